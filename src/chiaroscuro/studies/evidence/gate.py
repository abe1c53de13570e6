"""Whether the MetaRouter's gate is stable: over tasks, over seeds, and when other rows stand beside a token's own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chiaroscuro.report.evidence_figure import draw_gate
from chiaroscuro.studies.statistics import estimate
from chiaroscuro.studies.workspace import Workspace

FIELDS = ("results", "rows", "length", "tasks", "models")
QUESTION = "Is the gate stable?"
TEXT = "text"


def measure(recipe: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """The gates of the finished sweep, and of its models with other neighbours in the batch."""
    report = json.loads(Path(recipe["results"]).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"gates": {}, "moves": {}}
    for variant in report["variants"]:
        if not variant["runs"]:
            console.print(f"{variant['name']}: no run of it is finished, so it is left out", highlight=False)
            continue
        found["gates"][variant["name"]] = {
            str(run["seed"]): {TEXT: run["gate"]} | {task: one["gate"] for task, one in run["tasks"].items()}
            for run in variant["runs"]
        }
    for name, checkpoint in recipe["models"].items():
        found["moves"][name] = moves(checkpoint, recipe)
        console.print(f"{name}: {found['moves'][name]}", highlight=False)
    return found


@torch.no_grad()
def moves(checkpoint: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How far a token's g moves when the other rows of its batch are of another task, by task."""
    rows = {task: _rows(checkpoint, task, recipe) for task in (TEXT, *recipe["tasks"])}
    model: Any = Workspace(checkpoint, device="cpu").model
    found = {}
    for task, own in rows.items():
        others = [row for other in rows if other != task for row in rows[other]]
        alone = _gate_of_first(model, own[:1])
        among = {"of its own task": _gate_of_first(model, own)}
        among |= {"of other tasks": _gate_of_first(model, [own[0], *others])}
        found[task] = {"alone": float(alone.mean())} | {
            f"with rows {name}": {"g": float(gate.mean()), "moved": float((gate - alone).abs().max())}
            for name, gate in among.items()
        }
    return found


def _gate_of_first(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """G of each token of the first row of a batch; shorter rows are padded."""
    ids = pad_sequence(list(rows), batch_first=True)
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    gate: Tensor = model.trunk(ids, attention_mask=real, use_cache=False, output_routing=True).meta_gate
    return gate.float().expand(ids.shape)[0, : len(rows[0])]


def _rows(checkpoint: str, task: str, recipe: Mapping[str, Any]) -> list[Tensor]:
    """Held-out rows of a task, cut at the recipe's length."""
    workspace = Workspace(checkpoint, device="cpu", task=None if task == TEXT else task)
    length = recipe["length"]
    held_out: Any = (
        workspace.blocks("validation", length=length)[1]
        if task == TEXT
        else workspace.labelled_rows("test", length=length)[1]
    )
    return [torch.as_tensor(held_out[i]["input_ids"]) for i in range(min(recipe["rows"], len(held_out)))]


# ---- what follows from it ------------------------------------------------------------------------------------


def draw(found: Mapping[str, Any]) -> bytes:
    """The picture."""
    return draw_gate(found["gates"])


def answer(found: Mapping[str, Any]) -> list[str]:
    """The answer and its figures, as Markdown."""
    furthest = {
        name: max(one["with rows of other tasks"]["moved"] for one in tasks.values())
        for name, tasks in found["moves"].items()
    }
    said = "; ".join(f"by up to {far:.3f} ({name})" for name, far in furthest.items())
    lines = [
        f"When a row's neighbours in the batch are of other tasks, a token's g moves {said}. Below, g on held-out "
        "rows of each task, the mean over seeds with its standard deviation. The paper says that g settles at 0.22. "
        "The causal gate reads its own row alone, so no neighbour can move it.",
        "",
        "| | " + " | ".join(next(iter(next(iter(found["gates"].values())).values()))) + " | seeds |",
        "| --- |" + " --- |" * (len(next(iter(next(iter(found["gates"].values())).values()))) + 1),
    ]
    for name, seeds in found["gates"].items():
        cells = []
        for task in next(iter(seeds.values())):
            one = estimate([seed[task] for seed in seeds.values()])
            cells.append(f"{one.mean:.3f}" + ("" if one.sd is None else f" ± {one.sd:.3f}"))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(seeds)} |")
    lines += ["", "| one row of | alone | with rows of its own task | with rows of other tasks | g moves by up to |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name, tasks in found["moves"].items():
        for task, one in tasks.items():
            own, other = one["with rows of its own task"], one["with rows of other tasks"]
            cells = [f"{one['alone']:.3f}", f"{own['g']:.3f}", f"{other['g']:.3f}", f"{other['moved']:.3f}"]
            lines.append(f"| {name}: {task} | " + " | ".join(cells) + " |")
    return [*lines, ""]
