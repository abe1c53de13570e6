"""A classification task in numbers: how many texts, how long, and how the labels are spread."""

from pathlib import Path
from typing import Any

import numpy as np

from chiaroscuro.data import load_tokenizer
from chiaroscuro.data.tasks import ClassificationTask, tokenize_task

QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
EXAMPLES = 3


def describe_task(
    task: ClassificationTask, tokenizer: str | None = None, cache_dir: Path | None = None
) -> dict[str, Any]:
    """What one should know of a task before training on it, ready for JSON.

    Args:
        task: the task; it is tokenised for this, and kept so in the cache.
        tokenizer: what its lengths are measured in; the task's own unless given.
        cache_dir: see `tokenize_task`.

    Returns:
        For every split its rows, its labels' counts, quantiles of the lengths in tokens, and `chance`, the accuracy of
        whoever always says its most frequent label; and the first rows of train.

    """
    spec = tokenizer or task.tokenizer
    made = load_tokenizer(spec, task.corpus, cache_dir)
    # Whole texts: the length at which they would be cut plays no part here.
    rows = tokenize_task(task, made, 1, cache_dir)
    splits = {}
    for split in task.splits:
        counts = task.label_counts(split)
        lengths = np.quantile(rows[split].lengths, list(QUANTILES.values()))
        splits[split] = {
            "rows": sum(counts),
            "labels": dict(zip(task.labels, counts, strict=True)),
            "chance": max(counts) / sum(counts),
            "tokens": dict(zip(QUANTILES, lengths.tolist(), strict=True)),
        }
    first = task.splits["train"].select(range(min(EXAMPLES, len(task.splits["train"]))))
    return {
        "task": task.name,
        "description": task.description,
        "fingerprint": task.fingerprint,
        "tokenizer": spec,
        "vocabulary": len(made),
        "splits": splits,
        "examples": [{"label": task.labels[row["label"]], "text": row["text"]} for row in first],
    }
