"""A per-token task from one file outside the package: in recipes and commands, trained and measured.

Oracle: the task's own rows, and accuracy and loss counted here position by position.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.copying import Copying
from rich.console import Console
from transformers import LlamaForCausalLM

from chiaroscuro.data.tasks import load_task
from chiaroscuro.errors import UserError
from chiaroscuro.model.loading import load_checkpoint, load_checkpoint_tokenizer
from chiaroscuro.training import Recipe, TrainResult, read_records, train

DATA = {"length": 6, "vocabulary": 8, "train_examples": 2000, "heldout_examples": 100}
UNIFORM = math.log(8)


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "model": {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "attention_share": 0.5},
        "data": {"task": "copying", "sequence_length": 12, **DATA},
        "tokenizer": "words",
        "trainer": {
            "output_dir": str(folder),
            "steps": 300,
            "batch_size": 32,
            "warmup_steps": 20,
            "learning_rate": 3e-3,
            "evaluate_every": 150,
        },
    }
    for section, fields in changes.items():
        recipe[section] = recipe[section] | fields if isinstance(fields, dict) else fields
    return recipe


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("copying") / "run"
    return train(Recipe.from_dict(content(folder)), console=Console(quiet=True))


def measured(folder: Path, split: str) -> tuple[float, float, int]:
    """Loss, accuracy and number of targets, one sequence after the other."""
    model, tokenizer = load_checkpoint(str(folder)), load_checkpoint_tokenizer(str(folder))
    losses, hits = [], []
    for row in load_task("copying", **DATA).splits[split]:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.convert_tokens_to_ids(row["words"])])).logits[0].double()
        for at, target in zip(logits.log_softmax(-1), row["targets"], strict=True):
            if target is not None:
                losses.append(-at[tokenizer.convert_tokens_to_ids(target)].item())
                hits.append(at.argmax().item() == tokenizer.convert_tokens_to_ids(target))
    return sum(losses) / len(losses), sum(hits) / len(hits), len(hits)


def test_a_row_is_a_sequence_and_its_copy() -> None:
    for row in load_task("copying", **DATA).splits["test"]:
        assert row["words"][6] == "|" and len(row["words"]) == len(row["targets"]) == 12
        assert row["targets"] == [None] * 6 + row["words"][:6]
        assert row["words"][7:] == row["words"][:5]


def test_it_learns_to_copy(copied: TrainResult) -> None:
    loss, accuracy, targets = measured(copied.folder, "validation")
    assert targets == 600
    assert copied.validation_loss == pytest.approx(loss, rel=1e-4) and copied.accuracy == accuracy
    assert loss < 0.75 * UNIFORM and accuracy > 0.3  # it copies all after 200 to 400 steps, by seed
    assert copied.perplexity is None
    records = read_records(copied.folder / "metrics.jsonl")
    assert {record["kind"] for record in records} == {"train", "validation"}
    assert Recipe.load(copied.folder / "recipe.yaml").data.build_task() == Copying(**DATA)


def test_evaluate_measures_it(copied: TrainResult, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("evaluate", copied.folder, "--split", "test", "--json")
    assert code == 0, err
    figures = json.loads(out)
    loss, accuracy, targets = measured(copied.folder, "test")
    assert figures["loss"] == pytest.approx(loss, rel=1e-4)
    assert (figures["accuracy"], figures["predictions"], figures["data"]) == (accuracy, targets, "copying")
    code, out, _ = run("evaluate", copied.folder)
    assert code == 0 and "accuracy" in out and "perplexity" not in out
    code, _, err = run("evaluate", copied.folder, "--stride", 4)
    assert code == 2 and "--stride 4" in err


def test_the_other_commands_know_it(copied: TrainResult, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("task", "copying", "length=3", "train_examples=30", "heldout_examples=5", "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["splits"]["train"] | {"chance": 0} == {
        "rows": 30,
        "predictions": 90,
        "chance": 0,
        "tokens": dict.fromkeys(("shortest", "5 %", "median", "95 %", "longest"), 6),
    }
    code, out, _ = run("task", "copying", "length=3", "train_examples=30", "heldout_examples=5")
    assert code == 0 and ". . ." in out and "|" in out
    code, out, _ = run("info", copied.folder)
    assert code == 0 and "copying" in out
    code, out, _ = run("generate", copied.folder, "1 2 3 4 5 6 |", "--max-new-tokens", 2, "--temperature", 0)
    assert code == 0, "it is a language model like any other"
    code, _, err = run("calibrate", copied.folder, "--output", copied.folder / "calibrated")
    assert code == 2 and "name a text with --data" in err


def test_a_command_imports_it() -> None:
    ask = [sys.executable, "-m", "chiaroscuro", "--import", "examples.copying", "task", "copying", "length=3"]
    ask += ["train_examples=30", "heldout_examples=5", "--json"]
    done = subprocess.run(ask, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == "copying"


def test_full_attention_in_a_llama_learns_it_too(tmp_path: Path) -> None:
    model = {"architecture": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    recipe = content(tmp_path / "run", trainer={"steps": 3, "warmup_steps": 1, "evaluate_every": 3})
    recipe["model"] = {**model, "intermediate_size": 64}
    result = train(Recipe.from_dict(recipe), console=Console(quiet=True))
    assert isinstance(load_checkpoint(str(result.folder)), LlamaForCausalLM)
    assert result.accuracy is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "bpe:300"}, "tokenizer='bpe:300' with the task copying, where each word is one token"),
        ({"data": {"length": 1}}, "data: length=1: must be from 2 to 100,000"),
        ({"data": {"lenght": 4}}, "data: lenght=4: the task copying has no such option; did you mean 'length'?"),
        ({"data": {"sequence_lenth": 4}}, "did you mean 'sequence_length'?"),
        (
            {"data": {"task": "language-modelling"}},
            "data: length=6: the task language-modelling has no such option",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.from_dict(content(tmp_path / "run", **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_words_are_not_mixed_into_a_text(tmp_path: Path) -> None:
    recipe = content(tmp_path / "run")
    recipe |= {"mixture": {"tasks": {"copying": recipe["data"]}}, "data": {}, "tokenizer": "bpe:300"}
    with pytest.raises(UserError, match=r"tokenizer='bpe:300' with the task copying"):
        Recipe.from_dict(recipe)


def test_rows_longer_than_a_sequence(tmp_path: Path) -> None:
    recipe = content(tmp_path / "run", data={"sequence_length": 11})
    with pytest.raises(UserError, match="has sequences of 12 tokens, more than the 11 that are to be read"):
        train(Recipe.from_dict(recipe), console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
