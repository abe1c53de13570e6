"""The MetaRouter's gate over training, one line per task."""

from collections.abc import Mapping

from chiaroscuro.analysis.gates import TaskGate
from chiaroscuro.report.figures import INK, as_png, new_figure, number_steps, quieten

PUBLISHED = 0.22
"""Where the paper's g settles."""
# Ultramarine, madder, ochre, malachite, umber; each with its own dashes, for readers who don't distinguish the colours.
_LINES = (("#1f3a93", "-"), ("#a32a20", "--"), ("#b07a12", "-."), ("#2f6b4f", ":"), ("#6b4a2b", (0, (5, 1))))


def draw_gates(gates: Mapping[str, TaskGate]) -> bytes:
    """Draw what `trace_gates` found.

    Returns:
        A PNG.

    """
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    axes.axhline(PUBLISHED, color=INK, linewidth=0.8, alpha=0.5)
    axes.annotate(
        f"the paper's, {PUBLISHED}",
        (0.995, PUBLISHED),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontsize=8,
    )
    for number, (task, gate) in enumerate(gates.items()):
        colour, _ = _LINES[number % len(_LINES)]
        _, dash = _LINES[(number + number // len(_LINES)) % len(_LINES)]
        label = f"{task}: {gate.final:.3f}"
        axes.plot(gate.steps, gate.gate, color=colour, linestyle=dash, linewidth=1.6, label=label)
    axes.set_ylim(0, 1)
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.set_ylabel("gate g", color=INK, fontsize=9)
    number_steps(axes, most=6)
    quieten(axes, ["top", "right"])
    figure.legend(frameon=False, fontsize=8, title="g at the end", title_fontsize=8, loc="outside right center")
    return as_png(figure)
