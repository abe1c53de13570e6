"""Interrupted or not, a run ends with the same bits, and a failure costs nothing that was saved.

The oracles: the uninterrupted run for the resumed one, and a loss written out here for what is reported.
"""

import errno
import functools
import io
import itertools
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState, TrainingArguments

from chiaroscuro import ChiarConfig, ChiarForCausalLM
from chiaroscuro.data import TokenBlocks, load_corpus, load_tokenizer, tokenize_corpus
from chiaroscuro.errors import UserError
from chiaroscuro.model import MoveThresholds
from chiaroscuro.training import TrainingDiverged, TrainingInterrupted, TrainResult, read_records
from chiaroscuro.training.callbacks import Reporter
from chiaroscuro.training.checkpoints import Facts, seal
from chiaroscuro.training.trainer import RunTrainer

Go = Callable[..., Any]


def nll(model: Any, blocks: Dataset[Any], count: int) -> float:
    """Mean negative log-likelihood of every token that `count` blocks predict, in float64."""
    losses = []
    with torch.no_grad():
        for i in range(count):
            logits = model.eval()(blocks[i]["input_ids"][None]).logits[0].double()
            losses.append(-logits.log_softmax(-1).gather(1, blocks[i]["shift_labels"][:, None]))
    return torch.cat(losses).mean().item()


