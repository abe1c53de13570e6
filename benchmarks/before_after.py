"""What a change costs in speed: the same work by two versions of the code, in turn.

    python -m benchmarks.before_after [COMMIT]

COMMIT, an earlier one of this repository, is checked out into a temporary folder. For each cell the two versions take
turns, each in a process of its own, and each process lets full attention and routing take turns. So what is compared
is how many times faster routing is than full attention, before and after. Without COMMIT it is the one before the
library was rebuilt around the operator. Prints a table and writes benchmarks/results/before_after.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from chiaroscuro.analysis.speed import machine
from chiaroscuro.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/before_after.json"
BEFORE = "eb5d1a1"
ROUNDS = 2
CELLS = [("decoding", 1, 256), ("prefill", 8, 1024), ("training step", 8, 1024), ("prefill", 2, 4096)]
"""What is done, rows, and tokens of a row; a quarter of the tokens goes to attention."""

# It runs on either version, so it uses what both have: 12 layers of width 256, as in docs/performance.md.
WORK = """
import json, sys
import torch
from chiaroscuro import ChiarConfig, ChiarForCausalLM, calibrate
from chiaroscuro.allocator import keep_freed_memory
from chiaroscuro.analysis.speed import decoding, forward_pass, take_turns, training_step

what, rows, time, seconds = sys.argv[1], *map(int, sys.argv[2:])
keep_freed_memory()


def build(context, menus=None):
    torch.manual_seed(0)
    fields = {"hidden_size": 256, "num_hidden_layers": 12, "attention_context": context, "operators": menus}
    return ChiarForCausalLM(ChiarConfig(max_position_embeddings=time + 64, meta_router="none", **fields))


ids = torch.randint(8192, (rows, time), generator=torch.Generator().manual_seed(0))
models = {"full": build("all", [["attention"]] * 12), "all": build("all"), "routed": build("routed")}
for name in ("all", "routed"):
    calibrate(models[name], [ids], 0.25)
work = {"decoding": decoding, "prefill": forward_pass, "training step": training_step}[what]
timings = take_turns({name: work(model, ids) for name, model in models.items()}, seconds, 3)
print(json.dumps({name: timings["full"].median / timings[name].median for name in ("all", "routed")}))
"""


def run(source: Path, what: str, rows: int, time: int, seconds: int = 10) -> dict[str, float]:
    """How many times faster than full attention routing is, by the code in this folder."""
    command = [sys.executable, "-W", "ignore", "-c", WORK, what, str(rows), str(time), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "TRANSFORMERS_VERBOSITY": "error"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main(commit: str) -> None:
    """Measure every cell, print the table and write the results."""
    cells: list[dict[str, Any]] = []
    after = _git("describe", "--always", "--dirty")  # the working tree, whatever is not committed included
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", before, commit], cwd=ROOT, check=True)
        try:
            for what, rows, time in CELLS:
                found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
                for _ in range(ROUNDS):
                    for name, source in (("before", before), ("after", ROOT)):
                        found[name].append(run(source, what, rows, time))
                for context in ("all", "routed"):
                    runs = {name: [round(ratio[context], 3) for ratio in ratios] for name, ratios in found.items()}
                    cells.append({"what": what, "rows": rows, "time": time, "context": context, **runs})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    write_text(
        RESULTS, json.dumps({"before": commit, "after": after, "machine": machine(), "cells": cells}, indent=1) + "\n"
    )
    table = Table("work", "tokens", "context", "before", "after", box=None)
    for cell in cells:
        shown = [f"{median(cell[n]):.2f} ({min(cell[n]):.2f}–{max(cell[n]):.2f})" for n in ("before", "after")]
        table.add_row(cell["what"], f"{cell['rows']} × {cell['time']}", cell["context"], *shown)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else BEFORE)
