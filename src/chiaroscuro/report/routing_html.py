"""The routing of a text as one page: no server, no network, nothing to install.

Text and charts are part of the page and need no script. The script only reacts to the reader: it shows one layer
instead of all, and the numbers of the token that is hovered or focused. A content security policy allows that one
script and nothing else, whatever the text contains.
"""

import base64
import hashlib
import html
import json
from statistics import fmean
from typing import Any

from chiaroscuro.analysis.routing import LayerTrace, RoutingTrace
from chiaroscuro.report.page import SCRIPT, STYLE
from chiaroscuro.report.palette import NIGHT, PAPER, OperatorStyle, costliest, operator_styles
from chiaroscuro.report.visible import harmless

# Charts: x is the token, y is H. The drawing is stretched to its box, so it contains no text.
_CHART_HEIGHT = 100


def render_html(trace: RoutingTrace) -> str:
    """The page as a string, with everything it needs.

    Args:
        trace: what to show. Its text is escaped.

    """
    styles = operator_styles(trace)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    many = len(trace.routed_layers)
    if many:
        light = html.escape(costliest(trace))
        lead = (
            f"{len(trace.tokens)} tokens, {len(trace.layers)} layers, {many} of them with a choice. "
            f"The brighter a token, the more of those layers sent it to {light}."
        )
    else:
        lead = f"{len(trace.tokens)} tokens, {len(trace.layers)} layers, each with one operator: no choice."
    tau = '<span class="rule threshold"></span> threshold τ: above it, the costlier operator.'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
script-src 'sha256-{digest}'">
<title>Where attention fell · chiaroscuro</title>
<style>{_palette_css(styles)}{STYLE}</style>
</head>
<body>
<header>
<p class="house">chiaroscuro</p>
<h1>Where attention fell</h1>
<p class="lead">{lead}</p>
</header>
<main>
{_layer_choice(trace)}
{_legend(trace, styles)}
<div class="reading">
<p id="text" role="group" aria-label="The text, token by token: arrow keys move">{_tokens(trace)}</p>
<aside id="panel" aria-live="polite">
<p class="hint">Point at a token, or walk through the text with the arrow keys.</p>
</aside>
</div>
<h2>Entropy, layer by layer</h2>
<p class="note">One mark a token, in the order of the text. H is the spectral entropy of the token's vector
where the operator reads it. <span class="rule null"></span> the null: the mean H of white noise
of width {trace.width}, {trace.null_mean:.4f}.
{tau if any(layer.thresholds for layer in trace.layers) else ""}</p>
{"".join(_strip(trace, index, styles) for index in range(len(trace.layers)))}
</main>
<script type="application/json" id="trace">{_embedded(_page_data(trace, styles))}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _page_data(trace: RoutingTrace, styles: dict[str, OperatorStyle]) -> dict[str, Any]:
    """What the script needs: the trace with operators by number, without the text, which is in the page."""
    return {
        "operators": list(styles),
        "null": trace.null_mean,
        "gate": trace.meta_gate,
        "layers": [
            {
                "operators": [list(styles).index(name) for name in layer.operators],
                "of": layer.operator_index,
                "entropy": [round(value, 5) for value in layer.entropy],
                "thresholds": layer.finite_thresholds,
            }
            for layer in trace.layers
        ],
    }


def _embedded(data: dict[str, Any]) -> str:
    """JSON for a script element: without `<`, nothing in it can end the element."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _palette_css(styles: dict[str, OperatorStyle]) -> str:
    inks = "".join(f"--op{i}:{style.ink};" for i, style in enumerate(styles.values()))
    glows = "".join(f"--op{i}:{style.glow};" for i, style in enumerate(styles.values()))
    marks = "".join(
        f'[data-op="{i}"]{{--op:var(--op{i});--line:{_line(style)}}}' for i, style in enumerate(styles.values())
    )
    return f"""
