"""Equal time: the loss over the time that training takes on this machine, and over operations.

The losses are those of finished runs. Their own clocks are not used: other work ran beside them. How long a step takes
is measured here, all models of a length taking turns.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from chiaroscuro.analysis.flops import count_flops
from chiaroscuro.analysis.speed import machine, take_turns, training_step
from chiaroscuro.errors import UserError
from chiaroscuro.layers.operator import is_whole
from chiaroscuro.report.evidence_figure import draw_curves
from chiaroscuro.studies.statistics import Comparison, compare, estimate
from chiaroscuro.studies.workspace import Workspace

FIELDS = ("seconds", "baseline", "lengths")
QUESTION = "What does equal time buy?"
COSTS = ("seconds a token", "operations a token")


def measure(recipe: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """All models of the recipe, by length: their curves, and the time and the operations of a token."""
    refuse_wrong(recipe)
    found: dict[str, Any] = {"machine": machine(), "baseline": recipe["baseline"], "lengths": {}}
    for length, models in recipe["lengths"].items():
        runs = {
            name: {seed: Workspace(given["run"].format(seed=seed), device="cpu") for seed in given["seeds"]}
            for name, given in models.items()
        }
        first = {name: next(iter(seeds.values())) for name, seeds in runs.items()}
        vocabulary = min(workspace.config.vocab_size for workspace in first.values())
        ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
        timings = take_turns(
            {name: training_step(workspace.model.train(), ids) for name, workspace in first.items()},
            recipe["seconds"],
            turns=3,
        )
        found["lengths"][str(length)] = {}
        for name, seeds in runs.items():
            config: Any = first[name].config
            found["lengths"][str(length)][name] = {
                "begins after": models[name].get("after"),
                "seconds a token": timings[name].median / length,
                "operations a token": count_flops(config, length, training=True).total / length,
                "seeds": {str(seed): _curve(run) for seed, run in seeds.items()},
            }
            console.print(f"{name}, T = {length}: {timings[name].median:.3f} s a row", highlight=False)
    return found


def refuse_wrong(recipe: Mapping[str, Any]) -> None:
    """Raise a UserError if a length of the recipe has no models, or one that can't be compared."""
    lengths, baseline = recipe["lengths"], recipe["baseline"]
    if not isinstance(lengths, dict) or not all(isinstance(models, dict) and models for models in lengths.values()):
        raise UserError(f"lengths={lengths!r}: give each length its models, by name")
    for length, models in lengths.items():
        if wrong := [name for name, given in models.items() if not isinstance(given, dict)]:
            raise UserError(f"lengths.{length}.{wrong[0]}: give its run and its seeds, as in {{run: …, seeds: [0]}}")
        for name in (baseline, *(one["after"] for one in models.values() if "after" in one)):
            if name not in models:
                raise UserError(f"lengths.{length}: no model is called {name!r}; have {', '.join(models)}")
        for name, given in models.items():
            if not {"run", "seeds"} <= given.keys() <= {"run", "seeds", "after"} or not given["seeds"]:
                raise UserError(
                    f"lengths.{length}.{name}: give its run and its seeds, and after which model it began, if any"
                )
            if not isinstance(given["seeds"], list) or not all(map(is_whole, given["seeds"])):
                raise UserError(f"lengths.{length}.{name}.seeds={given['seeds']!r}: give a list of whole numbers")
            before = [name]
            while (earlier := models[before[-1]].get("after")) is not None:
                if earlier in before:
                    raise UserError(f"lengths.{length}.{name}: it begins after itself, by way of {earlier!r}")
                before.append(earlier)


