"""What attention that reaches near and far keeps of earlier tokens: the last w, and of those before the kept ones.

    slots     0 … w − 1                        w …
    hold      the window: place p in slot p mod w    the sinks, then the kept tokens that have left the window, in order

A token that is decoded alone sees either the first w + s slots or all that are filled: one attention, without a mask
where rows are equally long. What has left the window last is remembered a little longer, so that `crop` can undo it.

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
        vectors: keys and values, (2, rows, heads, slots, c).
        far: how many tokens each row has kept beyond the window.
        length: `seen` where all rows have the same, which spares a mask; else None.

    """

    croppable = True
    vectors: Tensor
    far: Tensor
    _kept: Tensor
    """Which of the last w + `REMEMBERED` tokens are kept, that at place p in column p mod (w + `REMEMBERED`)."""
    _left: Tensor
    """Keys and values of the last `REMEMBERED` tokens that left the window, that at place p in slot p mod these."""
    _real: Tensor
    _counted: Tensor
    _least = _most = 0
    """Of `far`."""
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
        """Two vectors for each token in the window or beyond it; buffers are up to a quarter larger."""
        if not self.begun:
            return 0
        each = 2 * self.vectors.shape[2] * self.vectors.shape[4]
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
        self._put(self.vectors, added, self.window + before[added.row] + rank)
        staying = held.where(~beyond)
        self._put(self.vectors, staying, staying.place % self.window)
        leaving = held.where(beyond & (age <= self.window + REMEMBERED))
        self._put(self._left, leaving, leaving.place % REMEMBERED)
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
            self._let_go(self.vectors[:, :, :, slot], place - self.window)
        self.vectors[0, :, :, slot] = key
        self.vectors[1, :, :, slot] = value
        self._kept[:, place % (self.window + REMEMBERED)] = kept
        self.length = place + 1
        self._plain += 1
        self._undoable = min(REMEMBERED, self._undoable + 1)

    def _let_go(self, leaving: Float[Tensor, "2 rows heads head_width"], place: int) -> None:
        """What happens to the tokens at this place, which leave the window: they are kept or not, and remembered."""
        self._left[:, :, :, place % REMEMBERED] = leaving
        kept = self._kept[:, place % (self.window + REMEMBERED)]
        if self.rows == 1:
            if place < self.sinks or bool(kept):
                self.vectors[:, :, :, self.window + self._most] = leaving
                self.far += 1
                self._least = self._most = self._most + 1
            return
        # For every row; where the token is not kept the next one takes the slot.
        slot = (self.window + self.far)[:, None, None, None].expand_as(leaving[..., None, :])
        self.vectors.scatter_(3, slot, self._left[:, :, :, place % REMEMBERED, None])
        self.far += 1 if place < self.sinks else kept
        self._least, self._most = torch.stack(self.far.aminmax()).tolist()

    @property
    def near(self) -> int:
        """How many slots a newest token sees that does not look, where rows are equally long."""
        assert self.length is not None
        return min(self.length, self.window + self.sinks)

    @property
    def far_and_near(self) -> tuple[int, Int[Tensor, " rows"] | None]:
        """How many slots one sees that looks: the most of any row, and of each row unless they are alike."""
        assert self.length is not None
        if self.length <= self.window:
            return self.length, None
        return self.window + self._most, None if self._least == self._most else self.window + self.far

    def entries(self) -> Entries:
        """All that it holds, row after row in order; beyond the window and the sinks, at places that keep the order."""
        row, rank = (torch.arange(self._most, device=self.far.device) < self.far[:, None]).nonzero().unbind(1)
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
        return Entries(self.vectors[0][row, :, slot], self.vectors[1][row, :, slot], row, place, kept)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these batch elements, in this order."""
        if not self.begun:
            return
        self._wake()
        index = rows.to(self.far.device)
        index = (index[:, None] * self.heads + torch.arange(self.heads, device=index.device)).flatten()
        self.vectors, self._left = self.vectors[:, index], self._left[:, index]
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
        if self.length is not None and len(set(numbers)) == 1:
            self._undo(slice(None), self.length, numbers[0])
        else:  # rows may be equally long, and yet some have lost padding
            for row, (last, number) in enumerate(zip(seen.tolist(), numbers, strict=True)):
                self._undo(slice(row, row + 1), last, number)
        self._counted, self._plain = seen - undone, 0
        self._measure()

    def _undo(self, rows: slice, seen: int, number: int) -> None:
        window = self.window
        left = torch.arange(max(0, seen - number - window), max(0, seen - window), device=self.far.device)
        kept = self._kept[rows][:, left % (window + REMEMBERED)] | (left < self.sinks)
        self.far[rows] -= kept.sum(1)
        back = left[:window]
        back = back[back < seen - number]  # where more is cropped than a window, what left it may be cropped too
        self.vectors[:, rows, :, back % window] = self._left[:, rows, :, back % REMEMBERED]

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
        self.vectors = entries.key.new_zeros(2, rows, key_heads, 0, width)
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
        self._least, self._most = torch.stack(self.far.aminmax()).tolist() if self.rows else (0, 0)

    @staticmethod
    def _put(vectors: Tensor, entries: Entries, slot: Tensor) -> None:
        for kind, new in zip(vectors, (entries.key, entries.value), strict=True):
            kind[entries.row, :, slot] = new.to(kind.dtype)

    def _make_room(self, seen: int, more: int = 0) -> None:
        """Slots and columns for rows of so many tokens, of which `more` may yet be kept beyond the window."""
        slots = seen if seen <= self.window else self.window + self._most + more
        missing = slots - self.vectors.shape[3]
        if missing > 0:
            self.vectors = torch.nn.functional.pad(self.vectors, (0, 0, 0, missing + slots // 4 + 16))
        columns = self._kept.shape[1]
        if columns < self.window + REMEMBERED and columns < seen:  # they do not wrap around before that many
            wanted = min(self.window + REMEMBERED, seen + seen // 4 + REMEMBERED)
            self._kept = torch.nn.functional.pad(self._kept, (0, wanted - columns))

    def _wake(self) -> None:
        """Tensors made in inference mode can't be written to outside it."""
        if torch.is_inference_mode_enabled():
            self._of_inference = True
        elif self._of_inference:
            for name in ("vectors", "far", "_kept", "_left", "_real", "_counted"):
                setattr(self, name, getattr(self, name).clone())
            self._of_inference = False
