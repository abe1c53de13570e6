"""Equal time: the loss over the time that training takes on this machine, and over operations.

The losses are those of finished runs. Their own clocks are not used: other work ran beside them. How long a step takes
is measured here, all models taking turns.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

from chiaroscuro.analysis.flops import count_flops
from chiaroscuro.analysis.speed import machine, take_turns, training_step
from chiaroscuro.report.evidence_figure import draw_curves
from chiaroscuro.studies.workspace import Workspace

FIELDS = ("length", "seconds", "models")
QUESTION = "What does equal time buy?"


def measure(recipe: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """All models of the recipe: their curves, and the time and the operations of a token."""
    workspaces = {name: Workspace(given["run"], device="cpu") for name, given in recipe["models"].items()}
    vocabulary = min(workspace.config.vocab_size for workspace in workspaces.values())
    ids = torch.randint(vocabulary, (1, recipe["length"]), generator=torch.Generator().manual_seed(0))
    timings = take_turns(
        {name: training_step(workspace.model.train(), ids) for name, workspace in workspaces.items()},
        recipe["seconds"],
        turns=3,
    )
    found: dict[str, Any] = {"length": recipe["length"], "machine": machine(), "models": {}}
    for name, workspace in workspaces.items():
        assert workspace.run is not None  # a checkpoint of a run: its records are read
        config: Any = workspace.config
        lines = (workspace.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        found["models"][name] = {
            "begins after": recipe["models"][name].get("after"),
            "seconds a token": timings[name].median / recipe["length"],
            "operations a token": count_flops(config, recipe["length"], training=True).total / recipe["length"],
            "curve": [[r["tokens"], r["loss"]] for r in records if r["kind"] == "train"],
            "validation": [[r["tokens"], r["loss"]] for r in records if r["kind"] == "validation"],
        }
        console.print(f"{name}: {timings[name].median:.3f} s a row", highlight=False)
    return found


# ---- what follows from it ------------------------------------------------------------------------------------


def totals(found: Mapping[str, Any], name: str, cost: str) -> float:
    """What a model's whole training costs, that of the model it goes on from included."""
    model = found["models"][name]
    before = totals(found, model["begins after"], cost) if model["begins after"] else 0.0
    return before + model["validation"][-1][0] * model[cost]


def draw(found: Mapping[str, Any]) -> bytes:
    """The picture: each run's curve, begun where the run that it goes on from ended."""
    panels = {}
    for cost, title in (("seconds a token", "seconds"), ("operations a token", "operations")):
        panels[title] = {
            name: [(_start(found, name, cost) + tokens * model[cost], loss) for tokens, loss in model["curve"][1:]]
            for name, model in found["models"].items()
        }
    return draw_curves(panels)


def _start(found: Mapping[str, Any], name: str, cost: str) -> float:
    before = found["models"][name]["begins after"]
    return totals(found, before, cost) if before else 0.0


def answer(found: Mapping[str, Any]) -> list[str]:
    """The answer and its figures, as Markdown."""
    models = found["models"]
    first = next(iter(models))
    lines = [
        f"T = {found['length']:,}; one seed. The time of a step was measured with the models taking turns. *Whole "
        f"training* is that of the run and of the one it goes on from, as a part of that of *{first}*.",
        "",
        "| | goes on from | time a token | operations a token | whole training, time | whole training, operations "
        "| loss at the end |",
        "| --- |" + " --- |" * 6,
    ]
    for name, model in models.items():
        cells = [model["begins after"] or "–"]
        for cost in ("seconds a token", "operations a token"):
            cells.append(f"{model[cost] / models[first][cost]:.2f}")
        for cost in ("seconds a token", "operations a token"):
            cells.append(f"{totals(found, name, cost) / totals(found, first, cost):.2f}")
        cells.append(f"{model['validation'][-1][1]:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]
