"""A sweep as two plots: the final values of its runs, and their curves.

The final values: a row per variant, a point per seed, the mean with its interval, and the baseline as a line. The
curves: a panel per variant, a curve per seed over the validations, and the baseline's curves for comparison. Runs with
the same seed have the same shade, since the test pairs them.
"""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from chiaroscuro.report.figures import GRID, INK, as_png, new_figure, number_steps, quieten
from chiaroscuro.report.fonts import Fonts, fonts_for
from chiaroscuro.report.palette import blend

_BASELINE = "#2b4c9b"
_FIRST, _LAST = "#7a4700", "#e0b15c"
# If the largest value is this many times the smallest, a linear axis would crowd the good variants together.
_LOGARITHMIC = 3.0
_COLUMNS = 4


def draw_sweep(found: Mapping[str, Any]) -> bytes:
    """Draw what a sweep found.

    Args:
        found: what `describe_sweep` gives; variants without a finished run have an empty row.

    Returns:
        A PNG.

    """
    variants = found["variants"]
    figure = new_figure(8.5, 1.3 + 0.36 * len(variants))
    axes = figure.subplots()
    for row, variant in enumerate(variants):
        if "estimate" in variant:
            _draw_variant(axes, row, variant, found)
    baseline = next(variant for variant in variants if variant["name"] == found["baseline"])
    if "estimate" in baseline:
        axes.axvline(baseline["estimate"]["mean"], color=_BASELINE, linewidth=1.2, linestyle="--", zorder=1)
    _dress(axes, found)
    return as_png(figure)


def draw_curves(found: Mapping[str, Any]) -> bytes:
    """Draw the metric over the training of every run that is done, validation by validation.

    Args:
        found: what `describe_sweep` gives; variants without a finished run have an empty panel.

    Returns:
        A PNG.

    """
    variants, metric = found["variants"], found["metric"]
    columns = min(_COLUMNS, len(variants))
    rows = math.ceil(len(variants) / columns)
    figure = new_figure(2.4 * columns + 0.8, 1.9 * rows + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    baseline = next(variant for variant in variants if variant["name"] == found["baseline"])
    fonts = _fonts(found)
    for axes, variant in zip(panels, variants, strict=False):
        for run in baseline["runs"]:
            _draw_curve(axes, run, metric, color=_BASELINE, linewidth=0.8, linestyle="--")
        if variant is not baseline:
            for run in variant["runs"]:
                _draw_curve(axes, run, metric, color=_shade(run, found), linewidth=1.4, marker="o", markersize=2.5)
        name = fonts.drawable(variant["name"])
        axes.set_title(name, loc="left", color=INK, fontsize=8, fontfamily=list(fonts.families), parse_math=False)
        _dress_curves(axes, metric)
    for axes in panels[len(variants) :]:
        axes.set_visible(False)
    dashed = f"step; dashed: {fonts.drawable(found['baseline'])}"
    figure.supxlabel(dashed, color=INK, fontsize=9, fontfamily=list(fonts.families), parse_math=False)
    figure.supylabel(metric, color=INK, fontsize=9)
    return as_png(figure)


def _fonts(found: Mapping[str, Any]) -> Fonts:
    return fonts_for(variant["name"] for variant in found["variants"])


def _shade(run: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    return blend(_FIRST, _LAST, found["seeds"].index(run["seed"]) / max(1, len(found["seeds"]) - 1))


def _draw_curve(axes: Axes, run: Mapping[str, Any], metric: str, **style: Any) -> None:
    looks = run["curve"]
    axes.plot([look["step"] for look in looks], [look[metric] for look in looks], **style)


def _dress_curves(axes: Axes, metric: str) -> None:
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    number_steps(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    quieten(axes)


def _draw_variant(axes: Axes, row: int, variant: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    value = variant["estimate"]
    colour = _BASELINE if variant["name"] == found["baseline"] else INK
    if value["low"] is not None:
        axes.plot([value["low"], value["high"]], [row, row], color=colour, linewidth=1.6, zorder=2)
    axes.plot([value["mean"]], [row], marker="|", markersize=13, markeredgewidth=2.2, color=colour, zorder=3)
    for run in variant["runs"]:
        end = run[found["metric"]]
        axes.plot([end], [row], marker="o", markersize=4.5, color=_shade(run, found), linestyle="", zorder=4)


def _dress(axes: Axes, found: Mapping[str, Any]) -> None:
    variants, metric = found["variants"], found["metric"]
    values = [run[metric] for variant in variants for run in variant["runs"]]
    if metric == "accuracy":
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    elif values and max(values) > _LOGARITHMIC * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    axes.set_ylim(len(variants) - 0.5, -0.5)
    fonts = _fonts(found)
    families = list(fonts.families)
    axes.set_yticks(range(len(variants)), [fonts.drawable(variant["name"]) for variant in variants])
    for text in axes.get_yticklabels():
        text.set(fontfamily=families, parse_math=False)
    better = "more is better" if metric == "accuracy" else "less is better"
    seeds = f"{len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else "one seed"
    axes.set_xlabel(f"{metric} of the last validation ({better})", color=INK, fontsize=9)
    title = f"{seeds}: points, mean and 95% interval; dashed: {fonts.drawable(found['baseline'])}"
    axes.set_title(title, loc="left", color=INK, fontsize=9, fontfamily=families, parse_math=False)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    quieten(axes)
