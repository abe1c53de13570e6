"""One job of several processes (gloo): one folder, one lock, and a resumed run that ends with the same bits."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chiaroscuro.errors import UserError
from chiaroscuro.files import alone_in
from chiaroscuro.model.loading import load_checkpoint
from chiaroscuro.training import Recipe, read_records, train
from several_processes import NO_DROPOUT, accumulating, losses, run_job, tensors


@pytest.mark.slow
def test_a_job_of_two_processes_is_one_run(content: dict[str, Any], tmp_path: Path) -> None:
    content["trainer"] |= {"batch_size": 2, "log_every": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    whole, broken = (f"trainer.output_dir={tmp_path / name}" for name in ("whole", "broken"))

    done = run_job(tmp_path, whole, command=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 12/12  loss") == 1  # the main process alone speaks
    records = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert [record["tokens"] for record in records if record["kind"] == "train"] == [64, 192, 384, 576, 768]

    assert run_job(tmp_path, broken, killed_at=7).returncode != 0
    assert not (tmp_path / "broken" / "model").exists()
    resumed = run_job(tmp_path, broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 4 of 12" in resumed.stdout
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    timed = {"seconds", "tokens_per_second"}
    again = read_records(tmp_path / "broken" / "metrics.jsonl")
    assert [{n: v for n, v in r.items() if n not in timed} for r in records] == [
        {n: v for n, v in r.items() if n not in timed} for r in again
    ]

    # A signal that reaches one of them ends both after the same step, saved.
    told = f"trainer.output_dir={tmp_path / 'told'}"
    stopped = run_job(tmp_path, told, killed_at=6, killed_by="SIGTERM", killed=1)
    assert "stopped after step 6 of 12; --resume goes on from" in stopped.stderr and "Traceback" not in stopped.stdout
    assert [path.name for path in sorted((tmp_path / "told").glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]
    assert run_job(tmp_path, told, "--resume").returncode == 0
    assert all(torch.equal(tensor, one[name]) for name, tensor in tensors(tmp_path / "told").items())

    with alone_in(tmp_path / "held"):
        refused = run_job(tmp_path, f"trainer.output_dir={tmp_path / 'held'}")
    assert refused.returncode != 0
    assert refused.stderr.count("held is in use: a run or a sweep is at work there") == 2  # both learn it, none waits
    assert not (tmp_path / "held").exists()


@pytest.mark.slow
def test_two_processes_distil_as_one_and_draw_one_share(content: dict[str, Any], tmp_path: Path) -> None:
    """Two processes of one batch each are one process that accumulates two."""
    content["model"] |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "attention_share": [0.1, 1.0]}
    content |= {"distill": {"weight": 5.0}}
    content["trainer"] |= {"batch_size": 2, "log_every": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    two, one = (tmp_path / name for name in ("two", "one"))
    done = run_job(tmp_path, f"trainer.output_dir={two}")
    assert done.returncode == 0, done.stderr
    train(Recipe.load(tmp_path / "recipe.yaml", [f"trainer.output_dir={one}", "trainer.gradient_accumulation=2"]))
    records = [[r for r in read_records(f / "metrics.jsonl") if r["kind"] == "train"] for f in (two, one)]
    for theirs, ours in zip(*records, strict=True):
        assert theirs["attention_share"] == ours["attention_share"]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["kl"] == pytest.approx(ours["kl"], rel=0.02, abs=1e-7)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (two, one))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-3)


# ---- as one process, sharded or not --------------------------------------------------------------------------


@pytest.fixture
def recipe(content: dict[str, Any], tmp_path: Path) -> Path:
    content["model"] |= NO_DROPOUT | {"operators": [["dct", "attention"]] * 3}
    content["trainer"] |= {"batch_size": 1, "log_every": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def train_in_float64(recipe: Path, folder: Path) -> None:
    """In this process, which accumulates the batches of all."""
    torch.set_default_dtype(torch.float64)
    try:
        train(Recipe.load(recipe, [f"trainer.output_dir={folder}", accumulating(1)]))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sharded"), [(2, False), (4, True)])
def test_several_processes_learn_as_one(recipe: Path, tmp_path: Path, processes: int, sharded: bool) -> None:
    """In float64; in float32 a last bit can send a token elsewhere."""
    several, one = tmp_path / "several", tmp_path / "one"
    place = [f"trainer.output_dir={several}", f"trainer.fsdp={str(sharded).lower()}"]
    done = run_job(tmp_path, *place, accumulating(processes), processes=processes, dtype="float64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1  # the main process alone speaks
    train_in_float64(recipe, one)
    assert losses(several) == pytest.approx(losses(one), rel=1e-9)
    ours, theirs = tensors(one), tensors(several)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # Quantile tables are float32, and pooled in another order: between two of their points they interpolate.
        close = {"rtol": 1e-6, "atol": 1e-9} if tensor.dtype == torch.float64 else {"rtol": 0, "atol": 2e-4}
        torch.testing.assert_close(theirs[name], tensor, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_a_llama_whose_embeddings_are_tied_learns_sharded(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    recipe.write_text(yaml.safe_dump(content | {"model": {"architecture": "llama"} | shape}))
    several, one = tmp_path / "several", tmp_path / "one"
    place = [f"trainer.output_dir={several}", "trainer.fsdp=true"]
    done = run_job(tmp_path, *place, accumulating(2), dtype="float64")
    assert done.returncode == 0, done.stderr
    train_in_float64(recipe, one)
    assert losses(several) == pytest.approx(losses(one), rel=1e-9)
    for name, tensor in tensors(one).items():
        torch.testing.assert_close(tensors(several)[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_sharded_run_is_resumed_bit_for_bit_and_by_another_number_of_processes(recipe: Path, tmp_path: Path) -> None:
    whole, broken, by_one, by_four = (tmp_path / name for name in ("whole", "broken", "by-one", "by-four"))
    done = run_job(tmp_path, f"trainer.output_dir={whole}", "trainer.fsdp=true", accumulating(2), command=True)
    assert done.returncode == 0, done.stderr
    begun = time.monotonic()
    killed = run_job(tmp_path, f"trainer.output_dir={broken}", "trainer.fsdp=true", accumulating(2), killed_at=7)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert time.monotonic() - begun < 60  # the other process does not wait for it
    for copy in (by_one, by_four):
        shutil.copytree(broken, copy)

    # Its checkpoint is one of those that every command takes, and holds no pickle of weights.
    saved = broken / "checkpoint-4"
    assert sorted(path.name for path in saved.glob("*.safetensors")) == [
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    ]
    assert {path.name for path in saved.rglob("*.p*t*")} == {"scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"}
    assert load_checkpoint(str(saved)).config.num_hidden_layers == 3

    resumed = run_job(tmp_path, f"trainer.output_dir={broken}", "trainer.fsdp=true", accumulating(2), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 4 of 12" in resumed.stdout
    ours = tensors(whole)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in tensors(broken).items())

    place = [f"trainer.output_dir={by_one}", "trainer.fsdp=true"]
    with pytest.raises(UserError, match=r"4 sequences .* would have 2 on 1; set trainer.gradient_accumulation=4"):
        train(Recipe.load(recipe, [*place, accumulating(2)]), resume=True)
    train(Recipe.load(recipe, [*place, accumulating(1)]), resume=True)
    place = [f"trainer.output_dir={by_four}", "trainer.fsdp=true", accumulating(4)]
    resumed = run_job(tmp_path, *place, "--resume", processes=4)
    assert resumed.returncode == 0, resumed.stderr
    assert "2 processes began: steps have the same rows" in resumed.stdout
    for run in (by_one, by_four):
        assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
        for name, tensor in tensors(run).items():
            torch.testing.assert_close(tensor, ours[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_bf16_checkpointing_accumulation_and_compile_on_two_processes(
    recipe: Path, tmp_path: Path, sharded: bool
) -> None:
    layers = ["model.num_hidden_layers=1", "model.operators=[[dct, attention]]"]  # each compiles for itself
    how = ["precision=bf16", "gradient_checkpointing=true", "compile=true", f"fsdp={str(sharded).lower()}"]
    place = f"output_dir={tmp_path / 'run'}"
    done = run_job(tmp_path, accumulating(2), *layers, *(f"trainer.{each}" for each in [*how, place]))
    assert done.returncode == 0, done.stderr
    first, *_, last = losses(tmp_path / "run")
    assert last < first - 0.1


def test_what_needs_whole_weights_is_refused_in_shards(content: dict[str, Any]) -> None:
    content["trainer"] |= {"fsdp": True, "ema": 0.9}
    with pytest.raises(UserError, match=r"trainer.fsdp=true with trainer.ema, which needs whole weights; remove one"):
        Recipe.from_dict(content)