def blocks_of(content: dict[str, Any], split: str) -> tuple[TokenBlocks, float]:
    corpus = load_corpus(content["data"]["source"])
    file = tokenize_corpus(corpus, load_tokenizer(content["tokenizer"], corpus))[split]
    return TokenBlocks(file, content["data"]["sequence_length"]), file.count / file.bytes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Calls `act` in the middle of a step, between its backward and the optimizer."""
    original = RunTrainer._clip_grad_norm

    def clip(self: RunTrainer, model: torch.nn.Module) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            monkeypatch.setattr(RunTrainer, "_clip_grad_norm", original)
            act()
        return original(self, model)

    monkeypatch.setattr(RunTrainer, "_clip_grad_norm", clip)


def break_off() -> None:
    raise KeyboardInterrupt


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


LLAMA = {
    "architecture": "llama",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
# No dropout, and thresholds that don't move: the loss depends on weights and tokens alone.
FIXED = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "calibration": "fixed",
    "entropy_thresholds": [0.8, 0.8],
}


@pytest.mark.parametrize("model", [FIXED, LLAMA], ids=["chiar", "llama"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_the_losses_are_means_over_tokens(
    content: dict[str, Any], run: Go, model: dict[str, Any], batch: int, accumulation: int
) -> None:
    blocks, _ = blocks_of(content, "train")
    steps = len(blocks) // 4
    changes = {"steps": steps, "batch_size": batch, "gradient_accumulation": accumulation, "log_every": 1}
    # An epoch with a rate that moves nothing: the steps' losses average to the mean over the epoch's blocks.
    frozen = {"learning_rate": 1e-30, "min_learning_rate": 0.0, "weight_decay": 0.0}
    result, _ = run(model=model, trainer={**content["trainer"], **changes, **frozen})
    trained = AutoModelForCausalLM.from_pretrained(result.model)
    records = read_records(result.folder / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == steps
    assert np.mean(losses) == pytest.approx(nll(trained, blocks, steps * 4), rel=1e-5)

    validation, tokens_per_byte = blocks_of(content, "validation")
    assert len(validation) % 4 == 2  # by fours, the last batch is a small one
    expected = nll(trained, validation, len(validation))
    assert result.validation_loss == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) * tokens_per_byte, rel=1e-6)


def test_accumulation_is_one_large_batch(run: Go, content: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for batch in (4, 1):
        trainer = {
            **content["trainer"],
            "output_dir": str(tmp_path / f"by-{batch}"),
            "batch_size": batch,
            "gradient_accumulation": 4 // batch,
        }
        results.append(run(model=FIXED, trainer=trainer)[0])
    one, other = (weights(result.model) for result in results)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-4)


# An epoch has 6 steps: a resume after step 6 begins one, the others come in the midst of one.
@pytest.mark.parametrize(
    ("act", "step", "saved"), [(break_off, 7, 4), (ctrl_c, 7, 7), (ctrl_c, 6, 6), (break_off, 10, 8)]
)
def test_resumed_is_uninterrupted_bit_for_bit(
    run: Go,
    whole: TrainResult,
    content: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[], None],
    step: int,
    saved: int,
) -> None:
    assert len(blocks_of(content, "train")[0]) // 4 == 6
    interrupt_at(monkeypatch, step, act)
    with pytest.raises(TrainingInterrupted, match=f"--resume goes on from .*checkpoint-{saved}$"):
        run()
    resumed, printed = run(resume=True)
    assert f"resuming after step {saved} of 12" in printed
    assert_same_bits(whole.model, resumed.model)
    assert_same_bits(whole.folder / "checkpoint-12", resumed.folder / "checkpoint-12")
    assert resumed.validation_loss == whole.validation_loss
    steps = [(r["kind"], r["step"]) for r in read_records(resumed.folder / "metrics.jsonl")]
    assert len(set(steps)) == len(steps)
    assert set(steps) == {(r["kind"], r["step"]) for r in read_records(whole.folder / "metrics.jsonl")}


def test_resumed_amid_accumulation(run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"trainer__batch_size": 2, "trainer__gradient_accumulation": 2}
    accumulated, _ = run(trainer__output_dir=str(tmp_path / "whole"), **shape)
    interrupt_at(monkeypatch, 9, break_off)
    with pytest.raises(TrainingInterrupted):
        run(**shape)
    with pytest.raises(UserError, match=r"a step had 4 sequences .*; set trainer.gradient_accumulation=2 to resume"):
        run(resume=True, **shape | {"trainer__gradient_accumulation": 1})
    assert_same_bits(accumulated.model, run(resume=True, **shape)[0].model)


def test_resuming_passes_over_a_checkpoint_that_was_cut_short(
    run: Go, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 10, break_off)
    with pytest.raises(TrainingInterrupted):
        run()
    cut = tmp_path / "run" / "checkpoint-8" / "optimizer.pt"
    cut.write_bytes(cut.read_bytes()[:1000])
    killed = tmp_path / "run" / ".unfinished"  # as a killed run leaves it
    (killed / "checkpoint-12").mkdir(parents=True)
    (killed / "written-by-chiaroscuro").touch()
    time.sleep(1)  # TensorBoard orders its files by the second in their names
    resumed, printed = run(resume=True)
    shown = EventAccumulator(str(resumed.folder / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in shown] == [1, 2, 4, 6, 8, 10, 12]
    assert "passing over checkpoint-8, which is incomplete: optimizer.pt has 1,000 bytes of" in printed
    assert "resuming after step 4 of 12" in printed
    assert_same_bits(whole.model, resumed.model)
    assert not killed.exists()
    assert sorted(path.name for path in resumed.folder.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-8",
    ]


def test_with_every_checkpoint_broken_nothing_is_resumed(run: Go, tmp_path: Path) -> None:
    run()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        run(resume=True)


def test_a_finished_run_resumes_to_itself(run: Go) -> None:
    first, _ = run()
    before = weights(first.model)
    shutil.rmtree(first.model)  # as if the run had been killed just before this was written
    again, _ = run(resume=True)
    assert again == first
    assert all(torch.equal(tensor, weights(again.model)[name]) for name, tensor in before.items())


def test_looking_more_often_moves_no_weight(run: Go, whole: TrainResult) -> None:
    often = {"trainer__evaluate_every": 1, "trainer__log_every": 1, "trainer__save_every": 100}
    assert_same_bits(whole.model, run(**often)[0].model)


def test_gradient_checkpointing_moves_no_weight(run: Go, whole: TrainResult) -> None:
    checkpointed, _ = run(trainer__gradient_checkpointing=True)
    assert_same_bits(whole.model, checkpointed.model)


def test_thresholds_move_once_per_step_and_routing_is_seen_only_when_shown(
    run: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    looked: list[bool] = []
    step, forward = ChiarForCausalLM.step_calibration, ChiarForCausalLM.forward

    def counting_step(self: ChiarForCausalLM) -> None:
        moved.append(1)
        step(self)

    def counting_forward(self: ChiarForCausalLM, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            looked.append(kwargs.get("output_routing", False))
        return forward(self, *args, **kwargs)

    # The Trainer reads the signature of the forward, so the double must keep it.
    functools.update_wrapper(counting_forward, forward)
    monkeypatch.setattr(ChiarForCausalLM, "step_calibration", counting_step)
    monkeypatch.setattr(ChiarForCausalLM, "forward", counting_forward)
    result, _ = run(trainer__gradient_accumulation=2, trainer__batch_size=2, trainer__log_every=5)
    records = read_records(result.folder / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 5, 10, 12]
    assert result.tokens == 768
    assert len(moved) == 12
    assert [i // 2 + 1 for i, look in enumerate(looked) if look] == [1, 1, 5, 5, 10, 10, 12, 12]
    assert len(looked) == 24


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_a_run_that_diverges_stops_and_keeps_what_was_good(
    run: Go, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    original = RunTrainer.compute_loss

    def poisoned(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 7:
            parameter = next(self.model.parameters())
            if what == "loss":
                return loss * math.nan
            if what == "gradient":
                parameter.register_hook(lambda gradient: gradient * math.inf)
            else:
                self.optimizer.optimizer.register_step_post_hook(
                    lambda *_: parameter.data.view(-1)[3:4].fill_(math.nan)
                )
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", poisoned)
        with pytest.raises(TrainingDiverged) as caught:
            run()
    assert "\n" not in str(caught.value)
    assert f"the {'largest weight' if what == 'weight' else what} is" in str(caught.value)
    assert "checkpoint-4" in str(caught.value)
    folder = tmp_path / "run"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (folder / "model").exists()
    resumed, _ = run(resume=True)
    assert_same_bits(whole.model, resumed.model)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(
    run: Go,
    whole: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files_no_larger_than: Go,
    sharded: bool,
) -> None:
    run = functools.partial(run, trainer__fsdp=sharded)
    original = RunTrainer._save_checkpoint

    def save(self: RunTrainer, *args: Any) -> None:
        if self.state.global_step < 8:
            return original(self, *args)
        with files_no_larger_than(50_000):
            return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_save_checkpoint", save)
        with pytest.raises(UserError, match=r"cannot write .*checkpoint-8: .* Make room, then resume$"):
            run()
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-4"]
    assert not (tmp_path / "run" / ".unfinished").exists()
    resumed, _ = run(resume=True)
    assert_same_bits(whole.model, resumed.model)


def test_what_accelerate_is_told_elsewhere_changes_nothing(
    run: Go, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    result, _ = run()
    assert_same_bits(whole.model, result.model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"ACCELERATE_USE_FSDP is set, by accelerate launch .* set trainer.fsdp=true"):
        run(resume=True)


def test_a_disk_too_full_for_a_record(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("chiaroscuro.training.callbacks.append_record", full)
    with pytest.raises(UserError, match=r"cannot write .*run: No space left on device; what was saved"):
        run()


def test_a_disk_too_full_for_tensorboard(run: Go, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Its thread fails, the run says so in one line, and the file that can't be closed is no second failure."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = threading.excepthook
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.flush", full)
    with pytest.raises(UserError, match=r"cannot write .*run: No space left on device; what was saved"):
        run()
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is before


def test_a_folder_with_a_run_is_not_run_over(run: Go, tmp_path: Path) -> None:
    result, _ = run()
    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    with pytest.raises(UserError, match="holds a run with checkpoints; pass --resume"):
        run()
    with pytest.raises(UserError, match=r"trainer.learning_rate was 0.002 .* and is 0.001 now"):
        run(resume=True, trainer__learning_rate=1e-3)
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == before
    with pytest.raises(UserError, match="holds no run to resume"):
        run(resume=True, trainer__output_dir=str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    for impossible in ("a\0b", "x" * 300):
        with pytest.raises(UserError, match="no folder can have that name"):
            run(trainer__output_dir=str(tmp_path / impossible))
    with pytest.raises(UserError, match="is a file; name a folder"):
        run(trainer__output_dir=str(tmp_path / "file"))
    assert not (tmp_path / "nowhere").exists()


def test_a_finished_model_without_checkpoints_is_not_run_over(run: Go) -> None:
    result, _ = run()
    for checkpoint in result.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    with pytest.raises(UserError, match="holds a finished model; name another folder, or remove it"):
        run()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        run(resume=True)
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == before


def test_a_recipe_of_the_user_s_own_is_not_replaced(run: Go, content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("# what I thought\n" + yaml.safe_dump(content))
    with pytest.raises(UserError, match="that no run wrote and this one would replace; name another"):
        run()
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    assert (folder / "recipe.yaml").read_text().startswith("# what I thought")


def test_a_run_that_died_before_its_first_record_starts_again(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="died"):
        patched.setattr(RunTrainer, "train", raise_died)
        run()
    run()


def raise_died(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("died")


def test_another_text_is_not_resumed_on(
    run: Go, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    shutil.copytree(content["data"]["source"], text)
    interrupt_at(monkeypatch, 6, break_off)
    with pytest.raises(TrainingInterrupted):
        run(data__source=str(text))
    with (text / "train.txt").open("a") as file:
        file.write("and one line more\n")
    with pytest.raises(UserError, match="the text or its tokenizer changed since this run began"):
        run(resume=True, data__source=str(text))


@pytest.mark.parametrize(
    "place",
    ["checkpoint-2", "checkpoint-2/notes.txt", ".unfinished/notes.txt", ".unfinished", "metrics.jsonl", "model"],
)
def test_what_is_the_user_s_own_is_refused_and_stays(run: Go, tmp_path: Path, place: str) -> None:
    file = tmp_path / "run" / place
    file.parent.mkdir(parents=True)
    file.write_text("my notes\n")
    with pytest.raises(UserError) as caught:
        run()
    assert "\n" not in str(caught.value) and "name another" in str(caught.value)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "my notes\n"


@pytest.mark.parametrize("place", ["checkpoint-8", "checkpoint-8/notes.txt", "checkpoint-1/notes.txt"])
def test_what_appears_in_a_checkpoint_s_place_is_kept(
    run: Go, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    file = tmp_path / "run" / place

    def appear() -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("my notes")

    interrupt_at(monkeypatch, 6, appear)
    result, printed = run()
    moved = "checkpoint-8" in place
    kept = Path(str(file).replace("checkpoint-8", "checkpoint-8.aside-1"))
    assert kept.read_text() == "my notes"
    assert ("checkpoint-8 was not a complete checkpoint; it is checkpoint-8.aside-1 now" in printed) is moved
    assert_same_bits(whole.model, result.model)


def test_a_folder_is_one_run_s_at_a_time(run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def a_second_one() -> None:
        before = {path: path.read_bytes() for path in (tmp_path / "run").glob("[a-z]*.*")}
        for resume in (False, True):
            with pytest.raises(UserError, match=rf"run is in use: .*process {os.getpid()}; wait for it, or stop it"):
                run(resume=resume)
        assert {path: path.read_bytes() for path in (tmp_path / "run").glob("[a-z]*.*")} == before
        seen.append(True)

    interrupt_at(monkeypatch, 6, a_second_one)
    result, _ = run()
    assert seen
    assert not [path for path in result.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"facts": {}, "files": []}',
        b'{"facts": 3, "files": {"a": 3}}',
        b'{"facts": {"tokens": "x", "processes": "two", "seconds": 1}, "files": {}}',
        b"\xff",
    ],
)
def test_junk_in_a_manifest_is_passed_over(
    run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, junk: bytes
) -> None:
    interrupt_at(monkeypatch, 6, break_off)
    with pytest.raises(TrainingInterrupted):
        run()
    (tmp_path / "run" / "checkpoint-4" / "manifest.json").write_bytes(junk)
    with pytest.raises(UserError, match="holds no complete checkpoint; start anew"):
        run(resume=True)


def test_junk_in_the_records_stops_a_resume_in_one_line(
    run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 6, break_off)
    with pytest.raises(TrainingInterrupted):
        run()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"junk\njunk\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is not the record of a training run: line 1"):
        run(resume=True)


def test_a_checkpoint_that_does_not_fit_the_model(run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 6, break_off)
    with pytest.raises(TrainingInterrupted):
        run()
    folder = tmp_path / "run" / "checkpoint-4"
    tensors = weights(folder)
    name = next(iter(tensors))
    save_file({**tensors, "extra": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder, Facts.model_validate(json.loads((folder / "manifest.json").read_text())["facts"]))
    with pytest.raises(UserError, match=r"does not fit the model: extra is \(1,\) in it and missing in the model"):
        run(resume=True)
    save_file({**tensors, name: torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder, Facts.model_validate(json.loads((folder / "manifest.json").read_text())["facts"]))
    with pytest.raises(UserError, match=rf"does not fit the model: {name} is \(3,\) in it"):
        run(resume=True)


def test_an_older_checkpoint_is_resumed(
    run: Go, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 6, break_off)
    with pytest.raises(TrainingInterrupted):
        run()
    manifest = tmp_path / "run" / "checkpoint-4" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["facts"]["interval"], content["facts"]["sequences"]
    manifest.write_text(json.dumps(content))
    assert_same_bits(whole.model, run(resume=True)[0].model)


def test_interrupted_before_anything_was_saved(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 2, break_off)
    with pytest.raises(TrainingInterrupted, match="with nothing saved; start again without --resume"):
        run()
    with pytest.raises(UserError, match="holds no checkpoint yet; leave out --resume to start again"):
        run(resume=True)
    run()


# Validation


def stop_in_validation(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], step: int) -> None:
    """Calls `act` when the first batch of the validation after `step` has been read."""
    original = RunTrainer.evaluate

    def evaluate(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            monkeypatch.setattr(RunTrainer, "evaluate", original)
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "evaluate", evaluate)


def kinds(folder: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_records(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("act", "step", "saved"),
    [
        (break_off, 12, 12),  # a kill in the last validation: the checkpoint is there before it
        (ctrl_c, 12, 12),
        (ctrl_c, 6, 6),  # where no checkpoint was due one is made
        (break_off, 6, 4),
        (lambda: (ctrl_c(), ctrl_c()), 12, 12),  # twice: at once
    ],
)
def test_stopped_in_a_validation_nothing_is_lost(
    run: Go,
    whole: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[], None],
    step: int,
    saved: int,
) -> None:
    stop_in_validation(monkeypatch, act, step)
    with pytest.raises(TrainingInterrupted, match=rf"--resume goes on from .*checkpoint-{saved}$"):
        run()
    assert not (tmp_path / "run" / "model").exists()
    assert ("validation", step) not in kinds(tmp_path / "run")
    resumed, _ = run(resume=True)
    assert_same_bits(whole.model, resumed.model)
    assert kinds(resumed.folder) == kinds(whole.folder)
    assert resumed.validation_loss == whole.validation_loss


def test_validation_shows_how_far_it_is_and_that_it_can_be_capped(
    run: Go, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[int, int]] = []
    original = Reporter.validating

    @contextmanager
    def validating(self: Reporter, objective: Any) -> Any:
        with original(self, objective) as advance:
            task = self.progress.tasks[-1]
            assert task.description == "validation"
            yield lambda rows: (advance(rows), moved.append((int(task.completed), int(task.total or 0))))

    monkeypatch.setattr(Reporter, "validating", validating)
    blocks, _ = blocks_of(content, "validation")
    result, _ = run(trainer__evaluate_every=12)
    assert moved == [(min(done, len(blocks)), len(blocks)) for done in range(4, len(blocks) + 4, 4)]
    moved.clear()
    capped, _ = run(trainer__validation_tokens=5 * 16 - 3, trainer__output_dir=f"{result.folder}-capped")
    assert moved == [(4, 5), (5, 5)] * 2
    assert_same_bits(result.model, capped.model)
    model = AutoModelForCausalLM.from_pretrained(capped.model)
    assert capped.validation_loss == pytest.approx(nll(model, blocks, 5), rel=1e-6)
    assert capped.bits_per_byte / capped.validation_loss == pytest.approx(
        result.bits_per_byte / result.validation_loss, rel=1e-12
    )


# Ctrl-C, and what a resume records


def test_the_first_ctrl_c_says_at_once_what_happens(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO())
    seen = []

    def press() -> None:
        ctrl_c()
        seen.append(console.file.getvalue())

    interrupt_at(monkeypatch, 7, press)
    with pytest.raises(TrainingInterrupted):
        run(console=console)
    said = "stopping once the step in hand is finished and saved; Ctrl-C again stops at once"
    assert seen[0].splitlines()[-1] == said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_records_of_a_resumed_run_are_those_of_an_uninterrupted_one(
    run: Go, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stopped after step 7, in the midst of the interval from 5 to 8: its loss is the mean of all four.
    changes = {"trainer__log_every": 4, "model__router": "soft", "model__collapse_penalty": 0.5}
    one, _ = run(**changes, trainer__output_dir=f"{whole.folder}-again")
    interrupt_at(monkeypatch, 7, ctrl_c)
    with pytest.raises(TrainingInterrupted):
        run(**changes)
    other, _ = run(resume=True, **changes)
    first, second = (read_records(result.folder / "metrics.jsonl") for result in (one, other))
    timed = {"seconds", "tokens_per_second"}
    assert [{n: v for n, v in r.items() if n not in timed} for r in first] == [
        {n: v for n, v in r.items() if n not in timed} for r in second
    ]
    assert all(record["tokens_per_second"] > 0 for record in second if record["kind"] == "train")


def test_a_resumed_run_looks_and_saves_as_often_as_it_is_told_now(
    run: Go, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 7, break_off)
    with pytest.raises(TrainingInterrupted):
        run()
    often = {"trainer__log_every": 3, "trainer__save_every": 5, "trainer__evaluate_every": 9}
    resumed, _ = run(resume=True, **often, trainer__keep_checkpoints=9)
    assert kinds(resumed.folder)[3:] == [
        *(("train", step) for step in (6, 9)),
        ("validation", 9),
        *(("train", 12), ("validation", 12)),
    ]
    assert {path.name for path in resumed.folder.glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (4, 5, 10, 12)
    }
    assert_same_bits(whole.model, resumed.model)


def test_the_result_is_what_the_run_knows(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiaroscuro.training.run.read_records", only_before(read_records))
    result, _ = run()
    last = {record["kind"]: record for record in read_records(result.folder / "metrics.jsonl")}
    assert result.train_loss == last["train"]["loss"] and result.seconds == last["train"]["seconds"]
    assert result.validation_loss == last["validation"]["loss"]


def only_before(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Reads records of an earlier run, and refuses those that this one wrote."""

    def checked(path: Path) -> Any:
        assert not path.exists()
        return read(path)

    return checked


