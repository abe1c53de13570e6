"""A task as numbers: each text tokenised once, cut at T tokens when it is read, padded when rows become a batch."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as arrow
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from chiaroscuro.data.progress import patient_bar
from chiaroscuro.data.storage import default_cache_dir, fingerprint
from chiaroscuro.data.tasks.tables import kept_table
from chiaroscuro.data.tasks.task import ClassificationTask
from chiaroscuro.data.tokenizers import all_cores, bare_backend
from chiaroscuro.errors import UserError

# Counts up when the tables or what is put into them change.
FORMAT = 1

# Texts that go to the threads at once.
BATCH = 256


class LabelledRows(Dataset[dict[str, Any]]):
    """Row i is a text's first T tokens, `input_ids`, and its label, `labels`.

    What comes after the T-th token is cut off: a review, say, is judged by how it begins.

    Args:
        name: which split of which task, in words.
        identity: changes with the texts, their labels and the tokenizer.
        table: the columns "input_ids", of whole texts, and "label".
        length: T.

    Raises:
        UserError: T is less than 1.

    """

    def __init__(self, name: str, identity: str, table: datasets.Dataset, length: int) -> None:
        if length < 1:
            raise UserError(f"length is {length}; a row needs at least 1 token")
        self.name = name
        self.identity = identity
        self.table = table
        self.length = length

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        return {"input_ids": row["input_ids"][: self.length], "labels": row["label"]}

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """How many tokens each text has, before it is cut."""
        return arrow.list_value_length(self.table.data.column("input_ids")).to_numpy()

    @property
    def share_cut(self) -> float:
        """The share of the texts that are longer than T."""
        return float((self.lengths > self.length).mean())


class PadToLongest:
    """Rows as a batch: padded on the right to the longest of them, and a mask that says so.

    Args:
        pad_token_id: what stands in the padding; the mask is what counts, so that any token will do.

    """

    def __init__(self, pad_token_id: int | None = None) -> None:
        self.pad_token_id = pad_token_id or 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Int[Tensor, "batch ..."]]:
        """Give `input_ids` and `attention_mask` (B, longest), and `labels` (B,)."""
        time = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), time), self.pad_token_id)
        mask = torch.zeros(len(rows), time, dtype=torch.long)
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[i, :size] = torch.tensor(row["input_ids"])
            mask[i, :size] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def tokenize_task(
    task: ClassificationTask, tokenizer: PreTrainedTokenizerFast, length: int, cache_dir: Path | None = None
) -> dict[str, LabelledRows]:
    """Tokenise each split of a task, without special tokens, or find it done.

    Args:
        task: the texts.
        tokenizer: the tokenizer; its limits on length, padding and truncation don't matter here.
        length: T, where a text is cut. What is kept is of whole texts, so that another T costs nothing.
        cache_dir: where the tables are kept, under a fingerprint of task and tokenizer; [`default_cache_dir`][] if not
            given.

    Raises:
        UserError: a text has no tokens, or the cache folder can't be written.

    """
    serialised = bare_backend(tokenizer).to_str()
    folder = (cache_dir or default_cache_dir()) / "tasks"
    small = len(tokenizer) <= 2**16
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("uint16" if small else "uint32")), "label": datasets.Value("uint8")}
    )
    rows = {}
    for split in task.splits:
        key = fingerprint(task=task.fingerprint, split=split, tokenizer=serialised, format=FORMAT)
        table = kept_table(folder / f"{split}-{key}.arrow", features, partial(_encode, task, split, tokenizer))
        rows[split] = LabelledRows(f"the {split} split of {task.name}", f"{split}-{key}", table, length)
    return rows


def _encode(task: ClassificationTask, split: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, list[Any]]]:
    backend = bare_backend(tokenizer)
    place = 0
    with patient_bar(f"tokenising the {split} split of {task.name}", len(task.splits[split])) as advance:
        for batch in task.splits[split].iter(batch_size=BATCH):
            with all_cores():
                encoded = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
            for row, text in enumerate(encoded, start=place):
                if not text.ids:
                    raise UserError(f"row {row} of the {split} split of {task.name} has no tokens: remove such rows")
            yield {"input_ids": [text.ids for text in encoded], "label": batch["label"]}
            place += len(encoded)
            advance(len(encoded))
