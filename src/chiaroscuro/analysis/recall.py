"""Where in a text a model predicts well: by position, and on tokens that repeat what stood far back.

Most tokens of a text are predicted from those just before them, so the perplexity over all tokens hardly shows what a
model takes from far away. *Recall tokens* show it: the second word of a pair that stood earlier in the row, and not
nearby. Source: the "associative recall hits" of zoology (Arora et al., arXiv 2312.04927), here with a distance.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.operator import is_whole

WINDOW = 64
"""The distance of recall tokens for a model whose config has no `window`."""

FIRST_POSITIONS = 16
"""The positions of the first bin; each further one ends twice as far as the one before."""


def recall_tokens(tokens: Int[Tensor, "batch length"], window: int) -> Bool[Tensor, "batch predicted"]:
    """Which tokens end a pair that stood earlier in the row, last more than `window` tokens ago.

    Token i is one if the greatest j < i with (x_{j−1}, x_j) = (x_{i−1}, x_i) exists and i − j > w. The model predicts
    it while it reads x_{i−1}, from which x_j is then w tokens away or more: outside a window of w.

    Args:
        tokens: x, all tokens of each row, T + 1 of them where T are predicted.
        window: w, at least 1.

    Returns:
        For each token but the first, (B, T).

    """
    pairs = tokens[:, :-1].long() * (int(tokens.max()) + 1) + tokens[:, 1:]
    ordered, places = pairs.sort(dim=1, stable=True)  # equal pairs beside each other, in the order of the row
    far = (ordered[:, 1:] == ordered[:, :-1]) & (places[:, 1:] - places[:, :-1] > window)
    return torch.zeros_like(pairs, dtype=torch.bool).scatter(1, places[:, 1:], far)


def position_bins(length: int) -> list[range]:
    """Positions 1 … T in bins: 1 to 16, 17 to 32, 33 to 64, and so on, the last one up to T."""
    ends = [FIRST_POSITIONS * 2**k for k in range(length.bit_length())]
    ends = [end for end in ends if end < length] + [length]
    return [range(start + 1, end + 1) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Slice:
    """The loss over some tokens of a text.

    Attributes:
        loss: mean negative log-likelihood, in nats; None without tokens.
        tokens: their number.

    """

    loss: float | None
    tokens: int

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None without tokens."""
        return None if self.loss is None else math.exp(min(self.loss, 700))

    def figures(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}


@dataclass(frozen=True)
class TextSlices:
    """The loss over a text, divided twice: by the position in the row, and into recall tokens and the rest.

    Attributes:
        window: w of the recall tokens.
        positions: for each bin of positions that has tokens, its first and last position and its slice. A position is
            the number of tokens of the row that the model has read when it predicts.
        recall: the recall tokens.
        rest: all others.

    """

    window: int
    positions: tuple[tuple[int, int, Slice], ...]
    recall: Slice
    rest: Slice

    def figures(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {
            "window": self.window,
            "positions": [{"first": first, "last": last, **part.figures()} for first, last, part in self.positions],
            "recall": self.recall.figures(),
            "rest": self.rest.figures(),
        }


class SliceSums:
    """Adds up the loss of a text's tokens batch by batch: `add` each batch, then `slices`.

    Args:
        window: see [`recall_tokens`][].

    """

    def __init__(self, window: int) -> None:
        if not is_whole(window) or window < 1:
            raise UserError(f"window={window!r}: must be a positive whole number of tokens")
        self.window = window
        self._by_position: Float[np.ndarray, "2 time"] = np.zeros((2, 0))
        self._recall, self._rest = np.zeros(2), np.zeros(2)

    def add(self, logits: Float[Tensor, "batch time words"], batch: dict[str, Tensor]) -> None:
        """Count a batch.

        Args:
            logits: the model's.
            batch: `input_ids` (B, T) and `shift_labels` (B, T), the token after each or −100; the last is given.

        """
        ids, labels = batch["input_ids"], batch["shift_labels"]
        # Row by row, because the softmax is as large as the logits.
        losses = torch.stack(
            [
                torch.nn.functional.cross_entropy(row.float(), label, reduction="none")
                for row, label in zip(logits, labels.to(logits.device), strict=True)
            ]
        )
        losses = losses.double().cpu()
        counted = labels.cpu() != -100
        recall = recall_tokens(torch.cat([ids, labels[:, -1:]], 1).cpu(), self.window) & counted
        if not self._by_position.shape[1]:
            self._by_position = np.zeros((2, ids.shape[1]))
        self._by_position += torch.stack([losses.sum(0), counted.sum(0)]).numpy()
        self._recall += _sums(losses, recall)
        self._rest += _sums(losses, counted & ~recall)

    def slices(self) -> TextSlices:
        """What was counted."""
        bins = position_bins(self._by_position.shape[1])
        parts = [(bin_[0], bin_[-1], _slice(self._by_position[:, bin_[0] - 1 : bin_[-1]].sum(1))) for bin_ in bins]
        return TextSlices(
            window=self.window,
            positions=tuple(part for part in parts if part[2].tokens),
            recall=_slice(self._recall),
            rest=_slice(self._rest),
        )


def _sums(losses: Float[Tensor, "batch time"], chosen: Bool[Tensor, "batch time"]) -> Float[np.ndarray, "2"]:
    return np.array([float(losses[chosen].sum()), float(chosen.sum())])


def _slice(sums: Float[np.ndarray, "2"]) -> Slice:
    total, tokens = float(sums[0]), int(sums[1])
    return Slice(total / tokens if tokens else None, tokens)
