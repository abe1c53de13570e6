"""The routing of a text as a figure for a paper or a slide: layers × tokens, and a summary of each layer.

A row per layer, in three columns: the entropy of every token with its operator in a stripe below, and in another, where
that is decided, by how many key-value heads it is kept; the share per operator; and the distribution of H with its
thresholds and the null. A text can have any length; its tokens are written below as long as they are legible.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from chiaroscuro.analysis.routing import RoutingTrace
from chiaroscuro.files import write_bytes
from chiaroscuro.report.figures import INK, as_png, new_figure, quieten
from chiaroscuro.report.fonts import Fonts, fonts_for
from chiaroscuro.report.palette import OperatorStyle, operator_styles
from chiaroscuro.report.visible import label

_LABELLED_TOKENS = 60
_NULL, _THRESHOLD = "#3f5f8a", "#a32a20"
# From shadow to light, without hue, so that it can't be confused with the operators' colours.
_ENTROPY_MAP = LinearSegmentedColormap.from_list("chiaroscuro", ["#14110d", "#59544d", "#a8a298", "#f4f1ea"])
_KEPT_MAP = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#7a2f80"])
# Below each row of entropies are the stripe of operators, that of the kept ones if any are, and a gap.
_ENTROPY_ROWS, _STRIPE_ROWS, _GAP_ROWS = 8, 3, 1


def draw_routing(trace: RoutingTrace) -> Figure:
    """Draw the trace.

    Args:
        trace: what to show, of any length.

    Returns:
        A figure on an Agg canvas; pyplot's global state is not touched.

    """
    styles = operator_styles(trace)
    layers, tokens = len(trace.layers), len(trace.tokens)
    labelled = tokens <= _LABELLED_TOKENS
    row_height = float(np.clip(3.6 / layers, 0.27, 0.62))
    width = float(np.clip(0.19 * tokens, 4.5, 9.5)) + 5.5
    height = row_height * layers + (2.4 if labelled else 1.9)
    figure = new_figure(width, height)
    map_axes, share_axes, spread_axes = figure.subplots(
        1, 3, sharey=True, width_ratios=[width - 5.5, 1.3, 2.7], gridspec_kw={"wspace": 0.03}
    )
    fonts = fonts_for(label(piece) for piece in trace.tokens) if labelled else fonts_for(())
    norm = _draw_map(map_axes, trace, styles, fonts if labelled else None)
    _draw_shares(share_axes, trace, styles)
    _draw_spread(spread_axes, trace)
    for axes in (map_axes, share_axes, spread_axes):
        axes.set_ylim(layers - 0.5, -0.5)
        quieten(axes)

    bar = figure.colorbar(
        ScalarMappable(norm, _ENTROPY_MAP),
        ax=map_axes,
        location="top",
        extend="both",
        aspect=65,
        fraction=0.05,
        pad=0.02,
    )
    bar.ax.axvline(trace.null_mean, color=_NULL, linewidth=2)
    bar.ax.tick_params(labelsize=7, colors=INK)
    bar.set_label("spectral entropy H", fontsize=8, color=INK)
    bar.outline.set_visible(False)

    operators = [Patch(color=style.area, label=name) for name, style in styles.items()]
    if trace.keeps:
        operators.append(Patch(color=_KEPT_MAP(1.0), label="kept to be seen from far"))
    figure.legend(handles=operators, loc="outside lower left", ncols=len(operators), fontsize=8, frameon=False)
    title = f"{tokens} tokens, {len(trace.routed_layers)} of {layers} layers routed, width {trace.width}"
    if trace.meta_gate is not None:
        title += f", gate of layer 1: g = {np.mean(trace.meta_gate):.3f}"
        if len(trace.meta_gate) > 1:
            title += f" ({min(trace.meta_gate):.3f}–{max(trace.meta_gate):.3f})"
    if fonts.note:
        title += f"; {fonts.note}"
    figure.suptitle(title, fontsize=9, color=INK, x=0.008, ha="left")
    return figure


def save_png(trace: RoutingTrace, path: str | Path) -> None:
    """Draw the trace and write it as a PNG file, whole or not at all.

    Raises:
        UserError: the file can't be written there.

    """
    write_bytes(path, as_png(draw_routing(trace), dpi=160))


def _draw_map(axes: Axes, trace: RoutingTrace, styles: dict[str, OperatorStyle], fonts: Fonts | None) -> Normalize:
    layers, tokens = len(trace.layers), len(trace.tokens)
    entropies = np.array([layer.entropy for layer in trace.layers])
    # Outliers would leave no contrast for the rest.
    low, high = np.percentile(entropies, [1, 99])
    margin = max(high - low, 1e-3) * 0.02
    norm = Normalize(min(low, trace.null_mean) - margin, max(high, trace.null_mean) + margin)
    # One image for all rows instead of a mark per token, so thousands of tokens are no problem.
    kept_from = _ENTROPY_ROWS + _STRIPE_ROWS
    rows = kept_from + (_STRIPE_ROWS if trace.keeps else 0) + _GAP_ROWS
    picture = np.ones((layers, rows, tokens, 3))
    picture[:, :_ENTROPY_ROWS] = _ENTROPY_MAP(norm(entropies))[:, None, :, :3]
    for row, layer in zip(picture, trace.layers, strict=True):
        colours = np.array([to_rgb(styles[name].area) for name in layer.operators])
        row[_ENTROPY_ROWS:kept_from] = colours[list(layer.operator_index)]
        if layer.kept is not None:
            row[kept_from:-_GAP_ROWS] = _KEPT_MAP(np.array(layer.kept))[:, :3]
    axes.imshow(
        picture.reshape(layers * rows, tokens, 3),
        aspect="auto",
        extent=(0, tokens, layers - 0.5, -0.5),
    )
    axes.set_yticks(range(layers), [str(index + 1) for index in range(layers)])
    axes.set_ylabel("layer", fontsize=8, color=INK)
    if fonts:
        names = [_cut(fonts.drawable(label(piece))) for piece in trace.tokens]
        axes.set_xticks(np.arange(tokens) + 0.5, names, rotation=90)
        for text in axes.get_xticklabels():
            # A text may contain dollar signs, which are not formulas.
            text.set(fontsize=7.5, fontfamily=list(fonts.families), parse_math=False)
    else:
        axes.set_xlabel("token, in the order of the text", fontsize=8, color=INK)
    return norm


def _draw_shares(axes: Axes, trace: RoutingTrace, styles: dict[str, OperatorStyle]) -> None:
    for row, layer in enumerate(trace.layers):
        start = 0.0
        for name, share in zip(layer.operators, layer.share, strict=True):
            axes.barh(row, share, left=start, height=0.5, color=styles[name].area)
            start += share
        note = f"{layer.share[-1]:.0%}" if layer.routed else "fixed"
        axes.text(1.05, row, note, va="center", fontsize=7, color=styles[layer.operators[-1]].ink)
    axes.set_xlim(0, 1.35)
    axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    axes.set_title("share per operator", fontsize=8, color=INK)


def _draw_spread(axes: Axes, trace: RoutingTrace) -> None:
    values = [value for layer in trace.layers for value in (*layer.entropy, *layer.finite_thresholds)]
    low, high = np.percentile(values, [0.5, 99.5])
    low, high = min(low, trace.null_mean), max(high, trace.null_mean)
    margin = max(high - low, 1e-3) * 0.05
    edges = np.linspace(low - margin, high + margin, 41)
    for row, layer in enumerate(trace.layers):
        counts, _ = np.histogram(np.clip(layer.entropy, edges[0], edges[-1]), edges)
        axes.stairs(row + 0.42 - 0.84 * counts / counts.max(), edges, baseline=row + 0.42, fill=True, color="#b9b2a6")
        axes.vlines(
            layer.finite_thresholds,
            row - 0.45,
            row + 0.45,
            color=_THRESHOLD,
            linewidth=1.4,
            linestyle=(0, (2, 1)),
        )
    axes.axvline(trace.null_mean, color=_NULL, linewidth=1.4)
    axes.set_xlim(edges[0], edges[-1])
    axes.locator_params(axis="x", nbins=4)
    axes.set_title("distribution of H", fontsize=8, color=INK)
    handles = [Line2D([], [], color=_NULL, linewidth=1.4, label=f"null {trace.null_mean:.4f}")]
    if any(layer.thresholds for layer in trace.layers):
        handles.append(Line2D([], [], color=_THRESHOLD, linewidth=1.4, linestyle=(0, (2, 1)), label="threshold τ"))
    axes.figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=8, frameon=False)


def _cut(text: str) -> str:
    return text if len(text) <= 14 else text[:13] + "…"
