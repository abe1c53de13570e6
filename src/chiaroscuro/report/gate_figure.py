"""The MetaRouter's gate over training, one line per task."""

import io
from collections.abc import Mapping

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from chiaroscuro.analysis.gates import TaskGate

PUBLISHED = 0.22
"""Where the paper's g settles."""
_INK = "#241d14"
# Ultramarine, madder, ochre, malachite, umber; each with its own dashes, for readers who don't distinguish the colours.
_LINES = (("#1f3a93", "-"), ("#a32a20", "--"), ("#b07a12", "-."), ("#2f6b4f", ":"), ("#6b4a2b", (0, (5, 1))))


def draw_gates(gates: Mapping[str, TaskGate]) -> bytes:
    """Draw what `trace_gates` found.

    Returns:
        A PNG.

    """
    figure = Figure(figsize=(7.0, 3.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(PUBLISHED, color=_INK, linewidth=0.8, alpha=0.5)
    axes.annotate(
        f"the paper's, {PUBLISHED}",
        (0.995, PUBLISHED),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=_INK,
        fontsize=8,
    )
    for number, (task, gate) in enumerate(gates.items()):
        colour, dash = _LINES[number % len(_LINES)]
        label = f"{task}: {gate.final:.3f}"
        axes.plot(gate.steps, gate.gate, color=colour, linestyle=dash, linewidth=1.6, label=label)
    axes.set_ylim(0, 1)
    axes.set_xlabel("step", color=_INK, fontsize=9)
    axes.set_ylabel("gate g", color=_INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, title="g at the end", title_fontsize=8, loc="outside right center")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
