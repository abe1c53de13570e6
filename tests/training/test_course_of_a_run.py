"""Learning rates, averaged weights, runs that are made longer, and trackers."""

import gc
import io
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_recipe import LLAMA
from test_train import break_off, interrupt_at
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import integration_utils

from chiaroscuro import ChiarForCausalLM, UserError
from chiaroscuro.data import Corpus
from chiaroscuro.data.tasks import TASKS, TextTask, register_task
from chiaroscuro.studies.evaluation import evaluate
from chiaroscuro.studies.workspace import Workspace
from chiaroscuro.training import Recipe, TrainingInterrupted, TrainResult, read_records, train
from chiaroscuro.training.averaging import FILE, Averages

Go = Callable[..., tuple[TrainResult, str]]


def rates(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["learning_rate"] for record in records if record["kind"] == "train"}


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.model / "model.safetensors")


def test_the_learning_rate_stays_or_falls_at_the_end(run: Go, tmp_path: Path) -> None:
    every: dict[str, Any] = {"trainer__log_every": 1, "trainer__learning_rate": 1e-3}
    run(**every, trainer__learning_rate_schedule="constant")
    assert [rates(tmp_path / "run")[step] for step in (1, 2, 3, 7, 12)] == [0, 0.5e-3, 1e-3, 1e-3, 1e-3]
    other = tmp_path / "wsd"
    run(
        **every,
        trainer__learning_rate_schedule="wsd",
        trainer__decay_steps=4,
        trainer__min_learning_rate=1e-4,
        trainer__output_dir=str(other),
    )
    found = rates(other)
    assert found[3] == found[9] == 1e-3
    # After step n the rate is that of n of the 4; the twelfth step is the fourth of them, and has that of three.
    assert [found[step] for step in (10, 11, 12)] == pytest.approx([7.75e-4, 5.5e-4, 3.25e-4])


def test_decay_steps_are_a_fifth_of_the_run_or_as_said(content: dict[str, Any]) -> None:
    content["trainer"] |= {"learning_rate_schedule": "wsd", "steps": 100}
    assert Recipe.from_dict(content).decay_steps(100) == 20
    content["trainer"]["decay_steps"] = 0.5
    assert Recipe.from_dict(content).decay_steps(100) == 50


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"learning_rate_schedule": "linear"}, "trainer.learning_rate_schedule='linear'"),
        ({"decay_steps": 3}, "decay_steps=3 with learning_rate_schedule='cosine'"),
        (
            {"learning_rate_schedule": "wsd", "decay_steps": 11},
            "warmup_steps=2 and decay_steps=11 are more than the 12",
        ),
        ({"learning_rate_schedule": "wsd", "decay_steps": 1.5}, "needs a number of steps"),
        ({"ema": 1.0}, "trainer.ema=1.0"),
        ({"ema": True}, "trainer.ema=True"),
        ({"report_to": "wandb"}, "trainer.report_to='wandb'"),
        ({"report_to": ["wandbb"]}, "trainer.report_to='wandbb': no such tracker; did you mean 'wandb'"),
        ({"report_to": ["comet_ml"]}, "trainer.report_to='comet_ml'"),
    ],
)
def test_a_mistake_is_one_line(content: dict[str, Any], fields: dict[str, Any], complaint: str) -> None:
    content["trainer"] |= fields
    with pytest.raises(UserError) as refused:
        train(Recipe.from_dict(content), console=Console(quiet=True))
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_a_finished_run_is_made_longer_as_if_it_had_been_asked_for(run: Go, tmp_path: Path) -> None:
    constant = {"trainer__learning_rate_schedule": "constant"}
    whole, _ = run(**constant, trainer__steps=20, trainer__output_dir=str(tmp_path / "whole"))
    run(**constant)
    longer, said = run(resume=True, **constant, trainer__steps=20)
    assert "resuming after step 12 of 20" in said and longer.steps == 20
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(longer).items())
    with pytest.raises(UserError, match="has taken more steps than the 12 of the recipe"):
        run(resume=True, **constant)