:root{{color-scheme:light dark;--ground:{PAPER};{inks}}}
@media(prefers-color-scheme:dark){{:root{{--ground:{NIGHT};{glows}}}}}
{marks}"""


def _line(style: OperatorStyle) -> str:
    return f"underline {style.underline} 2px" if style.underline else "none"


def _layer_choice(trace: RoutingTrace) -> str:
    radios = ['<label><input type="radio" name="layer" value="all" checked><span>all layers</span></label>']
    for index, layer in enumerate(trace.layers):
        menu = html.escape(" · ".join(layer.operators))
        single = "" if layer.routed else ' class="single"'
        radios.append(
            f'<label{single} title="{menu}"><input type="radio" name="layer" value="{index}" '
            f'aria-label="layer {index + 1}: {menu}"><span>{index + 1}</span></label>'
        )
    return f'<fieldset class="layers"><legend>Layer</legend>{"".join(radios)}</fieldset>'


def _legend(trace: RoutingTrace, styles: dict[str, OperatorStyle]) -> str:
    """The operators as their tokens look, and the scale for all layers together."""
    items = "".join(
        f'<li><span class="sample" data-op="{number}">{html.escape(name)}</span></li>'
        for number, name in enumerate(styles)
    )
    many = len(trace.routed_layers)
    steps = range(many + 1) if many < 6 else (0, many // 3, 2 * many // 3, many)
    scale = "".join(
        f'<span class="sample depth" style="--depth:{step / max(many, 1):.3f}">{step}</span>' for step in steps
    )
    note = f'<p class="scale">{scale} of {many} layers</p>' if many else ""
    return f'<div class="legend"><ul class="operators" hidden>{items}</ul>{note}<p id="choice"></p></div>'


def _tokens(trace: RoutingTrace) -> str:
    many = max(1, len(trace.routed_layers))
    spans = []
    for number, (piece, depth) in enumerate(zip(trace.tokens, trace.depth, strict=True)):
        # A token without visible characters gets a sign by the style sheet, so that copied text doesn't contain it.
        sign = ' data-sign="…"' if not piece else f' data-sign="{"⏎" * piece.count(chr(10))}"' if "\n" in piece else ""
        stop = 0 if number == 0 else -1
        spans.append(
            f'<span class="token" id="t{number}" tabindex="{stop}" style="--depth:{depth / many:.3f}"{sign}>'
            f"{html.escape(harmless(piece))}</span>"
        )
    return "".join(spans)


def _strip(trace: RoutingTrace, index: int, styles: dict[str, OperatorStyle]) -> str:
    layer = trace.layers[index]
    landmarks = [*layer.entropy, *layer.finite_thresholds, trace.null_mean]
    low, high = min(landmarks), max(landmarks)
    margin = max(0.06 * (high - low), 1e-4)
    low, high = low - margin, high + margin

    def y(value: float) -> str:
        return f"{_CHART_HEIGHT * (high - value) / (high - low):.1f}"

    def rule(value: float, name: str) -> str:
        return f'<path class="rule {name}" d="M0 {y(value)}H{len(trace.tokens)}"/>'

    marks = []
    for number, name in enumerate(layer.operators):
        # A path of zero-length strokes: each is a dot, or a square if the line has square ends.
        dots = "".join(
            f"M{token + 0.5} {y(layer.entropy[token])}h0"
            for token, operator in enumerate(layer.operator_index)
            if operator == number
        )
        marks.append(f'<path class="mark" {_operator(name, styles, layer)} d="{dots}"/>')
    rules = rule(trace.null_mean, "null") + "".join(
        rule(threshold, "threshold") for threshold in layer.finite_thresholds
    )
    return f"""<figure class="strip" data-layer="{index}">
<figcaption><b>Layer {index + 1}</b> {_facts(layer, styles)}</figcaption>
<div class="plot"><span class="top">{high:.3f}</span><span class="bottom">{low:.3f}</span>
<svg viewBox="0 0 {len(trace.tokens)} {_CHART_HEIGHT}" preserveAspectRatio="none" role="img"
style="--mark:{max(2.6, min(5, 900 / len(trace.tokens))):.1f}px"
aria-label="Entropy of each token in layer {index + 1}">{"".join(marks)}{rules}
<path class="cursor" d=""/></svg></div>
</figure>
"""


def _operator(name: str, styles: dict[str, OperatorStyle], layer: LayerTrace) -> str:
    """The attributes that give an element an operator's look, lit if it is the costliest choice."""
    lit = " data-lit" if layer.routed and name == layer.operators[-1] else ""
    return f'data-op="{list(styles).index(name)}"{lit}'


def _facts(layer: LayerTrace, styles: dict[str, OperatorStyle]) -> str:
    operators = [
        f'<span class="sample" {_operator(name, styles, layer)}>{html.escape(name)}</span> {count} ({share:.0%})'
        for name, count, share in zip(layer.operators, layer.counts, layer.share, strict=True)
    ]
    facts = operators if layer.routed else [f"{operators[0]}, no choice"]
    facts.append(f"H mean {fmean(layer.entropy):.4f}")
    facts += [f"τ {threshold:.4f}" for threshold in layer.thresholds]
    return " · ".join(facts)
