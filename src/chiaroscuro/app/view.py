"""Readings, texts and runs as HTML and pictures. All text of users is escaped."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from chiaroscuro.app.reading import LayerReading, Reading
from chiaroscuro.app.writing import Written
from chiaroscuro.report.figures import GRID, INK, as_png, line_look, new_figure, quieten
from chiaroscuro.report.layer_map import draw_layer_map
from chiaroscuro.report.visible import harmless

ROUTING, LOSS = "routing", "loss beside full attention's"
LARGEST_CHANGE = 0.5
"""Nats above which a change of the loss has its full colour."""


def draw_reading(reading: Reading, layer: int | None, colour: str) -> str:
    """The text, each token coloured; below it the map of all layers.

    Args:
        reading: what to show.
        layer: which layer, or None for all.
        colour: `ROUTING` or `LOSS`.

    """
    shown = None if layer is None else reading.layers.get(layer)
    nothing = (0.0,) * len(reading.tokens)
    levels = reading.level if layer is None else nothing if shown is None else shown.level
    tokens = []
    for t, piece in enumerate(reading.tokens):
        style = f"--lit:{levels[t]:.2f}"
        classes = "token" + (" lit" if levels[t] > 0.5 else "")
        change = _change(reading, t)
        if colour == LOSS:
            strength = min(1.0, abs(change or 0.0) / LARGEST_CHANGE)
            classes, style = f"token {'worse' if (change or 0) > 0 else 'better'}", f"--lit:{strength:.2f}"
        elif shown is not None and shown.kept is not None and shown.kept[t] >= 0.5:
            classes += " kept"
        tip = tip_of(reading, t, layer)
        tokens.append(
            Markup('<span class="{}" tabindex="0" style="{}" data-tip="{}" aria-label="{}">{}</span>').format(
                classes, style, tip, tip.replace("\n", ", "), _visible(piece)
            )
        )
    parts = [
        Markup('<div class="reading" role="group" aria-label="The text, token by token">'),
        *tokens,
        Markup("</div>"),
    ]
    if reading.layers:
        rows = [(f"layer {i + 1}: {_what(one)}", one.level) for i, one in reading.layers.items()]
        parts.append(draw_layer_map(rows, reading.tokens))
    return "".join(map(str, parts))


def tip_of(reading: Reading, t: int, layer: int | None) -> str:
    """What is known of a token, a line each."""
    lines = [f"“{harmless(reading.tokens[t])}”, token {t + 1} of {len(reading.tokens)}"]
    if layer is None:
        of = "layers and heads" if any(one.looking for one in reading.layers.values()) else "layers"
        for what, levels in (("attention", reading.attention), ("kept", reading.kept)):
            if levels is not None:
                lines.append(f"{what} in {levels[t]:.0%} of the {of} that choose")
    elif layer not in reading.layers:
        lines.append(f"layer {layer + 1} chooses nothing")
    else:
        one = reading.layers[layer]
        heads = "" if one.looking is None else f", by {one.looking[t]:.0%} of the key-value heads"
        lines.append(f"layer {layer + 1}: {one.operators[one.index[t]]}{heads if one.index[t] else ''}")
        lines.append(f"H {one.entropy[t]:.4f}")
        if one.score is not None and one.threshold is not None:
            lines.append(f"score {one.score[t]:.4f}, threshold {one.threshold[t]:.4f}")
        if one.kept is not None:
            lines.append(f"kept by {one.kept[t]:.0%} of the key-value heads")
        if one.far is not None:
            lines.append(f"attention: near {1 - one.far[t]:.1%}, far {one.far[t]:.1%}")
    loss, full = reading.loss[t], reading.full[t]
    if loss is not None and full is not None:
        lines.append(f"loss {loss:.3f}, with full attention {full:.3f} ({loss - full:+.3f})")
    return "\n".join(lines)


def _change(reading: Reading, t: int) -> float | None:
    loss, full = reading.loss[t], reading.full[t]
    return None if loss is None or full is None else loss - full


def _visible(piece: str) -> str:
    shown = harmless(piece)
    return shown.replace("\n", "⏎\n") if shown else "…"


def summary(reading: Reading, served_name: str) -> str:
    """One line on a reading."""
    pairs = [(a, b) for a, b in zip(reading.loss, reading.full, strict=True) if a is not None and b is not None]
    if not pairs:
        return f"{len(reading.tokens)} token"
    ours, whole = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    line = f"{len(reading.tokens):,} tokens. Loss {ours:.3f} nats a token, with full attention {whole:.3f}."
    if not reading.layers:
        return f"{line} {served_name} routes nothing: every layer attends to everything."
    if (looks := reading.attention) is not None:
        choosing = sum(one.attention is not None for one in reading.layers.values())
        line += f" {sum(looks) / len(looks):.1%} got the costliest operator, the mean over {choosing} layers."
    if (kept := reading.kept) is not None:
        line += f" {sum(kept) / len(kept):.1%} are kept."
    return line


def _what(layer: LayerReading) -> str:
    """Between what a layer chooses, for the name of its row."""
    return "kept" if layer.attention is None and layer.kept is not None else " · ".join(layer.operators)


def draw_written(prompt: str, written: Written, title: str) -> str:
    """A continuation as it comes, with its speed and its cache."""
    numbers = (
        "no cache: every token reads the whole text again"
        if written.numbers is None
        else (f"cache {written.numbers:,} numbers")
    )
    head = Markup("<h4>{}</h4><p>{} tokens, {:.1f} tokens/s, {}</p>").format(
        title, len(written.pieces), written.speed, numbers
    )
    span = Markup('<span class="token{}" style="--lit:{:.2f}" title="attention in {:.0%} of the layers">{}</span>')
    tokens = [
        span.format(" lit" if level > 0.5 else "", level, level, _visible(piece))
        for piece, level in zip(written.pieces, written.levels, strict=True)
    ]
    said = Markup('<div class="reading"><span class="prompt">{}</span>').format(_visible(prompt))
    return str(head + said) + "".join(map(str, tokens)) + "</div>"


def draw_panels(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> bytes:
    """A run's curves, one panel each, as a PNG."""
    figure = new_figure(9.0, 2.3 * len(panels))
    for axes, (title, lines) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        for n, (name, points) in enumerate(lines.items()):
            marker = "o" if len(points) < 3 else ""
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.3, marker=marker, **line_look(n))
        axes.set_title(title, color=INK, fontsize=9, loc="left")
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        quieten(axes, ["top", "right"])
    return as_png(figure)


def escaped(text: str) -> str:
    """Text as HTML."""
    return str(escape(harmless(text)))
