"""The results of a sweep: of each run, and of the variants in comparison, as plain data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean, median
from typing import Any

import numpy as np
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from chiaroscuro.analysis.facts import count_parameters
from chiaroscuro.analysis.flops import count_flops, count_llama_flops
from chiaroscuro.errors import UserError
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.retrofitting.routed_model import FIELD
from chiaroscuro.studies.statistics import compare, compare_ratios, estimate
from chiaroscuro.studies.sweep import Sweep, SweepRun
from chiaroscuro.training.records import read_records, routed

DIVERGED = 30.0
"""Nats. A guess among 2³² tokens has 22; far beyond, a mean of perplexities says nothing, and an interval overflows."""


def collect_figures(run: SweepRun) -> dict[str, Any]:
    """The results of a finished run, ready for JSON.

    Returns:
        The fields of its last validation record; `parameters`; `steps`, `tokens` and `seconds` of training;
        `train_loss`; `share`, the mean over the routed layers of the last operator's; `flops_per_token` of a forward
        and of a training step (exact protocol, at the run's T and that share; None if the model can't be counted);
        and `curve`, all its validations.

    Raises:
        UserError: if its metric is not finite, or it diverged.
    """
    records = read_records(run.folder / "metrics.jsonl")
    last = {record["kind"]: record for record in records}
    seen, trained = last["validation"], last["train"]
    if seen.get(metric_of(seen)) is None:
        raise UserError(f"its {metric_of(seen)} is not finite")
    if seen["loss"] > DIVERGED:
        raise UserError(f"its loss is {seen['loss']:.4g} nats: it diverged")
    config = AutoConfig.from_pretrained(run.folder / "model")
    choices = routed(seen)
    share = mean(layer["share"][-1] for layer in choices) if choices else None
    return {
        **{name: value for name, value in seen.items() if name not in ("kind", "step", "tokens", "seconds")},
        "parameters": count_parameters(config),
        "steps": trained["step"],
        "tokens": trained["tokens"],
        "seconds": trained["seconds"],
        "train_loss": trained["loss"],
        "share": share,
        "flops_per_token": _flops(config, run.recipe.data.sequence_length, share),
        "curve": [
            {name: value for name, value in record.items() if name not in ("kind", "layers", "null_entropy")}
            for record in records
            if record["kind"] == "validation"
        ],
    }


def metric_of(figures: Mapping[str, Any]) -> str:
    """The name of the metric that a run is judged by."""
    return "accuracy" if "accuracy" in figures else "perplexity"


def _flops(config: PreTrainedConfig, length: int, share: float | None) -> dict[str, float] | None:
    """Operations per token."""
    counted = {}
    for step, training in (("forward", False), ("training", True)):
        if isinstance(config, ChiarConfig):
            try:
                counted[step] = count_flops(config, length, share=share, training=training).total / length
            except UserError:  # an operator without a count
                return None
        elif isinstance(config, LlamaConfig) and not hasattr(config, FIELD):  # of a retrofitted one that would be all
            counted[step] = count_llama_flops(config, length, training=training).total / length
    return counted or None


def describe_sweep(
    sweep: Sweep, figures: Mapping[SweepRun, dict[str, Any]], failed: Mapping[SweepRun, str]
) -> dict[str, Any]:
    """Compare the variants of a sweep.

    Perplexities are compared by their logarithms, so the effect is a ratio; accuracies by their difference.

    Args:
        sweep: The sweep.
        figures: What `collect_figures` gives for the finished runs.
        failed: Why the failed runs failed.

    Returns:
        `metric`, `baseline`, `seeds`, `failed` (a line each), and `variants`, each with its name, its changes, its
        runs, and their summary: `estimate`, `effect` against the baseline over the seeds that both have,
        `seconds_per_step` (median) and `time_ratio`, `flops_ratio`, `parameters`, `layers` (means over the seeds).
    """
    metric = next((metric_of(found) for found in figures.values()), "perplexity")
    runs = {
        name: [(run, figures.get(run)) for run in sweep.runs if run.variant == name and run not in failed]
        for name in sweep.changes
    }
    done = {name: {run.seed: found for run, found in each if found} for name, each in runs.items()}
    baseline = done[sweep.file.baseline]
    variants = []
    for name, changes in sweep.changes.items():
        found = done[name]
        variants.append(
            {
                "name": name,
                "changes": changes,
                "seeds_done": list(found),
                "failed": {str(run.seed): line for run, line in failed.items() if run.variant == name},
                **_summary(found, baseline, metric, is_baseline=name == sweep.file.baseline),
                "runs": [
                    {"seed": run.seed, "folder": str(run.folder), **each}
                    for run, each in runs[name]
                    if each is not None
                ],
            }
        )
    return {
        "recipe": sweep.file.recipe,
        "metric": metric,
        "baseline": sweep.file.baseline,
        "seeds": sweep.file.seeds,
        "failed": [f"{run.title}: {line}" for run, line in failed.items()],
        "variants": variants,
    }


def _summary(
    found: Mapping[int, dict[str, Any]], baseline: Mapping[int, dict[str, Any]], metric: str, *, is_baseline: bool
) -> dict[str, Any]:
    if not found:
        return {}
    first = next(iter(found.values()))
    summary: dict[str, Any] = {
        "estimate": asdict(estimate([each[metric] for each in found.values()])),
        "parameters": first["parameters"],
        "flops_per_token": _mean_flops(found.values()),
        "seconds_per_step": _pace(found),
    }
    if "layers" in first:
        summary["layers"] = _mean_layers([each["layers"] for each in found.values()])
        summary["null_entropy"] = first["null_entropy"]
    shares = [each["share"] for each in found.values() if each["share"] is not None]
    summary |= {"share": mean(shares)} if shares else {}
    gates = [each["gate"] for each in found.values() if "gate" in each]
    summary |= {"gate": asdict(estimate(gates))} if gates else {}
    common = [seed for seed in found if seed in baseline]
    if not is_baseline and common:
        ours, theirs = ([each[seed][metric] for seed in common] for each in (found, baseline))
        summary["effect"] = _effect(ours, theirs, metric)
    if baseline:
        summary["time_ratio"] = _pace(found) / _pace(baseline)
        ours, whole = summary["flops_per_token"], _mean_flops(baseline.values())
        if ours and whole:
            summary["flops_ratio"] = ours["training"] / whole["training"]
    return summary


def _effect(ours: Sequence[float], theirs: Sequence[float], metric: str) -> dict[str, Any]:
    if metric == "accuracy":
        return {"kind": "difference", **asdict(compare(ours, theirs))}
    found = asdict(compare_ratios(ours, theirs))
    return {"kind": "ratio", "sd_of_log": found.pop("sd"), **found}


def _mean_flops(runs: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """The mean over the seeds, whose shares differ if thresholds don't follow ρ; None if the model can't be counted."""
    counts = [run["flops_per_token"] for run in runs]
    return {step: mean(count[step] for count in counts) for step in counts[0]} if all(counts) else None


def _pace(found: Mapping[int, dict[str, Any]]) -> float:
    return median(each["seconds"] / each["steps"] for each in found.values())


def _mean_layers(each: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Shares and entropies of every layer, as means over the seeds."""
    return [
        {
            "layer": same[0]["layer"],
            "operators": same[0]["operators"],
            **{name: np.mean([layer[name] for layer in same], axis=0).tolist() for name in ("share", "entropy")},
        }
        for same in zip(*each, strict=True)
    ]
