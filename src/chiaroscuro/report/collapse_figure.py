"""Shares over training as a plot: a panel per routed layer, an area per operator, and the utilisation as a line.

Areas, because shares add up to 1: an operator that collapses is a band that thins out and disappears.
"""

import io
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from chiaroscuro.analysis.collapse import CollapseTrace, LayerCollapse
from chiaroscuro.report.palette import OperatorStyle, styles_of

_INK, _COLUMNS = "#241d14", 4


def draw_collapse(trace: CollapseTrace) -> bytes:
    """Draw what `trace_collapse` found.

    Returns:
        A PNG.

    """
    columns = min(_COLUMNS, len(trace.layers))
    rows = math.ceil(len(trace.layers) / columns)
    figure = Figure(figsize=(2.6 * columns + 1.6, 2.1 * rows + 0.7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
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
    figure.supxlabel("step", color=_INK, fontsize=9)
    figure.supylabel("share of the tokens", color=_INK, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _draw_layer(axes: Axes, steps: list[int], layer: LayerCollapse, styles: dict[str, OperatorStyle]) -> None:
    shares = np.array(layer.share).T
    colours = [styles[name].ink for name in layer.operators]
    axes.stackplot(steps, shares, labels=list(layer.operators), colors=colours, alpha=0.75, linewidth=0)
    axes.plot(steps, layer.utilisation, color="white", linewidth=3.0)
    axes.plot(steps, layer.utilisation, color=_INK, linewidth=1.3, linestyle="--", label="utilisation U")
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 1.02)
    axes.set_title(f"layer {layer.layer}", loc="left", color=_INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)
