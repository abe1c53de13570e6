"""Sparse execution against full attention and a Hugging Face Llama: docs/performance.md, its plot and its figures.

    python -m benchmarks.speed

It takes an hour on two otherwise idle cores. What benchmarks/results/speed.json already has is not measured again;
remove the file to start over. `chiaroscuro benchmark` does the same at other sizes.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from chiaroscuro.allocator import keep_freed_memory
from chiaroscuro.studies.benchmark import Plan, run_benchmark
from chiaroscuro.studies.command import exit_code

RESULTS = Path("benchmarks/results/speed.json")
PAIR = Path("benchmarks/results/llama.json")
PAGE = Path("docs/performance.md")
SPEEDS = {"routed": {256: 1.2, 1024: 1.4, 4096: 2.0, 8192: 2.6}, "all": {4096: 1.5, 8192: 1.8}}
"""The speed relative to full attention that each context should reach, by length."""


@dataclass(frozen=True)
class Goal:
    """A goal for one figure of the benchmark."""

    text: str
    task: str
    candidate: str
    length: int
    field: str
    bound: float
    at_least: bool = True

    def row(self, cells: list[dict[str, Any]]) -> str:
        """A row of the table: the goal, what was measured, and whether it is reached."""
        keys = ("task", "candidate", "length")
        goal = f"{'≥' if self.at_least else '≤'} {self.bound:g}"
        cell = next((c for c in cells if all(c.get(key) == getattr(self, key) for key in keys)), None)
        if cell is None:
            return f"| {self.text} | {self.length:,} | {goal} | | not measured |"
        found = cell[self.field]
        return _row(self.text, self.length, goal, found, found >= self.bound if self.at_least else found <= self.bound)


def goals() -> Iterator[Goal]:
    """The goals of the project."""
    for task, what in (("train", "training step"), ("forward", "prefill")):
        for context, bounds in SPEEDS.items():
            for length, bound in bounds.items():
                yield Goal(f"{what}, {context}: times faster", task, f"{context}, ρ = 0.25", length, "ratio", bound)
        for length in SPEEDS["routed"]:
            text = f"{what}, full attention: its time over Llama's"
            yield Goal(text, task, "Hugging Face Llama", length, "ratio", 1.05, at_least=False)
    yield Goal("decoding, routed: times faster", "decode", "routed, ρ = 0.25", 8192, "ratio", 2.0)
    yield Goal("decoding, routed: part of the cache", "decode", "routed, ρ = 0.25", 8192, "cache_ratio", 0.35, False)
    yield Goal("training step, routed: part of the memory", "memory", "routed, ρ = 0.25", 8192, "ratio", 0.85, False)


def main() -> None:
    """Measure what is missing, then write figures, page and plot, and the goals at the end of the page."""
    keep_freed_memory()
    run_benchmark(Plan(), RESULTS, PAGE, Console(), closing)


def closing(found: dict[str, Any]) -> str:
    """The table of goals, and what is not measured yet."""
    cells = found["cells"]
    rows, why = [goal.row(cells) for goal in goals()], list[str]()
    for cell in cells:
        if cell["task"] == "router":
            share, what = cell["share_of_layer"], "training step" if cell["training"] else "forward"
            text = f"router and transform, {cell['context']}, {what}: part of a layer at d = {cell['length']}"
            rows.append(_row(text, 1024, "≤ 0.1", share, share <= 0.1))
            if share > 0.1 and cell["parts"]:  # they are timed of a forward alone
                each = ", ".join(f"{name} {1e3 * t['median']:.2g} ms" for name, t in cell["parts"].items())
                why += ["", f"What goes into *{text}*: {each}, of the layer's {1e3 * cell['layer']['median']:.3g} ms."]
    head = [
        "",
        "## Goals",
        "",
        "| at ρ = 0.25 | T | goal | measured | reached |",
        "|---|---|---|---|---|",
    ]
    done = {cell["length"] for cell in cells if cell["task"] == "train"}
    missing = [f"{length:,}" for length in found["plan"]["lengths"] if length not in done]
    rest = ["", f"Not measured here: T = {', '.join(missing)}; `make bench` continues."] if missing else []
    return "\n".join([*head, *rows, *why, *rest, *alone(), ""])


def alone() -> list[str]:
    """The longer measurement of the baseline and Llama alone, if it was made."""
    if not PAIR.is_file():
        return []
    steps = json.loads(PAIR.read_text(encoding="utf-8"))["training_step"]
    ratios = ", ".join(f"{step['ours_over_llama']:.2f} at T = {int(length):,}" for length, step in steps.items())
    turns = min(step["ours"]["turns"] for step in steps.values())
    return [
        "",
        "Above, the nine candidates of a training step have three turns or a few more. With full attention and Llama "
        f"alone, alternating training steps for {turns} turns or more (`python -m benchmarks.llama`), its time over "
        f"Llama's is {ratios}.",
    ]


def _row(text: str, length: int, goal: str, found: float, reached: bool) -> str:
    return f"| {text} | {length:,} | {goal} | {found:.3g} | {'yes' if reached else '**no**'} |"


if __name__ == "__main__":
    sys.exit(exit_code(main))
