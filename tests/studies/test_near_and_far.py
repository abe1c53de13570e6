"""The study of near and far: what it measures on a run, whom it puts on the front, and what it says of the goal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from chiaroscuro import ChiarConfig
from chiaroscuro.report.reach_figure import draw_reach
from chiaroscuro.studies import near_and_far
from chiaroscuro.studies.near_and_far import ACCURACY, PERPLEXITY, TASKS, Task, Variants, costs, gather, page, points
from chiaroscuro.studies.run_sweep import run_sweep

TEXT, RECALL = TASKS[0], TASKS[1]


def run(value: float, scores: float = 0.5, cache: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "perplexity": value,
        "recall_perplexity": 2 * value,
        "accuracy": value,
        "scores": scores,
        "cache": cache,
        "look": None,
        "kept": None,
        **more,
    }


def text(**values: list[float]) -> Variants:
    """Variants by their perplexities, seed by seed."""
    return Variants(TEXT, {name: {str(s): run(v) for s, v in enumerate(each)} for name, each in values.items()})


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
    st.sampled_from([PERPLEXITY, ACCURACY]),
)
def test_the_front_is_who_is_beaten_by_nobody(pairs: list[tuple[int, int]], metric: Any) -> None:
    variants = Variants(TEXT, {f"v{i}": {"0": run(value, cost)} for i, (cost, value) in enumerate(pairs)})
    front = variants.front(metric, "scores")

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        better = one[1] >= other[1] if metric.rises else one[1] <= other[1]
        return one != other and one[0] <= other[0] and better

    assert front == [f"v{i}" for i, pair in enumerate(pairs) if not any(beats(other, pair) for other in pairs)]
    assert front


def test_variants_with_unlike_seeds_are_compared_by_the_seeds_that_both_have() -> None:
    """Seed 1 is a hard one: who has it too is not worse for it."""
    variants = text(**{"full attention": [100.0, 200.0], "both, H": [99.0], "both, fitted": [98.0, 196.0]})
    assert variants.placed("both, H", PERPLEXITY).mean == pytest.approx(150 * 0.99)
    assert variants.placed("both, fitted", PERPLEXITY).mean == pytest.approx(147)
    assert variants.best(variants.of("both"), PERPLEXITY) == "both, fitted"
    more = text(**{"full attention": [100.0], "full attention, trained on": [90.0, 190.0]})
    assert more.baseline == "full attention, trained on"


def written(variants: dict[str, dict[str, dict[str, Any]]], task: str = "text") -> str:
    return page({each.name: variants if each.name == task else {} for each in TASKS})


def test_the_goal_is_reached_or_not_by_its_rule() -> None:
    full = {"full attention": {"0": run(50.0), "1": run(60.0)}, "full attention, trained on": {"0": run(70.0)}}
    for value, verdict in ((51.0, "+2.0% (both, H), reached"), (51.01, "**not reached**")):
        seeds = {"0": run(value), "1": run(value * 1.2)}
        said = written(full | {"both, H": seeds, "look, H": {"0": run(1.0)}})
        assert verdict in said
    exact = {"full attention": {"0": run(0.8)}}
    for value, verdict in (
        (0.77, "96.2% of it (both, fitted), reached"),
        (0.75, "93.8% of it (both, fitted), **not reached**"),
    ):
        assert verdict in written(exact | {"both, random": {"0": run(0.1)}, "both, fitted": {"0": run(value)}}, "mqar")
    assert "A quarter on both sides is not measured yet." in written(full)
    assert written({}).count("Not measured yet.") == len(TASKS)
    assert "Not run yet: look, H; kept, H." in written(full | {"look, H": {}, "kept, H": {}, "x, first part": {}})
    assert "Not run yet" not in written(full)


def test_the_hybrids_are_held_against_the_best_of_both_sides() -> None:
    models = {"full attention": {"0": run(50.0)}, "both, H": {"0": run(55.0, 0.1, 0.2)}}
    said = written(models | {"static, 1 in 6": {"0": run(56.0)}, "static, 1 in 3": {"0": run(54.0)}})
    costs = "with 0.10 of the scores and 0.20 of the cache"
    assert f"Against static, 1 in 6: **can't be told apart** by one seed, 55.00 against 56.00, {costs}" in said
    assert "Against static, 1 in 3: **no better**, 55.00 against 54.00" in said
    for theirs, verdict in (((0.5, 0.6), "better"), ((0.7, 0.95), "**can't be told apart**")):
        seeds = {"full attention": {"0": run(1.0), "1": run(1.0)}, "both, H": {"0": run(0.9), "1": run(0.99)}}
        said = written(seeds | {"static, 1 in 3": {str(n): run(value) for n, value in enumerate(theirs)}}, "mqar")
        assert f"Against static, 1 in 3: {verdict}, 94.5 ± " in said


def test_differences_are_paired_and_the_better_of_two_full_models_is_the_baseline() -> None:
    models = {
        "full attention": {"0": run(100.0), "1": run(200.0)},
        "full attention, trained on": {"0": run(90.0), "1": run(190.0)},
        "full attention + conv": {"0": run(1.0), "1": run(1.0)},
        "look, H": {"0": run(99.0)},
    }
    variants = Variants(TEXT, models)
    assert variants.baseline == "full attention, trained on"
    said = written(models)
    assert "against full attention, trained on" in said
    assert "| 99.00 | +10.0% |" in said
    assert "140.00 ± 70.71" in said


def test_an_unfinished_model_of_one_seed_has_a_picture_too() -> None:
    variants = text(**{"full attention": [50.0, 51.0], "look, random": [60.0, 63.0], "look, H": [59.0]})
    seen = points(variants, PERPLEXITY)
    assert [point.family for point in seen] == ["full attention", "look", "look"]
    assert [point.spread > 0 for point in seen] == [False, True, False]
    assert draw_reach(seen, "perplexity", rises=False).startswith(b"\x89PNG")


def test_costs_are_parts_of_full_attention_s_at_the_shares_that_were_measured() -> None:
    fields: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "meta_router": "none"}
    full = ChiarConfig(operators=[["attention"]] * 2, **fields)
    assert costs(full, 64, None, None) == {"scores": 1.0, "cache": 1.0}
    near = ChiarConfig(operators=[["local", "attention"]] * 2, window=8, attention_context="kept", **fields)
    few, many = costs(near, 64, 0.1, 0.1), costs(near, 64, 0.9, 0.9)
    assert few["scores"] < many["scores"] < 1 and few["cache"] < many["cache"] < 1
    assert costs(ChiarConfig(operators=[["dct"]] * 2, **fields), 64, None, None) == {"scores": 0.0, "cache": 0.0}


SWEEP = """
recipe: recipe.yaml
output_dir: {folder}/runs
seeds: [0]
baseline: full attention
variants:
  full attention, first part: {{trainer.steps: 4}}
  full attention: {{}}
  both, random:
    trainer.init_from: "{folder}/runs/full attention, first part/seed-{{seed}}"
    model.operators: [[local, attention], [local, attention]]
    model.window: 4
    model.attention_context: kept
    model.router: random
    model.kv_router: random
