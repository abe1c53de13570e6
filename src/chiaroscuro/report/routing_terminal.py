"""The routing of a text in the terminal: the text, highlighted where attention fell, and the numbers below it.

A token's background colour shows its operator; without colours (a pipe, NO_COLOR) brackets do. A legend explains them.
"""

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chiaroscuro.analysis.routing import LayerTrace, RoutingTrace
from chiaroscuro.report.palette import (
    LIGHT,
    SHADOW,
    OperatorStyle,
    blend,
    costliest,
    operator_styles,
)
from chiaroscuro.report.visible import harmless, label

_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_LABEL_WIDTH = 14
_KEPT = "*"
"""Marks a token that is kept, where there is no colour to underline it in."""


def print_routing(trace: RoutingTrace, console: Console, *, per_token: bool = False) -> None:
    """Print the text coloured by operator, a legend, and the table of layers.

    Args:
        trace: what to show.
        console: where to print; it decides between colours and brackets, and how wide tables are.
        per_token: whether to add the entropy of every token in every layer.

    """
    colour = console.color_system is not None and not console.no_color
    styles = operator_styles(trace)
    console.print(_legend(trace, styles, colour), end="\n\n")
    if trace.routed_layers:
        console.print(Text(f"All {len(trace.routed_layers)} routed layers together", style="bold"))
        console.print(_summary(trace, colour), end="\n\n")
    for index in trace.routed_layers:
        layer = trace.layers[index]
        console.print(Text(f"Layer {index + 1} · {_menu(layer)}", style="bold"))
        console.print(_paragraph(trace, layer, styles, colour), end="\n\n")
    console.print(_layer_table(trace, styles))
    if per_token:
        # A cell takes 8 columns; the layers are split into tables that fit the console.
        at_once = max(1, (console.width - _LABEL_WIDTH - 10) // 8)
        for first in range(0, len(trace.layers), at_once):
            console.print(_token_table(trace, styles, range(len(trace.layers))[first : first + at_once]))


def _menu(layer: LayerTrace) -> str:
    """The menu with the thresholds between its operators: `dct ≤ 0.8650 < attention`."""
    if len(layer.thresholds) != len(layer.operators) - 1:
        return " · ".join(layer.operators)
    steps = [
        f" ≤ {threshold:.4f} < {name}" for threshold, name in zip(layer.thresholds, layer.operators[1:], strict=True)
    ]
    return layer.operators[0] + "".join(steps)


def _ground(style: OperatorStyle) -> str:
    """A style for light and dark terminals: it sets the background too, so the contrast is known."""
    return "dim" if not style.underline else f"{SHADOW} on {style.glow}"


def _marked(piece: str, before: str, after: str, style: str = "") -> Text:
    """Put two marks around a token, inside its spaces and line breaks, so that the text still wraps."""
    piece = harmless(piece)
    core = piece.strip()
    if not core:
        # A token of spaces or line breaks was routed, too: make it visible, and keep its line breaks.
        core, breaks = (label(piece), "\n" * piece.count("\n")) if before or after else (piece, "")
        return Text.assemble(before, (core, style), after, breaks)
    start = piece.index(core)
    return Text.assemble(piece[:start], before, (core, style), after, piece[start + len(core) :])


def _paragraph(trace: RoutingTrace, layer: LayerTrace, styles: dict[str, OperatorStyle], colour: bool) -> Text:
    text = Text()
    for token, piece in enumerate(trace.tokens):
        style = styles[layer.operator(token)]
        before, after = ("", "") if colour else style.brackets
        kept = layer.kept is not None and layer.kept[token] > 0
        if kept and not colour:
            after += _KEPT
        ground = (_ground(style) + (" underline" if kept else "")) if colour else ""
        text.append_text(_marked(piece, before, after, ground))
    return text


def _depth_style(fraction: float) -> str:
    if fraction == 0:
        return "dim"
    ground = blend(SHADOW, LIGHT, fraction)
    return f"{'#ffffff' if fraction < 0.45 else SHADOW} on {ground}"


def _summary(trace: RoutingTrace, colour: bool) -> Text:
    text = Text()
    for piece, depth in zip(trace.tokens, trace.depth, strict=True):
        if colour:
            text.append_text(_marked(piece, "", "", _depth_style(depth / len(trace.routed_layers))))
        else:
            text.append_text(_marked(piece, "", str(depth).translate(_SUPERSCRIPT) if depth else ""))
    return text


def _legend(trace: RoutingTrace, styles: dict[str, OperatorStyle], colour: bool) -> Text:
    text = Text()
    for name, style in styles.items():
        before, after = ("", "") if colour else style.brackets
        text.append_text(_marked(name, before, after, _ground(style) if colour else ""))
        text.append(f" ({style.letter})   ")
    if trace.keeps:
        text.append_text(Text("kept", style="underline") if colour else Text(f"kept{_KEPT}"))
        text.append(" to be seen from far   ")
    if not trace.routed_layers:
        return text.append("no layer has a choice: each has one operator")
    many = len(trace.routed_layers)
    if colour:
        text.append("together: ")
        for depth in range(many + 1) if many < 6 else (0, many // 3, 2 * many // 3, many):
            text.append_text(Text(f" {depth} ", style=_depth_style(depth / many)))
    else:
        text.append("together: word²")
    return text.append(f" = in how many of the {many} layers it got {costliest(trace)}")


def _layer_table(trace: RoutingTrace, styles: dict[str, OperatorStyle]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), caption_justify="left")
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("operator")
    keeps = trace.keeps
    for heading in ("tokens", "share", "τ", "H mean", "H 5–95 %", *(["kept"] if keeps else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, layer in enumerate(trace.layers):
        low, high = np.percentile(layer.entropy, [5, 95])
        table.add_row(
            str(index + 1),
            Text("\n").join(Text(name, style=_name_style(styles[name])) for name in layer.operators),
            "\n".join(str(count) for count in layer.counts),
            "\n".join(f"{share:.1%}" for share in layer.share) if layer.routed else "no choice",
            # Each τ is on the line of the operator that gets the tokens above it.
            "".join(f"\n{threshold:.4f}" for threshold in layer.thresholds),
            f"{np.mean(layer.entropy):.4f}",
            f"{low:.4f}–{high:.4f}",
            *([] if not keeps else ["–" if layer.kept is None else f"{np.mean(layer.kept):.1%}"]),
        )
    table.add_section()
    table.add_row("null", f"white noise, d = {trace.width}", "", "", "", f"{trace.null_mean:.4f}", "")
    if trace.meta_gate is not None:
        low, high = min(trace.meta_gate), max(trace.meta_gate)
        spread = f", {low:.3f}–{high:.3f}" if len(trace.meta_gate) > 1 else ""
        table.caption = f"MetaRouter: layer 1 counts with weight g = {np.mean(trace.meta_gate):.3f}{spread}"
    return table


def _name_style(style: OperatorStyle) -> str:
    return "bold" if style.underline == "solid" else ""


def _token_table(trace: RoutingTrace, styles: dict[str, OperatorStyle], indices: range) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), caption_justify="left")
    table.caption = "H of each token and the letter of its operator"
    if trace.keeps:
        table.caption += f"; {_KEPT} is kept to be seen from far"
    table.add_column("#", justify="right")
    table.add_column("token", max_width=_LABEL_WIDTH, no_wrap=True)
    for index in indices:
        table.add_column(
            f"layer {index + 1}" if len(trace.layers) < 10 else f"{index + 1}", justify="right", no_wrap=True
        )
    for token, piece in enumerate(trace.tokens):
        cells = []
        for index in indices:
            layer = trace.layers[index]
            style = styles[layer.operator(token)]
            # Four decimals, without the zero before the point: H is in [0, 1], and thresholds differ in the third
            # decimal.
            number = f"{layer.entropy[token]:.4f}".removeprefix("0")
            kept = _KEPT if layer.kept is not None and layer.kept[token] > 0 else ""
            cells.append(Text.assemble(number, (style.letter, _ground(style)), kept))
        table.add_row(str(token), Text(label(piece)), *cells)
    return table
