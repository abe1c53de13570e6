"""Shares over training as a plot: a panel per routed layer, an area per operator, and the utilisation as a line.

Areas, because shares add up to 1: an operator that collapses is a band that thins out and disappears.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from chiaroscuro.analysis.collapse import CollapseTrace, LayerCollapse
from chiaroscuro.report.figures import INK, as_png, new_figure, number_steps, quieten
from chiaroscuro.report.palette import OperatorStyle, styles_of

_COLUMNS = 4


def draw_collapse(trace: CollapseTrace) -> bytes:
    """Draw what `trace_collapse` found.

    Returns:
        A PNG.

    """
    columns = min(_COLUMNS, len(trace.layers))
    rows = math.ceil(len(trace.layers) / columns)
    figure = new_figure(2.6 * columns + 1.6, 2.1 * rows + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    styles = styles_of(trace.operators)
    for axes, layer in zip(panels, trace.layers, strict=False):
        _draw_layer(axes, trace.steps, layer, styles)
    for axes in panels[len(trace.layers) :]:
        axes.set_visible(False)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.supxlabel("step", color=INK, fontsize=9)
    figure.supylabel("share of the tokens", color=INK, fontsize=9)
    return as_png(figure)


def _draw_layer(axes: Axes, steps: list[int], layer: LayerCollapse, styles: dict[str, OperatorStyle]) -> None:
    shares = np.array(layer.share).T
    colours = [styles[name].ink for name in layer.operators]
    axes.stackplot(steps, shares, labels=list(layer.operators), colors=colours, alpha=0.75, linewidth=0)
    axes.plot(steps, layer.utilisation, color="white", linewidth=3.0)
    axes.plot(steps, layer.utilisation, color=INK, linewidth=1.3, linestyle="--", label="utilisation U")
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 1.02)
    axes.set_title(f"layer {layer.layer}", loc="left", color=INK, fontsize=9)
    number_steps(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    quieten(axes)
