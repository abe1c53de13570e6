"""Draw the pictures of README and the site: `python docs/pictures.py`, and `… pictures.py RUN` for the routed text.

RUN is a run's folder, such as the `runs/quickstart/small` that `make quickstart` leaves. The committed picture is of
`chiaroscuro train recipes/small.yaml trainer.tokens=286_720`, 140 steps.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from chiaroscuro.analysis.routing import RoutingTrace, trace_routing
from chiaroscuro.model.loading import load_checkpoint, load_checkpoint_tokenizer
from chiaroscuro.ops import dct, null_entropy_mean, spectral_entropy

IMAGES = Path(__file__).parent / "images"
TEXT = (
    "Return a list of the words in the string, using sep as the delimiter string. If maxsplit is given, at most "
    "maxsplit splits are done, and the remainder of the string is returned as the final element of the list."
)
INK, PAPER, SHADOW, LIGHT, BLUE, RED = "#241d14", "#ffffff", "#6f665a", "#e59a1c", "#3f5f8a", "#a32a20"
PALE = {"dct": "#d9d4cb", "rbf": "#c9d6e6", "attention": "#f6d9a4"}


def new_figure(width: float, height: float, facecolor: str = PAPER) -> Figure:
    """A figure on a canvas of its own, in inches."""
    figure = Figure(figsize=(width, height), facecolor=facecolor)
    FigureCanvasAgg(figure)
    return figure


def blank(figure: Figure, width: float, height: float) -> Axes:
    """Axes over the whole figure, in units of their own, without a frame."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def save(figure: Figure, name: str) -> None:
    """Write the figure, the same bytes for the same figure."""
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(IMAGES / name, dpi=200, metadata={"Date": None} if name.endswith("svg") else None)


