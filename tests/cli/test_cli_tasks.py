"""The commands on classification tasks: `task`, `train` and `evaluate`, and each mistake in one line.

The oracle of a figure is the library's own function on the same rows, tested elsewhere; here counts that the command
and the data must agree on.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from chiaroscuro import ChiarConfig, ChiarForSequenceClassification
from chiaroscuro.data.tasks import load_task

Run = Callable[..., tuple[int, str, str]]

RECIPE = """
model: {{hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 3}}
data: {{task: listops-flat, train_examples: 64, heldout_examples: 16, sequence_length: 12}}
tokenizer: words
trainer: {{output_dir: '{folder}', steps: 4, warmup_steps: 1, batch_size: 8}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder / "run"))
    return folder / "recipe.yaml"


@pytest.fixture
def classifier(recipe: Path, run: Run) -> Path:
    """The folder of a run of `recipe`, which is trained once."""
    if not (recipe.parent / "run" / "model").is_dir():
        code, out, err = run("train", recipe, "--json")
        assert code == 0, err
        result = json.loads(out)
        assert 0 <= result["accuracy"] <= 1 and "perplexity" not in result
    return recipe.parent / "run"


def test_a_task_is_shown_as_it_is(run: Run) -> None:
    arguments = ["task", "listops-nested", "--length", 40, "--examples", 60, "--heldout", 20, "--seed", 3]
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    figures = json.loads(out)
    task = load_task("listops-nested", max_length=40, train_examples=60, heldout_examples=20, seed=3)
    assert figures["fingerprint"] == task.fingerprint
    assert (figures["tokenizer"], figures["vocabulary"]) == ("words", 17)
    for split, rows in task.splits.items():
        found = figures["splits"][split]
        counts = Counter(rows["label"][:])
        assert found["rows"] == len(rows)
        assert found["labels"] == {str(label): counts[label] for label in range(10)}
        assert found["chance"] == max(counts.values()) / len(rows)
        lengths = sorted(len(text.split()) for text in rows["text"])
        assert (found["tokens"]["shortest"], found["tokens"]["longest"]) == (lengths[0], lengths[-1])
        assert 10 <= lengths[0] <= found["tokens"]["median"] <= lengths[-1] <= 40
    assert figures["examples"][0]["text"] == task.splits["train"][0]["text"]

    code, out, _ = run(*arguments)
    assert code == 0
    assert "listops-nested" in out and "█" in out and "chance" in out
    share = figures["splits"]["train"]["labels"]["9"] / 60
    assert f"{share:.1%}" in out
    assert " ".join(figures["examples"][0]["text"].split()[:5]) in out


def test_evaluate_gives_accuracy_and_its_interval(run: Run, classifier: Path) -> None:
    code, out, err = run("evaluate", classifier, "--split", "test", "--json")
    assert code == 0, err
    figures = json.loads(out)
    low, high = figures["accuracy_interval"]
    assert (figures["data"], figures["rows"], figures["length"]) == ("listops-flat", 16, 12)
    assert low <= figures["accuracy"] <= high and figures["accuracy"] * 16 == int(figures["accuracy"] * 16)
    assert len(figures["layers"]) == 3 and "stride" not in figures
    dialled = json.loads(run("evaluate", classifier, "--share", 1, "--json")[1])
    assert dialled["layers"][1]["share"] == [0.0, 1.0]
    code, out, _ = run("evaluate", classifier)
    assert code == 0 and "accuracy" in out and "perplexity" not in out


def test_a_regression_has_no_accuracy(run: Run, classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier / "model", tmp_path / "model")
    shutil.copy(classifier / "recipe.yaml", tmp_path)
    config = ChiarConfig.from_pretrained(classifier / "model")
    config.num_labels, config.problem_type = 1, "regression"
    ChiarForSequenceClassification(config).save_pretrained(tmp_path / "model")
    code, out, err = run("evaluate", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("error: evaluate counts the right labels of a classifier, and ")
    assert "is a regression (num_labels=1)" in err and err.count("\n") == 1


def test_what_else_takes_a_classifier(run: Run, classifier: Path) -> None:
    code, out, _ = run("info", classifier, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["model"] == "ChiarForSequenceClassification" and len(facts["layers"]) == 3
    code, out, _ = run("route", classifier, "[MAX 1 2 3 4 ]", "--json")
    assert code == 0 and len(json.loads(out)["tokens"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "RUN", "[MAX 1"], "generate needs a language model"),
        (["calibrate", "RUN", "--output", "out"], "calibrate needs a language model"),
        (["evaluate", "RUN", "--stride", "4"], "--stride 4"),
        (["evaluate", "RUN", "--split", "dev"], "--split dev: listops-flat has train, validation, test"),
        (
            ["evaluate", "RUN", "--data", "python-docs"],
            "the task listops-flat has no such option",
        ),
        (["task", "listops"], "unknown task 'listops'"),
        (["task", "imdb", "--source", "./nowhere"], "no such folder: './nowhere'"),
        (["task", "listops-flat", "--length", "9"], "max_length=9: the task listops-flat has no such option"),
        (["task", "listops-flat", "max_length=9"], "max_length=9: the task listops-flat has no such option"),
        (
            ["task", "listops-nested", "max_length=40", "--length", "100"],
            "max_length=40 and the option that sets max_length to 100: give one of them",
        ),
        (["task", "mqar", "--seed", "1", "seed=2"], "seed=2 and the option that sets seed to 1"),
        (["task", "language-modelling"], "a running text has no rows to show"),
        (["train", "RECIPE", "data.task=imbd"], "did you mean 'imdb'"),
        (["train", "RECIPE", "data.max_length=9"], "max_length=9: the task listops-flat has no such option"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run: Run,
    classifier: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": classifier, "RECIPE": recipe}
    code, out, err = run(*[places.get(argument, argument) for argument in arguments])
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_the_help_teaches(run: Run) -> None:
    code, out, _ = run("task", "--help")
    assert code == 0 and "Example" in out and len(out) > 400


def test_the_length_of_rows_goes_by_either_name(run: Run) -> None:
    code, out, err = run("task", "mqar", "--length", 32, "pairs=4", "--examples", 20, "--heldout", 10, "--json")
    assert code == 0, err
    assert {split["tokens"]["longest"] for split in json.loads(out)["splits"].values()} == {32.0}
