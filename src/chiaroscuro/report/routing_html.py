"""The routing of a text as one page: no server, no network, nothing to install.

Text and charts are part of the page and need no script. The script only reacts to the reader: it shows one layer
instead of all, and the numbers of the token that is hovered or focused. A content security policy allows that one
script and nothing else, whatever the text contains.

The page is the template `routing_page.html`, with its style sheet and script beside it; Jinja escapes all that it is
given.
"""

import base64
import hashlib
import json
from importlib.resources import files
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from chiaroscuro.analysis.routing import LayerTrace, RoutingTrace, level_of
from chiaroscuro.report.layer_map import draw_layer_map
from chiaroscuro.report.palette import NIGHT, PAPER, costliest, operator_styles
from chiaroscuro.report.visible import harmless

# Charts: x is the token, y is H. The drawing is stretched to its box, so it contains no text.
_CHART_HEIGHT = 100
_HERE = files("chiaroscuro.report")
_PAGE = Environment(autoescape=True, undefined=StrictUndefined).from_string(
    _HERE.joinpath("routing_page.html").read_text("utf-8")
)


def render_html(trace: RoutingTrace) -> str:
    """The page as a string, with everything it needs.

    Args:
        trace: what to show. Its text is escaped.

    """
    styles = operator_styles(trace)
    names, many = list(styles), len(trace.routed_layers)
    style_sheet, script = (_HERE.joinpath(f"routing_page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return _PAGE.render(
        styles=styles,
        style_sheet=Markup(style_sheet),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_embedded(_page_data(trace, names)),
        paper=PAPER,
        night=NIGHT,
        tokens=_tokens(trace),
        layers=[_layer(trace, layer, names) for layer in trace.layers],
        many=many,
        scale=range(many + 1) if many < 6 else (0, many // 3, 2 * many // 3, many),
        costliest=costliest(trace),
        keeps=trace.keeps,
        has_thresholds=any(layer.thresholds for layer in trace.layers),
        width=trace.width,
        null=trace.null_mean,
        chart_height=_CHART_HEIGHT,
        layer_map=draw_layer_map(
            [(f"layer {n}: {' · '.join(layer.operators)}", _levels(layer)) for n, layer in enumerate(trace.layers, 1)],
            trace.tokens,
        ),
        mark_size=max(2.6, min(5, 900 / len(trace.tokens))),
    )


def _levels(layer: LayerTrace) -> list[float]:
    return [level_of(layer.operators, index) for index in layer.operator_index]


def _page_data(trace: RoutingTrace, names: list[str]) -> dict[str, Any]:
    """What the script needs: the trace with operators by number, without the text, which is in the page."""
    return {
        "operators": names,
        "null": trace.null_mean,
        "gate": trace.meta_gate,
        "layers": [
            {
                "operators": [names.index(name) for name in layer.operators],
                "of": layer.operator_index,
                "entropy": [round(value, 5) for value in layer.entropy],
                "thresholds": layer.finite_thresholds,
                "kept": layer.kept,
            }
            for layer in trace.layers
        ],
    }


def _embedded(data: dict[str, Any]) -> Markup:
    """JSON for a script element: without `<`, nothing in it can end the element."""
    return Markup(json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"))


def _tokens(trace: RoutingTrace) -> list[dict[str, Any]]:
    many = max(1, len(trace.routed_layers))
    return [
        {
            "text": harmless(piece),
            "depth": depth / many,
            # A token without visible characters gets a sign by the style sheet, so that copied text doesn't contain it.
            "sign": "⏎" * piece.count("\n") if piece else "…",
        }
        for piece, depth in zip(trace.tokens, trace.depth, strict=True)
    ]


def _layer(trace: RoutingTrace, layer: LayerTrace, names: list[str]) -> dict[str, Any]:
    """A layer's facts and its chart, as paths."""
    landmarks = [*layer.entropy, *layer.finite_thresholds, trace.null_mean]
    margin = max(0.06 * (max(landmarks) - min(landmarks)), 1e-4)
    low, high = min(landmarks) - margin, max(landmarks) + margin

    def y(value: float) -> str:
        return f"{_CHART_HEIGHT * (high - value) / (high - low):.1f}"

    def dots(operator: int) -> str:
        """Zero-length strokes: each is a dot, or a square if the line has square ends."""
        chosen = (token for token, index in enumerate(layer.operator_index) if index == operator)
        return "".join(f"M{token + 0.5} {y(layer.entropy[token])}h0" for token in chosen)

    rules = [("null", trace.null_mean), *(("threshold", threshold) for threshold in layer.finite_thresholds)]
    return {
        "routed": layer.routed,
        "menu": " · ".join(layer.operators),
        "operators": [
            {
                "number": names.index(name),
                "name": name,
                "lit": layer.routed and name == layer.operators[-1],
                "count": layer.counts[k],
                "share": layer.share[k],
                "path": dots(k),
            }
            for k, name in enumerate(layer.operators)
        ],
        "mean": fmean(layer.entropy),
        "thresholds": layer.thresholds,
        "low": low,
        "high": high,
        "rules": [(name, f"M0 {y(value)}H{len(trace.tokens)}") for name, value in rules],
    }
