"""A sweep's tables say what its runs found, no more: figures made up here, and worked out by hand or by scipy."""

import csv
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console
from scipy import stats
from transformers import AutoConfig, LlamaConfig

from chiaroscuro import ChiarConfig, ChiarForCausalLM
from chiaroscuro.analysis.flops import count_flops, count_llama_flops
from chiaroscuro.errors import UserError
from chiaroscuro.report.sweep_figure import draw_curves, draw_sweep
from chiaroscuro.report.sweep_table import print_sweep, render_csv, render_markdown, write_results
from chiaroscuro.studies.sweep import Sweep, SweepFile, SweepRun
from chiaroscuro.studies.sweep_results import collect_figures, describe_sweep
from chiaroscuro.training import Recipe

RECIPE = Recipe.from_dict({"model": {"preset": "small"}, "trainer": {"output_dir": "runs/x", "steps": 100}})


def made_up(
    values: dict[str, list[float | None]],
    metric: str = "perplexity",
    counts: dict[str, tuple[list[float], list[float]]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a sweep finds whose runs came out so, seed by seed; None is a run that failed. The first is the baseline.

    `counts` are the operations of a forward and of a training step, seed by seed.
    """
    seeds = list(range(max(map(len, values.values()))))
    changes: dict[str, dict[str, Any]] = {name: {} for name in values}
    file = SweepFile(recipe="r", output_dir="o", seeds=seeds, baseline=next(iter(values)), variants=changes)
    runs = {(name, seed): SweepRun(name, seed, RECIPE, {}) for seed in seeds for name in values}
    figures, failed = {}, {}
    for (name, seed), run in runs.items():
        if seed < len(values[name]):
            value = values[name][seed]
            if value is None:
                failed[run] = "it | broke"
            else:
                figures[run] = {metric: value, "seconds": 10.0 + seed, "steps": 100, "share": None, "parameters": 7000}
                curve = [{"step": 50, metric: 1.3 * value}, {"step": 100, metric: value}]
                figures[run] |= {"flops_per_token": None, "curve": curve, **more}
                if counts:
                    figures[run]["flops_per_token"] = {
                        step: each[seed] for step, each in zip(("forward", "training"), counts[name], strict=True)
                    }
    return describe_sweep(Sweep(file, changes, list(runs.values())), figures, failed)


def named(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variant["name"]: variant for variant in found["variants"]}


PERPLEXITIES = st.lists(st.tuples(st.floats(2, 500), st.floats(2, 500)), min_size=2, max_size=6)


@given(PERPLEXITIES)
def test_the_effect_on_perplexity_is_a_ratio_by_the_paired_test_of_logarithms(pairs: list[tuple[float, float]]) -> None:
    base, other = ([pair[i] for pair in pairs] for i in (0, 1))
    effect = named(made_up({"base": base, "other": other}))["other"]["effect"]
    logs = [math.log(o / b) for b, o in pairs]
    assert effect["mean"] == pytest.approx(stats.gmean([o / b for b, o in pairs]))
    if np.std(logs) < 1e-6:
        return
    test = stats.ttest_rel(np.log(other), np.log(base))
    interval = test.confidence_interval(0.95)
    assert (effect["low"], effect["high"]) == pytest.approx((math.exp(interval.low), math.exp(interval.high)), rel=1e-6)
    assert effect["p"] == pytest.approx(test.pvalue, rel=1e-6)


def test_only_seeds_that_both_have_are_compared() -> None:
    found = named(made_up({"base": [10.0, None, 40.0], "other": [20.0, 7.0, 40.0], "one": [5.0]}))
    assert found["other"]["effect"]["count"] == 2
    assert found["other"]["effect"]["mean"] == pytest.approx(math.sqrt(2))
    assert found["other"]["estimate"]["count"] == 3
    assert found["one"]["effect"]["mean"] == pytest.approx(0.5)
    assert [found["one"]["effect"][name] for name in ("low", "high", "p")] == [None] * 3
    assert "effect" not in found["base"]
    assert found["base"]["failed"] == {"1": "it | broke"}


def test_accuracies_are_compared_by_their_difference() -> None:
    found = made_up({"base": [0.80, 0.82], "other": [0.84, 0.88]}, metric="accuracy")
    effect = named(found)["other"]["effect"]
    assert (effect["kind"], effect["mean"]) == ("difference", pytest.approx(0.05))
    assert "| other | 2 | 86.00% ± 2.83% |" in render_markdown(found) and "+5.00% (" in render_markdown(found)


def test_the_table_has_a_row_a_variant_whatever_became_of_it() -> None:
    found = made_up({"base": [10.0, 12.0], "one": [5.0], "broken": [None, None], "waiting": []})
    page = render_markdown(found)
    assert "| base | 2 | 11.00 ± 1.41 | -1.71 to 23.71 | – | – | – | 0.007 M | – | 0.105 s (×1.00) |" in page
    assert "| one | 1 of 2 | 5.00 | – | ×0.500 | – |" in page
    assert "| broken | 0 of 2, 2 failed | – |" in page and "| waiting | 0 of 2 | – |" in page
    assert "- broken seed 0: it | broke" in page
    rows = list(csv.DictReader(io.StringIO(render_csv(found))))
    assert [row["variant"] for row in rows] == ["base", "one", "broken", "waiting"]
    assert float(rows[0]["mean"]) == 11.0 and float(rows[1]["effect_mean"]) == pytest.approx(0.5)
    assert rows[2]["mean"] == "" and rows[2]["failed"] == "2"


def test_with_nothing_done_yet_there_is_a_table_all_the_same(tmp_path: Path) -> None:
    write_results(made_up({"base": [], "other": [None]}), tmp_path)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_routing_is_shown_beside_the_null_and_the_gate_with_its_spread() -> None:
    layers = [
        {"layer": 1, "operators": ["dct"], "share": [1.0], "entropy": [0.1, 0.2, 0.3]},
        {"layer": 2, "operators": ["dct", "attention"], "share": [0.7, 0.3], "entropy": [0.8, 0.85, 0.9]},
    ]
    page = render_markdown(made_up({"base": [1.0, 2.0]}, layers=layers, null_entropy=[0.81, 0.86, 0.91], gate=0.25))
    assert "| base | 2 | dct 70.0% · attention 30.0% | 0.800 / 0.850 / 0.900 |" in page
    assert "White noise of the same width: H 0.810 / 0.860 / 0.910" in page
    assert "| base | 0.250 ± 0.000 |" in page
    assert "| base | 1 |" not in page


@pytest.mark.parametrize("metric", ["perplexity", "accuracy"])
@pytest.mark.parametrize("scale", [1, 100])
def test_the_files_agree_and_the_plot_is_not_blank(tmp_path: Path, metric: str, scale: int) -> None:
    values = {"base": [0.5, 0.52, 0.49], "other": [0.6, 0.63, 0.58], "broken": [None]}
    found = made_up({"base": values["base"], "far": [scale * 0.6, scale * 0.7], "broken": [None]}, metric=metric)
    write_results(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "plot.png",
        "results.json",
        "table.csv",
        "table.md",
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "table.md").read_text() == render_markdown(found)
    for name in ("plot.png", "curves.png"):
        assert len(np.unique(imread(tmp_path / name).reshape(-1, 4), axis=0)) > 20


@pytest.mark.parametrize("variant", ["base", "other"])
def test_the_curves_show_every_validation_and_the_plot_the_last(variant: str) -> None:
    found = made_up({"base": [10.0, 12.0], "other": [11.0, 15.0]})
    curves, plot = draw_curves(found), draw_sweep(found)
    named(found)[variant]["runs"][1]["curve"][0]["perplexity"] *= 1.2
    assert draw_curves(found) != curves and draw_sweep(found) == plot


def test_the_terminal_shows_the_same_rows() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_sweep(made_up({"base (x)": [10.0, 12.0], "other": [5.0, 6.0]}), console)
    assert "base (x)" in console.file.getvalue() and "×0.500" in console.file.getvalue()  # type: ignore[attr-defined]


# What is collected from a run


def run_of(folder: Path, config: Any, architecture: str, **validation: Any) -> Any:
    config.architectures = [architecture]
    config.save_pretrained(folder / "model")
    place = {"step": 100, "tokens": 2000, "seconds": 30.0}
    records = [
        {"kind": "train", **place, "loss": 2.0},
        {"kind": "validation", **{**place, "step": 50}, "loss": 3.0, "perplexity": 20.0},
        {"kind": "validation", **place, "loss": 2.5, "perplexity": 12.0, **validation},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return SimpleNamespace(folder=folder, recipe=RECIPE)


def test_the_figures_of_a_run_are_its_records_its_size_and_its_operations(tmp_path: Path) -> None:
    layers = [
        {"layer": 1, "operators": ["dct"], "share": [1.0], "entropy": []},
        {"layer": 2, "operators": ["dct", "attention"], "share": [0.9, 0.1], "entropy": []},
        {"layer": 3, "operators": ["dct", "attention"], "share": [0.7, 0.3], "entropy": []},
    ]
    config = ChiarConfig(vocab_size=50, hidden_size=32, num_hidden_layers=4, attention_share=0.5)
    figures = collect_figures(run_of(tmp_path, config, "ChiarForCausalLM", layers=layers, null_entropy=[], extra=1))
    assert figures["parameters"] == ChiarForCausalLM(config).num_parameters()
    assert figures["share"] == pytest.approx(0.2)
    for step, training in (("forward", False), ("training", True)):
        expected = count_flops(config, 256, share=figures["share"], training=training).total / 256
        assert figures["flops_per_token"][step] == pytest.approx(expected)
    assert (figures["perplexity"], figures["loss"], figures["train_loss"], figures["extra"]) == (12.0, 2.5, 2.0, 1)
    assert (figures["steps"], figures["tokens"], figures["seconds"]) == (100, 2000, 30.0)
    assert [look["perplexity"] for look in figures["curve"]] == [20.0, 12.0]


def test_a_llama_is_counted_too_and_routes_nothing(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    figures = collect_figures(run_of(tmp_path, config, "LlamaForCausalLM"))
    read = AutoConfig.from_pretrained(tmp_path / "model")
    assert figures["share"] is None
    assert figures["flops_per_token"]["training"] == count_llama_flops(read, 256, training=True).total / 256
    assert figures["parameters"] > 0


def test_a_run_without_a_finite_result_is_none(tmp_path: Path) -> None:
    config = ChiarConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(UserError, match="perplexity is not finite"):
        collect_figures(run_of(tmp_path, config, "ChiarForCausalLM", perplexity=None))


def test_a_run_that_diverged_is_none_either(tmp_path: Path) -> None:
    config = ChiarConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(UserError, match="its loss is 400 nats: it diverged"):
        collect_figures(run_of(tmp_path, config, "ChiarForCausalLM", loss=400.0, perplexity=math.exp(400)))


def test_operations_are_the_mean_of_the_seeds() -> None:
    """Where no threshold follows ρ each seed has another share."""
    layers = {"base": ([2.0, 4.0], [30.0, 60.0]), "other": ([1.0, 9.0], [20.0, 70.0])}
    found = made_up({"base": [10.0, 11.0], "other": [12.0, 13.0]}, counts=layers)
    other = named(found)["other"]
    assert other["flops_per_token"] == {"forward": 5.0, "training": 45.0}
    assert other["flops_ratio"] == 1.0
