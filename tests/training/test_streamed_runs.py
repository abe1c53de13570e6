"""Runs whose text is read on the way: the same weights wherever they were interrupted, by however many processes."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chiaroscuro.data import StreamedCorpus, TextStream
from chiaroscuro.data.tasks import TASKS, register_task
from chiaroscuro.data.tasks.language_modelling import LanguageModelling
from chiaroscuro.errors import UserError
from chiaroscuro.studies.workspace import Workspace
from chiaroscuro.training import Recipe, TrainingInterrupted, read_records, train
from chiaroscuro.training.initial_weights import fit_batches
from chiaroscuro.training.objectives import load_objective
from chiaroscuro.training.streaming import read_notes
from chiaroscuro.training.trainer import RunTrainer
from several_processes import NO_DROPOUT, accumulating, losses, run_job, tensors
from small_runs import WORDS


@pytest.fixture
def content(content: dict[str, Any], corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """The runs of the other tests, from a text of several files."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copy(corpus / "validation.txt", folder)
    for i in range(4):
        turned = [" ".join(WORDS[(i + j) % 5 :]) for j in range(40)]
        (folder / f"train-{i}.txt").write_text("\n".join(turned) + "\n")
    content["data"] |= {"source": str(folder), "streaming": True, "shuffle": 6}
    return content


