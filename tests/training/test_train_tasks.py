"""Training a classifier: a resumed run ends in the same bits, and the accuracy is that of the rows.

The oracles: the uninterrupted run for the resumed one, and accuracy and loss counted here, row by row and unpadded.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from chiaroscuro.data import load_tokenizer
from chiaroscuro.data.tasks import LabelledRows, load_task, tokenize_task
from chiaroscuro.errors import UserError
from chiaroscuro.training import Recipe, TrainingInterrupted, TrainResult, read_records, train
from chiaroscuro.training.trainer import RunTrainer

Go = Callable[..., Any]

TASK = {"task": "listops-nested", "train_examples": 80, "heldout_examples": 10, "max_length": 24, "sequence_length": 20}


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A recipe, as YAML would give it: 12 steps with dropout on texts of many lengths, a checkpoint every 4."""
    return recipe_content(tmp_path / "run")


def recipe_content(folder: Path) -> dict[str, Any]:
    return {
        "model": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": TASK,
        "tokenizer": "words",
        "trainer": {
            "output_dir": str(folder),
            "steps": 12,
            "batch_size": 8,
            "warmup_steps": 2,
            "log_every": 2,
            "evaluate_every": 6,
            "save_every": 4,
        },
    }


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run of `content`, never interrupted."""
    return train(Recipe.from_dict(recipe_content(tmp_path_factory.mktemp("whole"))), console=Console(quiet=True))


def rows_of(split: str) -> LabelledRows:
    options = {name: TASK[name] for name in ("train_examples", "heldout_examples", "max_length")}
    task = load_task(str(TASK["task"]), **options)
    return tokenize_task(task, load_tokenizer("words", task.corpus), 20)[split]


def measured(model: Any, rows: LabelledRows) -> tuple[float, float]:
    """Loss and accuracy, one unpadded row after the other, in float64."""
    losses, hits = [], []
    for row in (rows[i] for i in range(len(rows))):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0].double()
        losses.append(-logits.log_softmax(-1)[row["labels"]].item())
        hits.append(logits.argmax().item() == row["labels"])
    return sum(losses) / len(losses), sum(hits) / len(hits)


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_what_a_run_leaves(whole_run: TrainResult) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(whole_run.model)
    loss, accuracy = measured(model, rows_of("validation"))
    assert whole_run.validation_loss == pytest.approx(loss, rel=1e-5)
    assert whole_run.accuracy == accuracy
    assert whole_run.perplexity is None and whole_run.bits_per_byte is None
    assert set(json.loads(json.dumps(whole_run.as_dict()))).isdisjoint({"perplexity", "bits_per_byte"})
    assert (whole_run.steps, whole_run.tokens) == (12, 12 * 8 * 20)
    assert model.config.id2label == {i: str(i) for i in range(10)} and model.config.num_labels == 10

    records = read_records(whole_run.folder / "metrics.jsonl")
    train_records = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    assert [record["step"] for record in train_records] == [1, 2, 4, 6, 8, 10, 12]
    assert [record["step"] for record in validation] == [6, 12]
    assert all("accuracy" not in record and "perplexity" not in record for record in train_records)
    assert validation[-1]["accuracy"] == accuracy and "perplexity" not in validation[-1]
    assert all(len(record["layers"]) == 3 and 0 < record["gate"] < 1 for record in records)
    events = EventAccumulator(str(whole_run.folder / "tensorboard")).Reload()
    assert events.Scalars("validation/accuracy")[-1].value == pytest.approx(accuracy)

    tokenizer = AutoTokenizer.from_pretrained(whole_run.model)
    assert tokenizer.decode(rows_of("test")[0]["input_ids"]).startswith("[")
    again = Recipe.load(whole_run.folder / "recipe.yaml")
    assert again.data.options | {"task": again.data.task, "sequence_length": 20} == {**TASK, "seed": 0}


def test_the_terminal_shows_the_accuracy(run: Go) -> None:
    result, printed = run(trainer__steps=4, trainer__evaluate_every=4)
    assert "ChiarForSequenceClassification" in printed and "listops-nested (80 texts, " in printed
    assert f"accuracy {result.accuracy:.2%}" in printed and "ppl" not in printed


# An epoch has 10 steps: a resume after step 8 begins in the first and ends in the second.
@pytest.mark.parametrize("step", [7, 10, 12])
def test_resumed_is_uninterrupted_bit_for_bit(
    run: Go, whole_run: TrainResult, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = RunTrainer._clip_grad_norm

    def clip(self: RunTrainer, model: torch.nn.Module) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return original(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_clip_grad_norm", clip)
        with pytest.raises(TrainingInterrupted, match="--resume goes on from"):
            run()
    resumed, _ = run(resume=True)
    assert_same_bits(whole_run.model, resumed.model)
    assert_same_bits(whole_run.folder / "checkpoint-12", resumed.folder / "checkpoint-12")
    assert (resumed.accuracy, resumed.validation_loss) == (whole_run.accuracy, whole_run.validation_loss)


def test_looking_more_often_moves_no_weight(run: Go, whole_run: TrainResult) -> None:
    often = {"trainer__evaluate_every": 1, "trainer__log_every": 1, "trainer__save_every": 100}
    assert_same_bits(whole_run.model, run(**often)[0].model)


def test_validation_can_be_capped(run: Go, whole_run: TrainResult) -> None:
    capped, _ = run(trainer__validation_tokens=3 * 20 - 1)
    assert_same_bits(whole_run.model, capped.model)
    model = AutoModelForSequenceClassification.from_pretrained(capped.model)
    rows = rows_of("validation")
    loss, accuracy = measured(model, LabelledRows("first", rows.identity, rows.table.select(range(3)), rows.length))
    assert capped.validation_loss == pytest.approx(loss, rel=1e-5) and capped.accuracy == pytest.approx(accuracy)


def test_accumulation_is_one_large_batch(run: Go, tmp_path: Path) -> None:
    # No dropout, and thresholds that don't move: the gradient depends on weights and rows alone.
    model = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "calibration": "fixed",
        "entropy_thresholds": [0.8, 0.8],
    }
    folders = []
    for batch in (8, 2):
        shape = {"trainer__batch_size": batch, "trainer__gradient_accumulation": 8 // batch, "trainer__steps": 6}
        folders.append(run(model=model, **shape, trainer__output_dir=str(tmp_path / f"by-{batch}"))[0].model)
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-4, msg=name)


def test_another_task_is_not_resumed_on(run: Go) -> None:
    run(trainer__steps=4)
    with pytest.raises(UserError, match=r"data.seed was 0 when this run began and is 1 now"):
        run(resume=True, trainer__steps=4, data__seed=1)


def test_it_learns_what_can_be_learnt(run: Go) -> None:
    data = {"task": "listops-flat", "train_examples": 2000, "heldout_examples": 200, "sequence_length": 12}
    model = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    schedule = {"trainer__steps": 150, "trainer__batch_size": 32, "trainer__evaluate_every": None}
    result, _ = run(data=data, model=model, **schedule, trainer__learning_rate=5e-3)
    assert result.accuracy is not None and result.accuracy > 0.3
    assert math.isfinite(result.train_loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "listops"}, "data: unknown task 'listops': did you mean 'listops-flat'"),
        ({"task": "imdb"}, "data: train_examples=80: the task imdb has no such option"),
        ({"source": "here"}, "data: source='here': the task listops-nested has no such option"),
        ({"task": "language-modelling"}, "data: train_examples=80: the task language-modelling has no such option"),
        ({"train_examples": 0}, "data: train_examples=0: must be from 1 to"),
        (
            {"max_lenght": 9},
            "data: max_lenght=9: the task listops-nested has no such option; did you mean",
        ),
    ],
)
def test_a_mistake_in_the_data_section(run: Go, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(data={**TASK, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_llama_learns_language_alone(run: Go) -> None:
    llama = {"architecture": "llama", "hidden_size": 32, "num_attention_heads": 2}
    llama |= {"num_hidden_layers": 2, "intermediate_size": 64}
    with pytest.raises(UserError, match=r"^data.task='listops-nested' with model.architecture: llama"):
        run(model=llama)


def test_too_few_rows_for_a_step(run: Go) -> None:
    with pytest.raises(UserError, match="one step takes 81 sequences and the train split has 80"):
        run(trainer__batch_size=81)


@pytest.mark.parametrize("name", ["imdb", "listops-flat", "listops-nested"])
def test_the_recipes_are_of_the_task(name: str) -> None:
    recipe = Recipe.load(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    assert recipe.data.task == name
    config = recipe.build_config(vocab_size=100)
    assert config.menus == [["dct"], *[["dct", "attention"]] * 3, ["attention"]]
    assert (config.hidden_size, config.norm, config.embedding_norm, config.attention_share) == (128, "pre", True, 0.25)
    assert yaml.safe_load(recipe.to_yaml())["data"]["task"] == name
