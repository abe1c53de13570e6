"""Quality over cost: models as points, over the attention scores that they compute and over the size of their cache.

The line is the Pareto front: those than which no other model is better at the same or a lower cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from chiaroscuro.report.figures import GRID, INK, as_png, new_figure, quieten

_COLOURS = (
    "#2b4c9b",
    "#8a8378",
    "#b97714",
    "#0b665c",
    "#a32a20",
    "#6b3fa0",
    "#3a2a14",
    "#c2568f",
    "#5b8c2a",
    "#1f8fb3",
)
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
_OFFSETS = [(x, y) for y in (9, -9, 0, 18, -18) for x in (9, -9)]
"""Where the name of a point may stand beside it, in points of print; the first ones are preferred."""
_RADIUS = 6.0
"""Of a mark, in pixels."""
_TITLES = {"scores": "attention scores, of full attention's", "cache": "cache, of full attention's"}


@dataclass(frozen=True)
class Point:
    """A model.

    Attributes:
        name: of the model.
        family: the models that have its colour.
        costs: its cost, by the name of what is counted.
        value: how good it is.
        spread: the standard deviation over seeds of the value's difference from the baseline's; 0 for one.
        best: by the same names, whether it is on the front.

    """

    name: str
    family: str
    costs: Mapping[str, float]
    value: float
    spread: float
    best: Mapping[str, bool]


def draw_reach(points: Sequence[Point], metric: str, rises: bool) -> bytes:
    """Draw models over each of their costs.

    Args:
        points: the models; all have the same costs.
        metric: what the value is.
        rises: whether the value is an accuracy, of which more is better.

    Returns:
        A PNG.

    """
    costs = list(points[0].costs)
    figure = new_figure(11.5, 5.2)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    families = list(dict.fromkeys(point.family for point in points))
    for axes, cost in zip(panels, costs, strict=True):
        _draw(axes, points, families, cost, rises)
        axes.set_xlabel(_TITLES[cost], color=INK, fontsize=9)
    panels[0].set_ylabel(metric, color=INK, fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.draw_without_rendering()  # from here on the layout is known
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes, cost in zip(panels, costs, strict=True):
        _label(axes, points, cost, renderer)
    return as_png(figure)


def _draw(axes: Axes, points: Sequence[Point], families: Sequence[str], cost: str, rises: bool) -> None:
    front = sorted((point.costs[cost], point.value) for point in points if point.best[cost])
    axes.step(*zip(*front, strict=True), where="post", color=GRID, linewidth=3, zorder=1)
    for number, family in enumerate(families):
        members = [point for point in points if point.family == family]
        axes.errorbar(
            [point.costs[cost] for point in members],
            [point.value for point in members],
            yerr=[point.spread for point in members] if any(point.spread for point in members) else None,
            label=family,
            linestyle="",
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],
            markersize=6,
            elinewidth=0.8,
            zorder=2,
        )
    axes.grid(color=GRID, linewidth=0.4)
    axes.set_xlim(left=0)
    if rises:
        axes.set_ylim(0, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    quieten(axes)


def _label(axes: Axes, points: Sequence[Point], cost: str, renderer: RendererAgg) -> None:
    """Name the points on the front, each where its name covers the fewest other names and points."""
    places = axes.transData.transform([(point.costs[cost], point.value) for point in points])
    taken = [Bbox([(x - _RADIUS, y - _RADIUS), (x + _RADIUS, y + _RADIUS)]) for x, y in places]
    for point in sorted((p for p in points if p.best[cost]), key=lambda p: (p.costs[cost], p.value)):
        tried = []
        for x, y in _OFFSETS:
            label = axes.annotate(
                point.name,
                (point.costs[cost], point.value),
                (x, y),
                textcoords="offset points",
                ha="left" if x > 0 else "right",
                va="center",
                fontsize=7,
                color=INK,
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": INK, "shrinkA": 0, "shrinkB": 0},
            )
            label.set_in_layout(False)
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line to the point
            outside = box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
            tried.append((label, box, outside + sum(box.overlaps(other) for other in taken)))
        best = min(tried, key=lambda one: one[2])
        taken.append(best[1])
        for label, *_ in tried:
            if label is not best[0]:
                label.remove()
