"""The pictures of the evidence: one of each question."""

from collections.abc import Mapping, Sequence
from typing import Any

from chiaroscuro.report.figures import GRID, INK, as_png, new_figure, quieten

Spread = tuple[float, float, float]
"""A low end, a mean and a high end."""

COLOURS = ("#2b4c9b", "#b97714", "#0b665c", "#a32a20", "#6b3fa0", "#3a2a14")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "P")


def draw_gain(
    correlations: Mapping[str, Mapping[str, Mapping[str, Spread]]],
    distances: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
) -> bytes:
    """Rank correlations by score, and the distance that attention reaches by H; a row of panels for each model.

    Args:
        correlations: by model, target and score, with their intervals.
        distances: by model and layer, the tenths of H with their mean `distance`.

    Returns:
        A PNG.

    """
    figure = new_figure(9.0, 2.9 * len(correlations))
    panels = figure.subplots(len(correlations), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), (name, targets) in zip(panels, correlations.items(), strict=True):
        for n, (title, scores) in enumerate(targets.items()):
            places = [i + (n - 0.5) * 0.3 for i in range(len(scores))]
            low, mean, high = zip(*scores.values(), strict=True)
            ends = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
            left.errorbar(
                places, mean, ends, fmt=MARKERS[n], color=COLOURS[n], markersize=5, capsize=2, linewidth=1, label=title
            )
            left.set_xticks(range(len(scores)), list(scores))
        left.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
        left.set_ylabel("rank correlation", color=INK, fontsize=9)
        left.set_title(name, color=INK, fontsize=9, loc="left")
        left.legend(frameon=False, fontsize=8)
        layers = distances[name]
        for i, tenths in enumerate(layers):
            shade = 0.15 + 0.75 * i / max(1, len(layers) - 1)
            right.plot(range(1, len(tenths) + 1), [one["distance"] for one in tenths], color=COLOURS[0], alpha=shade)
        right.set_xlabel("tenth of H, low to high", color=INK, fontsize=9)
        right.set_ylabel("distance, tokens", color=INK, fontsize=9)
        right.set_title("attention beyond the window; darker: later layers", color=INK, fontsize=8, loc="left")
        for axes in (left, right):
            axes.grid(axis="y", color=GRID, linewidth=0.6)
            quieten(axes, ["top", "right"])
    return as_png(figure)
