"""A task as numbers: each row tokenised once and kept, and padded when rows become a batch."""

from collections.abc import Callable, Iterator, Sequence
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
from chiaroscuro.data.tasks.task import LabelledTexts, TokenTargets
from chiaroscuro.data.tokenizers import all_cores, bare_backend
from chiaroscuro.errors import UserError

# To be raised when the tables, or what is put into them, change.
FORMAT = 1

# The target of a position where nothing is to be predicted: what PyTorch's cross-entropy leaves out.
IGNORED = -100

# Texts that are tokenised at once.
BATCH = 256


class LabelledRows(Dataset[dict[str, Any]]):
    """Row i holds the first T tokens of a text, `input_ids`, and its label, `labels`; longer texts are truncated.

    Args:
        name: which split of which task, in words.
        identity: changes with the texts, their labels and the tokenizer.
        table: with the columns "input_ids", of whole texts, and "label".
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
        """The number of tokens of each text before truncation."""
        return arrow.list_value_length(self.table.data.column("input_ids")).to_numpy()

    @property
    def share_cut(self) -> float:
        """The share of texts that are longer than T."""
        return float((self.lengths > self.length).mean())

    def first(self, count: int) -> "LabelledRows":
        """The first rows alone."""
        return LabelledRows(self.name, self.identity, self.table.select(range(count)), self.length)


class TokenRows(Dataset[dict[str, Any]]):
    """Row i is a sequence, `input_ids`, and what to predict at each of its positions, `shift_labels` (−100: nothing).

    `labels` is the same as `shift_labels`: transformers' Trainer counts predictions only where there are labels.

    Args:
        name: which split of which task, in words.
        identity: changes with the rows and the tokenizer.
        table: the columns "input_ids" and "targets", and "depths" if there are some.
        length: T, the most tokens that a row may have.
        depths: what each depth of a target is called; see [`TokenTargets`][].

    Raises:
        UserError: a row is longer; truncated, it would lose targets.

    """

    def __init__(
        self, name: str, identity: str, table: datasets.Dataset, length: int, depths: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.identity = identity
        self.table = table
        self.length = length
        self.depths = depths
        if (longest := int(self.lengths.max())) > length:
            raise UserError(
                f"{name} has sequences of {longest} tokens, more than the {length} that are to be read: raise "
                "data.sequence_length (and model.max_position_embeddings), or ask for shorter ones"
            )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        return {"input_ids": row["input_ids"], "labels": row["targets"], "shift_labels": row["targets"]}

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """The number of tokens of each row."""
        return arrow.list_value_length(self.table.data.column("input_ids")).to_numpy()

    @property
    def predictions(self) -> int:
        """The number of positions with a target, over all rows."""
        return int((self._flat("targets") != IGNORED).sum())

    @property
    def target_depths(self) -> Int[np.ndarray, " predictions"]:
        """The depth of each target, an index into `depths`: row after row, without the positions between."""
        return self._flat("depths")[self._flat("targets") != IGNORED]

    def first(self, count: int) -> "TokenRows":
        """The first rows alone."""
        return TokenRows(self.name, self.identity, self.table.select(range(count)), self.length, self.depths)

    def _flat(self, column: str) -> Int[np.ndarray, " tokens"]:
        return arrow.list_flatten(self.table.data.column(column)).to_numpy()


class PadToLongest:
    """Rows as a batch: padded on the right to the longest of them, with a mask that marks the padding.

    Args:
        pad_token_id: the token that fills the padding. Any will do: the mask is what counts.

    """

    def __init__(self, pad_token_id: int | None = None) -> None:
        self.pad_token_id = pad_token_id or 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Int[Tensor, "batch ..."]]:
        """Make a batch.

        Args:
            rows: each a mapping from names to a number, or to a list of numbers, one for each position.

        Returns:
            `input_ids` and `attention_mask` (B, longest), and for every other name (B,) or (B, longest), where the
            padding is −100.

        """
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        mask = [[1] * len(ids) for ids in columns["input_ids"]]
        return {
            "input_ids": _padded(columns.pop("input_ids"), self.pad_token_id),
            "attention_mask": _padded(mask, 0),
            **{
                name: _padded(values, IGNORED) if isinstance(values[0], list) else torch.tensor(values)
                for name, values in columns.items()
            },
        }


def _padded(rows: list[list[int]], padding: int) -> Int[Tensor, "batch time"]:
    filled = torch.full((len(rows), max(map(len, rows))), padding)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return filled


def tokenize_task(
    task: LabelledTexts, tokenizer: PreTrainedTokenizerFast, length: int, cache_dir: Path | None = None
) -> dict[str, LabelledRows]:
    """Tokenise each split of a task, without special tokens, or take it from the cache.

    Args:
        task: the texts.
        tokenizer: the tokenizer; its settings for length, padding and truncation have no effect here.
        length: T, where a text is truncated. Whole texts are kept, so that another T costs nothing.
        cache_dir: where the tables are kept, under a fingerprint of task and tokenizer; [`default_cache_dir`][] by
            default.

    Raises:
        UserError: a text has no tokens, or the cache folder can't be written.

    """
    features = datasets.Features({"input_ids": _ids(tokenizer), "label": datasets.Value("uint8")})
    return {
        split: LabelledRows(name, identity, table, length)
        for split, name, identity, table in _tables(task, tokenizer, features, _encode_texts, cache_dir)
    }


def tokenize_targets(
    task: TokenTargets, tokenizer: PreTrainedTokenizerFast, length: int, cache_dir: Path | None = None
) -> dict[str, TokenRows]:
    """Turn the words and targets of each split into the tokenizer's ids, or take them from the cache.

    Args:
        task: the sequences.
        tokenizer: one that has each word as one token.
        length: T, the most tokens that a row may have.
        cache_dir: see `tokenize_task`.

    Raises:
        UserError: a word is not one of the tokenizer's, a row is empty or longer than T, words and targets differ in
            number, a target has no depth where others have one, or the cache folder can't be written.

    """
    columns = ("targets", "depths") if task.depths else ("targets",)
    features = datasets.Features(
        {"input_ids": _ids(tokenizer), **{column: datasets.List(datasets.Value("int32")) for column in columns}}
    )
    return {
        split: TokenRows(name, identity, table, length, task.depths)
        for split, name, identity, table in _tables(task, tokenizer, features, _encode_targets, cache_dir)
    }


def _ids(tokenizer: PreTrainedTokenizerFast) -> datasets.List:
    return datasets.List(datasets.Value("uint16" if len(tokenizer) <= 2**16 else "uint32"))


def _tables(
    task: LabelledTexts | TokenTargets,
    tokenizer: PreTrainedTokenizerFast,
    features: datasets.Features,
    encode: Callable[..., Iterator[dict[str, list[Any]]]],
    cache_dir: Path | None,
) -> Iterator[tuple[str, str, str, datasets.Dataset]]:
    """For each split: its name, the same in words, its identity, and its table."""
    serialised = bare_backend(tokenizer).to_str()
    folder = (cache_dir or default_cache_dir()) / "tasks"
    for split in task.splits:
        key = fingerprint(task=task.fingerprint, split=split, tokenizer=serialised, format=FORMAT)
        table = kept_table(folder / f"{split}-{key}.arrow", features, partial(encode, task, split, tokenizer))
        yield split, f"the {split} split of {task.name}", f"{split}-{key}", table


def _encode_texts(
    task: LabelledTexts, split: str, tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, list[Any]]]:
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


def _encode_targets(
    task: TokenTargets, split: str, tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, list[Any]]]:
    ids: dict[str | None, int] = {None: IGNORED}
    for word, id_ in tokenizer.get_vocab().items():
        ids[word] = id_
    place = 0
    with patient_bar(f"tokenising the {split} split of {task.name}", len(task.splits[split])) as advance:
        for batch in task.splits[split].iter(batch_size=BATCH):
            for row, (words, targets) in enumerate(zip(batch["words"], batch["targets"], strict=True), start=place):
                where = f"row {row} of the {split} split of {task.name}"
                if not words or len(words) != len(targets):
                    raise UserError(f"{where} has {len(words)} words and {len(targets)} targets; need as many of both")
                for word in (*words, *targets):
                    if word not in ids:
                        raise UserError(
                            f"{where} has the word {word!r}, which the tokenizer does not know: it knows those of the "
                            "rows that it was made of, so give more of them (train_examples)"
                        )
            encoded = {
                "input_ids": [[ids[word] for word in words] for words in batch["words"]],
                "targets": [[ids[target] for target in targets] for targets in batch["targets"]],
            }
            if task.depths:
                encoded["depths"] = [
                    _depths_of(targets, depths, len(task.depths), f"row {row} of the {split} split of {task.name}")
                    for row, (targets, depths) in enumerate(
                        zip(batch["targets"], batch["depths"], strict=True), start=place
                    )
                ]
            yield encoded
            place += len(batch["words"])
            advance(len(batch["words"]))


def _depths_of(targets: list[str | None], depths: list[int | None], count: int, where: str) -> list[int]:
    """The depth of each target, −100 where there is none."""
    if len(depths) != len(targets):
        raise UserError(f"{where} has {len(targets)} targets and {len(depths)} depths; need as many of both")
    for target, depth in zip(targets, depths, strict=True):
        if (depth is None) != (target is None) or (depth is not None and not 0 <= depth < count):
            raise UserError(
                f"{where} has the target {target!r} with the depth {depth}: a target has a depth from 0 to "
                f"{count - 1}, and any other position None"
            )
    return [IGNORED if depth is None else depth for depth in depths]
