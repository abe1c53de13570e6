"""`evaluate` on tasks of recall and on recall tokens of a text, and each mistake in one line.

Oracle: the functions of `analysis` on the same rows, tested elsewhere.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from chiaroscuro.analysis.classification import evaluate_targets
from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.data.tasks import PadToLongest
from chiaroscuro.studies.evaluation import evaluate
from chiaroscuro.studies.workspace import Workspace
from small_runs import recipe_content, write_corpus

Run = Callable[..., tuple[int, str, str]]
Trained = Callable[[str, dict[str, Any]], Path]

DATA = {
    "mqar": {"length": 32, "pairs": 4, "vocabulary": 16, "train_examples": 64, "heldout_examples": 16},
    "passkey": {"noise": 20, "keys": 2, "digits": 2, "train_examples": 400, "heldout_examples": 40},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recall")


@pytest.fixture
def trained(folder: Path, run: Run) -> Trained:
    def train(name: str, recipe: dict[str, Any]) -> Path:
        """The folder of a run of a few steps, which is trained once."""
        if not (folder / name / "model").is_dir():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
            code, _, err = run("train", folder / f"{name}.yaml", "--json")
            assert code == 0, err
        return folder / name

    return train


@pytest.fixture
def task_run(folder: Path, trained: Trained) -> Callable[[str], Path]:
    def train(task: str) -> Path:
        return trained(
            task,
            {
                "model": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2},
                "data": {"task": task, "sequence_length": 32, **DATA[task]},
                "tokenizer": "words",
                "trainer": {"output_dir": str(folder / task), "steps": 4, "warmup_steps": 1, "batch_size": 8},
            },
        )

    return train


@pytest.fixture
def text_run(folder: Path, trained: Trained) -> Path:
    return trained("text", recipe_content(write_corpus(folder), folder / "text"))


def test_needles_for_a_tokenizer_that_does_not_know_digits(run: Run, task_run: Callable[[str], Path]) -> None:
    code, _, err = run("needles", task_run("mqar"), "--lengths", 200, "--keys", 1, "--tries", 1)
    assert code == 2 and "does not know digits" in err and err.count("\n") == 1


@pytest.mark.parametrize("task", DATA)
def test_accuracy_by_depth(task: str, run: Run, task_run: Callable[[str], Path]) -> None:
    code, out, err = run("evaluate", task_run(task), "--split", "test", "--json")
    assert code == 0, err
    figures = json.loads(out)
    workspace = Workspace(str(task_run(task)))
    _, rows = workspace.target_rows("test")
    seen = evaluate_targets(workspace.model, rows, PadToLongest(workspace.tokenizer.pad_token_id))
    wanted = seen.figures()
    assert figures["depths"] == wanted["depths"] and figures["answer_accuracy"] == wanted["answer_accuracy"]
    assert figures["loss"] == pytest.approx(wanted["loss"])
    assert sum(depth["answers"] for depth in figures["depths"]) == figures["answers"] > 0
    assert sum(depth["predictions"] for depth in figures["depths"]) == figures["predictions"]
    code, out, _ = run("evaluate", task_run(task))
    assert code == 0 and "answers right" in out and figures["depths"][-1]["depth"] in out


def test_perplexity_by_position_and_on_recall_tokens(run: Run, text_run: Path) -> None:
    code, out, err = run("evaluate", text_run, "--length", 40, "--window", 3, "--json")
    assert code == 0, err
    figures = json.loads(out)
    workspace = Workspace(str(text_run))
    _, blocks = workspace.blocks("validation", length=40)
    seen = evaluate_blocks(workspace.model, blocks, window=3)
    assert seen.slices is not None
    assert {name: figures[name] for name in seen.slices.figures()} == seen.slices.figures()
    assert [part["last"] for part in figures["positions"]] == [16, 32, 40]
    assert 0 < figures["recall"]["tokens"] < figures["tokens"]
    code, out, _ = run("evaluate", text_run, "--length", 40)
    assert code == 0 and "position 33 to 40" in out and "recall, beyond 64" in out and "–" in out, "40 is less than 64"


@pytest.mark.parametrize(
    ("given", "seen"),
    [((32, 1), 32), ((33, 1), 33), ((100, 7), 32 + 10 * 7), ((64, 16), 64), ((100, None), 128), ((1, None), 32)],
)
def test_the_first_windows_that_hold_so_many_tokens(text_run: Path, given: tuple[int, int | None], seen: int) -> None:
    tokens, stride = given
    assert evaluate(Workspace(str(text_run)), length=32, stride=stride, tokens=tokens)["tokens"] == seen


def test_a_model_of_words_is_not_measured_on_a_text(run: Run, folder: Path, task_run: Callable[[str], Path]) -> None:
    out = folder / "out"
    for command in (["evaluate"], ["calibrate", "--output", out], ["fit", "--kept", 0.5, "--output", out]):
        code, _, err = run(*command[:1], task_run("mqar"), *command[1:], "--data", write_corpus(folder))
        assert code == 2 and "is one of words, which loses the spaces of a text" in err and err.count("\n") == 1
    assert not out.exists()


def test_a_run_goes_on_with_other_rows(run: Run, folder: Path, task_run: Callable[[str], Path]) -> None:
    first, second = task_run("mqar"), folder / "second"
    given = [
        f"trainer.init_from={first}",
        f"tokenizer={first / 'model'}",
        "data.power=1.0",
        f"trainer.output_dir={second}",
    ]
    code, _, err = run("train", folder / "mqar.yaml", *given, "--json")
    assert code == 0, err
    tokenizers = [Workspace(str(each)).tokenizer.get_vocab() for each in (first, second)]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "mqar", "--window", "4"], "--window 4: --window goes with a text"),
        (["evaluate", "mqar", "--tokens", "64"], "--tokens 64: --tokens goes with a text"),
        (["evaluate", "text", "--window", "0"], "--window 0: must be at least 1"),
        (["train", "mqar.yaml", "data.pairs=9"], "pairs=9: must be from 1 to 8, a quarter of the length"),
        (
            ["train", "mqar.yaml", "data.sequence_length=31", "trainer.output_dir=OTHER"],
            "has sequences of 32 tokens, more than the 31",
        ),
        (["train", "mqar.yaml", "data.noise=9"], "noise=9: the task mqar has no such option"),
        (["train", "mqar.yaml", "tokenizer=bpe:300"], "with the task mqar, where each word is one token"),
        (["task", "passkey", "queries=2"], "queries=2: must be from 1 to 1"),
        (["task", "passkeys"], "unknown task 'passkeys': did you mean 'passkey'"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, folder: Path, task_run: Callable[[str], Path], text_run: Path, arguments: list[str], message: str
) -> None:
    places: dict[str, object] = {"mqar": task_run("mqar"), "mqar.yaml": folder / "mqar.yaml", "text": text_run}
    places |= {"OUT": f"trainer.output_dir={folder / 'other'}"}
    code, out, err = run(*[places.get(argument, argument) for argument in arguments])
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