"""

RECIPE = """
model:
  operators: [[attention], [attention]]
  hidden_size: 16
  num_attention_heads: 2
  max_position_embeddings: 32
  meta_router: none
data: {task: mqar, sequence_length: 32, length: 32, pairs: 4, vocabulary: 16, train_examples: 64, heldout_examples: 8}
tokenizer: words
trainer: {output_dir: runs/x, steps: 6, batch_size: 8, warmup_steps: 2}
"""


@pytest.mark.slow
def test_a_sweep_is_trained_measured_once_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(folder=tmp_path))
    monkeypatch.setattr(Task, "sweep", str(tmp_path / "sweep.yaml"))
    monkeypatch.setattr(near_and_far, "RESULTS", tmp_path)
    run_sweep(tmp_path / "sweep.yaml", Console(quiet=True), jobs=1)
    found = gather(RECALL, Console(quiet=True))
    assert {name: list(runs) for name, runs in found.items()} == {
        "full attention, first part": [],
        "full attention": ["0"],
        "both, random": ["0"],
        **{f"both, {name} afterwards": ["0"] for name in ("random", "H", "fitted")},
    }
    full, both = found["full attention"]["0"], found["both, fitted afterwards"]["0"]
    assert (full["scores"], full["cache"], full["look"], full["kept"]) == (1.0, 1.0, None, None)
    assert 0 < both["look"] < 1 and 0 < both["kept"] < 1 and both["scores"] < 1 and both["cache"] < 1
    assert json.loads((tmp_path / "mqar.json").read_text()) == found
    # A run that comes later leaves what is there.
    (tmp_path / "mqar.json").write_text(json.dumps(found | {"both, random": {}}))
    monkeypatch.setattr(near_and_far, "measure", lambda workspace: both)
    assert gather(RECALL, Console(quiet=True)) == found | {"both, random": {"0": both}}
    assert json.loads((tmp_path / "mqar.json").read_text()) == found | {"both, random": {"0": both}}
    (tmp_path / "mqar.json").write_text(json.dumps(found))
    monkeypatch.setattr(near_and_far, "measure", None)  # nothing is measured again, and nothing forgotten
    assert gather(RECALL, Console(quiet=True)) == found
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert gather(RECALL, Console(quiet=True)) == found
    written = page({"text": {}, "mqar": found, "passkeys": {}})
    assert re.search(r"^\| (\*\*)?both, fitted afterwards(\*\* \(s?c?\))? \| \d", written, re.MULTILINE)


def test_what_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Task, "sweep", "recipes/sweeps/none.yaml")
    assert near_and_far.main() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


def test_the_page_is_made_of_the_committed_figures() -> None:
    root = Path(__file__).resolve().parents[2]
    found = {task.name: json.loads((root / task.results).read_text("utf-8")) for task in TASKS}
    assert (root / near_and_far.PAGE).read_text("utf-8") == page(found)
    for task in TASKS:
        names = near_and_far.Sweep.load(root / task.sweep).changes
        routed = [name for name, how in near_and_far.AFTERWARDS.items() if how.of is None or how.of in names]
        assert list(found[task.name]) == [*names, *routed]


def test_worse_with_every_seed_is_never_better() -> None:
    """Not even where the other has a seed more that went wrong, and its mean is higher for it."""
    said = written(
        {
            "full attention": {str(seed): run(100.0) for seed in range(4)},
            "both, fitted": {str(seed): run(102.0 + seed / 10) for seed in range(3)},
            "static, 1 in 6": {str(seed): run(value) for seed, value in enumerate((100.0, 100.1, 99.95, 120.0))},
        }
    )
    assert "Against static, 1 in 6: better" not in said
    assert "Against static, 1 in 6: **can't be told apart**" in said
