"""Several tasks in one model: which step learns from what, what is recorded, and that a resumed run ends the same."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from chiaroscuro import ChiarConfig, ChiarForCausalLM, ChiarForMixedTasks
from chiaroscuro.analysis.gates import trace_gates
from chiaroscuro.analysis.routing_summary import mean_gate
from chiaroscuro.cli import main
from chiaroscuro.errors import UserError
from chiaroscuro.model.loading import load_checkpoint
from chiaroscuro.training import read_records
from chiaroscuro.training.mixture import Mixture
from chiaroscuro.training.trainer import RunTrainer

Go = Callable[..., Any]
SUMS = {"task": "listops-flat", "train_examples": 60, "heldout_examples": 10}


@pytest.fixture
def mixture(corpus: Path) -> dict[str, Any]:
    tasks = {"sums": SUMS, "other_text": {"source": str(corpus)}}
    return {"ratio": 0.6, "tasks": tasks}


# Which step learns from what


@given(seed=st.integers(0, 2**32), ratio=st.floats(0.05, 1), rank=st.integers(0, 7))
def test_a_step_s_draw_hangs_on_seed_and_step_alone(seed: int, ratio: float, rank: int) -> None:
    rows = {"a": 50, "b": 9, "c": 1000}
    one, other = (Mixture(rows, ratio, 8, seed) for _ in range(2))
    for step in (7, 3, 3, 1):
        drawn = one.at(step, rank)
        assert other.at(step, rank) == drawn
        if drawn is not None:
            task, chosen = drawn
            assert len(set(chosen)) == 8 and 0 <= min(chosen) <= max(chosen) < rows[task]
            # Every process learns from the same task.
            assert one.at(step, rank + 1)[0] == task


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_the_ratio_and_the_tasks_are_drawn_evenly(ratio: float) -> None:
    mixture = Mixture({"a": 100, "b": 100}, ratio, 4, seed=0)
    drawn = [mixture.at(step) for step in range(4000)]
    tasks = Counter(None if each is None else each[0] for each in drawn)
    # Four standard deviations of a binomial.
    assert abs(tasks[None] / 4000 - (1 - ratio)) <= 4 * (ratio * (1 - ratio) / 4000) ** 0.5
    assert abs(tasks["a"] - tasks["b"]) < 4 * (ratio * 4000) ** 0.5
    rows = Counter(row for each in drawn if each is not None for row in each[1])
    assert len(rows) == 100


def test_too_few_rows_for_a_batch() -> None:
    with pytest.raises(UserError, match=r"mixture\.tasks\.a has 3 rows.*trainer\.batch_size=4"):
        Mixture({"a": 3}, 0.5, 4, seed=0)


# A run


def test_a_run_learns_all_and_says_so(run: Go, mixture: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    draw = Mixture.at
    monkeypatch.setattr(Mixture, "at", lambda self, step, rank: asked.append(step) or draw(self, step, rank))
    result, _ = run(mixture=mixture, trainer__gradient_accumulation=2)
    assert asked == list(range(1, 13))  # once a step, however many forwards it has
    drawn = Counter(
        each[0] for step in asked if (each := draw(Mixture({"sums": 60, "other_text": 99}, 0.6, 4, 0), step))
    )
    records = read_records(result.folder / "metrics.jsonl")
    learned = Counter[str]()
    for record in records:
        if record["kind"] == "train":
            for task, figures in record.get("tasks", {}).items():
                learned[task] += figures["batches"]
                assert 0 < figures["gate"] < 1 and figures["loss"] > 0
    assert learned == drawn and len(learned) == 2
    last = [record for record in records if record["kind"] == "validation"][-1]
    assert 0 <= last["tasks"]["sums"]["accuracy"] <= 1 and last["tasks"]["other_text"]["perplexity"] > 1
    # The text's own figures are those of the text alone.
    assert last["perplexity"] == pytest.approx(last["tasks"]["other_text"]["perplexity"])
    assert set(trace_gates(records)) == {"text", "sums", "other_text"}
    model = load_checkpoint(str(result.folder))
    assert isinstance(model, ChiarForMixedTasks) and model.config.task_labels == {"sums": 10}
    assert isinstance(ChiarForCausalLM.from_pretrained(result.model), ChiarForCausalLM)


def test_other_texts_beside_a_mixture_are_those_of_the_text_alone(
    run: Go, mixture: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    for split in ("train", "validation"):
        (beside / f"{split}.txt").write_text("a wall of light stays dark until the sun has gone\n" * 60)
    texts = {"trainer__validation_texts": {"walls": str(beside)}, "trainer__training_texts": {str(beside): 0.5}}
    result, said = run(mixture=mixture, **texts)
    assert said.count(str(beside)) == 1  # learned from by the text, and by no task
    last = [record for record in read_records(result.folder / "metrics.jsonl") if record["kind"] == "validation"][-1]
    assert set(last["tasks"]) == {"walls", "sums", "other_text"}
    assert all(not isinstance(value, dict) for task in last["tasks"].values() for value in task.values())


def test_the_recorded_loss_is_the_text_s_alone(run: Go, mixture: dict[str, Any]) -> None:
    # At a learning rate of next to nothing the model stays as it is, and so does the loss of any batch.
    still = {"trainer__learning_rate": 1e-12, "trainer__min_learning_rate": 0.0, "model__hidden_dropout": 0.0}
    still |= {"model__attention_dropout": 0.0, "trainer__log_every": 12}
    alone, _ = run(**still)
    all_steps = mixture | {"ratio": 1.0}
    result, _ = run(mixture=all_steps, trainer__output_dir=f"{alone.folder}-mixed", **still)
    assert result.train_loss == pytest.approx(alone.train_loss, rel=0.02)
    # A penalty on both forwards is no part of it either, nor of the tasks'.
    soft = still | {"model__router": "soft"}
    plain, _ = run(mixture=all_steps, trainer__output_dir=f"{alone.folder}-soft", **soft)
    penalised, _ = run(
        mixture=all_steps, model__collapse_penalty=5.0, trainer__output_dir=f"{alone.folder}-penalised", **soft
    )
    one, other = (
        [r for r in read_records(each.folder / "metrics.jsonl") if r["kind"] == "train"][-1]
        for each in (plain, penalised)
    )
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, task in one["tasks"].items():
        assert other["tasks"][name]["loss"] == pytest.approx(task["loss"], rel=1e-4)


def test_a_resumed_run_ends_with_the_same_bits(
    run: Go, mixture: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(mixture=mixture)
    folder = f"{whole.folder}-broken"
    step = RunTrainer.training_step

    def break_off(self: RunTrainer, *args: Any) -> torch.Tensor:
        if self.state.global_step == 6:
            raise RuntimeError("broken off")
        return step(self, *args)

    monkeypatch.setattr(RunTrainer, "training_step", break_off)
    with pytest.raises(RuntimeError, match="broken off"):
        run(mixture=mixture, trainer__output_dir=folder)
    monkeypatch.undo()
    resumed, _ = run(mixture=mixture, trainer__output_dir=folder, resume=True)
    one, other = (load_file(each.model / "model.safetensors") for each in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0}, r"mixture\.ratio=0: "),
        ({"ratio": 1.5}, r"mixture\.ratio=1\.5: "),
        ({"tasks": {}}, r"mixture\.tasks"),
        ({"tasks": {"a.b": SUMS}}, r"mixture\.tasks\.a\.b"),
        ({"tasks": {"text": SUMS}}, "the name 'text' is taken"),
        ({"tasks": {"keys": SUMS}}, "the name 'keys' is taken"),
        ({"tasks": {"sums": {"task": "listops-flut"}}}, "did you mean 'listops-flat'"),
        ({"tasks": {"sums": {**SUMS, "sequence_lenght": 5}}}, "did you mean 'sequence_length'"),
        (
            {"tasks": {"sums": {**SUMS, "sequence_length": 5000}}},
            r"mixture\.tasks\.sums\.sequence_length=5000 is longer",
        ),
        ({"rato": 0.5}, "did you mean 'ratio'"),
    ],
)
def test_mixtures_that_are_none(run: Go, mixture: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(mixture=mixture | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": SUMS, "tokenizer": "words"}, "mixture with data.task='listops-flat'"),
        (
            {
                "model": {
                    "architecture": "llama",
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 16,
                }
            },
            "mixture with model.architecture: llama",
        ),
    ],
)
def test_what_has_no_mixture(run: Go, mixture: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(mixture=mixture, **changes)


# The gate


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part_in_the_mean_gate(side: str) -> None:
    torch.manual_seed(0)
    model = ChiarForMixedTasks(
        ChiarConfig(vocab_size=31, hidden_size=16, num_hidden_layers=3, task_labels={"sums": 3})
    ).eval()
    torch.nn.init.normal_(model.model.meta_router.weight, std=2.0)
    rows = [[3, 4, 5, 6, 7, 8], [9, 10]]
    padded = [row if len(row) == 6 else ([0] * 4 + row if side == "left" else row + [0] * 4) for row in rows]
    mask = torch.tensor([[int(token > 0) for token in row] for row in padded])
    together = model(torch.tensor(padded), attention_mask=mask, task="sums", output_routing=True)
    alone = [model(torch.tensor([row]), task="sums", output_routing=True).meta_gate.flatten() for row in rows]
    found = mean_gate([(together.routing, together.meta_gate)])["gate"]
    assert found == pytest.approx(torch.cat(alone).mean().item(), abs=1e-5)
    assert found != pytest.approx(together.meta_gate.mean().item(), abs=1e-3)


def test_evaluate_measures_a_task_of_a_mixed_run(
    run: Go, mixture: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, printed = run(mixture=mixture)
    last = [r for r in read_records(result.folder / "metrics.jsonl") if r["kind"] == "validation"][-1]["tasks"]
    assert f"sums: accuracy {last['sums']['accuracy']:.2%}" in printed
    for task, figure in (("sums", "accuracy"), ("other_text", "perplexity")):
        monkeypatch.setattr("sys.argv", ["chiaroscuro", "evaluate", str(result.folder), "--task", task, "--json"])
        main()
        assert json.loads(capsys.readouterr().out)[figure] == pytest.approx(last[task][figure])
    monkeypatch.setattr("sys.argv", ["chiaroscuro", "evaluate", str(result.folder), "--task", "chess"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "it has sums, other_text" in capsys.readouterr().err


def test_gates_are_followed_by_task() -> None:
    records = [{"kind": "train", "step": s, "gate": 0.8 - s / 100, "tasks": {"a": {"gate": 0.5}}} for s in range(20)]
    records += [{"kind": "train", "step": 20, "gate": 0.1}, {"kind": "validation", "step": 20, "gate": 0.9}]
    found = trace_gates(records)
    assert list(found) == ["text", "a"]
    assert found["text"].steps == list(range(21)) and found["a"].steps == list(range(20))
    assert found["text"].final == pytest.approx((0.61 + 0.1) / 2)
    assert found["a"].final == 0.5


def test_no_gate_to_follow(run: Go, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run(model__meta_router="none")
    monkeypatch.setattr("sys.argv", ["chiaroscuro", "gates", str(result.folder)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "has no MetaRouter" in capsys.readouterr().err


def test_the_gates_command(
    run: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = run()
    monkeypatch.setattr("sys.argv", ["chiaroscuro", "gates", str(result.folder), "--png", str(tmp_path / "g.png")])
    main()
    assert "text" in capsys.readouterr().out
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