def stop_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = RunTrainer._clip_grad_norm

    def clip(self: RunTrainer, model: torch.nn.Module) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            monkeypatch.setattr(RunTrainer, "_clip_grad_norm", original)
            raise KeyboardInterrupt
        return original(self, model)

    monkeypatch.setattr(RunTrainer, "_clip_grad_norm", clip)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_is_uninterrupted_bit_for_bit(run, accumulation, tmp_path, monkeypatch) -> None:
    shape = {"trainer__batch_size": 2, "trainer__gradient_accumulation": accumulation}
    whole, printed = run(trainer__output_dir=str(tmp_path / "whole"), **shape)
    assert "shards (streamed)" in printed
    stop_in(monkeypatch, 10)
    with pytest.raises(TrainingInterrupted):
        run(**shape)
    notes = read_notes(tmp_path / "run" / "checkpoint-8")
    assert notes.keys() == {str(lane) for lane in range(accumulation)}

    read: list[dict[str, Any] | None] = []
    rows = StreamedCorpus.rows

    def watched(self: Any, part: int = 0, parts: int = 1, state: Any = None) -> Any:
        read.append(state)
        return rows(self, part, parts, state)

    monkeypatch.setattr(StreamedCorpus, "rows", watched)
    resumed, _ = run(resume=True, **shape)
    assert len(read) == accumulation and None not in read  # each lane was opened where it stood
    one, other = (load_file(result.model / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert losses(whole.folder) == losses(resumed.folder)


def test_documents_and_parts(run, content, corpus, tmp_path) -> None:
    result, printed = run(data__documents=True, trainer__training_texts={str(corpus): 0.34}, trainer__steps=4)
    assert "(streamed) and" in printed and printed.count("(streamed)") == 2
    assert result.perplexity is not None
    # The other commands read the splits that are not streamed.
    workspace = Workspace(str(result.folder))
    assert len(workspace.blocks("validation")[1]) > 0
    with pytest.raises(UserError, match=r"--split train: the recipe streams that of .*; name another split, or a text"):
        workspace.blocks("train")


def test_scores_are_fitted_on_its_first_rows_and_the_run_reads_on(run, monkeypatch) -> None:
    fitted: list[list[int]] = []
    made: list[Any] = []
    original, make = fit_batches, TextStream.rows
    monkeypatch.setattr(TextStream, "rows", lambda self, *how: made.append(make(self, *how)) or made[-1])

    def noted(rows: Any, *how: Any) -> Any:
        assert rows is made[1]  # not the run's own, which would note where the fit has read
        batches = original(rows, *how)
        fitted.append([ids for batch in batches for ids in batch["input_ids"].flatten().tolist()])
        fitted.append([ids for i in range(32) for ids in rows[i]["input_ids"].tolist()])
        return batches

    monkeypatch.setattr("chiaroscuro.training.run.fit_batches", noted)
    windows: list[int] = []
    counts = TextStream.counts
    monkeypatch.setattr(TextStream, "counts", lambda self, window: windows.append(window) or counts(self, window))
    model = {"operators": [["local", "attention"]] * 3, "window": 4, "router": "fitted", "attention_share": 0.5}
    course = {"attention_share": {"from": 1.0, "after": 4, "steps": 2}}
    result, _ = run(
        fit={"tokens": 512, "after": 4}, schedule=course, **{f"model__{name}": value for name, value in model.items()}
    )
    assert result.steps == 12 and fitted[0] == fitted[1]
    # 48 rows in windows of 6; and beside them those of the fit, which are read once more here.
    assert sorted(windows) == sorted([*range(8), *range(6), *range(6)])


def test_another_end_of_sequence_is_another_text(content, tmp_path) -> None:
    recipe = Recipe.from_dict(content)
    one = load_objective(recipe, tmp_path / "cache")
    ended = copy.deepcopy(one.tokenizer)
    ended.eos_token = "t"
    assert load_objective(recipe, tmp_path / "cache", ended).identity != one.identity


@dataclass(frozen=True)
class Backwards(LanguageModelling):
    """Whose rows are those of the text in another order."""

    def train_rows(self, tokens: Any, tokenizer: Any, length: int) -> Any:
        return list(reversed(super().train_rows(tokens, tokenizer, length)))


def test_a_task_with_rows_of_its_own_is_refused(run, monkeypatch) -> None:
    monkeypatch.setattr("chiaroscuro.data.tasks.registry.TASKS", dict(TASKS))
    register_task("backwards", Backwards)
    with pytest.raises(UserError, match=r"data.task=backwards: it makes rows of its own, which can't be streamed"):
        run(data__task="backwards")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer__steps": None, "trainer__epochs": 1}, "trainer.epochs=1 with data.streaming=true"),
        ({"data__shuffle": 0}, "data.shuffle=0: must be at least 1"),
        ({"data__shuffle": 8, "data__streaming": False}, "data.shuffle=8 goes with data.streaming: true"),
        ({"mixture": {"tasks": {"other": {"shuffle": 8}}}}, "mixture.tasks.other.shuffle goes with streaming"),
        ({"data__shuffle": 2**70}, "the blocks that data.shuffle=1180591620717411303424 reads at a time"),
        ({"data__task": "retrieval"}, "data.streaming with data.task: retrieval"),
        ({"data__streaming": "yes"}, "streaming='yes'"),
        ({"data__source": "python-docs"}, "python-docs is not streamed"),
        ({"trainer__training_texts": {"python-docs": 0.5}}, "trainer.training_texts.python-docs: python-docs is not"),
        ({"mixture": {"tasks": {"other": {"streaming": True}}}}, "mixture.tasks.other.streaming=true: the text alone"),
    ],
)
def test_what_cant_be_streamed_is_refused(run, changes, said) -> None:
    with pytest.raises(UserError) as raised:
        run(**changes)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_another_text_is_not_resumed(run, content, monkeypatch) -> None:
    stop_in(monkeypatch, 6)
    with pytest.raises(TrainingInterrupted):
        run()
    first = Path(content["data"]["source"]) / "train-0.txt"
    first.write_text(first.read_text().upper())
    with pytest.raises(UserError, match=r"the text or its tokenizer changed since this run began"):
        run(resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_stream_as_one_and_any_number_goes_on(content, tmp_path, processes) -> None:
    content["model"] |= NO_DROPOUT | {"operators": [["dct", "attention"]] * 3}
    content["trainer"] |= {"batch_size": 1, "log_every": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    several, one = tmp_path / "several", tmp_path / "one"
    place = [f"trainer.output_dir={several}", accumulating(processes)]
    killed = run_job(tmp_path, *place, processes=processes, killed_at=7, dtype="float64")
    assert killed.returncode != 0
    notes = read_notes(several / "checkpoint-4")
    assert {lane: max(map(int, noted)) for lane, noted in notes.items()} == dict.fromkeys("0123", 1)  # of 6 rows each
    shutil.copytree(several, tmp_path / "alone")
    done = run_job(tmp_path, *place, "--resume", processes=processes, dtype="float64")
    assert done.returncode == 0, done.stderr
    torch.set_default_dtype(torch.float64)
    try:
        for folder, resume in ((one, False), (tmp_path / "alone", True)):
            changes = [f"trainer.output_dir={folder}", accumulating(1)]
            train(Recipe.load(tmp_path / "recipe.yaml", changes), resume=resume)
    finally:
        torch.set_default_dtype(torch.float32)
    for folder in (several, tmp_path / "alone"):
        assert losses(folder) == pytest.approx(losses(one), rel=1e-9)
        assert [r["step"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "train"] == list(range(1, 13))
        for name, tensor in tensors(one).items():
            close = {"rtol": 1e-6, "atol": 1e-9} if tensor.dtype == torch.float64 else {"rtol": 0, "atol": 2e-4}
            torch.testing.assert_close(tensors(folder)[name], tensor, **close)
