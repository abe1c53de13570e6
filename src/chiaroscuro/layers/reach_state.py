"""What attention that reaches near and far keeps of earlier tokens: the last w, and of those before the kept ones.

    slots     0 … w − 1                        w …
    hold      the window: place p in slot p mod w    the sinks, then the kept tokens that have left the window, in order

A token that is decoded alone sees either the first w + s slots or all that are filled: one attention, without a mask
where rows are equally long. Heads that choose for themselves keep very different numbers of tokens, so each of them has
slots of its own. What has left the window last is remembered a little longer, so that `crop` can undo it.

Where a token stood is not kept: in the window it follows from how many tokens there were, and beyond it the order is
all that matters, and that the sinks come first.
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
        key: of each.
        value: of each.
        row: of each.
        place: of each in its sequence, counted over real tokens.
        kept: which are seen from far.

    """

    key: Float[Tensor, "entries heads head_width"]
    value: Float[Tensor, "entries heads head_width"]
    row: Int[Tensor, " entries"]
    place: Int[Tensor, " entries"]
    kept: Bool[Tensor, " entries"]

    def where(self, chosen: Bool[Tensor, " entries"]) -> "Entries":
        """Some of them."""
        return self._at(chosen.nonzero()[:, 0])

    def then(self, other: "Entries") -> "Entries":
        """These and, in each row, the others after them."""
        row = torch.cat([self.row, other.row])
        both = Entries(
            torch.cat([self.key.to(other.key.dtype), other.key]),
            torch.cat([self.value.to(other.value.dtype), other.value]),
            row,
            torch.cat([self.place, other.place]),
            torch.cat([self.kept, other.kept]),
        )
        return both._at(row.argsort(stable=True))

    def _at(self, index: Int[Tensor, " chosen"]) -> "Entries":
        parts = (self.key, self.value, self.row, self.place, self.kept)
        return Entries(*(part.index_select(0, index) for part in parts))


