"""`chiaroscuro heal`: a retrofitted model that learns from its full-attention self."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from byte_tokenizer import byte_tokenizer
from chiaroscuro import fit, retrofit
from chiaroscuro.data.needles import Haystack
from chiaroscuro.retrofitting.whole import without_routing
from chiaroscuro.training import Recipe
from chiaroscuro.training.adapters import add_adapters
from chiaroscuro.training.distillation import kl_divergence
from chiaroscuro.training.trainer import RunTrainer
from decoders import build
from small_runs import WORDS

Run = Callable[..., tuple[int, str, str]]
LENGTH = 600


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A retrofitted decoder, and a text."""
    folder = tmp_path_factory.mktemp("heal")
    (folder / "text").mkdir()
    draw = random.Random(0)
    for split, lines in (("train", 120), ("validation", 40)):
        text = "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(lines))
        (folder / "text" / f"{split}.txt").write_text(text + "\n")
    tokenizer = byte_tokenizer()
    model = build(
        vocab_size=len(tokenizer), max_position_embeddings=1024, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    retrofit(model, window=16, sinks=1, kv_share=0.25)
    text = torch.tensor(tokenizer((folder / "text/train.txt").read_text())["input_ids"])
    fit(model, Haystack(tokenizer, text).mixture(8, LENGTH), spread=False)
    model.save_pretrained(folder / "routed")
    tokenizer.save_pretrained(folder / "routed")
    return folder / "routed", folder / "text"


def recipe(places: tuple[Path, Path], folder: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "model": {"architecture": "retrofit", "checkpoint": str(places[0]), "lora": 4},
        "data": {"source": str(places[1]), "sequence_length": LENGTH},
        "schedule": {"kv_share": {"from": 1.0, "steps": 0.33}},
        "trainer": {
            "output_dir": str(folder / "run"),
            "steps": 6,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "log_every": 2,
            "save_every": 3,
            "validation_tokens": 1200,
        },
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            content.setdefault(section, {})[field] = value
        elif value is None:
            content.pop(section, None)
        else:
            content[section] = value
    file = folder / "heal.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_coarse_weights_are_trained_as_fine_ones(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(places[0], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "coarse")
    byte_tokenizer().save_pretrained(tmp_path / "coarse")
    file = recipe((tmp_path / "coarse", places[1]), tmp_path, model__lora=None, trainer__learning_rate=1e-5)
    code, _, err = run("heal", file, "trainer.steps=2", "trainer.save_every=2")
    assert code == 0, err
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    before, after = (one.model.layers[0].self_attn.q_proj.weight for one in (model, healed))
    assert after.dtype == torch.float32
    moved = (after - before.float()).abs()
    assert 0 < float(moved.max()) < 1e-4 and float((moved > 0).float().mean()) > 0.9


@torch.no_grad()
def divergence(model: Any, rows: list[torch.Tensor], teaching: Any) -> float:
    """KL(p of the teaching model's full-attention self ‖ q)."""
    total = 0.0
    for row in rows:
        student = model.base_model(row, use_cache=False).last_hidden_state[0]
        with without_routing(teaching):
            teacher = teaching.base_model(row, use_cache=False).last_hidden_state[0]
        total += float(kl_divergence(student, teacher, model.get_output_embeddings().weight)) / len(student)
    return total / len(rows)


@pytest.mark.parametrize("lora", [4, None])
def test_it_comes_closer_to_its_full_attention_self(
    run: Run, places: tuple[Path, Path], tmp_path: Path, lora: int | None
) -> None:
    code, _, err = run("heal", recipe(places, tmp_path, model__lora=lora))
    assert code == 0, err
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (places[0], tmp_path / "run/model"))
    assert type(after) is type(before) and after.config.chiaroscuro == before.config.chiaroscuro
    assert before.state_dict().keys() == after.state_dict().keys()
    moved = {name for name, w in before.state_dict().items() if not torch.equal(w, after.state_dict()[name])}
    moved -= {name for name in moved if name.endswith("calibration.values")}  # a dial's, which a table rounds
    assert not any(".chiaroscuro." in name for name in moved) and any("q_proj" in name for name in moved)
    assert lora is None or all("_proj" in name and "self_attn" in name for name in moved)
    records = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"kl"' in line]
    assert records
    tokenizer = byte_tokenizer()
    text = torch.tensor(tokenizer((places[1] / "validation.txt").read_text())["input_ids"])
    rows = Haystack(tokenizer, text).mixture(3, LENGTH, seed=9)
    teacher = after if lora is None else before  # LoRA's teacher stays as it was
    assert divergence(after, rows, teacher) < divergence(before, rows, before)
    if lora is None:  # after its last step, the run is taken up as it was
        saved_config = (tmp_path / "run/model/config.json").read_text()
        shutil.rmtree(tmp_path / "run/model")
        code, _, err = run("heal", recipe(places, tmp_path, model__lora=lora), "--resume")
        assert code == 0 and (tmp_path / "run/model/config.json").read_text() == saved_config, err
    # What it began with need not be there any more.
    saved = (tmp_path / "run/recipe.yaml").read_text()
    assert str(places[0]) in saved
    (tmp_path / "run/recipe.yaml").write_text(saved.replace(str(places[0]), "/nowhere/at/all"))
    code, out, err = run("evaluate", tmp_path / "run", "--length", 64, "--tokens", 64, "--json")
    assert code == 0 and json.loads(out)["perplexity"] > 1, err


@torch.no_grad()
def test_the_teacher_of_adapters_is_the_model_as_it_was(places: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(places[0])
    ids = torch.randint(3, 200, (1, 64))
    with without_routing(model):
        before = model.base_model(ids, use_cache=False).last_hidden_state
    add_adapters(model, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(autocast=contextlib.nullcontext))
    teacher = RunTrainer._with_full_attention(cast(Any, trainer), {"input_ids": ids})
    torch.testing.assert_close(teacher, before)
    with without_routing(model):  # what was learned is there again, and goes on learning
        assert not torch.allclose(model.base_model(ids, use_cache=False).last_hidden_state, before, atol=1e-3)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


def test_a_run_that_was_interrupted_ends_with_the_same_weights(
    run: Run, places: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    assert run("heal", recipe(places, whole))[0] == 0
    file = recipe(places, halves)
    assert run("heal", file)[0] == 0
    import shutil

    shutil.rmtree(halves / "run/model")
    shutil.rmtree(halves / "run/checkpoint-6")
    code, _, err = run("heal", file, "--resume")
    assert code == 0, err
    first, second = (AutoModelForCausalLM.from_pretrained(folder / "run/model") for folder in (whole, halves))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    (halves / "run/model/model.safetensors").unlink()
    code, out, err = run("heal", file, "--resume")  # of a finished run: the result again, and the model
    assert code == 0 and "validation loss" in out, err
    again = AutoModelForCausalLM.from_pretrained(halves / "run/model")
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model__checkpoint": "/nowhere/at/all"}, "model.checkpoint: no such checkpoint"),
        ({"model__lora": 0}, "model.lora=0"),
        ({"model__lora": 33}, "model.lora=33 is more than the model's width, 32: give a smaller rank"),
        ({"model__rank": 8}, "rank"),
        ({"model__loraa": 8}, "did you mean 'lora'?"),
        ({"trainer__fsdp": True}, "trainer.fsdp=true with model.architecture: retrofit"),
        ({"schedule": {"kv_share": [0.6, 0.9]}}, "does not hold the checkpoint's kv_share="),
        ({"fit": {"tokens": 5}}, "fit with model.architecture: retrofit"),
        ({"calibration": {"method": "running"}}, "calibration with model.architecture: retrofit"),
        ({"trainer__init_from": "x"}, "trainer.init_from with model.architecture: retrofit"),
        ({"data__task": "mqar", "data__source": None}, "mqar"),
        ({"data__sequence_length": 4096}, "longer than the model's"),
        ({"data__sequence_length": 100}, "too few for"),
        ({"schedule": {"kv_share": {"from": 1.0, "to": 0.5, "steps": 2}}}, "ends where it was fitted"),
        ({"mixture": {"tasks": {"a": {"task": "imdb"}}}}, "mixture with model.architecture: retrofit"),
        ({"tokenizer": "bpe:300"}, "tokenizer is another one"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, places: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    code, out, err = run("heal", recipe(places, tmp_path, **changes))
    assert code == 2 and complaint in err and not out, err
    assert err.strip().count("\n") <= 1
    assert not (tmp_path / "run/model").exists()


def test_the_recipe_for_smollm2_is_valid(places: tuple[Path, Path]) -> None:
    file = Path(__file__).parents[2] / "recipes/heal/smollm2.yaml"
    read = Recipe.load(file, [f"model.checkpoint={places[0]}"])
    assert read.data.options["source"] == "python-docs" and read.data.task == "retrieval" and read.distill is not None
    assert read.courses(200)["kv_share"].after(66) == 0.25 and read.courses(200)["kv_share"].during(1) == 1.0
    short = "data.sequence_length=1024"  # this model reads no more
    both = Recipe.load(file.with_name("smollm2-both.yaml"), [f"model.checkpoint={places[0]}", short])
    assert both.courses(12).keys() == {"attention_share", "kv_share"} and both.data.task == "retrieval"


@pytest.mark.parametrize(
    ("changes", "distill"),
    [
        ([], {"cross_entropy": 0.0, "by_row": True, "weight": 1.0}),
        (["distill.by_row=false"], {"cross_entropy": 0.0, "by_row": False, "weight": 1.0}),
        (["distill.weight=0.5"], {"cross_entropy": 0.0, "by_row": True, "weight": 0.5}),
        (["distill.weight=0.5", "model.lora=null"], {"cross_entropy": 1.0, "by_row": True, "weight": 0.5}),
    ],
)
def test_a_field_of_the_distillation_leaves_the_others_as_healing_has_them(
    places: tuple[Path, Path], tmp_path: Path, changes: list[str], distill: dict[str, Any]
) -> None:
    read = Recipe.load(recipe(places, tmp_path), changes).distill
    assert read is not None and {name: getattr(read, name) for name in distill} == distill


def test_other_mistakes(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    code, _, err = run("heal", recipe((tmp_path / "plain", places[1]), tmp_path))
    assert code == 2 and "was not retrofitted" in err
    file = tmp_path / "other.yaml"
    file.write_text("model: {preset: small}\ntrainer: {output_dir: x, steps: 1}\n")
    code, _, err = run("heal", file)
    assert code == 2 and "trains another model" in err


@pytest.mark.parametrize("null", ["model.lora=null", "distill=null"])
def test_a_recipe_with_a_null_is_read_back_as_it_was(places: tuple[Path, Path], tmp_path: Path, null: str) -> None:
    given = Recipe.load(recipe(places, tmp_path), [null])
    (tmp_path / "again.yaml").write_text(given.to_yaml())
    again = Recipe.load(tmp_path / "again.yaml")
    assert again == given
    given.refuse_to_resume(again)
