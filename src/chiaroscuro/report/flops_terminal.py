"""The operation counts in the terminal: by operator, by protocol, and how much routing can save at all."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chiaroscuro.report.visible import harmless

# Units of operations, and their names.
_UNITS = {1e9: "GFLOP", 1e12: "TFLOP", 1e15: "PFLOP", 1e18: "EFLOP", 1e21: "ZFLOP"}


def print_flops(figures: dict[str, Any], console: Console) -> None:
    """Print what `describe_flops` gives, of the model that `figures["model"]` names."""
    length, share = figures["length"], figures["share"]
    kept = "" if figures["kv_share"] is None else f" ({figures['kv_share']:g} kept)"
    name = escape(harmless(figures["model"]))
    what = f"T = {length:,}, ρ = {share:g}, context {figures['attention_context']}{kept}"
    console.print(f"{name}, {what}, {figures['execution']} execution; one sequence\n", highlight=False)
    counted = figures["by_operator"]
    columns = [counted[step][whose] for step in ("forward", "training") for whose in ("ours", "full attention")]
    unit = _unit(max(sum(column.values()) for column in columns))
    table = Table(f"exact, {_UNITS[unit]}", box=None)
    for column in ("forward", "full attention", "training", "full attention"):
        table.add_column(column, justify="right")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(_in(unit, column.get(name)) for column in columns))
    table.add_row("total", *(_in(unit, sum(column.values())) for column in columns), style="bold")
    console.print(table)
    compared = [c for steps in figures["protocols"].values() for c in steps.values()]
    unit = _unit(max(c["baseline"] for c in compared))
    table = Table("protocol", "step", box=None)
    for column in (_UNITS[unit], "full attention", "times less", "saved"):
        table.add_column(column, justify="right")
    for protocol, steps in figures["protocols"].items():
        for step, c in steps.items():
            ratio = "∞" if c["ratio"] is None else f"{c['ratio']:.2f}"
            numbers = (_in(unit, c["flops"]), _in(unit, c["baseline"]), ratio, f"{c['saving']:.1%}")
            table.add_row("paper, multiply-adds" if protocol == "paper" else protocol, step, *numbers)
    console.print()
    console.print(table)
    console.print(f"\n{explain(figures)}", highlight=False)


def explain(figures: dict[str, Any]) -> str:
    """What can be saved here, what the paper claims for this size, and from which length on its 35% is reached."""
    part, target = figures["attention_part"], figures["target"]
    length, share = figures["length"], figures["share"]
    saved = figures["protocols"]["exact"]["training"]["saving"]
    claim = f"The paper claims to save {figures['claimed']} of all operations (v2). " if figures["claimed"] else ""
    lines = [
        f"{claim}At T = {length:,} attention, projections and scores together, is {part['of_a_layer']:.1%} of a "
        f"full-attention layer and {part['of_the_model']:.1%} of the model with its head. No routing can save more "
        f"than that; at ρ = {share:g} it saves {saved:.1%}. (The paper's formula counts only the multiply-adds of "
        "attention, over all pairs of tokens, and no keys and values of tokens that are not routed.)"
    ]
    shortest, largest = figures["shortest_length"], figures["largest_share"]
    where = f"{target:.0%} of a training step"
    lines.append(
        f"At ρ = {share:g}, {where} is saved from T = {shortest:,} on."
        if shortest is not None
        else f"At ρ = {share:g}, {where} is saved at no length."
    )
    lines.append(
        f"At T = {length:,}, {where} is saved up to ρ = {largest:g}."
        if largest is not None
        else f"At T = {length:,}, {where} is saved at no ρ, not even at 0."
    )
    return "\n".join(lines)


def _unit(largest: float) -> float:
    """The unit in which the largest number has five digits before its point at most, so that a table stays narrow."""
    return next((unit for unit in _UNITS if largest < 1e5 * unit), max(_UNITS))


def _in(unit: float, number: float | None) -> str:
    return "–" if number is None else f"{number / unit:,.2f}"
