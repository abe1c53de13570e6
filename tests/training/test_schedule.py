"""Shares that change while a model trains.

The oracles: the share written out from the number of the step here; the uninterrupted run for the resumed one; the
thresholds' table, of which the saved thresholds must be the quantiles at the saved share.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_recipe import LLAMA, SMALL, assert_refused, with_changes
from test_train import Go, assert_same_bits, break_off, interrupt_at

from chiaroscuro import ChiarForCausalLM
from chiaroscuro.errors import UserError
from chiaroscuro.layers.thresholds import shares_to_thresholds
from chiaroscuro.training import Recipe, TrainingInterrupted, read_records
from chiaroscuro.training.schedule import Draws, Ramp

SHARES = st.floats(0, 1)


@given(SHARES, SHARES, st.integers(1, 10_000), st.integers(0, 5_000), st.integers(1, 20_000))
def test_a_ramp_waits_is_a_line_and_then_stands(start: float, end: float, steps: int, wait: int, step: int) -> None:
    ramp = Ramp(start, end, steps, wait)
    assert ramp.during(1) == ramp.during(wait + 1) == start
    assert ramp.after(step) == pytest.approx(start + (end - start) * min(1, max(0, step - wait) / steps))
    assert ramp.during(step + 1) == ramp.after(step)
    assert min(start, end) <= ramp.after(step) <= max(start, end)
    assert ramp.after(wait + steps) == ramp.after(wait + steps + step) == end


@given(st.tuples(SHARES, SHARES).map(sorted), SHARES, st.integers(0, 2**31), st.integers(1, 10**6))
def test_a_draw_is_of_seed_and_step_alone(pair: list[float], stated: float, seed: int, step: int) -> None:
    low, high = pair
    draws = Draws(low, high, stated, seed)
    assert low <= draws.during(step) <= high
    assert draws.during(step) == Draws(low, high, stated, seed).during(step)
    assert draws.after(step) == stated


def test_draws_are_even_and_differ_by_seed() -> None:
    drawn, other = (torch.tensor([Draws(0.1, 0.9, 0.25, s).during(n) for n in range(1, 4001)]) for s in (0, 1))
    share_below = torch.tensor([(drawn < 0.1 + 0.8 * part).float().mean() for part in (0.25, 0.5, 0.75)])
    torch.testing.assert_close(share_below, torch.tensor([0.25, 0.5, 0.75]), atol=0.03, rtol=0)
    assert abs(torch.corrcoef(torch.stack([drawn, other]))[0, 1]) < 0.06


# Runs

RAMP = {"attention_share": {"from": 1.0, "to": 0.25, "steps": 8}}


def shares_in(folder: Path, kind: str) -> dict[int, float]:
    return {r["step"]: r["attention_share"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == kind}


def assert_at_share(folder: Path, share: float) -> None:
    """The saved model's thresholds are the quantiles of its table at the share, which its config names."""
    model = ChiarForCausalLM.from_pretrained(folder)
    assert model.config.attention_share == share
    for thresholds in model.thresholds().values():
        assert thresholds.calibrated
        expected = shares_to_thresholds(thresholds.quantiles, share, thresholds.operators)
        assert torch.equal(thresholds.values, expected)


