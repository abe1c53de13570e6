"""What a run needs on GPUs, in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


def print_plan(figures: dict[str, Any], console: Console) -> None:
    """Print what `plan_run` gives."""
    step, memory = figures["step"], figures["memory"]
    saved = step["of full attention's operations"]
    console.print(
        f"{figures['parameters']:,} parameters on {figures['gpus']} × {figures['gpu']} "
        f"({figures['memory of the GPU'] / 1e9:,.0f} GB each)\n",
        highlight=False,
    )
    table = Table("GB a GPU", box=None)
    for kind in memory:
        table.add_column(kind.upper(), justify="right")
    for part in memory["ddp"]:
        style = "bold" if part == "total" else ""
        table.add_row(part, *(f"{parts[part] / 1e9:,.2f}" for parts in memory.values()), style=style)
    table.add_row("fits", *("yes" if figures["fits"][kind] else "no" for kind in memory))
    console.print(table)
    console.print(
        f"\na step of {step['tokens']:,} tokens: {1e3 * step['seconds']:,.1f} ms ({1e3 * step['compute']:,.1f} ms of "
        f"computing, {1e3 * step['exchange of gradients']:,.1f} ms of exchanging gradients beside it), "
        f"{step['tokens_per_second']:,.0f} tokens/s; {saved:.0%} of full attention's "
        "operations",
        highlight=False,
        soft_wrap=True,
    )
    if "run" in figures:
        run = figures["run"]
        console.print(
            f"the run: {run['steps']:,} steps, {run['tokens']:,} tokens, {run['seconds'] / 3600:,.2f} hours",
            highlight=False,
        )
    if "baseline" in figures:
        first = figures["baseline"]
        totals = " and ".join(
            f"{each['total'] / 1e9:,.2f} GB ({kind.upper()})" for kind, each in first["memory"].items()
        )
        hours = f", {first['run']['seconds'] / 3600:,.2f} hours in all" if "run" in first else ""
        console.print(
            f"before it the baseline of full attention is trained, from which the thresholds come: {totals}, "
            f"{1e3 * first['step']['seconds']:,.1f} ms a step{hours}",
            highlight=False,
            soft_wrap=True,
        )
    console.print("\nassumed:")
    for line in figures["assumptions"]:
        console.print(f"- {line}", highlight=False, soft_wrap=True)
