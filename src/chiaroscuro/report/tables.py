"""The small tables of the commands. They show the figures that `--json` prints."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from chiaroscuro.analysis.collapse import CollapseTrace
from chiaroscuro.analysis.gates import TaskGate
from chiaroscuro.report.visible import harmless


def figures_table(figures: Mapping[str, Any]) -> Table:
    """A row per figure: its name and its value."""
    table = Table("", Column(overflow="fold"), box=None, show_header=False)  # a path that is cut can't be copied
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), escape(harmless(_shown(value))))
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def evaluation_tables(figures: Mapping[str, Any]) -> list[Table]:
    """What `evaluate` measured, and where the tokens went."""
    tabled = ("layers", "null_entropy", "depths", "window", "positions", "recall", "rest")
    shown = {name: value for name, value in figures.items() if name not in tabled}
    shown |= routed_shares(figures)
    if "accuracy_interval" in shown:
        shown["accuracy_interval"] = "{:.4f} to {:.4f}".format(*shown["accuracy_interval"])
    routing = [routing_table(figures["layers"], figures["null_entropy"])] if "layers" in figures else []
    depths = [depths_table(figures["depths"])] if "depths" in figures else []
    slices = [slices_table(figures)] if "positions" in figures else []
    return [figures_table(shown), *slices, *depths, *routing]


def routed_shares(figures: Mapping[str, Any]) -> dict[str, str]:
    """Of a retrofitted model, in words, the shares of the tokens that looked and that were kept."""
    sides = [side for side in ("looked", "kept") if side in figures]
    return {
        side: f"{mean(figures[side].values()):.1%} of the tokens, the mean over the routed layers" for side in sides
    }


def slices_table(figures: Mapping[str, Any]) -> Table:
    """A row per bin of positions, and one for recall tokens and the rest: the perplexity, and how many tokens."""
    parts = {f"position {part['first']:,} to {part['last']:,}": part for part in figures["positions"]}
    parts |= {f"recall, beyond {figures['window']:,}": figures["recall"], "not recall": figures["rest"]}
    table = Table("tokens", *_right("perplexity", "number"), box=None)
    for name, part in parts.items():
        table.add_row(name, _shown(part["perplexity"]), f"{part['tokens']:,}")
    return table


def needles_table(figures: Mapping[str, Any]) -> Table:
    """A row per length and number of needles: the part found, in all and by depth, and of some the parts routed."""
    sides = [side for side in ("looked", "kept") if side in figures["needles"][0]]
    depths = "by depth, from the first part to the last"
    table = Table(*_right("tokens", "needles", "found"), depths, *_right(*sides), box=None)
    for row in figures["needles"]:
        by_depth = "  ".join(f"{part:.0%}" for part in row["by depth"])
        routed = [f"{row[side]:.1%}" for side in sides]
        table.add_row(f"{row['length']:,}", f"{row['keys']}", f"{row['found']:.0%}", by_depth, *routed)
    return table


def depths_table(depths: Iterable[Mapping[str, Any]]) -> Table:
    """A row per depth: the accuracy over its targets and over its answers, and how many there are."""
    table = Table("depth", *_right("accuracy", "targets", "answers right", "answers"), box=None)
    for depth in depths:
        table.add_row(
            depth["depth"],
            f"{depth['accuracy']:.1%}",
            f"{depth['predictions']:,}",
            f"{depth['answer_accuracy']:.1%}",
            f"{depth['answers']:,}",
        )
    return table


def routing_table(layers: Iterable[Mapping[str, Any]], null: Iterable[float]) -> Table:
    """A row per layer: the share of each operator, the quantiles of H, and of some the share that is kept.

    The last row is white noise.
    """
    layers = list(layers)
    keeps = any("kept" in layer for layer in layers)
    table = Table("layer", "share per operator", "H 5 / 50 / 95 %", *(_right("kept") if keeps else []), box=None)
    for layer in layers:
        kept = [f"{layer['kept']:.1%}"] if "kept" in layer else []
        table.add_row(str(layer["layer"]), shares(layer["operators"], layer["share"]), three(layer["entropy"]), *kept)
    table.add_row("null", "white noise of the same width", three(null), style="dim")
    return table


def fit_table(found: Mapping[str, Any]) -> Table:
    """A row per layer and side that was fitted."""
    columns = _right("rank correlation", "recall", "by chance", "captured", "held out", "share")
    table = Table("layer", "side", *columns, box=None)
    for layer in found["layers"]:
        for side in ("look", "kept"):
            if side in layer:
                fit = layer[side]
                table.add_row(
                    str(layer["layer"]),
                    side,
                    f"{fit['rank_correlation']:.3f}",
                    f"{fit['recall']:.1%}",
                    f"{found[side]:.1%}",
                    f"{fit['captured']:.1%}",
                    f"{fit['tokens']:,}",
                    f"{fit['share']:.1%}",
                )
    return table


def checkpoint_tables(facts: Mapping[str, Any]) -> list[Table]:
    """What `info` found: the model and its training, and a row per layer."""
    recipe = facts.get("recipe")
    keeps = any("kept_thresholds" in layer for layer in facts["layers"])
    names = ["layer", "menu", "parameters", "thresholds", "calibrated on steps"]
    table = Table(*names, *(["threshold of who is kept"] if keeps else []), box=None)
    for layer in facts["layers"]:
        cells = [
            str(layer["layer"]),
            " · ".join(layer["operators"]),
            f"{layer['parameters']:,}",
            ", ".join(map(_threshold, layer["thresholds"])) or "–",
            "–" if layer["calibration_steps"] is None else str(layer["calibration_steps"]),
        ]
        if keeps:
            cells.append(", ".join(map(_threshold, layer.get("kept_thresholds", []))) or "–")
        table.add_row(*cells)
    shown = {name: value for name, value in facts.items() if name not in ("layers", "recipe")}
    told = figures_table(shown | (_training(recipe) if recipe else {}))
    return [told, table] if facts["layers"] else [told]


def _threshold(value: float | str | None) -> str:
    return "∞" if value is None else value if isinstance(value, str) else f"{value:.4f}"


def _training(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was trained on, how long and with which seed."""
    mixture, trainer = recipe.get("mixture"), recipe["trainer"]
    lines = {
        "task": recipe["data"]["task"],
        "mixed with": ", ".join(mixture["tasks"]) if mixture else None,
        "data": recipe["data"].get("source"),
        "tokenizer": recipe["tokenizer"],
        "steps": trainer.get("steps"),
        "training tokens": trainer.get("tokens"),
        "epochs": trainer.get("epochs"),
        "seed": trainer["seed"],
    }
    return {name: value for name, value in lines.items() if value is not None}