class ReachState(OperatorState):
    """The window's tokens in a ring, and beyond it those that are kept.

    Where key-value heads choose for themselves who looks or who is kept, each head of each batch element is a row here.

    Args:
        window: w.
        sinks: s, how many first tokens are kept whatever was decided.

    Attributes:
        heads: how many rows a batch element has.
        vectors: keys and values, (2, batch, key heads of a row, slots, c) for each of these heads.
        far: how many tokens each row has kept beyond the window.
        length: `seen` where all rows have the same, which spares a mask; else None.

    """

    croppable = True
    vectors: list[Tensor]
    far: Tensor
    _kept: Tensor
    """Which of the last w + `REMEMBERED` tokens are kept, that at place p in column p mod (w + `REMEMBERED`)."""
    _left: Tensor
    """Keys and values of the last `REMEMBERED` tokens that left the window, that at place p in slot p mod these."""
    _real: Tensor
    _counted: Tensor
    _least: list[int]
    _most: list[int]
    """Of `far`, over the batch, for each head."""
    _undoable = 0
    """How many of the last columns can still be cropped."""
    _plain = 0
    """Columns since `_real` and `_counted` were written, all of which held a real token in every row."""
    _of_inference = False
    """Whether some tensors may have been made in inference mode."""

    def __init__(self, window: int, sinks: int) -> None:
        self.window = window
        self.sinks = sinks
        self.heads = 1
        self.rows = 0
        self.begun = False
        self.length: int | None = 0

    @property
    def seen(self) -> Int[Tensor, " rows"]:
        """How many real tokens each row has had."""
        return self._counted + self._plain

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
        """Two vectors for each token in the window or beyond it.

        Buffers have room for a sixteenth and 16 tokens more, and for each row as much as for the longest of the batch.
        """
        if not self.begun:
            return 0
        each = 2 * self._left.shape[2] * self._left.shape[4]
        return each * int((self.seen.clamp(max=self.window) + self.far).sum())

    @torch.no_grad()
    def extend(self, entries: Entries, real: Bool[Tensor, "rows time"], heads: int = 1) -> None:
        """Take up some new tokens.

        Args:
            entries: the real ones.
            real: which of the new columns hold real tokens.
            heads: how many rows a batch element has.

        """
        held = self._ring().then(entries) if self.begun else entries
        self._begin(entries, real, heads)
        self._counted = self.seen + real.sum(1)
        self._real = torch.cat([self._columns(), real], 1)[:, -REMEMBERED:]
        self._undoable = min(REMEMBERED, self._undoable + real.shape[1])
        self._plain = 0
        age = self.seen[held.row] - held.place
        beyond = age > self.window
        added = held.where(beyond & (held.kept | (held.place < self.sinks)))
        number = torch.bincount(added.row, minlength=self.rows)
        rank = torch.arange(len(added.row), device=added.row.device) - (number.cumsum(0) - number)[added.row]
        before, self.far = self.far, self.far + number
        self._measure()
        self._make_room(int(self.seen.max()))
        self._put(added, self.window + before[added.row] + rank)
        staying = held.where(~beyond)
        self._put(staying, staying.place % self.window)
        leaving = held.where(beyond & (age <= self.window + REMEMBERED))
        _write(self._left, leaving.row, leaving.place % REMEMBERED, leaving.key, leaving.value)
        for last in (leaving, staying):
            self._kept[last.row, last.place % (self.window + REMEMBERED)] = last.kept

    @torch.no_grad()
    def extend_by_one(
        self,
        key: Float[Tensor, "rows heads head_width"],
        value: Float[Tensor, "rows heads head_width"],
        kept: Bool[Tensor, " rows"],
    ) -> None:
        """Take up one real token a row, where all rows are equally long."""
        assert self.length is not None
        self._wake()
        place, slot = self.length, self.length % self.window
        self._make_room(place + 1, more=1)
        if place >= self.window:
            self._let_go(slot, place - self.window)
        for head, vectors in enumerate(self.vectors):
            vectors[0, :, :, slot] = key[head :: self.heads]
            vectors[1, :, :, slot] = value[head :: self.heads]
        self._kept[:, place % (self.window + REMEMBERED)] = kept
        self.length = place + 1
        self._plain += 1
        self._undoable = min(REMEMBERED, self._undoable + 1)

    def _let_go(self, slot: int, place: int) -> None:
        """What happens to the tokens at this place, which leave the window: they are kept or not, and remembered."""
        kept = self._kept[:, place % (self.window + REMEMBERED)]
        keeping = [place < self.sinks or one for one in kept.tolist()] if self.rows == self.heads else None
        for head, vectors in enumerate(self.vectors):
            leaving = self._left[:, head :: self.heads, :, place % REMEMBERED]
            leaving.copy_(vectors[:, :, :, slot])
            if keeping is None:  # for every row; where the token is not kept the next one takes the slot
                next_slot = (self.window + self.far[head :: self.heads])[:, None, None, None]
                vectors.scatter_(3, next_slot.expand_as(leaving[..., None, :]), leaving[..., None, :])
            elif keeping[head]:
                vectors[:, :, :, self.window + self._most[head]] = leaving
        self.far += 1 if place < self.sinks else kept
        if keeping is None:
            self._measure_far()
        else:
            self._least = self._most = [most + one for most, one in zip(self._most, keeping, strict=True)]

    @property
    def near(self) -> int:
        """How many slots a newest token sees that does not look, where rows are equally long."""
        assert self.length is not None
        return min(self.length, self.window + self.sinks)

    def far_and_near(self, head: int) -> tuple[int, Int[Tensor, " batch"] | None]:
        """How many slots one sees that looks: the most of any row of a head, and of each row unless they are alike."""
        assert self.length is not None
        if self.length <= self.window:
            return self.length, None
        alike = self._least[head] == self._most[head]
        return self.window + self._most[head], None if alike else self.window + self.far[head :: self.heads]

    def entries(self) -> Entries:
        """All that it holds, row after row in order; beyond the window and the sinks, at places that keep the order."""
        row, rank = (torch.arange(max(self._most), device=self.far.device) < self.far[:, None]).nonzero().unbind(1)
        place = torch.where(rank < self.sinks, rank, (self.seen - self.window - self.far)[row] + rank)
        return self._entries(row, self.window + rank, place, torch.ones_like(row).bool()).then(self._ring())

    def _ring(self) -> Entries:
        """Those in the window."""
        seen = self.seen
        number = seen.clamp(max=self.window)
        row, rank = (torch.arange(int(number.max()), device=seen.device) < number[:, None]).nonzero().unbind(1)
        place = (seen - number)[row] + rank
        return self._entries(row, place % self.window, place, self._kept[row, place % (self.window + REMEMBERED)])

    def _entries(self, row: Tensor, slot: Tensor, place: Tensor, kept: Tensor) -> Entries:
        if self.heads == 1:
            key, value = self.vectors[0][:, row, :, slot].unbind(1)
            return Entries(key, value, row, place, kept)
        key, value = self.vectors[0].new_empty(2, len(row), 1, self.vectors[0].shape[-1])
        for head, vectors in enumerate(self.vectors):
            own = (row % self.heads == head).nonzero()[:, 0]
            key[own], value[own] = vectors[:, row[own] // self.heads, :, slot[own]].unbind(1)
        return Entries(key, value, row, place, kept)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these batch elements, in this order."""
        if not self.begun:
            return
        self._wake()
        index = rows.to(self.far.device)
        self.vectors = [vectors[:, index] for vectors in self.vectors]
        index = (index[:, None] * self.heads + torch.arange(self.heads, device=index.device)).flatten()
        self._left = self._left[:, index]
        for name in ("far", "_kept", "_real", "_counted"):
            setattr(self, name, getattr(self, name)[index])
        self.rows = len(index)
        self._measure()

    def check_crop(self, tokens: int) -> None:
        """Raise a UserError where more tokens are to be cropped than are remembered."""
        if self.begun and tokens > self._undoable:
            raise UserError(
                f"crop of {tokens} tokens, but of what left a window the last {REMEMBERED} alone are remembered, and "
                f"{self._undoable} of them are left: start a new cache"
            )

    @torch.no_grad()
    def crop(self, tokens: int) -> None:
        """Forget the last tokens: what had left the window for them comes back from what is remembered.

        Raises:
            UserError: see `check_crop`.

        """
        if not self.begun or tokens == 0:
            return
        self.check_crop(tokens)
        self._undoable -= tokens
        self._wake()
        columns, seen = self._columns(), self.seen
        undone = columns[:, -tokens:].sum(1)
        self._real = torch.cat([torch.zeros_like(columns[:, :tokens]), columns[:, :-tokens]], 1)
        numbers = undone.tolist()
        rows = torch.arange(self.rows, device=seen.device)
        if self.length is not None and len(set(numbers)) == 1:
            self._undo(rows, self.length, numbers[0])
        else:  # rows may be equally long, and yet some have lost padding
            for row, last, number in zip(rows.split(1), seen.tolist(), numbers, strict=True):
                self._undo(row, last, number)
        self._counted, self._plain = seen - undone, 0
        self._measure()

    def _undo(self, rows: Int[Tensor, " some"], seen: int, number: int) -> None:
        window = self.window
        left = torch.arange(max(0, seen - number - window), max(0, seen - window), device=self.far.device)
        kept = self._kept[rows][:, left % (window + REMEMBERED)] | (left < self.sinks)
        self.far[rows] -= kept.sum(1)
        back = left[:window]
        back = back[back < seen - number]  # where more is cropped than a window, what left it may be cropped too
        for head, vectors in enumerate(self.vectors):
            own = rows[rows % self.heads == head][:, None]
            vectors[:, own // self.heads, :, back % window] = self._left[:, own, :, back % REMEMBERED]

    def _begin(self, entries: Entries, real: Tensor, heads: int) -> None:
        rows, device = len(real), real.device
        if self.begun:
            if rows != self.rows:
                held, given = self.rows // self.heads, rows // heads
                raise UserError(f"the cache holds {held} rows, the input has {given}: the two must match")
            self._wake()
            return
        self.begun, self.rows, self.heads = True, rows, heads
        self._of_inference = torch.is_inference_mode_enabled()
        key_heads, width = entries.key.shape[1:]
        self.vectors = [entries.key.new_zeros(2, rows // heads, key_heads, 0, width) for _ in range(heads)]
        self._left = entries.key.new_zeros(2, rows, key_heads, REMEMBERED, width)
        self._kept = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.far = torch.zeros(rows, dtype=torch.long, device=device)
        self._counted = torch.zeros(rows, dtype=torch.long, device=device)
        self._real = torch.zeros(rows, REMEMBERED, dtype=torch.bool, device=device)

    def _columns(self) -> Bool[Tensor, "rows remembered"]:
        """Which of the last columns held a real token."""
        plain = torch.ones_like(self._real[:, : self._plain]) if self._plain else self._real[:, :0]
        return torch.cat([self._real, plain], 1)[:, -REMEMBERED:]

    def _measure(self) -> None:
        lengths = self.seen.tolist()
        self.length = lengths[0] if len(set(lengths)) == 1 else None
        self._measure_far()

    def _measure_far(self) -> None:
        far = self.far.view(-1, self.heads)
        self._least, self._most = torch.stack(far.aminmax(dim=0)).tolist() if len(far) else [[0] * self.heads] * 2

    def _put(self, entries: Entries, slot: Int[Tensor, " entries"]) -> None:
        for head, vectors in enumerate(self.vectors):
            own = slice(None) if self.heads == 1 else (entries.row % self.heads == head).nonzero()[:, 0]
            key, value, row = (part[own] for part in (entries.key, entries.value, entries.row))
            _write(vectors, row // self.heads, slot[own], key, value)

    def _make_room(self, seen: int, more: int = 0) -> None:
        """Slots and columns for rows of so many tokens, of which `more` may yet be kept beyond the window."""
        for head, (vectors, most) in enumerate(zip(self.vectors, self._most, strict=True)):
            slots = seen if seen <= self.window else self.window + most + more
            missing = slots - vectors.shape[3]
            if missing > 0:
                self.vectors[head] = torch.nn.functional.pad(vectors, (0, 0, 0, missing + slots // 16 + 16))
        columns = self._kept.shape[1]
        if columns < self.window + REMEMBERED and columns < seen:  # they do not wrap around before that many
            wanted = min(self.window + REMEMBERED, seen + seen // 4 + REMEMBERED)
            self._kept = torch.nn.functional.pad(self._kept, (0, wanted - columns))

    def _wake(self) -> None:
        """Tensors made in inference mode can't be written to outside it."""
        if torch.is_inference_mode_enabled():
            self._of_inference = True
        elif self._of_inference:
            self.vectors = [vectors.clone() for vectors in self.vectors]
            for name in ("far", "_kept", "_left", "_real", "_counted"):
                setattr(self, name, getattr(self, name).clone())
            self._of_inference = False


def _write(vectors: Tensor, row: Tensor, slot: Tensor, key: Tensor, value: Tensor) -> None:
    for kind, new in zip(vectors, (key, value), strict=True):
        kind[row, :, slot] = new.to(kind.dtype)