@pytest.mark.parametrize(
    "changes", [{"calibration": {"method": "paper"}}, {"data__streaming": True, "fit": {"after": 4}}]
)
def test_a_run_whose_other_parts_hang_on_its_length_is_not_made_longer(
    content: dict[str, Any], changes: dict[str, Any]
) -> None:
    content["trainer"] |= {"learning_rate_schedule": "constant", "steps": 12}
    if "fit" in changes:
        content["model"] |= {"router": "fitted"}
        content["schedule"] = {"attention_share": {"from": 1.0, "after": 4, "steps": 4}}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        content[section] = content.get(section, {}) | {field: value} if field else value
    begun = Recipe.from_dict(content)
    content["trainer"] = content["trainer"] | {"steps": 20}
    with pytest.raises(UserError, match=r"steps was 12 when this run began and is 20 now"):
        Recipe.from_dict(content).refuse_to_resume(begun)


def test_with_a_cosine_another_length_is_another_run(run: Go) -> None:
    run()
    with pytest.raises(UserError, match="steps was 12 when this run began and is 20 now"):
        run(resume=True, trainer__steps=20)


def test_a_part_of_the_run_would_move(run: Go, content: dict[str, Any]) -> None:
    moving = {
        "trainer__learning_rate_schedule": "constant",
        "schedule": {"attention_share": {"from": 1.0, "steps": 0.5}},
    }
    run(**moving)
    with pytest.raises(UserError, match="steps was 12"):
        run(resume=True, trainer__steps=20, **moving)


def test_averages_are_those_of_the_formula() -> None:
    model = torch.nn.Linear(2, 1)
    averages, expected = Averages(model, 0.5), model.weight.detach().clone()
    state: Any = type("State", (), {"global_step": 0})()
    for step in range(1, 8):
        with torch.no_grad():
            model.weight += step
        state.global_step = step
        averages.on_step_end(None, state, None)  # type: ignore[arg-type]
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(averages.values["weight"], expected)
    now = model.weight.detach().clone()
    with averages.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, now)


def test_the_model_and_its_validation_have_averaged_weights_and_a_resume_has_the_same(
    run: Go, tmp_path: Path, whole: TrainResult
) -> None:
    averaged, _ = run(trainer__ema=0.9, trainer__output_dir=str(tmp_path / "ema"))
    newest = tmp_path / "ema/checkpoint-12"
    # The steps were those of a run without: the last weights are in the checkpoint.
    assert all(
        torch.equal(tensor, weights(whole)[name]) for name, tensor in load_file(newest / "model.safetensors").items()
    )
    saved = load_file(newest / FILE)
    for name, value in weights(averaged).items():
        if name in saved:
            assert torch.equal(value, saved[name])
    assert not torch.equal(saved["model.embed_tokens.weight"], weights(whole)["model.embed_tokens.weight"])
    assert averaged.validation_loss != whole.validation_loss
    model = ChiarForCausalLM.from_pretrained(averaged.model).eval()
    assert math.isfinite(model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.item())
    # A run that was interrupted: what the newest checkpoint holds is forgotten, and it goes on from the one before.
    broken = tmp_path / "ema"
    (newest / FILE).write_bytes(b"cut")
    (broken / "model").rename(tmp_path / "was")
    again, said = run(resume=True, trainer__ema=0.9, trainer__output_dir=str(broken))
    assert "resuming after step 8 of 12" in said
    assert all(torch.equal(t, load_file(tmp_path / "was/model.safetensors")[n]) for n, t in weights(again).items())


class Recording(TrainerCallback):
    """A tracker that keeps what it is told."""

    told: list[dict[str, Any]]

    def __init__(self) -> None:
        type(self).told = []
        self.begun = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = True

    def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        self.told.append({"step": state.global_step, "run": args.run_name})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert self.begun
        self.told.append({"step": state.global_step, "run": args.run_name, **logs})