def _curve(workspace: Workspace) -> dict[str, Any]:
    """The losses of a run: [tokens, nats] on the way, and the last one on held-out text."""
    if workspace.run is None:
        raise UserError(f"{workspace.name} is no run, so it has no records of its training: name the run's folder")
    lines = (workspace.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    *_, last = [r for r in records if r["kind"] == "validation"]
    return {
        "curve": [[r["tokens"], r["loss"]] for r in records if r["kind"] == "train"],
        "tokens": last["tokens"],
        "loss": last["loss"],
    }


# ---- what follows from it ------------------------------------------------------------------------------------


def totals(models: Mapping[str, Any], name: str, cost: str) -> float:
    """What a model's whole training costs, that of the model it goes on from included."""
    model = models[name]
    return _start(models, name, cost) + next(iter(model["seeds"].values()))["tokens"] * model[cost]


def _start(models: Mapping[str, Any], name: str, cost: str) -> float:
    before = models[name]["begins after"]
    return totals(models, before, cost) if before else 0.0


def losses(model: Mapping[str, Any]) -> list[float]:
    """The loss at the end of each seed's run, in order."""
    return [seed["loss"] for seed in model["seeds"].values()]


def against(model: Mapping[str, Any], baseline: Mapping[str, Any]) -> Comparison | None:
    """How much more loss a model ends with, seed by seed, over the seeds that both have; None if there is none."""
    seeds = [seed for seed in model["seeds"] if seed in baseline["seeds"]]
    if not seeds:
        return None
    return compare(*([one["seeds"][seed]["loss"] for seed in seeds] for one in (model, baseline)))


def draw(found: Mapping[str, Any]) -> bytes:
    """The picture: each model's curve, the mean over its seeds, begun where the run that it goes on from ended."""
    rows = {}
    for length, models in found["lengths"].items():
        rows[f"T = {int(length):,}"] = {
            cost.removesuffix(" a token"): {
                name: [(_start(models, name, cost) + tokens * model[cost], loss) for tokens, loss in _mean(model)[1:]]
                for name, model in models.items()
            }
            for cost in COSTS
        }
    return draw_curves(rows)


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _mean(model: Mapping[str, Any]) -> list[tuple[int, float]]:
    """The curve of a model: the mean of its seeds, which were recorded after the same tokens."""
    curves: Sequence[Any] = [seed["curve"] for seed in model["seeds"].values()]
    return [(points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*curves, strict=True)]


def answer(found: Mapping[str, Any]) -> list[str]:
    """The answer and its figures, as Markdown."""
    baseline = found["baseline"]
    lines = [
        f"The time of a step was measured on {found['machine']['cpu']} with {_threads(found['machine']['threads'])}, "
        "the models of a length taking turns. *Whole training* is that of the run "
        f"and of the one it goes on from, as a part of that of *{baseline}*, every step at the shares that the run "
        "ends with: one that begins with everybody looking far, and is fitted on the way, costs more than it says. The "
        "loss at the end is a mean over seeds with its standard deviation; the difference is the mean over seeds with "
        "its 95% interval.",
        "",
    ]
    for length, models in found["lengths"].items():
        seeds = len(losses(models[baseline]))
        lines += [
            f"**T = {int(length):,}**, {seeds} {'seed' if seeds == 1 else 'seeds'}:",
            "",
            "| | goes on from | time a token | operations a token | whole training, time | whole training, operations "
            "| loss at the end, nats | difference |",
            "| --- |" + " --- |" * 7,
        ]
        for name, model in models.items():
            cells = [model["begins after"] or "–"]
            cells += [f"{model[cost] / models[baseline][cost]:.2f}" for cost in COSTS]
            cells += [f"{totals(models, name, cost) / totals(models, baseline, cost):.2f}" for cost in COSTS]
            end = estimate(losses(model))
            cells.append(f"{end.mean:.3f}" + ("" if end.sd is None else f" ± {end.sd:.3f}"))
            more = against(model, models[baseline])
            interval = "" if more is None or more.low is None else f" ({more.low:+.3f} to {more.high:+.3f})"
            cells.append("–" if name == baseline or more is None else f"{more.mean:+.3f}{interval}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines
