"""What a run says about itself: a record per look, for the terminal, TensorBoard and `metrics.jsonl` alike.

A record is a flat dict but for `layers`, a list with one entry per layer (numbered from 1, as in the paper), and in
mixed training `tasks`, the figures of each task beside the text.
Entropies are quantiles at [`PROBABILITIES`][], and the record of a model that routes carries those of white
noise beside them: an entropy means nothing without them.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.ops import null_entropy_quantiles

PROBABILITIES = (0.05, 0.5, 0.95)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def describe_routing(looks: Sequence[tuple[Sequence[Any], Tensor | None]], width: int) -> dict[str, Any]:
    """Shares and entropies per layer, and the mean gate, over some batches.

    Args:
        looks: `output.routing` and `output.meta_gate` of each batch; the gate None without a MetaRouter.
        width: d, the width whose white noise the entropies are held against.
    """
    layers = [
        {
            "layer": number,
            "operators": list(batches[0].operators),
            "share": _share(batches),
            "entropy": _entropy_quantiles(batches),
        }
        for number, batches in enumerate(zip(*(routing for routing, _ in looks), strict=True), start=1)
    ]
    record: dict[str, Any] = {
        "layers": layers,
        "null_entropy": null_entropy_quantiles(width, PROBABILITIES).tolist(),
    }
    return record | mean_gate(looks)


def mean_gate(looks: Sequence[tuple[Any, Tensor | None]]) -> dict[str, float]:
    """The mean of g over some batches, under `gate`; nothing without a MetaRouter. Padding has a g that counts not."""
    gates = []
    for routing, gate in looks:
        if gate is not None:
            real = routing[0].operator_index >= 0
            gates.append((gate[real] if gate.shape == real.shape else gate).detach().float().flatten())
    return {"gate": torch.cat(gates).mean().item()} if gates else {}


def describe_tasks(seen: Sequence[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What was learned beside the text: by task the number of batches, and the means of their figures.

    Args:
        seen: task and figures (`loss`, and `gate` with a MetaRouter) of each second forward.
    """
    tasks: dict[str, list[dict[str, float]]] = {}
    for task, figures in seen:
        tasks.setdefault(task, []).append(figures)
    return {
        task: {"batches": len(each), **{name: sum(f[name] for f in each) / len(each) for name in each[0]}}
        for task, each in tasks.items()
    }


@torch.no_grad()
def measure_routing(model: ChiarPreTrainedModel, batches: Iterable[Tensor]) -> dict[str, Any]:
    """What a model routes where on some batches of input ids, as `describe_routing` puts it."""
    with evaluation_mode(model):
        outputs = [model.trunk(batch.to(model.device), use_cache=False, output_routing=True) for batch in batches]
    return describe_routing([(output.routing, output.meta_gate) for output in outputs], model.config.hidden_size)


def _share(batches: Sequence[Any]) -> list[float]:
    """Share of the real tokens per operator: a batch counts by its tokens, as the last one may be small."""
    tokens = torch.stack([(batch.operator_index >= 0).sum() for batch in batches]).float()
    shares = torch.stack([batch.share.detach().float() for batch in batches])
    return (tokens @ shares / tokens.sum().clamp_min(1)).tolist()


def _entropy_quantiles(batches: Sequence[Any]) -> list[float]:
    # numpy, because torch.quantile refuses more than 16M values; real tokens only, padding has operator_index
    # -1.
    seen = torch.cat([batch.entropy.detach()[batch.operator_index >= 0].float() for batch in batches])
    return np.quantile(seen.cpu().numpy(), PROBABILITIES).tolist() if seen.numel() else []


def routed(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Pick the layers of a record that have a choice to make."""
    return [layer for layer in record.get("layers", []) if len(layer["operators"]) > 1]


def terminal_line(record: dict[str, Any], steps: int) -> str:
    """Put a record in one line: the share is the costliest operator's, for each routed layer in order."""
    words = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    if record["kind"] == "validation":
        words.append("validation")
    words.append(f"loss {record['loss']:.4f}")
    if "perplexity" in record:
        words.append(f"ppl {record['perplexity']:.2f}")
    if "accuracy" in record:
        words.append(f"accuracy {record['accuracy']:.2%}")
    if "bits_per_byte" in record:
        words.append(f"bits/byte {record['bits_per_byte']:.4f}")
    if "learning_rate" in record:
        words += [f"lr {record['learning_rate']:.2e}", f"{record['tokens_per_second']:,.0f} tok/s"]
    if layers := routed(record):
        costliest = dict.fromkeys(layer["operators"][-1] for layer in layers)
        words.append(f"{'/'.join(costliest)} " + " ".join(f"{layer['share'][-1]:.0%}" for layer in layers))
        middle = np.mean([layer["entropy"] for layer in layers if layer["entropy"]] or [[math.nan]], axis=0)
        words.append(f"H {_three(middle.tolist())} (null {_three(record['null_entropy'])})")
    if "gate" in record:
        words.append(f"g {record['gate']:.3f}")
    for task, figures in record.get("tasks", {}).items():
        shown = [f"accuracy {figures['accuracy']:.2%}"] if "accuracy" in figures else [f"loss {figures['loss']:.4f}"]
        shown += [f"g {figures['gate']:.3f}"] if "gate" in figures else []
        words.append(f"{task}: {' '.join(shown)}")
    return "  ".join(words)


def _three(quantiles: Sequence[float]) -> str:
    return "/".join(f"{value:.3f}" for value in quantiles)


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Give a record TensorBoard's flat names."""
    kind = record["kind"]
    flat = {
        f"{kind}/{name}": value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name not in ("step", "tokens", "seconds")
    }
    for task, figures in record.get("tasks", {}).items():
        flat |= {f"{kind}_{task}/{name}": value for name, value in figures.items()}
    for layer in record.get("layers", []):
        place = f"{kind}_layer_{layer['layer']:02d}"
        flat |= {f"{place}/share_{name}": x for name, x in zip(layer["operators"], layer["share"], strict=True)}
        flat |= {f"{place}/entropy_{p:.0%}": x for p, x in zip(PROBABILITIES, layer["entropy"], strict=False)}
    for p, value in zip(PROBABILITIES, record.get("null_entropy", []), strict=False):
        flat[f"{kind}_null/entropy_{p:.0%}"] = value
    return flat


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line of strict JSON to `path`: what is not finite is null, for JSON has no NaN."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(record), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run, oldest first; a last line that a killed run cut short is left out.

    Raises:
        UserError: the file holds something else.
    """
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
            raise UserError(
                f"{path} is no record of a run of chiaroscuro: line {len(records) + 1} has no kind and step"
            )
        records.append(record)
    return records


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run's folder.

    Raises:
        UserError: if it holds none.
    """
    records = read_records(folder / "metrics.jsonl")
    if not records:
        raise UserError("no run's folder: it has no metrics.jsonl with records in it")
    return records


def forget_after(path: Path, step: int) -> None:
    """Drop the records that come after `step`: a resumed run is about to write them again."""
    kept = [json.dumps(record) + "\n" for record in read_records(path) if record["step"] <= step]
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)
