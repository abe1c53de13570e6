"""A folder of runs: what each recorded while it trained, and the tables of sweeps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiaroscuro.analysis.routing_summary import PROBABILITIES
from chiaroscuro.errors import UserError
from chiaroscuro.training import read_records

RECORDS, TABLE = "metrics.jsonl", "table.md"
DEEPEST = 4
"""Folders below the one that is named."""


@dataclass(frozen=True)
class Runs:
    """What a folder holds.

    Attributes:
        runs: the folders of runs.
        sweeps: the folders of sweeps, with a table each of the runs that are finished.

    """

    runs: tuple[Path, ...]
    sweeps: tuple[Path, ...]


def find_runs(folder: str) -> Runs:
    """Look for runs and sweeps in a folder and below it.

    Raises:
        UserError: there is no such folder, or nothing in it.

    """
    if not folder.strip():
        raise UserError("the name is empty: give the folder of your runs, such as runs")
    place = Path(folder.strip())
    if not place.is_dir():
        raise UserError(f"{place} is no folder: give that of your runs, such as runs")
    levels = ["/".join(["*"] * depth) for depth in range(1, DEEPEST + 1)]
    records = [place / RECORDS, *(file for level in levels for file in sorted(place.glob(f"{level}/{RECORDS}")))]
    tables = [place / TABLE, *(file for level in levels for file in sorted(place.glob(f"{level}/{TABLE}")))]
    found = Runs(*(tuple(file.parent for file in files if file.is_file()) for files in (records, tables)))
    if not found.runs and not found.sweeps:
        raise UserError(f"{place} holds no run: none of its folders has a {RECORDS}")
    return found


def curves(run: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What a run recorded: by panel and line, points of step and value.

    Panels: the loss in training and validation; by layer the share of the last operator and of who is kept; by layer
    the quantiles of H; and the MetaRouter's gate.

    Raises:
        UserError: its records can't be read, or there are none yet.

    """
    records = read_records(run / RECORDS)
    if not any(record.get("loss") is not None for record in records):
        raise UserError(f"{run / RECORDS} has no loss yet: look again when the run has logged one")
    quantiles = [f"H, {probability:.0%} quantile" for probability in PROBABILITIES]
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {
        name: {} for name in ("loss", "shares", *quantiles, "gate")
    }

    def add(panel: str, line: str, step: int, value: Any) -> None:
        if value is not None:
            panels[panel].setdefault(line, []).append((step, float(value)))

    for record in records:
        step = record["step"]
        add("loss", record["kind"], step, record.get("loss"))
        if record["kind"] != "train":
            continue
        add("gate", "g", step, record.get("gate"))
        for layer in record.get("layers", []):
            name = f"layer {layer['layer']}"
            if len(layer["operators"]) > 1:
                add("shares", f"{name}, {layer['operators'][-1]}", step, layer["share"][-1])
            add("shares", f"{name}, kept", step, layer.get("kept"))
            for panel, value in zip(quantiles, layer.get("entropy") or [], strict=False):
                add(panel, name, step, value)
    return {panel: lines for panel, lines in panels.items() if lines}


def table_of(sweep: Path) -> str:
    """The table of a sweep's finished runs, as Markdown.

    Raises:
        UserError: it can't be read.

    """
    try:
        return (sweep / TABLE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{sweep / TABLE} can't be read: {error}") from None
