"""What attention that reaches near and far keeps of earlier tokens: the last w, and of those before the kept ones.

    slots     0 … w − 1                        w …
    hold      the window: place p in slot p mod w    the sinks, then the kept tokens that have left the window, in order

A token that is decoded alone sees either the first w + s slots or all that are filled: one attention, without a mask
where rows are equally long. What has left the window last is remembered a little longer, so that `crop` can undo it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.state import REMEMBERED, OperatorState


@dataclass(frozen=True)
class Entries:
    """Keys and values of some tokens, row after row, places rising within a row.

    Attributes:
        vectors: keys and values, (2, N, h, c).
        row: of each.
        place: of each in its sequence, counted over real tokens.
        kept: which are seen from far.

    """

    vectors: Float[Tensor, "2 entries heads head_width"]
    row: Int[Tensor, " entries"]
    place: Int[Tensor, " entries"]
    kept: Bool[Tensor, " entries"]

    def at(self, index: Tensor) -> "Entries":
        """Some of them."""
        return Entries(self.vectors[:, index], self.row[index], self.place[index], self.kept[index])

    def then(self, other: "Entries") -> "Entries":
        """These and, in each row, the others after them."""
        row = torch.cat([self.row, other.row])
        order = row.argsort(stable=True)
        both = Entries(
            torch.cat([self.vectors.to(other.vectors.dtype), other.vectors], 1),
            row,
            torch.cat([self.place, other.place]),
            torch.cat([self.kept, other.kept]),
        )
        return both.at(order)


class ReachState(OperatorState):
    """The window's tokens in a ring, and beyond it those that are kept.

    Where key-value heads keep tokens of their own, each head of each batch element is a row here.

    Args:
        window: w.
        sinks: s, how many first tokens are kept whatever was decided.

    Attributes:
        heads: how many rows a batch element has.
        vectors: keys and values, (2, rows, heads, slots, c).
        places: the place of the token in each slot, −1 where there is none, (rows, slots).
        kept: whether the token in each slot of the window is to be kept when it leaves it, (rows, w).
        far: how many tokens each row has kept beyond the window.
        seen: how many real tokens each row has had.

    """

    croppable = True
    vectors: Tensor
    places: Tensor
    kept: Tensor
    far: Tensor
    seen: Tensor
    _left: Tensor
    _left_kept: Tensor
    _real: Tensor
    _longest = 0
    _undoable = 0
    """How many of the last columns can still be cropped."""
    _plain = 0
    """Columns since `_real` was written, all of which held a real token in every row."""

    def __init__(self, window: int, sinks: int) -> None:
        self.window = window
        self.sinks = sinks
        self.heads = 1
        self.rows = 0
        self.begun = False
        self.length: int | None = 0
        """`seen` where all rows have the same, which spares a mask."""

    def continues(self, x: Float[Tensor, "batch time width"], context: Context) -> bool:
        """Whether x is one real token for each of rows that are equally long, so that there is nothing to pack."""
        return (
            x.shape[1] == 1
            and self.begun
            and self.length is not None
            and len(x) * self.heads == self.rows
            and context.attention_mask is None
            and not torch.is_grad_enabled()
        )

    def numbers_kept(self) -> int:
        """Two vectors for each token in the window or beyond it; buffers are up to a quarter larger."""
        if not self.begun:
            return 0
        each = 2 * self.vectors.shape[2] * self.vectors.shape[4]
        return each * int((self.seen.clamp(max=self.window) + self.far).sum())

    @torch.no_grad()
    def extend(self, entries: Entries, real: Bool[Tensor, "rows time"], heads: int = 1) -> None:
        """Take up some new tokens.

        Args:
            entries: those that have keys; without a window of more than one token, others may be left out.
            real: which of the new columns hold real tokens, all of which are counted.
            heads: how many rows a batch element has.

        """
        held = self._ring().then(entries) if self.begun else entries
        self._begin(entries, real, heads)
        self.seen = self.seen + real.sum(1)
        self._real = torch.cat([self._columns(), real], 1)[:, -REMEMBERED:]
        self._undoable = min(REMEMBERED, self._undoable + real.shape[1])
        self._plain = 0
        leaving = held.place < self.seen[held.row] - self.window
        left = held.at(leaving.nonzero()[:, 0])
        chosen = left.kept | (left.place < self.sinks)
        self._remember(left, chosen)
        added = left.at(chosen.nonzero()[:, 0])
        number = torch.bincount(added.row, minlength=self.rows)
        rank = torch.arange(len(added.row), device=added.row.device) - (number.cumsum(0) - number)[added.row]
        self._make_room(self.window + int((self.far + number).max()))
        self._put(added, self.window + self.far[added.row] + rank)
        self.far = self.far + number
        self.places[:, : self.window] = -1
        staying = held.at((~leaving).nonzero()[:, 0])
        self._put(staying, staying.place % self.window)
        self.kept[staying.row, staying.place % self.window] = staying.kept
        self._measure()

    @torch.no_grad()
    def extend_by_one(self, vectors: Float[Tensor, "2 rows heads head_width"], kept: Bool[Tensor, " rows"]) -> None:
        """Take up one real token a row, which has a key, where all rows are equally long."""
        assert self.length is not None
        self._wake()
        place, window = self.length, self.window
        slot = place % window
        if place >= window:
            leaving, sink = self.vectors[:, :, :, slot], place - window < self.sinks
            self._make_room(window + self._longest + 1)
            self._left[:, :, :, (place - window) % REMEMBERED] = leaving
            chosen = self.kept[:, slot] | sink
            self._left_kept[:, (place - window) % REMEMBERED] = chosen
            if self.rows == 1:
                if sink or bool(chosen):
                    self.vectors[:, :, :, window + self._longest] = leaving
                    self.places[:, window + self._longest] = place - window
                    self._longest += 1
                    self.far += 1
            else:  # for every row; where the token is not kept the next one takes the slot
                row, end = torch.arange(self.rows, device=self.far.device), window + self.far
                self.vectors[:, row, :, end] = leaving.transpose(0, 1)
                self.places[row, end] = place - window
                self.far = self.far + chosen
                self._longest = int(self.far.max())
        self.vectors[:, :, :, slot] = vectors
        self.places[:, slot] = place
        self.kept[:, slot] = kept
        self.seen += 1
        self.length = place + 1
        self._plain += 1
        self._undoable = min(REMEMBERED, self._undoable + 1)

    def visible(self, far: bool) -> tuple[int, Int[Tensor, " rows"] | None]:
        """How many slots a newest token sees: the most of any row, and of each row unless all are alike."""
        if far:
            if self.length is not None and self.length <= self.window:
                return self.length, None
            slots = torch.where(self.seen > self.window, self.window + self.far, self.seen)
        else:
            if self.length is not None:
                return min(self.length, self.window + self.sinks), None
            slots = self.seen.clamp(max=self.window + self.sinks)
        most = self.window + self._longest if self.rows == 1 and far else int(slots.max())
        return most, None if self.rows == 1 else slots

    def entries(self) -> Entries:
        """All that it holds, row after row in order."""
        filled = torch.arange(self.places.shape[1] - self.window, device=self.far.device) < self.far[:, None]
        row, slot = filled.nonzero().unbind(1)
        slot = slot + self.window
        beyond = Entries(
            self.vectors[:, row, :, slot].transpose(0, 1), row, self.places[row, slot], torch.ones_like(row).bool()
        )
        return beyond.then(self._ring())

    def _ring(self) -> Entries:
        row, slot = (self.places[:, : self.window] >= 0).nonzero().unbind(1)
        place = self.places[row, slot]
        order = (row * (int(self.seen.max()) + 1) + place).argsort()
        row, slot, place = row[order], slot[order], place[order]
        return Entries(self.vectors[:, row, :, slot].transpose(0, 1), row, place, self.kept[row, slot])

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these batch elements, in this order."""
        if not self.begun:
            return
        index = rows.to(self.far.device)
        index = (index[:, None] * self.heads + torch.arange(self.heads, device=index.device)).flatten()
        self.vectors, self._left = self.vectors[:, index], self._left[:, index]
        for name in ("places", "kept", "far", "seen", "_left_kept", "_real"):
            setattr(self, name, getattr(self, name)[index])
        self.rows = len(index)
        self._measure()

    @torch.no_grad()
    def crop(self, tokens: int) -> None:
        """Forget the last tokens: what had left the window for them comes back from what is remembered.

        Raises:
            UserError: more of them than are remembered.

        """
        if not self.begun or tokens == 0:
            return
        if tokens > self._undoable:
            raise UserError(
                f"crop of {tokens} tokens, but of what left a window the last {REMEMBERED} alone are remembered, and "
                f"{self._undoable} of them are left: start a new cache"
            )
        self._undoable -= tokens
        self._wake()
        columns, self._plain = self._columns(), 0
        undone = columns[:, -tokens:].sum(1)
        self._real = torch.cat([torch.zeros_like(columns[:, :tokens]), columns[:, :-tokens]], 1)
        if self.length is not None:
            self._undo(slice(None), self.length, int(undone[0]))
        else:
            for row, (seen, number) in enumerate(zip(self.seen.tolist(), undone.tolist(), strict=True)):
                self._undo(slice(row, row + 1), seen, number)
        self.seen = self.seen - undone
        self._measure()

    def _undo(self, rows: slice, seen: int, number: int) -> None:
        window, device = self.window, self.far.device
        gone = torch.arange(max(0, seen - number), seen, device=device)[-window:] % window
        self.places[rows, gone] = -1
        left = torch.arange(max(0, seen - number - window), max(0, seen - window), device=device)
        self.far[rows] -= self._left_kept[rows][:, left % REMEMBERED].sum(1)
        back = left[:window]
        back = back[back < seen - number]  # where more is cropped than a window, what left it may be cropped too
        slot, remembered = back % window, back % REMEMBERED
        self.vectors[:, rows, :, slot] = self._left[:, rows, :, remembered]
        self.places[rows, slot] = back
        self.kept[rows, slot] = self._left_kept[rows][:, remembered]

    def _begin(self, entries: Entries, real: Tensor, heads: int) -> None:
        rows, device = len(real), real.device
        if self.begun:
            if rows != self.rows:
                raise UserError(f"the cache holds {self.rows} rows, the input has {rows}: the two must match")
            self._wake()
            return
        self.begun, self.rows, self.heads = True, rows, heads
        kind = entries.vectors.shape[2:]
        self.vectors = entries.vectors.new_zeros(2, rows, kind[0], self.window, kind[1])
        self._left = entries.vectors.new_zeros(2, rows, kind[0], REMEMBERED, kind[1])
        self.places = torch.full((rows, self.window), -1, device=device)
        self.kept = torch.zeros(rows, self.window, dtype=torch.bool, device=device)
        self.far = torch.zeros(rows, dtype=torch.long, device=device)
        self.seen = torch.zeros(rows, dtype=torch.long, device=device)
        self._left_kept = torch.zeros(rows, REMEMBERED, dtype=torch.bool, device=device)
        self._real = torch.zeros(rows, REMEMBERED, dtype=torch.bool, device=device)

    def _columns(self) -> Bool[Tensor, "rows remembered"]:
        """Which of the last columns held a real token."""
        plain = torch.ones_like(self._real[:, : self._plain]) if self._plain else self._real[:, :0]
        return torch.cat([self._real, plain], 1)[:, -REMEMBERED:]

    def _measure(self) -> None:
        lengths = self.seen.tolist()
        self.length = lengths[0] if len(set(lengths)) == 1 else None
        self._longest = int(self.far.max())

    def _put(self, entries: Entries, slot: Tensor) -> None:
        self.vectors[:, entries.row, :, slot] = entries.vectors.transpose(0, 1).to(self.vectors.dtype)
        self.places[entries.row, slot] = entries.place

    def _remember(self, left: Entries, chosen: Tensor) -> None:
        """What left the window last."""
        index = (left.place >= self.seen[left.row] - self.window - REMEMBERED).nonzero()[:, 0]
        row, slot = left.row[index], left.place[index] % REMEMBERED
        self._left[:, row, :, slot] = left.vectors[:, index].transpose(0, 1).to(self._left.dtype)
        self._left_kept[row, slot] = chosen[index]

    def _make_room(self, slots: int) -> None:
        have = self.places.shape[1]
        if slots <= have:
            return
        more = slots + slots // 4 + 16 - have
        self.vectors = torch.nn.functional.pad(self.vectors, (0, 0, 0, more))
        self.places = torch.nn.functional.pad(self.places, (0, more), value=-1)

    def _wake(self) -> None:
        """Tensors made in inference mode can't be written to outside it."""
        if not torch.is_inference_mode_enabled():
            for name in ("vectors", "_left", "places", "kept", "far", "seen", "_left_kept", "_real"):
                if getattr(self, name).is_inference():
                    setattr(self, name, getattr(self, name).clone())