def routed_text(trace: RoutingTrace) -> Figure:
    """A text in which a token is the lighter, the more of the routed layers gave it attention."""
    layers, columns, line = len(trace.routed_layers), 60, 44.0
    ramp = ["#8b8478", "#b09a70", "#cfa95a", "#eeb13c", "#ffd27a"]
    colours = [ramp[round(i * (len(ramp) - 1) / layers)] for i in range(layers + 1)]
    width, places, x, y = columns * 9.03 + 36.0, [], 0, 0
    for n, token in enumerate(trace.tokens):
        if x + len(token.rstrip()) > columns:
            # A line breaks before a word, so the pieces of a word that has begun move down with it.
            first = next(i for i in range(n, -1, -1) if trace.tokens[i].startswith(" "))
            moved = [(i, row, column) for i, row, column in places if i >= first]
            places, x, y = places[: len(places) - len(moved)], -1, y + 1
            for i in range(first, n):
                places.append((i, y, x))
                x += len(trace.tokens[i])
        places.append((n, y, x))
        x += len(token)
    height = (y + 1) * line + 58.0
    figure = new_figure(width / 72, height / 72, "none")
    axes = blank(figure, width, height)
    axes.add_patch(
        FancyBboxPatch((8, 8), width - 16, height - 16, boxstyle="round,pad=0,rounding_size=8", fc="#17130e", ec="none")
    )
    letters = {"family": "DejaVu Sans Mono", "parse_math": False, "va": "baseline"}
    for n, row, column in places:
        token, top = trace.tokens[n], 36 + row * line
        left = 18 + column * 9.03
        axes.text(left, top, token, size=15, color=colours[trace.depth[n]], **letters)
        lead = (len(token) - len(token.lstrip())) * 9.03
        span = max(len(token.strip()), 1) * 9.03 - 1.6
        for i, layer in enumerate(trace.routed_layers):
            given = trace.layers[layer].operator(n) == "attention"
            cell = (left + lead + i * span / layers, top + 6)
            axes.add_patch(Rectangle(cell, span / layers - min(1.6, span / 20), 4, color=LIGHT if given else "#3a332a"))
    note = f"Layers with attention, of the {layers} that choose:"
    axes.text(18, height - 24, note, size=10.5, color="#a8a298", family="DejaVu Sans", va="baseline")
    for i, colour in enumerate(colours):
        axes.text(262 + 24 * i, height - 24, str(i), size=13, color=colour, weight="bold", **letters)
    axes.text(width - 18, height - 24, "bars: layer by layer", size=10.5, color="#a8a298", ha="right", va="baseline")
    return figure


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str, size: float = 10) -> None:
    """A labelled box."""
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=6", fc=colour, ec=INK, lw=0.9))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", size=size, color=INK, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """An arrow from one point to another."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.1, shrinkA=0, shrinkB=0)
    )


def layer() -> Figure:
    """One layer: the router reads the token, picks an operator, and the feed-forward follows."""
    width, height = 620.0, 250.0
    figure = new_figure(width / 72, height / 72)
    axes = blank(figure, width, height)
    box(axes, 20, 105, 74, 40, "token\nx, width d", "#ffffff")
    box(axes, 140, 90, 110, 70, "router\nscore against\nthresholds τ", "#eeebe5")
    for name, y, note in (
        ("dct", 22, "filters its own spectrum"),
        ("rbf", 102, "random features"),
        ("attention", 182, "reads earlier tokens"),
    ):
        box(axes, 312, y, 104, 46, name, PALE[name], 11)
        axes.text(364, y + 57, note, ha="center", va="center", size=8, color=SHADOW)
        arrow(axes, (250, 125), (312, y + 23), LIGHT if name == "attention" else SHADOW)
        arrow(axes, (416, y + 23), (468, 125), SHADOW)
    box(axes, 468, 98, 60, 54, "norm and\nresidual", "#ffffff", 9)
    box(axes, 546, 98, 62, 54, "feed-\nforward", "#ffffff", 9)
    arrow(axes, (94, 125), (140, 125))
    arrow(axes, (528, 125), (546, 125))
    axes.text(364, 10, "menu, in order of cost", ha="center", va="center", size=9, color=INK, style="italic")
    return figure


def entropy() -> Figure:
    """Two vectors, their spectra, and H of each."""
    d = 128
    figure = new_figure(8.2, 3.6)
    axes = figure.subplots(2, 2)
    smooth = torch.cos(torch.arange(d) * 2 * torch.pi * 3 / d) + 0.3 * torch.cos(torch.arange(d) * 2 * torch.pi * 7 / d)
    rough = torch.randn(d, generator=torch.Generator().manual_seed(4))
    for row, (name, x) in enumerate((("smooth", smooth), ("noise", rough))):
        spectrum = dct(x[None])[0].square()
        axes[row, 0].plot(x.numpy(), color=INK, lw=1)
        axes[row, 0].set_ylabel(name)
        axes[row, 1].bar(np.arange(d), (spectrum / spectrum.sum()).numpy(), color=LIGHT, width=1.0)
        axes[row, 1].text(
            0.97,
            0.85,
            f"H = {spectral_entropy(x[None]).item():.2f}",
            transform=axes[row, 1].transAxes,
            ha="right",
            va="top",
            size=11,
            color=INK,
        )
    axes[0, 0].set_title("a token's vector, feature by feature", size=9.5)
    axes[0, 1].set_title("its energy by frequency (DCT)", size=9.5)
    for cell in axes.flat:
        cell.tick_params(labelsize=7, length=2)
        cell.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def thresholds() -> Figure:
    """The distribution of H over white noise, and where τ stands for three shares."""
    d = 128
    noise = torch.randn(100_000, d, generator=torch.Generator().manual_seed(0))
    scores = spectral_entropy(noise).numpy()
    figure = new_figure(8.2, 2.9)
    axes = figure.subplots()
    counts, edges, bars = axes.hist(scores, bins=160, color=PALE["dct"])
    top = np.quantile(scores, 0.75)
    for bar, edge in zip(bars, edges[:-1], strict=True):
        if edge >= top:
            bar.set_color(PALE["attention"])
    for share, height in ((0.5, 0.72), (0.25, 0.86), (0.1, 1.0)):
        place = np.quantile(scores, 1 - share)
        axes.vlines(place, 0, counts.max() * height, color=RED, lw=1.3, linestyle=(0, (3, 1.5)))
        axes.text(place + 0.001, counts.max() * height, f"τ for ρ = {share:g}", size=8.5, color=RED, va="top")
    axes.axvline(null_entropy_mean(d), color=BLUE, lw=1)
    axes.text(
        null_entropy_mean(d) - 0.001, counts.max(), "mean of white noise", size=8.5, color=BLUE, ha="right", va="top"
    )
    axes.set_xlim(0.79, 0.9)
    axes.set_xlabel("spectral entropy H of a token", size=9)
    axes.set_ylabel("tokens", size=9)
    axes.set_yticks([])
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    return figure


def context() -> Figure:
    """Which scores are computed: full attention, a routed layer that attends to all, and to the routed alone."""
    routed = np.array([0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0], bool)
    causal = np.tri(len(routed), dtype=bool)
    panels = {
        "full attention": causal,
        'attention_context="all"': causal & routed[:, None],
        'attention_context="routed"': causal & routed[:, None] & routed[None],
    }
    figure = new_figure(8.2, 3.1)
    for axes, (name, seen) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(seen, cmap=ListedColormap(["#ffffff", LIGHT]))
        axes.set_title(f"{name}\n{seen.sum()} scores", size=9)
        axes.set_xticks(np.arange(-0.5, len(routed)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(routed)), minor=True)
        axes.grid(which="minor", color="#d9d4cb", lw=0.5)
        axes.tick_params(which="both", length=0)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("keys", size=8.5)
        if name == "full attention":
            axes.set_ylabel("queries", size=8.5)
        else:
            axes.set_yticks(np.flatnonzero(routed), ["▸"] * routed.sum(), color=LIGHT)
    figure.tight_layout()
    return figure


def sparse() -> Figure:
    """Gather, run each operator on its own tokens, scatter back."""
    width, height = 620.0, 210.0
    figure = new_figure(width / 72, height / 72)
    axes = blank(figure, width, height)
    chosen = [0, 0, 1, 0, 1, 0, 0, 1]
    for n, operator in enumerate(chosen):
        colour = PALE["attention"] if operator else PALE["dct"]
        for x in (24, 554):
            box(axes, x, 10 + 23.5 * n, 42, 19, f"x{n + 1}" if x == 24 else f"y{n + 1}", colour, 8.5)
    for k, (name, top) in enumerate((("dct", 22), ("attention", 138))):
        own = [n for n, operator in enumerate(chosen) if operator == k]
        for i, n in enumerate(own):
            place = top + 10 + 20.5 * i
            box(axes, 190, place, 38, 17, f"x{n + 1}", PALE[name], 8)
            box(axes, 394, place, 38, 17, f"y{n + 1}", PALE[name], 8)
            arrow(axes, (68, 19.5 + 23.5 * n), (188, place + 8.5), LIGHT if k else SHADOW)
            arrow(axes, (434, place + 8.5), (552, 19.5 + 23.5 * n), LIGHT if k else SHADOW)
        size = 20.5 * len(own)
        box(axes, 262, top + 10, 98, size - 3, name, PALE[name], 11)
        arrow(axes, (230, top + 8.5 + size / 2), (260, top + 8.5 + size / 2))
        arrow(axes, (362, top + 8.5 + size / 2), (392, top + 8.5 + size / 2))
    for x, word in ((128, "gather"), (493, "scatter")):
        axes.text(x, 12, word, ha="center", va="center", size=9.5, style="italic", color=INK)
    return figure


def main(run: str | None) -> None:
    """Draw what needs no model, and the routed text where a run is named."""
    IMAGES.mkdir(exist_ok=True)
    for draw in (layer, entropy, thresholds, context, sparse):
        save(draw(), f"{draw.__name__}.svg")
    if run is not None:
        save(routed_text(trace_routing(load_checkpoint(run), load_checkpoint_tokenizer(run), TEXT)), "routed-text.png")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
