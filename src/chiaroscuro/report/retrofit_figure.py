"""A retrofitted model beside the one that it was: perplexity by position, needles by depth, shares, speed and cache."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from chiaroscuro.report.figures import GRID, INK, as_png, new_figure, quieten

_BEFORE, _AFTER, _COLOURS = "#241d14", "#b97714", ("#b97714", "#0b665c", "#5b4a8a", "#a33b3b")


def draw_retrofit(found: Mapping[str, Any]) -> bytes:
    """Draw what `retrofit_copy` found.

    Returns:
        A PNG.

    """
    figure = new_figure(9.0, 5.6)
    text, needles, shares, costs = figure.subplots(2, 2).flatten()
    _draw_text(text, found)
    _draw_needles(needles, found["needles"])
    _draw_shares(shares, found)
    _draw_costs(costs, found["costs"])
    for axes in (text, needles, shares, costs):
        quieten(axes, ["top", "right"])
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    return as_png(figure)


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=9)


def _draw_text(axes: Axes, found: Mapping[str, Any]) -> None:
    _title(axes, "perplexity by position")
    for name, colour, dash in (("before", _BEFORE, "--"), ("after", _AFTER, "-")):
        bins = [one for one in found[name]["positions"] if one["perplexity"] is not None]
        axes.plot(
            [one["last"] for one in bins], [one["perplexity"] for one in bins], color=colour, linestyle=dash, label=name
        )
    _log2(axes, [one["last"] for one in found["after"]["positions"]])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens read", fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=8)


def _draw_needles(axes: Axes, needles: list[Mapping[str, Any]]) -> None:
    _title(axes, "needles found by depth; dashed: before")
    for one, colour in zip([one for one in needles if one["keys"] == 1], _COLOURS * len(needles), strict=False):
        depths = [(d + 0.5) / len(one["after"]) for d in range(len(one["after"]))]
        axes.plot(depths, one["before"], color=colour, linestyle="--", linewidth=1)
        axes.plot(depths, one["after"], color=colour, marker="o", markersize=4, label=f"{one['length']:,} tokens")
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("of the text before the needle", fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=8)


def _draw_shares(axes: Axes, found: Mapping[str, Any]) -> None:
    _title(axes, "share of the tokens, by layer")
    for name, side, colour in (("look", "looked", _COLOURS[0]), ("kept", "kept", _COLOURS[1])):
        layers = [int(layer) for layer in found[side]]
        axes.plot(layers, [*found[side].values()], color=colour, marker="o", markersize=3, linewidth=1, label=name)
    axes.set_ylim(-0.04, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("layer", fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=8)


def _draw_costs(axes: Axes, costs: list[Mapping[str, Any]]) -> None:
    _title(axes, "cache, and how many times faster")
    lengths = [one["length"] for one in costs]
    for name, colour, marker in (
        ("cache", _COLOURS[2], "s"),
        ("prefill", _COLOURS[0], "o"),
        ("decoding", _COLOURS[1], "^"),
    ):
        if name in costs[0]:
            axes.plot(lengths, [one[name] for one in costs], color=colour, marker=marker, markersize=4, label=name)
    axes.axhline(1.0, color=INK, linewidth=0.8)
    axes.set_ylim(bottom=0)
    _log2(axes, lengths)
    axes.set_xlabel("tokens", fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=8)


def _log2(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
