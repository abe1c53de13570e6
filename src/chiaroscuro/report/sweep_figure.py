"""A sweep as a plot: a row a variant, a point a seed, the mean with its interval, and the baseline as a line.

Points of the same seed share a shade, so that the eye can pair them, as the test does.
"""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from chiaroscuro.report.palette import blend

_INK, _GRID, _BASELINE = "#241d14", "#d9d2c5", "#2b4c9b"
_FIRST, _LAST = "#7a4700", "#e0b15c"
# Where one variant is so many times another, a linear axis would press the good ones into one place.
_LOGARITHMIC = 3.0


def draw_sweep(found: Mapping[str, Any]) -> bytes:
    """Draw what a sweep found.

    Args:
        found: what `describe_sweep` gives; variants without a finished run have an empty row.

    Returns:
        A PNG.

    """
    variants = found["variants"]
    figure = Figure(figsize=(8.5, 1.3 + 0.36 * len(variants)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, variant in enumerate(variants):
        if "estimate" in variant:
            _draw_variant(axes, row, variant, found)
    baseline = next(variant for variant in variants if variant["name"] == found["baseline"])
    if "estimate" in baseline:
        axes.axvline(baseline["estimate"]["mean"], color=_BASELINE, linewidth=1.2, linestyle="--", zorder=1)
    _dress(axes, found)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _draw_variant(axes: Axes, row: int, variant: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    value, seeds = variant["estimate"], found["seeds"]
    colour = _BASELINE if variant["name"] == found["baseline"] else _INK
    if value["low"] is not None:
        axes.plot([value["low"], value["high"]], [row, row], color=colour, linewidth=1.6, zorder=2)
    axes.plot([value["mean"]], [row], marker="|", markersize=13, markeredgewidth=2.2, color=colour, zorder=3)
    for run in variant["runs"]:
        shade = blend(_FIRST, _LAST, seeds.index(run["seed"]) / max(1, len(seeds) - 1))
        axes.plot([run[found["metric"]]], [row], marker="o", markersize=4.5, color=shade, linestyle="", zorder=4)


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
    axes.set_yticks(range(len(variants)), [variant["name"] for variant in variants])
    better = "more is better" if metric == "accuracy" else "less is better"
    seeds = f"{len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else "one seed"
    axes.set_xlabel(f"{metric} of the last validation ({better})", color=_INK, fontsize=9)
    axes.set_title(
        f"{seeds}: points, mean and 95% interval; dashed: {found['baseline']}", loc="left", color=_INK, fontsize=9
    )
    axes.grid(axis="x", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)