def test_a_tracker_is_told_numbers_under_flat_names(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recording", Recording)
    run(trainer__report_to=["recording", "tensorboard"])
    assert [one["step"] for one in Recording.told if "loss" in one] == [1, 2, 4, 6, 8, 10, 12]
    assert [one["step"] for one in Recording.told if "eval_perplexity" in one] == [6, 12]
    assert [one["step"] for one in Recording.told if "eval_layer_02/share_attention" in one] == [6, 12]
    assert all(isinstance(value, int | float | str) for one in Recording.told for value in one.values())
    assert [one["step"] for one in Recording.told if len(one) == 2] == list(range(1, 13))
    assert {one["run"] for one in Recording.told} == {"run"}


class Broken(TrainerCallback):
    """A tracker whose library is not there, or that does not begin."""

    installed = False

    def __init__(self) -> None:
        if not self.installed:
            raise ValueError("it is not installed\nin two lines")
        self.handle = 1

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no answer")

    def __del__(self) -> None:
        assert self.handle


def test_a_tracker_that_fails_is_one_line(run: Go, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    unraisable: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: unraisable.append(str(error.exc_value)))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "broken", Broken)
    with pytest.raises(UserError, match=r"^trainer.report_to='broken': it is not installed \(pip install broken, or"):
        run(trainer__report_to="broken")
    gc.collect()
    assert not unraisable  # Python prints what a deletion raises
    monkeypatch.setattr(Broken, "installed", True)
    with pytest.raises(UserError, match=r"^trainer.report_to='broken': no answer \(leave it out, and resume"):
        run(trainer__report_to="broken")
    assert "Traceback" not in capfd.readouterr().err


def test_a_text_that_is_added_to_a_finished_run_is_measured(
    run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "validation.txt").write_text("a wall of light stays dark until the sun has gone\n" * 40)
    run()
    result, said = run(resume=True, trainer__validation_texts={"walls": str(other)})
    assert "walls: loss" in said
    records = read_records(tmp_path / "run/metrics.jsonl")
    validations = [record for record in records if record["kind"] == "validation"]
    assert [record["step"] for record in validations] == [6, 12] and "walls" in validations[-1]["tasks"]
    assert validations[-1]["loss"] == result.validation_loss
    _, said = run(resume=True, trainer__validation_texts={"walls": str(other)})
    assert "walls: loss" not in said
    # Of a run that stands where no validation is due any more, the record stays.
    broken = {"trainer__output_dir": str(tmp_path / "broken"), "trainer__evaluate_every": 4, "trainer__save_every": 4}
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10, break_off)
        with pytest.raises(TrainingInterrupted):
            run(**broken)
    run(resume=True, **broken | {"trainer__evaluate_every": 6}, trainer__validation_texts={"walls": str(other)})
    records = read_records(tmp_path / "broken/metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "validation"] == [4, 8, 12]


def test_a_tracker_may_be_named_when_the_run_goes_on(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recording", Recording)
    run()
    printed = io.StringIO()
    run(resume=True, console=Console(file=printed), trainer__report_to="recording")


def test_other_texts_are_validated_on_too(run: Go, tmp_path: Path, whole: TrainResult) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "validation.txt").write_text("a wall of light stays dark until the sun has gone\n" * 40)
    result, said = run(trainer__validation_texts={"walls": str(other)}, trainer__validation_tokens=64)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(result).items())
    records = read_records(tmp_path / "run/metrics.jsonl")
    seen = [record["tasks"]["walls"] for record in records if record["kind"] == "validation"]
    assert len(seen) == 2 and all(one["perplexity"] == pytest.approx(math.exp(one["loss"])) for one in seen)
    assert "walls: loss" in said
    with pytest.raises(UserError, match=r"trainer.validation_texts.walls: .*no such folder"):
        run(trainer__validation_texts={"walls": str(tmp_path / "nothing")}, trainer__output_dir=str(tmp_path / "x"))