def collapse_table(trace: CollapseTrace) -> Table:
    """A row per operator of each routed layer: its share at both ends of training, and whether it survived."""
    table = Table("layer", "operator", *_right("share at first", "at the end", "utilisation"), "survives", box=None)
    for layer in trace.layers:
        used = f"{layer.utilisation[0]:.3f} → {layer.utilisation[-1]:.3f}"
        for k, name in enumerate(layer.operators):
            table.add_row(
                str(layer.layer) if k == 0 else "",
                name,
                f"{layer.share[0][k]:.1%}",
                f"{layer.final_share[k]:.1%}",
                used if k == 0 else "",
                "yes" if name in layer.surviving else "no",
            )
    return table


def gates_table(gates: Mapping[str, TaskGate]) -> Table:
    """A row per task: g at the beginning and the end of training."""
    table = Table("task", *_right("g at first", "at the end", "records"), box=None)
    for task, gate in gates.items():
        table.add_row(task, f"{gate.gate[0]:.3f}", f"{gate.final:.3f}", str(len(gate.gate)))
    return table


def presets_table(presets: Mapping[str, tuple[str, int]]) -> Table:
    """A row per preset: its description and its number of parameters."""
    table = Table("preset", "what it is", *_right("parameters"), box=None)
    for name, (description, parameters) in presets.items():
        table.add_row(name, description, f"{parameters / 1e6:,.2f} M")
    return table


def shares(operators: Iterable[str], values: Iterable[float]) -> str:
    """`dct 75.0% · attention 25.0%`."""
    return " · ".join(f"{name} {share:.1%}" for name, share in zip(operators, values, strict=True))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def three(quantiles: Iterable[float]) -> str:
    """`0.912 / 0.934 / 0.951`."""
    return " / ".join(f"{value:.3f}" for value in quantiles)


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]
