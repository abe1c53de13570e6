"""What operators keep of earlier tokens, so that a sequence can be continued without computing them again.

Each operator of each layer has a state of its own, made by its `new_cache()`. This file has the base class, the states
of one layer side by side, and the state that attention needs: vectors of the tokens so far, which may be a different
number for each batch element. States hold no gradient: what they keep is detached.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError

if TYPE_CHECKING:
    from chiaroscuro.layers.operator import Operator
    from chiaroscuro.layers.router import Router


REMEMBERED = 64
"""Tokens that a state keeps beyond what the next one needs, so that they can be cropped: more than assisted generation
drafts."""


def row_numbers(rows: Tensor) -> Int[Tensor, " rows"]:
    """The numbers of rows that are given by their numbers, or by a boolean for each row."""
    return rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows


class OperatorState(ABC):
    """What one operator keeps of earlier tokens. Batch elements are called rows.

    A subclass is filled by its operator, and must say how its rows are selected, for beam search and for batches that
    shrink.
    """

    croppable = False
    """Whether `crop` works. Assisted generation and prompt lookup need it."""

    @abstractmethod
    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order; a row may be repeated. The index may lie on another device."""

    def check_crop(self, tokens: int) -> None:
        """Raise a UserError where `crop` of so many tokens can't be had, and change nothing.

        A cache asks all of its states before it crops the first one.
        """
        if not self.croppable:
            raise UserError("this cache holds the state of an operator that can't be cropped: start a new one")

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every row."""
        raise NotImplementedError(f"{type(self).__name__} cannot be cropped")

    def numbers_kept(self) -> int:
        """How many numbers the state holds, over all rows."""
        return 0


class LayerStates:
    """The states of one layer's operators and routers, by name; each is made when its owner first runs."""

    def __init__(self) -> None:
        self.states: dict[str, OperatorState | None] = {}

    def of(self, name: str, owner: "Operator | Router") -> Any:
        """The state of one operator or router; None for one that keeps nothing."""
        if self.states.get(name) is None:  # what keeps nothing may keep something from now on
            self.states[name] = owner.new_cache()
        return self.states[name]

    def kept(self) -> Iterator[OperatorState]:
        """The states that hold something."""
        return (state for state in self.states.values() if state is not None)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """`OperatorState.select` of every state."""
        for state in self.kept():
            state.select(rows)

    def numbers_kept(self) -> int:
        """How many numbers all states hold."""
        return sum(state.numbers_kept() for state in self.kept())


