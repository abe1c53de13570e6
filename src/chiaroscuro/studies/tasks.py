"""A task in numbers: how many rows, how long, and how labels or targets are spread."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from chiaroscuro.data import load_tokenizer
from chiaroscuro.data.tasks import LabelledTexts, TokenTargets, tokenize_targets, tokenize_task
from chiaroscuro.errors import UserError

QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
EXAMPLES = 3

# No row is cut.
WHOLE = 2**62


def describe_task(
    task: LabelledTexts | TokenTargets, tokenizer: str | None = None, cache_dir: Path | None = None
) -> dict[str, Any]:
    """Summarise a task: its rows, labels and lengths, ready for JSON.

    Args:
        task: the task's data; the tokenised rows are kept in the cache.
        tokenizer: the tokenizer that measures the lengths; by default the task's own.
        cache_dir: see `tokenize_task`.

    Returns:
        For every split its rows, quantiles of the lengths in tokens, and `chance`, the accuracy of a model that always
        predicts the most frequent label or target; for labels also their counts, and for targets how many of them
        there are (`predictions`). Also the first rows of train.

    """
    spec = tokenizer or task.tokenizer
    made = load_tokenizer(spec, task.corpus, cache_dir)
    if isinstance(task, LabelledTexts):
        splits, examples = _describe_labels(task, made, cache_dir)
    else:
        splits, examples = _describe_targets(task, made, cache_dir)
    return {
        "task": task.name,
        "description": task.description,
        "fingerprint": task.fingerprint,
        "tokenizer": spec,
        "vocabulary": len(made),
        "splits": splits,
        "examples": examples,
    }


def _describe_labels(task: LabelledTexts, tokenizer: Any, cache_dir: Path | None) -> tuple[dict[str, Any], list[Any]]:
    splits = {}
    for split, rows in tokenize_task(task, tokenizer, WHOLE, cache_dir).items():
        counts = task.label_counts(split)
        splits[split] = {
            "rows": len(rows),
            "labels": dict(zip(task.labels, counts, strict=True)),
            "chance": max(counts) / len(rows),
            "tokens": _quantiles(rows.lengths),
        }
    first = task.splits["train"].select(range(min(EXAMPLES, len(task.splits["train"]))))
    return splits, [{"label": task.labels[row["label"]], "text": row["text"]} for row in first]


def _describe_targets(task: TokenTargets, tokenizer: Any, cache_dir: Path | None) -> tuple[dict[str, Any], list[Any]]:
    splits = {}
    for split, rows in tokenize_targets(task, tokenizer, WHOLE, cache_dir).items():
        counts = Counter(word for row in task.splits[split] for word in row["targets"] if word is not None)
        if not counts:
            raise UserError(f"{task.name}: no row of the {split} split has a target, so there is nothing to predict")
        splits[split] = {
            "rows": len(rows),
            "predictions": counts.total(),
            "chance": max(counts.values()) / counts.total(),
            "tokens": _quantiles(rows.lengths),
        }
    first = task.splits["train"].select(range(min(EXAMPLES, len(task.splits["train"]))))
    return splits, [{"text": " ".join(row["words"]), "targets": row["targets"]} for row in first]


def _quantiles(lengths: Any) -> dict[str, float]:
    return dict(zip(QUANTILES, np.quantile(lengths, list(QUANTILES.values())).tolist(), strict=True))
