"""A run whose scores are fitted before its first step. The oracle is `fit` on the loaded model, with the same rows."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_initial_weights import FROZEN, FULL, Stage, initial, stage  # noqa: F401
from test_recipe import LLAMA, SMALL, assert_refused, with_changes
from test_schedule import REACH
from test_train import assert_same_bits, break_off, interrupt_at
from transformers import TrainerState

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError, fit
from chiaroscuro.data import default_cache_dir
from chiaroscuro.training import Recipe, TrainingInterrupted, read_records
from chiaroscuro.training.callbacks import FitScores
from chiaroscuro.training.initial_weights import fit_batches, fit_scores
from chiaroscuro.training.objectives import load_objective

FITTED = REACH | {
    "meta_router": "none",
    "operators": [["local", "attention"]] * 3,
    "router": "fitted",
    "kv_router": {"fitted": {"hidden": 6}},
    "attention_share": 0.4,
    "kv_share": 0.3,
}


ROWS = {
    "task": "mqar",
    "sequence_length": 64,
    "length": 64,
    "pairs": 8,
    "vocabulary": 32,
    "train_examples": 64,
    "heldout_examples": 8,
}


@pytest.fixture
def asked(stage: Stage) -> dict[str, Any]:  # noqa: F811
    full = stage("full", model=FULL, data=ROWS, tokenizer="words")
    asked = {"trainer__init_from": str(full.folder), "fit": {"tokens": 1024}, "data": ROWS, "tokenizer": "words"}
    return {"model": FITTED, **asked}


def scores(model: ChiarForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".fitted." in name}


def test_the_scores_are_those_of_a_fit_at_the_model_s_shares(stage: Stage, asked: dict[str, Any]) -> None:  # noqa: F811
    begun = initial(stage, "begun", **asked)
    fields = {name: value for name, value in FITTED.items() if "router" not in name}
    oracle = ChiarForCausalLM.from_pretrained(
        Path(asked["trainer__init_from"]) / "model", **fields, router="random", kv_router="random"
    )
    recipe = Recipe.load(Path(asked["trainer__init_from"]) / "recipe.yaml")
    objective = load_objective(recipe, default_cache_dir())
    batches = fit_batches(objective.train, 1024, recipe.data.sequence_length, objective.collate)
    assert sum(batch["input_ids"].numel() for batch in batches) == 1024
    oracle.set_attention_share(kv_share=1.0)  # the other side's scores are still to come
    fit(oracle, batches, look=0.4)
    fit(oracle, batches, kept=0.3, hidden=6)
    ours, theirs = scores(begun), scores(oracle)
    assert len(ours) == 3 * (2 + 4) and ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=name)
        assert tensor.any(), name
    for one, other in zip(
        [*begun.thresholds().values(), *begun.kv_thresholds().values()],
        [*oracle.thresholds().values(), *oracle.kv_thresholds().values()],
        strict=True,
    ):
        assert one.calibrated
        torch.testing.assert_close(one.values, other.values, atol=1e-3, rtol=1e-3)


def test_no_step_changes_a_score_and_no_resume_fits_again(
    stage: Stage,  # noqa: F811
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = scores(initial(stage, "begun", **asked))
    whole = stage("whole", **asked)
    for name, tensor in scores(ChiarForCausalLM.from_pretrained(whole.model)).items():
        assert torch.equal(tensor, begun[name])
    interrupt_at(monkeypatch, 7, break_off)
    with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        stage("broken", **asked)
    shutil.rmtree(asked["trainer__init_from"])
    assert_same_bits(whole.model, stage("broken", resume=True, **asked).model)


def test_shares_that_are_spread_stay_so_through_a_run_and_a_resume(
    stage: Stage,  # noqa: F811
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked["fit"] = {"tokens": 1024, "spread": True}
    begun = initial(stage, "begun", **asked)
    saved = stage("whole", **asked).model
    whole = ChiarForCausalLM.from_pretrained(saved)
    for model in (begun, whole):
        for field, layers in (("attention_share", model.thresholds()), ("kv_share", model.kv_thresholds())):
            shares = [thresholds.share for thresholds in layers.values()]
            assert shares == list(model.config.layer_shares(field).values())
            assert len(set(shares)) == len(shares)
            assert sum(shares) / len(shares) == pytest.approx(getattr(model.config, field))
    assert whole.config.attention_spread == begun.config.attention_spread
    interrupt_at(monkeypatch, 7, break_off)
    with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        stage("broken", **asked)
    assert_same_bits(saved, stage("broken", resume=True, **asked).model)


def test_scores_can_be_fitted_while_the_model_trains(
    stage: Stage,  # noqa: F811
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del asked["trainer__init_from"]
    asked["fit"] = {"tokens": 1024, "after": 5, "spread": True}
    waiting = {"from": 1.0, "after": 5, "steps": 2}
    asked["schedule"] = {"attention_share": waiting, "kv_share": waiting}
    asked["trainer__steps"] = 9
    fitted = []
    with monkeypatch.context() as patch:
        patch.setattr("chiaroscuro.training.run.fit_scores", lambda *args: fitted.append(fit_scores(*args)) or "")
        whole = stage("whole", **asked)
    assert len(fitted) == 1 and fitted[0].startswith("fitted scores: mean rank correlation")
    found = ChiarForCausalLM.from_pretrained(whole.model)
    assert all(tensor.any() for tensor in scores(found).values())
    assert (found.config.attention_share, found.config.kv_share) == (0.4, 0.3)
    shares = {r["step"]: r["kv_share"] for r in read_records(whole.folder / "metrics.jsonl") if r["kind"] == "train"}
    assert {shares[step] for step in shares if step <= 6} == {1.0} and shares[max(shares)] == 0.3
    for last, step in ((5, "checkpoint-4"), (9, "checkpoint-8")):
        with monkeypatch.context() as patch:
            interrupt_at(patch, last, break_off)
            with pytest.raises(TrainingInterrupted, match=step):
                stage(f"broken-{last}", **asked)
        assert_same_bits(whole.model, stage(f"broken-{last}", resume=True, **asked).model)


def test_too_few_rows_to_fit_on_are_refused_before_the_training(stage: Stage, asked: dict[str, Any]) -> None:  # noqa: F811
    del asked["trainer__init_from"]
    asked["fit"] = {"tokens": 256, "after": 5}
    asked["schedule"] = {name: {"from": 1.0, "after": 5, "steps": 2} for name in ("attention_share", "kv_share")}
    with pytest.raises(UserError, match=r"fit.tokens=256: of the [\d,]+ rows of 64 tokens they make less than two"):
        stage("few", **asked)


def test_the_callback_fits_once_and_after_its_steps() -> None:
    model, fitted = ChiarForCausalLM(ChiarConfig(vocab_size=8, hidden_size=8, num_attention_heads=2)), []
    callback = FitScores(5, lambda given: f"{type(given).__name__} at {state.global_step}", fitted.append)
    for step in range(9):
        state = TrainerState(global_step=step)
        callback.on_step_begin(None, state, None, model=torch.nn.Sequential(model))
    assert fitted == ["ChiarForCausalLM at 5"]


def test_one_side_alone(stage: Stage, asked: dict[str, Any]) -> None:  # noqa: F811
    asked["model"] = FITTED | {"router": "random"}
    found = ChiarForCausalLM.from_pretrained(stage("kept", **asked, **FROZEN).model)
    assert {name.split(".fitted.")[0].rpartition(".")[2] for name in scores(found)} == {"kv_router"}


TRAINER = {**SMALL["trainer"], "init_from": "runs/full"}
WAITING = {"from": 1.0, "after": 5, "steps": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_changes(model=FITTED, fit={}), "fit without trainer.init_from"),
        (with_changes(model=FITTED, fit={"tokens": 0}, trainer=TRAINER), "fit.tokens=0: input should be greater"),
        (with_changes(model=FITTED, fit={"token": 9}, trainer=TRAINER), "unknown field; did you mean 'tokens'?"),
        (with_changes(model=FITTED | {"router": "H"}, fit={}, trainer=TRAINER), "unknown router 'H'"),
        (
            with_changes(model=FITTED | {"router": "norm", "kv_router": "norm"}, fit={}, trainer=TRAINER),
            "no layer decides by a fitted score",
        ),
        (
            with_changes(model=FITTED | {"kv_share": 1.0}, fit={}, trainer=TRAINER),
            "fit with kv_share=1.0: must be more than 0 and less than 1",
        ),
        (with_changes(model=FITTED, fit={"after": 0}), "fit.after: 0 needs a number of steps"),
        (
            with_changes(model=FITTED, fit={"after": 5}),
            "set schedule.attention_share: {from: 1.0, after: 5, steps: 0.3}",
        ),
        (
            with_changes(model=FITTED, fit={"after": 5}, schedule={"attention_share": WAITING, "kv_share": [0.1, 1.0]}),
            "set schedule.kv_share: {from: 1.0, after: 5, steps: 0.3}",
        ),
        (with_changes(model=LLAMA, fit={}, trainer=TRAINER), "model.architecture: llama routes nothing"),
        (
            with_changes(model=FITTED, data={"sequence_length": 4}, fit={}, trainer=TRAINER),
            "fit with data.sequence_length=4: all of a row is within the window and the sinks, ",
        ),
        (
            with_changes(model=FITTED, data={"task": "imdb"}, fit={}, trainer=TRAINER),
            "only the scores of a language model are fitted",
        ),
    ],
)
def test_a_mistake_is_one_line(content: dict[str, Any], message: str) -> None:
    assert_refused(content, message)


def test_a_share_that_falls_before_the_scores_are_fitted_is_refused() -> None:
    early = {"attention_share": WAITING, "kv_share": WAITING | {"after": 4}}
    recipe = Recipe.model_validate(with_changes(model=FITTED, fit={"after": 5}, schedule=early))
    with pytest.raises(UserError, match=r"^fit\.after=5 is later than schedule\.kv_share\.after"):
        recipe.courses(100)