def test_a_disk_that_fills_up_at_the_tokenizer_is_one_line(
    run: Go, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library has it

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        with pytest.raises(UserError, match=r"cannot write .*checkpoint-4: No space left on device; what was saved"):
            run()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# Thresholds


def test_thresholds_move_through_a_wrapper(tmp_path: Path) -> None:
    step = TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl()
    model = ChiarForCausalLM(ChiarConfig.preset("small", vocab_size=50, hidden_size=32, num_hidden_layers=3))
    moved = []
    model.step_calibration = lambda: moved.append(True)

    class Wrapper(torch.nn.Module):  # as DistributedDataParallel and torch.compile's
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    for wrapped in (model, Wrapper(model), Wrapper(Wrapper(model))):
        MoveThresholds().on_optimizer_step(*step, model=wrapped)
    assert len(moved) == 3
    with pytest.raises(UserError, match="MoveThresholds: a Linear has no thresholds to move"):
        MoveThresholds().on_optimizer_step(*step, model=torch.nn.Linear(1, 1))
    everywhere = ChiarConfig(vocab_size=50, hidden_size=32, num_attention_heads=2, operators=[["attention"]] * 2)
    MoveThresholds().on_optimizer_step(*step, model=ChiarForCausalLM(everywhere))  # nothing to do, and no mistake


def test_too_little_text_for_a_step(run: Go) -> None:
    with pytest.raises(UserError, match="one step takes 4000 sequences and the train split has"):
        run(trainer__batch_size=4000)


def test_what_a_run_leaves(run: Go, content: dict[str, Any]) -> None:
    result, printed = run()
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == [1, 2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [6, 12]
    assert [record["tokens"] for record in train] == [64 * record["step"] for record in train]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(records))
    for record in records:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert 0 < record["gate"] < 1
        assert len(record["null_entropy"]) == 3
        assert [layer["operators"] for layer in record["layers"]] == [
            ["dct"],
            ["dct", "attention"],
            ["attention"],
        ]
        for layer in record["layers"]:
            assert sum(layer["share"]) == pytest.approx(1)
            assert layer["entropy"] == sorted(layer["entropy"])
            assert 0 < layer["entropy"][0] <= layer["entropy"][-1] <= 1
    assert printed.count("  loss ") == len(records)
    assert printed.count("the null, white noise: ") == 1
    assert all(len(line) <= 80 for line in printed.splitlines()[1:])
    assert (result.tokens, result.steps) == (768, 12)
    assert result.tokens_per_second == pytest.approx(768 / result.seconds)
    assert json.loads(json.dumps(result.as_dict()))["model"] == str(result.folder / "model")

    events = EventAccumulator(str(result.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 4, 6, 8, 10, 12]
    assert events.Scalars("validation/bits_per_byte")[-1].value == pytest.approx(result.bits_per_byte)
    share = events.Scalars("train_layer_02/share_attention")[-1].value
    assert share == pytest.approx(train[-1]["layers"][1]["share"][1])

    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert model.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    # Nothing that runs code when it is read: the optimizer and the random states load as plain data.
    newest = result.folder / "checkpoint-12"
    assert not list(result.folder.rglob("training_args.bin"))
    torch.load(newest / "optimizer.pt", weights_only=True)
    torch.load(newest / "scheduler.pt", weights_only=True)


def test_thresholds_from_a_baseline(run: Go, tmp_path: Path) -> None:
    full = {"preset": "small-baseline", "hidden_size": 32, "num_hidden_layers": 2}
    baseline, _ = run(model=full, trainer__output_dir=str(tmp_path / "baseline"))
    result, _ = run(calibration={"method": "paper", "baseline": str(baseline.model)})
    model = AutoModelForCausalLM.from_pretrained(result.model)
    low, high = model.config.entropy_thresholds
    assert model.config.calibration == "fixed"
    assert 0.5 < low < high < 1
    assert model.model.layers[1].thresholds.tolist() == pytest.approx([(low + high) / 2])
    # A run's folder is as good as the model in it.
    other, _ = run(
        calibration={"method": "paper", "baseline": str(baseline.folder)}, trainer__output_dir=str(tmp_path / "again")
    )
    assert AutoModelForCausalLM.from_pretrained(other.model).config.entropy_thresholds == [low, high]
    cut = tmp_path / "cut"
    shutil.copytree(baseline.model, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    for wrong, message in ((str(tmp_path / "nothing"), "no such checkpoint"), (str(cut), "missing or damaged")):
        with pytest.raises(UserError, match=f"calibration.baseline: .*{message}"):
            run(calibration={"method": "paper", "baseline": wrong}, trainer__output_dir=str(tmp_path / "other"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_penalty_is_no_part_of_the_recorded_loss(run: Go, accumulation: int) -> None:
    # At a learning rate of next to nothing the model stays as it is, and so does the loss of the same batches.
    still = {"trainer__learning_rate": 1e-12, "trainer__min_learning_rate": 0.0, "model__hidden_dropout": 0.0}
    still |= {"model__attention_dropout": 0.0, "model__router": "soft", "trainer__log_every": 5}
    still |= {"trainer__gradient_accumulation": accumulation, "trainer__batch_size": 4 // accumulation}
    without, _ = run(**still)
    penalised, _ = run(model__collapse_penalty=5.0, trainer__output_dir=f"{without.folder}-penalised", **still)
    assert penalised.train_loss == pytest.approx(without.train_loss, rel=1e-4)


@pytest.mark.usefixtures("unchecked")  # accelerate rebuilds the output from a dict, which the checked class refuses
def test_bfloat16(run: Go) -> None:
    result, _ = run(trainer__precision="bf16")
    assert math.isfinite(result.validation_loss)
    assert {tensor.dtype for tensor in weights(result.model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": {"operators": [["attention"]], "hidden_size": 32}, "calibration": {"method": "paper"}},
            "calibration.method='paper' with operators=[['attention']], no layer of which has a choice",
        ),
        (
            {"trainer__learning_rate_schedule": "constant", "trainer__min_learning_rate": 1e-4},
            "trainer.min_learning_rate=0.0001 with learning_rate_schedule: constant",
        ),
        (
            {
                "model": {"preset": "reach-small", "window": 4, "kv_spread": [1] * 6},
                "schedule": {name: {"from": 1.0, "after": 2, "steps": 2} for name in ("attention_share", "kv_share")},
                "fit": {"after": 2},
            },
            "fit with model.kv_spread, which a fit sets (fit.spread) or removes",
        ),
    ],
)
def test_what_a_run_would_not_heed_is_refused_before_it_begins(run: Go, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        run(**changes)
    assert said in str(raised.value) and "\n" not in str(raised.value)