def test_the_share_is_lowered_and_what_is_saved_has_it(run: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    forward = ChiarForCausalLM.forward

    def watched(self: ChiarForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training:
            seen.append(self.config.attention_share)
        return output

    functools.update_wrapper(watched, forward)  # the Trainer reads the signature of the forward
    monkeypatch.setattr(ChiarForCausalLM, "forward", watched)
    shape = {"trainer__batch_size": 2, "trainer__gradient_accumulation": 2}
    result, printed = run(schedule=RAMP, trainer__log_every=1, **shape)
    expected = [1 - 0.75 * min(1, n / 8) for n in range(13)]
    assert seen == pytest.approx([expected[n // 2] for n in range(24)])  # two forwards a step, one share
    assert shares_in(result.folder, "train") == pytest.approx({n + 1: expected[n] for n in range(12)})
    assert shares_in(result.folder, "validation") == pytest.approx({6: expected[6], 12: 0.25})
    records = [r for r in read_records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert records[0]["layers"][1]["share"] == [0.0, 1.0]  # "exactly all" in the first step
    assert "ρ 1.00" in printed and "ρ 0.25" in printed
    assert "the share that the schedule asks for" in " ".join(printed.split())
    assert_at_share(result.model, 0.25)
    assert_at_share(result.folder / "checkpoint-12", 0.25)


@pytest.mark.parametrize(
    "changes",
    [{"schedule": RAMP}, {"schedule": {"attention_share": [0.1, 1.0]}}],
    ids=["lowered", "drawn"],
)
def test_a_resumed_run_has_the_same_shares_and_bits(
    run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    often = {"trainer__log_every": 1, **changes}
    whole, _ = run(trainer__output_dir=str(tmp_path / "whole"), **often)
    interrupt_at(monkeypatch, 7, break_off)
    with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        run(**often)
    resumed, _ = run(resume=True, **often)
    assert_same_bits(whole.model, resumed.model)
    for kind in ("train", "validation"):
        assert shares_in(whole.folder, kind) == shares_in(resumed.folder, kind)
    assert resumed.validation_loss == whole.validation_loss


def test_a_drawn_share_moves_the_steps_and_not_what_is_saved(run: Go, content: dict[str, Any]) -> None:
    model = {**content["model"], "attention_share": [0.1, 1.0]}
    result, _ = run(model=model, trainer__log_every=1)
    drawn = shares_in(result.folder, "train")
    draws = Draws(0.1, 1.0, 0.25, "attention_share 0")
    assert drawn == {step: draws.during(step) for step in range(1, 13)}
    assert max(drawn.values()) - min(drawn.values()) > 0.5
    records = [r for r in read_records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    asked = torch.tensor([record["attention_share"] for record in records[4:]])
    took = torch.tensor([record["layers"][1]["share"][1] for record in records[4:]])
    assert torch.corrcoef(torch.stack([asked, took]))[0, 1] > 0.9
    assert shares_in(result.folder, "validation") == {6: 0.25, 12: 0.25}
    assert_at_share(result.folder / "checkpoint-8", 0.25)
    assert_at_share(result.model, 0.25)


def test_a_ramp_that_begins_where_it_ends_is_a_run_without_one(run: Go) -> None:
    flat, _ = run(schedule={"attention_share": {"from": 0.25, "steps": 3}})
    plain, _ = run(trainer__output_dir=str(flat.folder.parent / "plain"))
    assert_same_bits(flat.model, plain.model)


REACH = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "operators": [["local", "attention"], ["local", "attention"], ["attention"]],
    "window": 4,
    "sinks": 1,
    "attention_context": "kept",
    "router": "learned",
    "kv_router": "random",
}


@pytest.mark.parametrize(
    ("looks", "keeps"),
    [({"from": 1.0, "to": 0.5, "steps": 6}, [0.2, 0.9]), (None, {"from": 1.0, "steps": 1.0}), ([0.1, 1.0], None)],
    ids=["both", "kept", "looks"],
)
def test_each_side_has_its_own_schedule(
    run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Any, keeps: Any
) -> None:
    schedule = {"attention_share": looks, "kv_share": keeps}
    asked = {"model": REACH, "schedule": schedule, "trainer__log_every": 1}
    whole, printed = run(trainer__output_dir=str(tmp_path / "whole"), **asked)
    courses = Recipe.load(whole.folder / "recipe.yaml").courses(12)
    records = read_records(whole.folder / "metrics.jsonl")
    assert set(courses) == {name for name, share in schedule.items() if share is not None}
    for record in records:
        at = {"train": "during", "validation": "after"}[record["kind"]]
        expected = {name: getattr(course, at)(record["step"]) for name, course in courses.items()}
        assert {name: record[name] for name in schedule if name in record} == expected
    assert ("kept 1.00" in printed) == (keeps == {"from": 1.0, "steps": 1.0})
    for folder, step in ((whole.model, 12), (whole.folder / "checkpoint-8", 8)):
        model = ChiarForCausalLM.from_pretrained(folder)
        for name, calibrations in (
            ("attention_share", model.thresholds()),
            ("kv_share", model.kv_thresholds()),
        ):
            share = getattr(model.config, name)
            assert share == (courses[name].after(step) if name in courses else 0.25)
            assert calibrations
            for thresholds in calibrations.values():
                expected = shares_to_thresholds(thresholds.quantiles, share, thresholds.operators)
                assert torch.equal(thresholds.values, expected)
    interrupt_at(monkeypatch, 7, break_off)
    with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        run(**asked)
    assert_same_bits(whole.model, run(resume=True, **asked)[0].model)


# Recipes


def scheduled(share: Any, model: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return with_changes(model={"preset": "small", **(model or {})}, schedule={"attention_share": share}, **sections)


@pytest.mark.parametrize(("steps", "expected"), [(40, 40), (0.33, 33), (1.0, 100), (1, 1), (0.001, 1)])
def test_steps_are_a_count_or_a_part_of_the_run(steps: int | float, expected: int) -> None:
    recipe = Recipe.from_dict(scheduled({"from": 1.0, "to": 0.1, "steps": steps}))
    assert recipe.courses(100) == {"attention_share": Ramp(1.0, 0.1, expected)}
    config = recipe.build_config(300)
    assert config.attention_share == 0.1  # type: ignore[union-attr]


def test_a_ramp_ends_at_the_model_s_share_unless_it_says_where() -> None:
    recipe = Recipe.from_dict(scheduled({"from": 1.0, "steps": 10}, {"attention_share": 0.4}))
    assert recipe.courses(100) == {"attention_share": Ramp(1.0, 0.4, 10)}


@pytest.mark.parametrize(
    "content",
    [
        scheduled({"from": 1.0, "to": 0.25, "steps": 0.33}),
        scheduled({"from": 1, "steps": 10}),
        scheduled([0.1, 1.0]),
        with_changes(model={"preset": "small", "attention_share": [0, 1]}),
    ],
)
def test_a_schedule_is_written_and_read_back(content: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(content)
    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe and again.courses(100) == recipe.courses(100) != {}
    again.refuse_to_resume(recipe)


def test_a_range_in_the_model_is_one_in_the_schedule() -> None:
    in_model = Recipe.from_dict(with_changes(model={"preset": "small", "attention_share": [0.1, 1.0]}))
    assert in_model == Recipe.from_dict(scheduled([0.1, 1.0]))
    assert in_model.courses(100) == {"attention_share": Draws(0.1, 1.0, 0.25, "attention_share 0")}


def test_everybody_may_look_while_the_share_that_is_kept_is_drawn() -> None:
    model = REACH | {"operators": [["attention"]] * 2, "kv_share": [0.1, 1.0], "kv_router": "threshold"}
    assert Recipe.from_dict(with_changes(model=model)).courses(10) == {"kv_share": Draws(0.1, 1.0, 0.25, "kv_share 0")}


def test_another_schedule_is_no_resume() -> None:
    begun = Recipe.from_dict(scheduled({"from": 1.0, "steps": 10}))
    with pytest.raises(UserError, match=r"schedule\.attention_share\.from was 1\.0 .* and is 0\.9 now"):
        Recipe.from_dict(scheduled({"from": 0.9, "steps": 10})).refuse_to_resume(begun)
    with pytest.raises(UserError, match=r"schedule\.attention_share\.from was 1\.0 .* and is None now"):
        Recipe.from_dict(SMALL).refuse_to_resume(begun)


WRONG: list[tuple[dict[str, Any], str]] = [
    (scheduled([0.1, 0.5, 1.0]), "schedule.attention_share.between: [0.1, 0.5, 1.0] needs two numbers"),
    (scheduled([0.9, 0.1]), "schedule.attention_share.between: [0.9, 0.1] needs two numbers from 0 to 1, the smaller"),
    (scheduled([0.1, 1.5]), "[0.1, 1.5] needs two numbers from 0 to 1"),
    (scheduled([True, False]), "[True, False] needs two numbers"),
    (
        with_changes(model={"preset": "small", "attention_share": [0.1, 0.5, 1.0]}),
        "model.attention_share: [0.1, 0.5, 1.0] needs two numbers",
    ),
    (
        scheduled([0.1, 1.0], {"attention_share": [0.2, 1.0]}),
        "model.attention_share=[0.2, 1.0] and schedule.attention_share=[0.1, 1.0] both change the share; keep one",
    ),
    (scheduled([0.5, 1.0]), "schedule.attention_share=[0.5, 1.0] does not hold model.attention_share=0.25"),
    (scheduled(0.5), "schedule.attention_share=0.5: give fields"),
    (scheduled({"from": 1.0}), "schedule.attention_share: give {from: 1.0, to: 0.25, steps: 0.33}, or a range"),
    (scheduled({"from": 1.5, "steps": 10}), "schedule.attention_share.from=1.5: input should be less than or equal"),
    (scheduled({"from": 1.0, "steps": 0}), "schedule.attention_share.steps: 0 needs a number of steps"),
    (scheduled({"from": 1.0, "steps": 1.5}), "schedule.attention_share.steps: 1.5 needs a number of steps"),
    (scheduled({"from": 1.0, "steps": True}), "schedule.attention_share.steps: True needs a number of steps"),
    (scheduled({"form": 1.0, "steps": 10}), "schedule.attention_share.form=1.0: unknown field; did you mean 'from'?"),
    (with_changes(schedule={"attention": {}}), "schedule.attention={}: unknown field; did you mean 'attention_share'?"),
    (scheduled({"from": 1.0, "steps": 10, "between": [0, 1]}), "give either between, or from, to, steps and after"),
    (
        scheduled({"from": 1.0, "to": 0.1, "steps": 10}, {"attention_share": 0.25}),
        "attention_share=0.25 and schedule.attention_share.to=0.1 both say where the share ends",
    ),
    (scheduled([0, 1], {"preset": "small-baseline"}), "no layer chooses between operators by a score"),
    (scheduled([0, 1], {"router": "soft"}), "schedule.attention_share with router='soft'"),
    (scheduled([0, 1], {"preset": "v2-400m"}), "schedule.attention_share with calibration='fixed'"),
    (
        scheduled([0, 1], calibration={"method": "fixed", "thresholds": [0.8, 0.9]}),
        "schedule.attention_share with calibration='fixed'",
    ),
    (scheduled([0, 1], calibration={"method": "paper"}), "schedule.attention_share with calibration='fixed'"),
    (
        with_changes(schedule={"kv_share": [0, 1]}),
        "schedule.kv_share with attention_context='all': no layer decides which tokens are kept",
    ),
    (
        with_changes(model=REACH | {"kv_share": [0.5, 0.1]}),
        "model.kv_share: [0.5, 0.1] needs two numbers from 0 to 1, the smaller one first",
    ),
    (
        with_changes(model=REACH | {"kv_share": [0.5, 1]}),
        "schedule.kv_share=[0.5, 1.0] does not hold model.kv_share=0.25",
    ),
    (with_changes(model=LLAMA, schedule={"attention_share": [0, 1]}), "of which model.architecture: llama has none"),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_a_mistake_is_one_line(content: dict[str, Any], message: str) -> None:
    assert_refused(content, message)


def test_a_ramp_longer_than_the_run_is_refused_before_anything_is_loaded(run: Go) -> None:
    with pytest.raises(UserError, match=r"^schedule\.attention_share\.steps=13 is more than the 12 steps of the run"):
        run(schedule={"attention_share": {"from": 1.0, "steps": 13}}, data__source="nowhere/at-all")
