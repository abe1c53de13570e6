"""Time over sequence length as a plot: a panel per task, a line per model, both axes logarithmic.

Full attention bends upwards where the scores begin to cost more than the matrix products. The plot shows how far below
it the routed models stay, and from which length on.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from chiaroscuro.analysis.speed import DECODED
from chiaroscuro.report.figures import GRID, INK, as_png, new_figure, quieten

PANELS = {"train": "training step", "forward": "prefill", "decode": "decoding"}
_LABELLED = ("1.0", "2.0", "3.0", "4.0", "5.0", "7.0")
_BASELINE, _LLAMA, _DENSE = INK, "#2b4c9b", "#a32a20"
# Attention is where the light falls: the less of it, the paler the line.
_CONTEXTS = {"routed": ("#7a4700", "#b97714", "#e0b15c"), "all": ("#0b665c", "#3f9c90", "#8fcabf")}
_MARKERS = "ooosDv^"
"""From the fourth share on a colour comes again, with another marker."""


def draw_performance(cells: Sequence[dict[str, Any]]) -> bytes:
    """Draw what was measured.

    Args:
        cells: of a results file of the benchmark.

    Returns:
        A PNG of the timed tasks among those that were measured.

    """
    tasks = [task for task in PANELS if any(cell["task"] == task for cell in cells)]
    figure = new_figure(4.2 * max(1, len(tasks)) + 2.2, 4.4)
    panels = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=False):
        _draw_panel(axes, task, [cell for cell in cells if cell["task"] == task])
    if tasks:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return as_png(figure)


def _draw_panel(axes: Axes, task: str, cells: list[dict[str, Any]]) -> None:
    shares = sorted({cell["share"] for cell in cells if cell["kind"] == "sparse"}, reverse=True)
    for name in dict.fromkeys(cell["candidate"] for cell in cells):
        line = sorted((cell for cell in cells if cell["candidate"] == name), key=lambda cell: cell["length"])
        axes.plot(
            [cell["length"] for cell in line],
            [1e3 * cell["median"] / _tokens(cell) for cell in line],
            label=name,
            **_style(line[0], shares),
        )
    lengths = sorted({cell["length"] for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:.1e}"[:3] in _LABELLED else ""))
    axes.set_xlabel("T, tokens of a sequence" if task != "decode" else "T, tokens in the cache", color=INK, fontsize=9)
    axes.set_ylabel("milliseconds a token" + (" of every sequence" if task == "decode" else ""), color=INK, fontsize=9)
    axes.set_title(PANELS[task], loc="left", color=INK, fontsize=10)
    axes.grid(color=GRID, linewidth=0.6)
    axes.grid(which="minor", axis="y", color=GRID, linewidth=0.3)
    quieten(axes)


def _tokens(cell: dict[str, Any]) -> int:
    return DECODED if cell["task"] == "decode" else cell["batch"] * cell["length"]


def _style(cell: dict[str, Any], shares: list[float]) -> dict[str, Any]:
    if cell["kind"] == "sparse":
        colours = _CONTEXTS[cell["context"]]
        number = shares.index(cell["share"])
        colour = colours[min(number, len(colours) - 1)]
        marker = _MARKERS[number % len(_MARKERS)]
        return {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.6}
    colour, dashes = {"baseline": (_BASELINE, "-"), "llama": (_LLAMA, "--"), "dense": (_DENSE, ":")}[cell["kind"]]
    return {"color": colour, "linestyle": dashes, "linewidth": 2.2 if cell["kind"] == "baseline" else 1.6}
