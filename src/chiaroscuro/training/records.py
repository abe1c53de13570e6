"""What a run says about itself: a record per look, for the terminal, TensorBoard and `metrics.jsonl` alike.

A record is a flat dict but for `layers`, a list with one entry per layer (numbered from 1, as in the paper), and in
mixed training `tasks`, the figures of each task beside the text.
Entropies are quantiles at [`PROBABILITIES`][], and the record of a model that routes carries those of white
noise beside them: an entropy means nothing without them.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chiaroscuro.analysis.routing_summary import PROBABILITIES
from chiaroscuro.errors import UserError
from chiaroscuro.files import write_text


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


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
    write_text(path, "".join(json.dumps(record) + "\n" for record in read_records(path) if record["step"] <= step))
