"""All layers at once: a map with a row for each layer and a column for each token, brighter where attention fell.

It is drawn by the page of `route --html` and by the app. Brightness says it, not colour, and each cell has a title.
"""

from collections.abc import Sequence

from markupsafe import Markup, escape

from chiaroscuro.report.visible import harmless

CELL = 10
"""Of a row, in the units of the drawing; a column takes what the width leaves."""

STEPS = 8
"""Shades."""


def draw_layer_map(rows: Sequence[tuple[str, Sequence[float]]], tokens: Sequence[str]) -> Markup:
    """The map as SVG, to be put into a page whose style sheet gives `.layer-map` its colours, `--lit` of them.

    Args:
        rows: the name of each layer, and of each token from 0, the cheapest operator, to 1.
        tokens: their texts, for the titles.

    """
    parts = []
    for number, (name, levels) in enumerate(rows):
        y = number * CELL
        cells: dict[int, list[int]] = {}
        for token, level in enumerate(levels):
            if step := round(level * STEPS):
                cells.setdefault(step, []).append(token)
        for step, chosen in sorted(cells.items()):
            path = "".join(f"M{token} {y}h1v{CELL - 1}h-1z" for token in chosen)
            parts.append(f'<path class="cell" style="--lit:{step / STEPS:g}" d="{path}"/>')
        lit = sum(levels) / max(1, len(levels))
        parts.append(
            f'<rect y="{y}" width="{len(tokens)}" height="{CELL - 1}"><title>{escape(name)}: {lit:.0%}</title></rect>'
        )
    label = f"{len(rows)} layers by {len(tokens)} tokens; brighter: more attention, or kept"
    first, last = (escape(harmless(piece.strip())) for piece in (tokens[0], tokens[-1]))
    return Markup(
        f'<figure class="layer-map"><svg viewBox="0 0 {len(tokens)} {len(rows) * CELL}" preserveAspectRatio="none" '
        f'role="img" aria-label="{label}" style="height:{min(28, 1.1 * len(rows)):.1f}rem">{"".join(parts)}</svg>'
        f"<figcaption><span>{first} …</span><span>… {last}</span></figcaption></figure>"
    )
