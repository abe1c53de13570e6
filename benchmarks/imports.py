"""What the imports cost: `chiaroscuro.ops` beside PyTorch alone, the model beside transformers' model classes.

    python -m benchmarks.imports

Each import is a process of its own, and they take turns. What counts is the processor time that one takes more than the
one it is compared with. Prints a table and writes benchmarks/results/imports.json.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

from rich.console import Console
from rich.table import Table

from chiaroscuro.analysis.speed import machine
from chiaroscuro.files import write_text

RESULTS = Path(__file__).parent / "results" / "imports.json"
TURNS = 11

IMPORTS = {
    "PyTorch": "import torch",
    "ops": "import torch, chiaroscuro.ops",
    "transformers' model classes": "from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel",
    "the model": "from chiaroscuro import ChiarForCausalLM",
    "the command line's help": "import sys; from chiaroscuro.__main__ import main; sys.argv[1:] = ['--help']; main()",
}
AGAINST = {
    "ops": "PyTorch",
    "the model": "transformers' model classes",
    "the command line's help": "PyTorch",
}
GOAL = 0.5
"""Seconds that ops and the model may take more."""


@dataclass(frozen=True)
class Cost:
    """Processor seconds: the median and the middle half."""

    median: float
    lower: float
    upper: float


def processor_seconds(code: str) -> float:
    """User and system time of a process that runs this code."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"failed: {code}")
    return usage.ru_utime + usage.ru_stime


def measure() -> dict[str, Cost]:
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(TURNS + 1):
        for name, code in IMPORTS.items():
            taken = processor_seconds(code)
            if turn > 0:  # the first reads files that the later ones find in memory
                seconds[name].append(taken)
    costs = {}
    for name, taken in seconds.items():
        lower, median, upper = quantiles(taken, n=4)
        costs[name] = Cost(median, lower, upper)
    return costs


def show(costs: dict[str, Cost], console: Console) -> None:
    table = Table(title="processor time of an import: s, median (middle half)")
    for column in ("import", "seconds", "more than", "seconds more", "times as long"):
        table.add_column(column, justify="left" if column in ("import", "more than") else "right")
    for name, cost in costs.items():
        other = AGAINST.get(name)
        compared = () if other is None else (cost.median - costs[other].median, cost.median / costs[other].median)
        spread = f"{cost.median:.2f} ({cost.lower:.2f}–{cost.upper:.2f})"
        table.add_row(name, spread, other or "", *(f"{figure:.2f}" for figure in compared))
    console.print(table)


def main() -> None:
    costs = measure()
    show(costs, Console())
    result = {
        "machine": machine(),
        "goal_seconds_more": GOAL,
        "imports": IMPORTS,
        "processor_seconds": {name: asdict(cost) for name, cost in costs.items()},
        "seconds_more": {name: costs[name].median - costs[other].median for name, other in AGAINST.items()},
        "times_as_long": {name: costs[name].median / costs[other].median for name, other in AGAINST.items()},
    }
    write_text(RESULTS, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
