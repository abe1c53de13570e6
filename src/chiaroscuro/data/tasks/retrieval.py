"""Passages of a text, and between them needles and copies, for a model that is to find what is far."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from chiaroscuro.data.needles import Haystack
from chiaroscuro.data.tasks.language_modelling import LanguageModelling
from chiaroscuro.data.tokens import TokenFile
from chiaroscuro.errors import UserError
from chiaroscuro.ops.linear_cross_entropy import IGNORED

MOST_TEXT = 2**24
"""Tokens of a text, from its beginning, that passages are taken from."""


@dataclass(frozen=True)
class Retrieval(LanguageModelling):
    """A corpus, of whose training rows about five in eight hold needles or copies: see `Haystack.row`.

    Of these the answers alone are predicted, and of a copy what is said again. It is validated on the text alone.

    Args:
        source: see `LanguageModelling`, as for `column`.
        draw: of the rows; another one gives others.

    """

    draw: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("documents", "streaming"):
            if getattr(self, option):
                raise UserError(f"data.{option} with data.task: retrieval, which draws rows of its own; remove one")

    def of(self, source: str, number: int) -> "Retrieval":
        """With rows of its own: two texts would have the same needles in noise."""
        return replace(self, source=source, draw=self.draw + number)

    def train_rows(self, tokens: TokenFile, tokenizer: Any, length: int) -> Dataset[Any]:
        """As many rows as the text has blocks."""
        return HaystackRows(tokens, tokenizer, length, self.draw)


class HaystackRows(Dataset[dict[str, Int[Tensor, " length"]]]):
    """Rows of a haystack as `TokenBlocks` has its blocks.

    Args:
        tokens: the text.
        tokenizer: of the model.
        length: T.
        seed: of the rows.

    Raises:
        UserError: the text is shorter than a row, or a row too short for a needle.

    """

    def __init__(self, tokens: TokenFile, tokenizer: Any, length: int, seed: int) -> None:
        if tokens.count <= length:
            raise UserError(f"{tokens.name} has {tokens.count} tokens, too few for a row of {length} + 1")
        self.tokens, self.length, self.seed = tokens, length, seed
        self.haystack = Haystack(tokenizer, torch.from_numpy(tokens.tokens[:MOST_TEXT].astype("int64")))
        for number in range(8):  # of every kind
            self.haystack.row(number, length + 1, seed)

    def __len__(self) -> int:
        return (self.tokens.count - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Int[Tensor, " length"]]:
        """`input_ids`, `labels` and `shift_labels` of a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        # By chance, not in turns: whoever takes every eighth row would get one kind alone.
        kind = Random(f"kind {self.seed} {index}").randrange(8)
        drawn = self.haystack.row(index, self.length + 1, self.seed, kind)
        row = drawn.input_ids
        labels = row.clone()
        if drawn.answer:
            labels[: -drawn.answer] = IGNORED
        return {"input_ids": row[:-1], "labels": labels[:-1], "shift_labels": labels[1:]}
