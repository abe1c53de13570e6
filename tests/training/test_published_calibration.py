"""Baseline, percentiles, thresholds and model as one recipe; and runs that are so many epochs long."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiaroscuro import ChiarForCausalLM
from chiaroscuro.data import load_corpus, load_tokenizer
from chiaroscuro.errors import UserError
from chiaroscuro.model.calibration import paper_thresholds
from chiaroscuro.training import Recipe, TrainingInterrupted
from chiaroscuro.training.trainer import RunTrainer

Go = Callable[..., Any]
PUBLISHED = {"method": "paper"}


def test_the_baseline_is_trained_first_and_its_percentiles_are_the_thresholds(
    run: Go, content: dict[str, Any], corpus: Path
) -> None:
    result, printed = run(calibration=PUBLISHED)
    baseline = ChiarForCausalLM.from_pretrained(result.folder / "baseline" / "model")
    assert baseline.config.operators == [["attention"]] * 3 and baseline.config.meta_router == "none"
    text = load_corpus(str(corpus))
    tokenizer = load_tokenizer(content["tokenizer"], text)
    rows = [tokenizer(row)["input_ids"] for row in text.splits["validation"]["text"]]
    wanted = paper_thresholds(baseline, rows)
    model = ChiarForCausalLM.from_pretrained(result.model)
    assert model.config.entropy_thresholds == pytest.approx(list(wanted))
    assert model.config.calibration == "fixed"
    assert model.config.operators == [["dct"], ["dct", "attention"], ["attention"]]
    assert printed.count("steps of") == 2


def test_interrupted_in_the_baseline_it_goes_on_there(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(calibration=PUBLISHED)
    folder = f"{whole.folder}-broken"
    step, broken = RunTrainer.training_step, []

    def break_off(self: RunTrainer, *args: Any) -> Any:
        if self.state.global_step == 6 and not broken:
            broken.append(self.run.folder.name)
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(RunTrainer, "training_step", break_off)
    with pytest.raises(TrainingInterrupted, match="in the baseline; the same command goes on") as stopped:
        run(calibration=PUBLISHED, trainer__output_dir=folder)
    assert broken == ["baseline"] and "--resume" not in str(stopped.value)
    result, printed = run(calibration=PUBLISHED, trainer__output_dir=folder)
    assert "resuming after step 4 of 12" in printed
    one, other = (ChiarForCausalLM.from_pretrained(each.model).config.entropy_thresholds for each in (whole, result))
    assert one == other


def test_a_finished_baseline_of_another_recipe_is_not_taken(run: Go) -> None:
    result, _ = run(calibration=PUBLISHED)
    shutil.rmtree(result.folder / "model")
    for checkpoint in result.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match=r"trainer\.learning_rate was 0\.002 when this run began"):
        run(calibration=PUBLISHED, trainer__learning_rate=1e-3)


def test_a_finished_baseline_of_another_text_is_not_taken(run: Go, content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "text"
    shutil.copytree(content["data"]["source"], folder)
    data = content["data"] | {"source": str(folder)}
    result, _ = run(calibration=PUBLISHED, data=data)
    shutil.rmtree(result.folder / "model")
    for checkpoint in result.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with (folder / "train.txt").open("a", encoding="utf-8") as file:
        file.write("and then it was light again on the wall\n")
    with pytest.raises(UserError, match="the text or its tokenizer changed since this run began"):
        run(calibration=PUBLISHED, data=data)


def test_the_percentiles_are_of_the_spectrum_that_routes(run: Go, content: dict[str, Any], corpus: Path) -> None:
    result, _ = run(calibration=PUBLISHED, model__spectrum="reference")
    baseline = ChiarForCausalLM.from_pretrained(result.folder / "baseline" / "model")
    text = load_corpus(str(corpus))
    tokenizer = load_tokenizer(content["tokenizer"], text)
    rows = [tokenizer(row)["input_ids"] for row in text.splits["validation"]["text"]]
    found = ChiarForCausalLM.from_pretrained(result.model).config.entropy_thresholds
    assert found == pytest.approx(list(paper_thresholds(baseline, rows, spectrum="reference")))
    assert found != pytest.approx(list(paper_thresholds(baseline, rows)), abs=1e-4)


@pytest.mark.parametrize("path", ["17m.yaml", "400m.yaml"])
def test_the_paper_s_recipes_are_the_paper_s(path: str) -> None:
    recipe = Recipe.load(Path("recipes/paper") / path)
    config = recipe.build_config(50257, (0.855, 0.865))
    assert recipe.sequences_per_step() == 128 and recipe.data.sequence_length == 256
    assert (recipe.trainer.learning_rate, recipe.trainer.min_learning_rate, recipe.trainer.clip) == (1e-4, 1e-6, 1.0)
    assert recipe.trainer.betas == (0.9, 0.95) and recipe.trainer.weight_decay == 0.01
    assert (config.norm, config.embedding_norm, config.hidden_dropout) == ("post", False, 0.1)
    large = path == "400m.yaml"
    assert (recipe.trainer.epochs, recipe.trainer.warmup_steps) == ((5, 1000) if large else (10, 500))
    assert (config.num_hidden_layers, config.meta_router) == ((28, "batch") if large else (4, "none"))
    assert recipe.baseline().build_config(50257).operators == [["attention"]] * config.num_hidden_layers


@pytest.mark.parametrize("preset", [None, "reach-small"])
def test_the_baseline_is_full_attention(content: dict[str, Any], preset: str | None) -> None:
    near = {
        "window": 8,
        "sinks": 2,
        "attention_context": "kept",
        "attention_spread": [1.0, 0.5],
        "kv_spread": [1.0, 0.5],
    }
    model = near | {"operators": [["local", "attention"]] * 2, "hidden_size": 32, "num_attention_heads": 2}
    if preset is not None:
        model = {"preset": preset}
    content |= {
        "model": model | {"router": "threshold", "kv_router": "threshold"},
        "calibration": {"method": "paper"},
        "schedule": {"kv_share": {"from": 1.0, "steps": 0.5}},
    }
    baseline = Recipe.from_dict(content).baseline()
    config = baseline.build_config(300)
    assert set(map(tuple, config.menus)) == {("attention",)} and baseline.schedule is None
    assert (config.window, config.sinks, config.attention_context) == (None, 0, "all")
    assert (config.attention_spread, config.kv_spread) == (None, None)


# Epochs


def test_an_epoch_is_as_many_whole_steps_as_the_data_have(run: Go, content: dict[str, Any]) -> None:
    result, _ = run(trainer__steps=None, trainer__epochs=3, trainer__warmup_steps=1)
    alone, _ = run(
        trainer__steps=None, trainer__epochs=1, trainer__warmup_steps=1, trainer__output_dir=f"{result.folder}-one"
    )
    assert alone.steps >= 2 and result.steps == 3 * alone.steps


def test_a_warm_up_longer_than_the_epochs(run: Go) -> None:
    with pytest.raises(UserError, match=r"warmup_steps=5000 is not shorter than the \d+ steps"):
        run(trainer__steps=None, trainer__epochs=2, trainer__warmup_steps=5000)


def test_epochs_of_fewer_rows_than_a_step(run: Go) -> None:
    with pytest.raises(UserError, match="one step takes 5000 sequences and the train split has"):
        run(trainer__steps=None, trainer__epochs=2, trainer__batch_size=5000)


def test_epochs_are_no_number_of_steps_before_the_data_are_known(content: dict[str, Any]) -> None:
    content["trainer"] |= {"steps": None, "epochs": 2}
    with pytest.raises(UserError, match=r"trainer\.epochs=2.*set trainer\.steps or trainer\.tokens"):
        Recipe.from_dict(content).steps()
