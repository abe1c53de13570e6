"""The benchmark's figures in the terminal: times, and how many times faster than full attention that is."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

TITLES = {
    "train": "training step",
    "forward": "prefill",
    "decode": "decoding",
    "memory": "peak memory of a training step",
}
_NAME, _CELL = 18, 20


def print_performance(found: Mapping[str, Any], console: Console) -> None:
    """Print what `run_benchmark` gives: a table per task, with a row per model and a column per length.

    Times are medians. Each is followed by the speed relative to full attention, and in brackets by the ratio that the
    operation counts predict; memory by its ratio to full attention's. Profiles and the router's part are in
    performance.md only.
    """
    at_once = max(1, (console.width - _NAME) // (_CELL + 2))
    for task, title in TITLES.items():
        cells = [cell for cell in found["cells"] if cell["task"] == task]
        lengths = sorted({cell["length"] for cell in cells})
        for first in range(0, len(lengths), at_once):
            console.print()
            console.print(_table(title, cells, lengths[first : first + at_once]))


def _table(title: str, cells: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> Table:
    columns = [Column(f"T = {length:,}", justify="right", no_wrap=True) for length in lengths]
    table = Table(Column(title, min_width=_NAME, overflow="fold"), *columns, box=None, pad_edge=False)
    shown = {(cell["candidate"], cell["length"]): _cell(cell) for cell in cells}
    for name in dict.fromkeys(cell["candidate"] for cell in cells):
        table.add_row(name, *(shown.get((name, length), "") for length in lengths))
    return table


def _cell(cell: Mapping[str, Any]) -> str:
    if cell["task"] == "memory":
        return f"{cell['bytes'] / 2**20:,.0f} MiB ×{cell['ratio']:.2f}"
    seconds = cell["median"]
    time = f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
    return rf"{time} {cell['ratio']:.2f}× \[{cell['predicted']:.2f}]"