class KeptTokens(OperatorState):
    """One or more vectors per kept token and head, such as its key and its value.

    Vectors lie in buffers that grow by a quarter when they are full, so a new token costs its own vectors and not a
    copy of all before it.

    Attributes:
        buffers: of each kind of vector, (B, h, capacity, c); row b has filled the first `lengths[b]` places.
        places: (B, capacity), the index of each kept token in its sequence, for `crop`.
        lengths: how many tokens each row keeps.
        seen: how many tokens each row has seen, kept or not.

    """

    croppable = True

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.places: Tensor | None = None
        self.lengths: list[int] = []
        self.seen = 0

    @property
    def ragged(self) -> bool:
        """Whether rows keep different numbers of tokens."""
        return len(set(self.lengths)) > 1

    @property
    def empty(self) -> bool:
        """Whether no row keeps anything."""
        return not any(self.lengths)

    def numbers_kept(self) -> int:
        """How many numbers are kept; the buffers are up to a quarter larger."""
        return sum(sum(self.lengths) * buffer.shape[1] * buffer.shape[3] for buffer in self.buffers)

    def update(
        self, *vectors: Float[Tensor, "batch heads time head_width"]
    ) -> tuple[Float[Tensor, "batch heads keys head_width"], ...]:
        """Keep the vectors of all new tokens, and return those of all tokens so far.

        Raises:
            UserError: rows keep different numbers of tokens, so that there is no rectangle to return.

        """
        if self.ragged:
            raise UserError(
                "this cache was begun with an attention_mask: pass one again, over the cached and the new tokens"
            )
        batch, _, time, _ = vectors[0].shape
        self._check_rows(batch)
        kept = self.lengths[0] if self.lengths else 0
        end = kept + time
        self._make_room(end, vectors)
        assert self.places is not None
        for buffer, new in zip(self.buffers, vectors, strict=True):
            buffer[:, :, kept:end] = new.detach()
        self.places[:, kept:end] = torch.arange(self.seen, self.seen + time, device=self.places.device)
        self.lengths, self.seen = [end] * batch, self.seen + time
        if kept == 0:  # as they came, so that a forward that begins a cache can be differentiated
            return vectors
        if torch.is_grad_enabled():  # not views, which the next call would overwrite before a backward has read them
            return tuple(torch.cat([b[:, :, :kept], new], 2) for b, new in zip(self.buffers, vectors, strict=True))
        return tuple(buffer[:, :, :end] for buffer in self.buffers)

    def extend(self, chosen: Bool[Tensor, "batch time"], *vectors: Float[Tensor, "tokens heads head_width"]) -> None:
        """Keep the vectors of the chosen new tokens; they come packed, row after row."""
        batch, time = chosen.shape
        self._check_rows(batch)
        before = self.lengths or [0] * batch
        if len(vectors[0]) == 0:  # no buffers either: their type is that of the first vectors that are kept
            self.lengths, self.seen = before, self.seen + time
            return
        whole = len(vectors[0]) == batch * time
        after = [n + m for n, m in zip(before, [time] * batch if whole else chosen.sum(1).tolist(), strict=True)]
        self._make_room(max(after), [new.transpose(0, 1)[None].expand(batch, -1, -1, -1) for new in vectors])
        assert self.places is not None
        if batch == 1:
            place = torch.arange(time, device=chosen.device) if whole else chosen[0].nonzero()[:, 0]
            for buffer, new in zip(self.buffers, vectors, strict=True):
                buffer[0, :, before[0] : after[0]] = new.detach().transpose(0, 1)
            self.places[0, before[0] : after[0]] = place + self.seen
        else:
            row, place = chosen.nonzero().unbind(1)
            start = torch.tensor(before, device=chosen.device)
            slot = (chosen.cumsum(1) - 1 + start[:, None])[row, place]
            for buffer, new in zip(self.buffers, vectors, strict=True):
                buffer[row, :, slot] = new.detach().to(buffer.dtype)
            self.places[row, slot] = place + self.seen
        self.lengths, self.seen = after, self.seen + time

    def rectangle(
        self, rows: Int[Tensor, " chosen"] | None = None
    ) -> tuple[tuple[Float[Tensor, "chosen heads keys head_width"], ...], Bool[Tensor, "chosen keys"] | None]:
        """The vectors of some rows (all unless given), each filled up to the longest; and which are real.

        The second is None where all are. Views where that is possible: to be read before the next token comes.
        """
        longest = max(self.lengths)
        vectors = tuple(
            (buffer if rows is None else buffer.index_select(0, rows))[:, :, :longest] for buffer in self.buffers
        )
        if not self.ragged:
            return vectors, None
        lengths = torch.tensor(self.lengths, device=vectors[0].device)
        lengths = lengths if rows is None else lengths[rows]
        return vectors, torch.arange(longest, device=lengths.device) < lengths[:, None]

    def packed(self) -> tuple[Float[Tensor, "tokens heads head_width"], ...]:
        """All vectors, row after row: a copy."""
        device = self.buffers[0].device
        filled = torch.arange(max(self.lengths), device=device) < torch.tensor(self.lengths, device=device)[:, None]
        row, slot = filled.nonzero().unbind(1)
        return tuple(buffer[row, :, slot] for buffer in self.buffers)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order."""
        if self.places is not None:
            index = rows.to(self.places.device)
            self.buffers = [buffer[index] for buffer in self.buffers]
            self.places = self.places[index]
        if self.lengths:
            self.lengths = torch.tensor(self.lengths)[rows.cpu()].tolist()

    def crop(self, tokens: int) -> None:
        """Forget the last tokens that were seen, of which each row may have kept another number."""
        self.seen -= tokens
        if self.places is not None:
            self.lengths = [int((row[:n] < self.seen).sum()) for row, n in zip(self.places, self.lengths, strict=True)]

    def _check_rows(self, batch: int) -> None:
        if self.lengths and len(self.lengths) != batch:
            raise UserError(f"the cache holds {len(self.lengths)} rows, the input has {batch}: the two must match")

    def _make_room(self, needed: int, vectors: Any) -> None:
        """Buffers for `needed` tokens a row, of the type of the first vectors kept."""
        if self.buffers and self.places is not None:
            if self.places.is_inference() and not torch.is_inference_mode_enabled():  # can't be written to any more
                self.buffers, self.places = [buffer.clone() for buffer in self.buffers], self.places.clone()
            if needed <= self.places.shape[1]:
                return
        batch, capacity = vectors[0].shape[0], needed + needed // 4 + 16
        # Zeros, because places that a mask hides are multiplied by 0, and what memory held before may be NaN.
        grown = [new.new_zeros(batch, new.shape[1], capacity, new.shape[3]) for new in vectors]
        places = torch.zeros(batch, capacity, dtype=torch.long, device=vectors[0].device)
        for old, new in zip(self.buffers, grown, strict=bool(self.buffers)):
            new[:, :, : old.shape[2]] = old
        if self.places is not None:
            places[:, : self.places.shape[1]] = self.places
        self.buffers, self.places = grown, places
