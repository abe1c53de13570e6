"""The pictures of the evidence: one of each question."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import PercentFormatter

from chiaroscuro.report.figures import COLOURS, GRID, INK, as_png, line_look, new_figure, quieten
from chiaroscuro.report.gate_figure import PUBLISHED

Spread = tuple[float, float, float]
"""A low end, a mean and a high end."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X")
KINDS = (*COLOURS, "#5f6b73")
"""A colour for each of as many kinds as there are markers."""


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


def draw_classes(
    shares: Mapping[str, Mapping[str, float | None]],
    by_layer: Mapping[str, Mapping[str, Mapping[str, float | None]]],
) -> bytes:
    """The share of each class of tokens that is chosen: of all layers, a line of marks, and of each, a map.

    Args:
        shares: by model and side, the share of each class; None where there is no such token.
        by_layer: by model, side and class, those of each layer by its number; one class at least is there.

    Returns:
        A PNG.

    """
    columns = 2
    rows = -(-len(by_layer) // columns)
    heights = (0.9 + 0.42 * len(shares), 1.35 * rows + 0.3)
    figure = new_figure(9.0, sum(heights))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flatten()
    axes = above.subplots()
    classes = list(next(iter(shares.values())))
    for n, name in enumerate(classes):
        values = [own[name] for own in shares.values()]
        places = [place for place, value in enumerate(values) if value is not None]
        if places:
            found = [value for value in values if value is not None]
            axes.plot(found, places, MARKERS[n], color=KINDS[n], markersize=6, label=name)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("chosen, of the tokens of a class", color=INK, fontsize=9)
    axes.grid(axis="both", color=GRID, linewidth=0.6)
    quieten(axes, ["top", "right", "left"])
    above.legend(frameon=False, fontsize=8, loc="outside right center")
    panels = below.subplots(rows, columns, squeeze=False).flatten()
    for panel, (name, own) in zip(panels, by_layer.items(), strict=False):
        drawn = {one: row for one, row in own.items() if any(share is not None for share in row.values())}
        shown = [[math.nan if share is None else share for share in row.values()] for row in drawn.values()]
        image = panel.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        panel.set_yticks(range(len(drawn)), list(drawn))
        layers = list(next(iter(drawn.values())))
        step = -(-len(layers) // 8)
        panel.set_xticks(range(0, len(layers), step), layers[::step])
        panel.set_title(name, color=INK, fontsize=9, loc="left")
        quieten(panel)
    for panel in panels[len(by_layer) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(by_layer) - columns) : len(by_layer)]:  # the last of each column
        panel.set_xlabel("layer, from 0", color=INK, fontsize=9)
    bar = below.colorbar(image, ax=panels, format=PercentFormatter(1.0, decimals=0), shrink=0.6, label="chosen")
    bar.ax.tick_params(labelsize=8, colors=INK)
    return as_png(figure)


def draw_length(lines: Mapping[str, Sequence[tuple[int, float]]], trained: int) -> bytes:
    """Perplexity by position.

    Args:
        lines: by model, the last position of each bin, and the perplexity there.
        trained: T of the training, where a line is drawn.

    Returns:
        A PNG.

    """
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    for n, (name, points) in enumerate(lines.items()):
        marker = MARKERS[n % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name, **line_look(n))
    axes.axvline(trained, color=INK, linewidth=0.8, alpha=0.6)
    axes.annotate("trained so far", (trained, 1), xycoords=("data", "axes fraction"), fontsize=8, color=INK, va="top")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_xlabel("tokens read", color=INK, fontsize=9)
    axes.set_ylabel("perplexity", color=INK, fontsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    quieten(axes, ["top", "right"])
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    return as_png(figure)


def draw_layers(models: Mapping[str, Mapping[str, Mapping[Any, Mapping[str, float]]]]) -> bytes:
    """The harm of each layer and the share that follows from it; a row of panels for each model, a panel for each side.

    Args:
        models: by model, side and layer, `harm` and `share`.

    Returns:
        A PNG.

    """
    figure = new_figure(8.5, 2.4 * len(models))
    panels = figure.subplots(len(models), 2, squeeze=False)
    for row, (name, sides) in zip(panels, models.items(), strict=True):
        for axes, side in zip(row, ("look", "kept"), strict=True):
            if side not in sides:
                axes.set_axis_off()
                continue
            layers = [int(i) for i in sides[side]]
            axes.bar(layers, [one["harm"] for one in sides[side].values()], color=COLOURS[0], alpha=0.75)
            axes.set_title(f"{name}: {side}", color=INK, fontsize=9, loc="left")
            axes.set_xlabel("layer", color=INK, fontsize=9)
            axes.set_ylabel("harm, nats a token", color=COLOURS[0], fontsize=8)
            shares = axes.twinx()
            given = [one["share"] for one in sides[side].values()]
            shares.plot(layers, given, color=COLOURS[1], marker="s", markersize=3)
            shares.set_ylim(0, 1.02)
            shares.set_ylabel("share", color=COLOURS[1], fontsize=8)
            shares.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            quieten(axes, ["top"])
            quieten(shares, ["top"])
    return as_png(figure)


def draw_curves(rows: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]]) -> bytes:
    """The training loss over each of some costs: a row of panels for each group of models, a panel for each cost.

    Args:
        rows: by the group's title, cost and model, points of cost and loss.

    Returns:
        A PNG.

    """
    figure = new_figure(9.5, 3.2 * len(rows) + 0.4)
    columns = max(map(len, rows.values()))
    looks: dict[str, dict[str, Any]] = {}  # of a model, the same in all panels
    for axes_of_row, (title, panels) in zip(
        figure.subplots(len(rows), columns, squeeze=False, sharey="row"), rows.items(), strict=True
    ):
        for axes, (cost, models) in zip(axes_of_row, panels.items(), strict=True):
            for name, points in models.items():
                look = looks.setdefault(name, {**line_look(len(looks)), "label": name})
                axes.plot(*zip(*points, strict=True), linewidth=1.4, **look)
            axes.set_xlabel(cost, color=INK, fontsize=9)
            axes.set_title(title, color=INK, fontsize=9, loc="left")
            axes.grid(axis="y", color=GRID, linewidth=0.6)
            quieten(axes, ["top", "right"])
        axes_of_row[0].set_ylabel("training loss since the point before, nats", color=INK, fontsize=8)
    drawn = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(drawn.values(), list(drawn), frameon=False, fontsize=8, loc="outside right center")
    return as_png(figure)


def draw_gate(gates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bytes:
    """The gate of each task, one mark for each seed.

    Args:
        gates: by model, seed and task, g.

    Returns:
        A PNG.

    """
    figure = new_figure(7.0, 3.2)
    axes = figure.subplots()
    tasks = list(next(iter(next(iter(gates.values())).values())))
    for n, (name, seeds) in enumerate(gates.items()):
        places = [i + (n - (len(gates) - 1) / 2) * 0.25 for i in range(len(tasks)) for _ in seeds]
        values = [seed[task] for task in tasks for seed in seeds.values()]
        axes.scatter(places, values, marker=MARKERS[n], color=COLOURS[n], s=34, label=name)
    axes.axhline(PUBLISHED, color=INK, linewidth=0.8, alpha=0.6)
    axes.annotate(f"the paper's, {PUBLISHED}", (0, PUBLISHED), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1)
    axes.set_ylabel("gate g", color=INK, fontsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    quieten(axes, ["top", "right"])
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    return as_png(figure)