@pytest.mark.parametrize("how", [{"documents": True}, {"column": "body"}])
def test_another_text_is_read_as_the_text_itself(run: Go, corpus: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    source = corpus
    if "column" in how:
        source = tmp_path / "tables"
        source.mkdir()
        for split in ("train", "validation"):
            lines = (corpus / f"{split}.txt").read_text().splitlines()
            datasets.Dataset.from_dict({"body": lines}).to_parquet(source / f"{split}.parquet")
    options = {f"data__{name}": value for name, value in how.items()}
    result, _ = run(data__source=str(source), trainer__validation_texts={"same": str(source)}, **options)
    last = [record for record in read_records(result.folder / "metrics.jsonl") if record["kind"] == "validation"][-1]
    assert last["tasks"]["same"]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    workspace = Workspace(str(result.folder))
    alone, named = (evaluate(workspace, source=given) for given in (None, str(source)))
    assert named["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert evaluate(workspace, source=str(corpus))["loss"] > 0  # text files, whose column is the usual one


def test_averages_of_coarse_weights_move() -> None:
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    averages = Averages(model, 0.999)
    state, arguments, control = TrainerState(), None, TrainerControl()
    for step in range(1, 3001):
        with torch.no_grad():
            model.weight.fill_(1 + step / 3000)
        state.global_step = step
        averages.on_step_end(arguments, state, control)  # type: ignore[arg-type]
    with averages.in_place():
        assert 1.85 < float(model.weight.detach()) < 1.95 and model.weight.dtype == torch.bfloat16
    assert float(model.weight.detach()) == 2


def test_other_texts_are_learned_from_and_the_run_resumes(run: Go, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.txt").write_text("a wall of light stays dark until the sun has gone\n" * 9)
    mixed: dict[str, Any] = {"trainer__training_texts": {str(other): 0.5}}
    result, said = run(**mixed)
    assert f" and {other} (" in said
    learned = weights(result)
    for later in ("checkpoint-12", "model"):
        shutil.rmtree(result.folder / later)
    resumed, said = run(**mixed, resume=True)
    assert "resuming after step 8 of 12" in said
    assert all(torch.equal(tensor, learned[name]) for name, tensor in weights(resumed).items())
    with pytest.raises(UserError, match=r"trainer.training_texts.*: .*no such folder"):
        run(trainer__training_texts={str(tmp_path / "x"): 0.5}, trainer__output_dir=str(tmp_path / "y"))


@dataclass(frozen=True)
class Lines(TextTask):
    """A text without a source."""

    def load(self, cache_dir: Path) -> Corpus:
        rows = datasets.Dataset.from_dict({"text": ["a wall of light stays dark until the sun has gone"] * 60})
        return self.data("lines", {"train": rows, "validation": rows}, "lines")


def test_a_text_beside_a_task_of_the_user_s_is_read_as_a_text(
    run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiaroscuro.data.tasks.registry.TASKS", dict(TASKS))
    register_task("lines", Lines)
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.txt").write_text("another text, of another kind\n" * 90)
    _, said = run(data={"task": "lines", "sequence_length": 32}, trainer__training_texts={str(other): 0.3})
    assert "on lines (" in said
    assert f" and {other} (" in said


def test_a_llama_learns_the_token_that_ends_documents(run: Go) -> None:
    """It pads too, and a Llama made with a token that pads would hold its embedding at 0."""
    still: dict[str, Any] = {"trainer__learning_rate": 1e-12, "trainer__min_learning_rate": 0.0}
    result, _ = run(model={**LLAMA, "hidden_size": 32, "num_attention_heads": 2}, trainer__steps=3, **still)
    model = LlamaForCausalLM.from_pretrained(result.model)
    ends = int(model.config.eos_token_id)
    assert model.config.pad_token_id == ends
    assert float(model.get_input_embeddings().weight[ends].detach().norm()) > 0.01
