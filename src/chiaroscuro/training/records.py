"""What a run says about itself: a record at every look, for the terminal, TensorBoard and `metrics.jsonl`.

A record is a flat dict, with two exceptions: `layers`, a list with one entry per layer (numbered from 1, as in the
paper), and in mixed training `tasks`, the figures of each task. Entropies are quantiles at
[`PROBABILITIES`][chiaroscuro.analysis.routing_summary.PROBABILITIES], and the record of a model that routes has those
of white noise beside them, because an entropy means nothing without them.
"""

import json
import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chiaroscuro.errors import UserError
from chiaroscuro.files import write_text

COLUMNS = 80
_OPENING = b'{"kind": "'  # of every record


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float can't hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def describe_tasks(seen: Sequence[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What was learned beside the text: for each task the number of batches, and the means of their figures.

    Args:
        seen: Task and figures (`loss`, and `gate` with a MetaRouter) of each second forward.
    """
    tasks: dict[str, list[dict[str, float]]] = {}
    for task, figures in seen:
        tasks.setdefault(task, []).append(figures)
    return {
        task: {"batches": len(each), **{name: sum(f[name] for f in each) / len(each) for name in each[0]}}
        for task, each in tasks.items()
    }


def routed(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a record that choose between operators."""
    return [layer for layer in record.get("layers", []) if len(layer["operators"]) > 1]


def terminal_line(record: dict[str, Any], steps: int) -> str:
    """Put a record in a line of at most 80 columns, or more such lines where it has more to say.

    The share is the costliest operator's, from the lowest to the highest of the routed layers; H is their median
    entropy. [`legend`][] explains them. Learning rate and quantiles are in the record alone.
    """
    words = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    if record["kind"] == "validation":
        words.append("validation")
    words.append(f"loss {record['loss']:.4f}")
    if "perplexity" in record and record["kind"] == "validation":
        words.append(f"ppl {record['perplexity']:.2f}")
    if "accuracy" in record:
        words.append(f"accuracy {record['accuracy']:.2%}")
    if "bits_per_byte" in record:
        words.append(f"bits/byte {record['bits_per_byte']:.4f}")
    if "kl" in record:
        words.append(f"KL {record['kl']:.4f}")
    if "tokens_per_second" in record:
        words.append(f"{record['tokens_per_second']:,.0f} tok/s")
    routing = []
    if layers := routed(record):
        shares = sorted(layer["share"][-1] for layer in layers)
        span = dict.fromkeys(f"{share:.0%}".rstrip("%") for share in (shares[0], shares[-1]))
        routing.append(f"{_costliest(layers)} {'–'.join(span)}%")
        if seen := [layer["entropy"][1] for layer in layers if layer["entropy"]]:
            routing.append(f"H {np.mean(seen):.3f}")
    if "gate" in record:
        routing.append(f"g {record['gate']:.3f}")
    if "attention_share" in record:
        routing.append(f"ρ {record['attention_share']:.2f}")
    if "kv_share" in record:
        routing.append(f"kept {record['kv_share']:.2f}")
    if routing:
        words.append("  ".join(routing))
    for task, figures in record.get("tasks", {}).items():
        shown = [f"accuracy {figures['accuracy']:.2%}"] if "accuracy" in figures else [f"loss {figures['loss']:.4f}"]
        shown += [f"g {figures['gate']:.3f}"] if "gate" in figures else []
        words.append(f"{task}: {' '.join(shown)}")
    lines, indent = [words[0]], " " * (len(words[0]) + 2)
    for word in words[1:]:
        if len(lines[-1]) + 2 + len(word) > COLUMNS:
            lines.append(indent + word)
        else:
            lines[-1] += f"  {word}"
    return "\n".join(lines)


def legend(record: dict[str, Any]) -> str:
    """What the abbreviations in a record's line mean, and the one figure that stays the same: the null."""
    said = []
    if layers := routed(record):
        said.append(f"{_costliest(layers)}: share of the tokens, lowest to highest of the routed layers.")
        said.append(f"H: their median spectral entropy (the null, white noise: {record['null_entropy'][1]:.3f}).")
    if "gate" in record:
        said.append("g: mean gate of the MetaRouter.")
    if "attention_share" in record:
        said.append("ρ: the share that the schedule asks for.")
    if "kv_share" in record:
        said.append("kept: the share of keys that the schedule asks for.")
    if "kl" in record:
        said.append("KL: what full attention would predict against what is predicted, in nats.")
    return textwrap.fill(" ".join(said), COLUMNS)


def _costliest(layers: Sequence[dict[str, Any]]) -> str:
    return "/".join(dict.fromkeys(layer["operators"][-1] for layer in layers))


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, under flat names for TensorBoard."""
    from chiaroscuro.analysis.routing_summary import PROBABILITIES  # it brings PyTorch, which reading does not need

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
    """Add a line of strict JSON to `path`: a number that is not finite becomes null, because JSON has no NaN."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_as_line(record))


def _as_line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Layer(BaseModel):
    operators: list[str]
    share: list[float | None]
    entropy: list[float | None] = Field(default_factory=list)


class _Record(BaseModel):
    """What the readers of records rely on."""

    model_config = ConfigDict(strict=True)

    kind: str
    step: int
    seconds: float = 0.0
    loss: float | None = None
    gate: float | None = None
    layers: list[_Layer] = Field(default_factory=list)
    null_entropy: list[float] = Field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run, oldest first; a last line that a killed run cut short is left out.

    Raises:
        UserError: the file can't be read, or holds something else.
    """
    if not os.path.lexists(path):
        return []
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        if last and not line:
            break
        try:
            _Record.model_validate_json(line)
        except ValidationError as error:
            if last and _OPENING.startswith(line[: len(_OPENING)]) and error.errors()[0]["type"] == "json_invalid":
                break
            raise UserError(f"{path} is not the record of a training run: line {number} is something else") from None
        records.append(json.loads(line))
    return records


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run's folder.

    Raises:
        UserError: if it holds none.
    """
    records = read_records(folder / "metrics.jsonl")
    if not records:
        raise UserError("not the folder of a run: it has no metrics.jsonl with records in it")
    return records


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a file of records, replacing one that is there."""
    write_text(path, "".join(_as_line(record) for record in records))
