"""Blocks of tokens to train and evaluate on.

A model that reads T tokens predicts T tokens, each the next one. So blocks are T + 1 tokens long and overlap by one,
and every token of a split is predicted exactly once, except the very first and, at the end, those (fewer than T) that
don't fill a block.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from chiaroscuro.data.tokens import TokenFile
from chiaroscuro.errors import UserError


class TokenBlocks(Dataset[dict[str, Int64[Tensor, " length"]]]):
    """Block i holds the tokens i·S … i·S + T: the first T are the input, the last T the targets.

    With S = T these are the paper's blocks. With a smaller stride S the blocks overlap more, and every block but the
    first predicts only its last S tokens. Each token is still predicted once, but with at least T − S tokens before
    it: a fairer figure for a model that is meant for long texts, at T / S times the work.

    Args:
        tokens: a tokenised split.
        length: T, the number of tokens that the model reads at once.
        stride: S, from 1 to T; T by default.
        end: the token that ends a document, where documents are to be told apart; None for a running text.

    Raises:
        UserError: T is less than 1, the stride is not in 1 … T, or the split is shorter than one block.

    """

    def __init__(self, tokens: TokenFile, length: int, stride: int | None = None, end: int | None = None) -> None:
        if length < 1:
            raise UserError(f"length is {length}; a block needs at least 1 token")
        if stride is not None and not 1 <= stride <= length:
            raise UserError(f"stride is {stride}; take one from 1 to the block's length, {length}")
        if tokens.count < length + 1:
            raise UserError(
                f"{tokens.name} has {tokens.count} tokens, too few for one block of {length} + 1; "
                "take a longer text or a shorter length"
            )
        self.tokens = tokens
        self.length = length
        self.stride = length if stride is None else stride
        self.end = end

    def __len__(self) -> int:
        return (self.tokens.count - 1 - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, Int64[Tensor, " length"]]:
        """Return `input_ids`, `labels` (the same: Hugging Face models shift them) and `shift_labels`, the next tokens.

        In `shift_labels` a token that an earlier block predicts is −100: it is left out of the loss. Where documents
        are told apart, so is the first token of each, and `position_ids` begin anew with it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.stride
        block = torch.from_numpy(self.tokens.tokens[start : start + self.length + 1].astype(np.int64))
        return row_of(block, self.length - self.stride if index > 0 else 0, self.end)


def row_of(
    block: Int64[Tensor, " length+1"], seen: int = 0, end: int | None = None
) -> dict[str, Int64[Tensor, " length"]]:
    """What a model is given of T + 1 tokens that follow each other: see `TokenBlocks.__getitem__`.

    Args:
        block: the tokens.
        seen: how many of the predictions, the first ones, are left out of the loss.
        end: the token that ends a document, where documents are to be told apart.

    """
    predicted = block[1:].clone()
    predicted[:seen] = -100
    if end is None:
        return {"input_ids": block[:-1], "labels": block[:-1], "shift_labels": predicted}
    first = torch.cat([torch.tensor([True]), block[:-1] == end])  # of a document, or of what the block has of one
    place = torch.arange(len(block))
    labels = block.masked_fill(first, -100)
    return {
        "input_ids": block[:-1],
        "labels": labels[:-1],
        "shift_labels": predicted.masked_fill(first[1:], -100),
        "position_ids": (place - place.where(first, 0).cummax(0).values)[:-1],
    }


class MixedRows(Dataset[Any]):
    """The rows of a source, and beside them rows of others, so that each gives a set part of all.

    The first source is read once. Of another, as many rows as its part asks for: spread evenly over it if it has more,
    and again from its start if it has fewer. The order is that of the sources; a sampler shuffles them.

    Args:
        rows: of the first source.
        others: of each other source its rows, and the part of all rows that they are to be.

    Raises:
        ValueError: the parts are not positive, or leave nothing to the first source.

    """

    def __init__(self, rows: Any, others: Sequence[tuple[Any, float]]) -> None:
        own = 1 - sum(part for _, part in others)
        if own <= 0 or any(part <= 0 for _, part in others):
            raise ValueError(f"parts {[part for _, part in others]}: must be positive, and less than 1 in all")
        self.sources = [rows, *(source for source, _ in others)]
        self.counts = [len(rows), *(max(1, round(part / own * len(rows))) for _, part in others)]
        self._ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place = bisect_right(self._ends, index)
        source, count = self.sources[place], self.counts[place]
        row = index - (self._ends[place] - count)
        return source[row * len(source) // count if count < len(source) else row % len(source)]
