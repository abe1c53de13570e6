"""Fitted scores layer by layer: how their ranking agrees with the truth, and how many of the true top share they find.

Circles are who looks far, squares who is kept. A line at the share is what chance would find.
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from chiaroscuro.report.figures import GRID, INK, as_png, new_figure, quieten

_SIDES = {"look": ("#b97714", "o", "-"), "kept": ("#0b665c", "s", "--")}


def draw_fit(found: Mapping[str, Any]) -> bytes:
    """Draw what `fit` found.

    Args:
        found: of `FitReport.figures`.

    Returns:
        A PNG.

    """
    figure = new_figure(8.0, 3.2)
    correlation, recall = figure.subplots(1, 2, sharex=True)
    _draw(correlation, found, "rank_correlation")
    _draw(recall, found, "recall")
    for side, (colour, _, dash) in _SIDES.items():
        if found[side] is not None:
            recall.axhline(found[side], color=colour, linestyle=dash, linewidth=0.8, alpha=0.5)
    correlation.set_ylim(bottom_of(found), 1.02)
    recall.set_ylim(0, 1.02)
    recall.yaxis.set_major_formatter(PercentFormatter(1))
    correlation.set_title("rank correlation", loc="left", color=INK, fontsize=9)
    recall.set_title("recall of the true top share; thin: by chance", loc="left", color=INK, fontsize=9)
    figure.supxlabel("layer", color=INK, fontsize=9)
    handles, labels = correlation.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return as_png(figure)


def bottom_of(found: Mapping[str, Any]) -> float:
    """Where the axis of the correlations begins: at 0, or below the lowest of either side."""
    drawn = (_values(found, side, "rank_correlation")[1] for side in _SIDES if found[side] is not None)
    return min(0.0, min(value for values in drawn for value in values) - 0.05)


def _values(found: Mapping[str, Any], side: str, figure: str) -> tuple[list[int], list[float]]:
    """The layers where a side was fitted, and one of its figures in each."""
    layers = [layer for layer in found["layers"] if side in layer]
    return [layer["layer"] for layer in layers], [layer[side][figure] for layer in layers]


def _draw(axes: Axes, found: Mapping[str, Any], figure: str) -> None:
    for side, (colour, marker, dash) in _SIDES.items():
        if found[side] is not None:
            layers, values = _values(found, side, figure)
            label = f"{side}, {found[side]:.0%}"
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "linestyle": dash,
                "markersize": 4,
                "linewidth": 1.4,
            }
            axes.plot(layers, values, label=label, **style)
    axes.grid(color=GRID, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    quieten(axes)
