"""Attention from some tokens to what came before them, in rows of different length, without padding.

Routing leaves each row of a batch with a different number of tokens that attend. So queries and keys come packed: all
rows' tokens one after another, and the rows' lengths beside them. A query sees the first so many keys of its row:
1, 2, 3, … where the routed tokens attend to each other, its own position where they attend to everything. One
function serves both, a cache of earlier keys, and rows that are padded, and none of it ever holds queries × keys.

On a CPU there is no kernel for packed rows. PyTorch's flash attention on chunks of queries, each against the keys that
it sees, does the work: what all queries of the chunk see goes in whole, the rest with a mask, and the two parts are
merged by their normalisers. The backward goes over the same tiles.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from chiaroscuro.ops.first_derivatives import without_second_derivative
from chiaroscuro.ops.spectral import HAS_TRITON

CHUNK, LONG_CHUNK = 64, 192
"""Queries of a tile, in rows of fewer than `LONG` keys, and of `LONG` or more. A tile's masked part is half wasted, so
small tiles waste little; the kernel likes long ones. `benchmarks/choices.py` measures 32 to 192 at 1024 and 8192
tokens, of which a quarter are routed."""

KEYS, FILLED = 0.5, 1.25
"""Where `PrefixOfRows` is taken: the most keys for a query, and the most that rows may grow by when they are filled up
to the longest."""

LONG = 2048
"""Keys of a row from which on its tiles are the larger ones: a length between the two that are measured."""


def prefix_attention(
    query: Float[Tensor, "queries heads head_width"],
    key: Float[Tensor, "keys key_heads head_width"],
    value: Float[Tensor, "keys key_heads head_width"],
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    visible: Int[Tensor, " queries"],
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "queries heads head_width"]:
    """softmax(q_i k_jᵀ / √c) v_j over the first visible_i keys j of i's row.

    Args:
        query: the queries, row after row.
        key: the keys, row after row. Their heads divide the queries' heads, and each serves as many of them in turn;
            no key is repeated for that.
        value: likewise.
        query_lengths: how many queries each row has; may be 0.
        key_lengths: how many keys.
        visible: how many keys of its row each query sees, at least 1, not falling within a row.
        dropout: of the attention weights; the caller passes 0 outside training. With dropout a row's weights are held
            in memory: queries × keys.
        scale: instead of 1/√c.

    Raises:
        ValueError: on a CPU, lengths that are not those of the queries or of the keys.

    """
    if dropout:
        return prefix_attention_by_rows(query, key, value, query_lengths, key_lengths, visible, dropout, scale)
    if query.device.type == "cpu":
        for name, lengths, tokens in (("query", query_lengths, query), ("key", key_lengths, key)):
            if int(lengths.sum()) != len(tokens):
                raise ValueError(f"{name}_lengths are {int(lengths.sum())} in all, and there are {len(tokens)}")
        return attend_in_parts(query, key, value, [PrefixPart(query_lengths, key_lengths, visible)], scale)
    if on_a_gpu_with_kernels(query):
        # Not at the top: it imports this module, and loads torch.compile's code generator, which a CPU has no use for.
        from chiaroscuro.ops import packed_attention_cuda

        return packed_attention_cuda.prefix_attention(
            query, key, value, query_lengths, key_lengths, visible, scale=scale
        )
    return prefix_attention_by_rows(query, key, value, query_lengths, key_lengths, visible, scale=scale)


def on_a_gpu_with_kernels(x: Tensor) -> bool:
    """Whether x lies on a GPU that PyTorch compiles kernels for: not so without Triton, as on Windows."""
    return x.device.type == "cuda" and HAS_TRITON


def prefix_attention_by_rows(
    query: Float[Tensor, "queries heads head_width"],
    key: Float[Tensor, "keys key_heads head_width"],
    value: Float[Tensor, "keys key_heads head_width"],
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    visible: Int[Tensor, " queries"],
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "queries heads head_width"]:
    """`prefix_attention` written out, row by row: the plain form that the fast ones are held to."""
    if len(query_lengths) == 0:
        return query
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    queries, keys = query_lengths.tolist(), key_lengths.tolist()
    rows = []
    for q, k, v, seen in zip(
        query.split(queries), key.split(keys), value.split(keys), visible.split(queries), strict=True
    ):
        scores = torch.einsum("qhgc,khc->hgqk", q.unflatten(1, (k.shape[1], -1)), k) * scale
        hidden = torch.arange(len(k), device=k.device) >= seen[:, None]
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=wide).to(v.dtype)
        rows.append(torch.einsum("hgqk,khc->qhgc", F.dropout(weights, dropout), v).flatten(1, 2))
    return torch.cat(rows)


class Part(ABC):
    """Attention of some queries to some keys, which with other parts, of other keys, makes up the whole.

    Attributes:
        queries: which queries; None for all.
        keys: which keys; None for all.

    """

    queries: Int[Tensor, " chosen"] | None = None
    keys: Int[Tensor, " chosen_keys"] | None = None

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, kernel: "Kernel") -> tuple[Tensor, Tensor]:
        """The output (N, h, c) and log Σ exp (N, h) of these queries over these keys alone."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        normaliser: Tensor,
        kernel: "Kernel",
    ) -> Sequence[Tensor]:
        """The gradients of query, key and value; `output` and `normaliser` are those of the whole."""


def attend_in_parts(
    query: Float[Tensor, "queries heads head_width"],
    key: Float[Tensor, "keys key_heads head_width"],
    value: Float[Tensor, "keys key_heads head_width"],
    parts: Sequence[Part],
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "queries heads head_width"]:
    """Attention over the keys of all parts together, on a CPU; the first part is of all queries."""
    kernel = Flash(scale) if softcap is None else WrittenOut(scale, softcap)
    if key.shape[1] == 1:  # a view has it for each of the queries' heads, and a tile's mask serves them all
        key, value = (x.expand(-1, query.shape[1], -1) for x in (key, value))
    # One head of every group at a time: so many calls of the kernel as there would be with the groups folded into the
    # queries, and rows whose queries see 1, 2, 3, … keys stay what the kernel calls causal.
    grouped = query.unflatten(1, (key.shape[1], -1)).unbind(2)
    outputs = [_AttentionInParts.apply(heads, key, value, parts, kernel) for heads in grouped]
    return torch.stack(outputs, 2).flatten(1, 2) if len(outputs) > 1 else outputs[0]


class _AttentionInParts(torch.autograd.Function):
    """The parts merged by their normalisers. Kept for the backward: what came in, the output, log Σ exp."""

    @staticmethod
    @torch._disable_dynamo
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part], kernel: "Kernel") -> Tensor:
        output, normaliser = parts[0].forward(query, _taken(key, parts[0].keys), _taken(value, parts[0].keys), kernel)
        for part in parts[1:]:
            own = part.forward(_taken(query, part.queries), _taken(key, part.keys), _taken(value, part.keys), kernel)
            merged, lse = _merge(_taken(output, part.queries), _taken(normaliser, part.queries), *own)
            if part.queries is None:
                output, normaliser = merged, lse
            else:
                output, normaliser = output.contiguous(), normaliser.contiguous()
                output.index_copy_(0, part.queries, merged)
                normaliser.index_copy_(0, part.queries, lse)
        ctx.save_for_backward(query, key, value, output, normaliser)
        ctx.parts, ctx.kernel = parts, kernel
        return output

    @staticmethod
    @without_second_derivative("packed attention", 'attn_implementation="eager"')
    @torch._disable_dynamo
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normaliser = ctx.saved_tensors
        totals: list[Tensor] = []
        for part in ctx.parts:
            # With the output and the normaliser of all keys, a part's gradients are right for that part.
            own = part.backward(
                _taken(grad, part.queries),
                _taken(query, part.queries),
                _taken(key, part.keys),
                _taken(value, part.keys),
                _taken(output, part.queries),
                _taken(normaliser, part.queries),
                ctx.kernel,
            )
            places = (part.queries, part.keys, part.keys)
            if not totals and all(place is None for place in places):
                totals = [gradient.contiguous() for gradient in own]
                continue
            totals = totals or [torch.zeros_like(x) for x in (query, key, value)]
            for total, place, gradient in zip(totals, places, own, strict=True):
                if place is None:
                    total += gradient
                else:
                    total.index_add_(0, place, gradient)
        return *totals, None, None


@dataclass(frozen=True)
class Piece:
    """Keys that some queries see, and the mask that says which sees which; none where all see all, or are causal."""

    keys: slice
    mask: Tensor | None = None
    causal: bool = False


class TiledPart(Part):
    """A part that goes tile by tile: so many queries at once, against one or more pieces of keys.

    The kernel takes the packed line as a batch of one row; a subclass may make a batch of more of it.
    """

    @abstractmethod
    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Sequence[Piece]]]:
        """The queries of each tile, and the pieces that together are the keys they see."""

    def queries_as_batch(self, x: Tensor, zeros: bool = False) -> Tensor:
        """(batch, tokens, …) of something that each query has; zeros where a row of the batch has no query."""
        return x[None]

    def keys_as_batch(self, x: Tensor) -> Tensor:
        """(batch, tokens, …) of something that each key has."""
        return x[None]

    def queries_packed(self, x: Tensor) -> Tensor:
        """What `queries_as_batch` made a batch of, packed again."""
        return x[0]

    def keys_packed(self, x: Tensor) -> Tensor:
        """What `keys_as_batch` made a batch of, packed again."""
        return x[0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kernel: "Kernel") -> tuple[Tensor, Tensor]:
        """Tile by tile, the pieces merged by their normalisers."""
        query, key, value = self._heads_first(query, key, value)
        batch, heads, tokens, width = query.shape
        output = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        normaliser = query.new_empty(batch, tokens, heads, dtype=wide).transpose(1, 2)
        for rows, pieces in self.tiles(query.dtype):
            merged: tuple[Tensor, Tensor] | None = None
            for piece in pieces:
                own = kernel.forward(
                    query[:, :, rows],
                    key[:, :, piece.keys],
                    value[:, :, piece.keys],
                    piece.mask,
                    causal=piece.causal,
                )
                merged = own if merged is None else _merge(*merged, *own)
            if merged is not None:
                output[:, :, rows], normaliser[:, :, rows] = merged
        return self.queries_packed(output.transpose(1, 2)), self.queries_packed(normaliser.transpose(1, 2))

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        normaliser: Tensor,
        kernel: "Kernel",
    ) -> Sequence[Tensor]:
        """Over the same tiles."""
        grad = self.queries_as_batch(side_by_side(grad), zeros=True).transpose(1, 2)
        output = self.queries_as_batch(side_by_side(output)).transpose(1, 2)
        normaliser = self.queries_as_batch(normaliser).transpose(1, 2)
        query, key, value = self._heads_first(query, key, value)
        totals = [torch.zeros_like(x) for x in (query, key, value)]
        for rows, pieces in self.tiles(query.dtype):
            for piece in pieces:
                gradients = kernel.backward(
                    grad[:, :, rows],
                    query[:, :, rows],
                    key[:, :, piece.keys],
                    value[:, :, piece.keys],
                    output[:, :, rows],
                    normaliser[:, :, rows],
                    piece.mask,
                    causal=piece.causal,
                )
                for total, place, part in zip(totals, (rows, piece.keys, piece.keys), gradients, strict=True):
                    total[:, :, place] += part
        to_query, *to_keys = (total.transpose(1, 2) for total in totals)
        return [self.queries_packed(to_query), *map(self.keys_packed, to_keys)]

    def _heads_first(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """(batch, heads, tokens, c) of each."""
        keys = (self.keys_as_batch(side_by_side(x)) for x in (key, value))
        return [x.transpose(1, 2) for x in (self.queries_as_batch(side_by_side(query)), *keys)]


class PrefixPart(TiledPart):
    """Queries that each see the first so many keys of their row: `prefix_attention`, tile by tile.

    Args:
        query_lengths: how many of the part's queries each row has.
        key_lengths: how many of the part's keys.
        visible: how many keys of its row each query sees, at least 1, not falling within a row.
        queries: see `Part`.
        keys: see there.

    """

    def __init__(
        self,
        query_lengths: Int[Tensor, " rows"],
        key_lengths: Int[Tensor, " rows"],
        visible: Int[Tensor, " queries"],
        queries: Int[Tensor, " chosen"] | None = None,
        keys: Int[Tensor, " chosen_keys"] | None = None,
    ) -> None:
        self.queries, self.keys, self.visible = queries, keys, visible
        self._tiles = list(_tiles(query_lengths.tolist(), key_lengths.tolist(), visible.tolist()))

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Sequence[Piece]]]:
        """Of each tile the keys that all of its queries see, and those that some see."""
        for tile in self._tiles:
            if tile.square:
                yield tile.queries, [Piece(slice(tile.start, tile.end), causal=True)]
                continue
            pieces = []
            if tile.shared > tile.start:
                pieces.append(Piece(slice(tile.start, tile.shared)))
            if tile.end > tile.shared:
                ordinal = torch.arange(tile.shared - tile.start, tile.end - tile.start)
                hidden = ordinal >= self.visible[tile.queries, None]
                pieces.append(Piece(slice(tile.shared, tile.end), additive_mask(hidden, dtype)))
            yield tile.queries, pieces


class PrefixOfRows(TiledPart):
    """`PrefixPart` of rows that have about as many queries: a tile is of all rows, a batch to the kernel.

    Shorter rows are filled up: with queries whose results are dropped, and with keys that nobody sees. With few keys a
    call of the kernel for each row and tile would take longer than what it computes.

    Args:
        query_lengths: how many of the part's queries each row has, at least 1.
        key_lengths: how many of the part's keys, at least 1.
        visible: as of `PrefixPart`.
        queries: see `Part`.
        keys: see there.

    """

    def __init__(
        self,
        query_lengths: Int[Tensor, " rows"],
        key_lengths: Int[Tensor, " rows"],
        visible: Int[Tensor, " queries"],
        queries: Int[Tensor, " chosen"] | None = None,
        keys: Int[Tensor, " chosen_keys"] | None = None,
    ) -> None:
        self.queries, self.keys = queries, keys
        self._of_queries, self._of_keys = _Rectangle(query_lengths), _Rectangle(key_lengths)
        self._visible = self._of_queries.fill(visible)
        least, most = self._visible.amin(0).tolist(), self._visible.amax(0).tolist()
        ends = [*range(LONG_CHUNK, len(most), LONG_CHUNK), len(most)]
        self._tiles = [
            (slice(a, b), _shared(least[a], most[b - 1]), most[b - 1]) for a, b in zip([0, *ends], ends, strict=False)
        ]

    @staticmethod
    def suits(query_lengths: Int[Tensor, " rows"], key_lengths: Int[Tensor, " rows"]) -> bool:
        """Whether there are several rows, of many queries and few keys, and little is to be filled up."""
        rows, queries, keys = len(query_lengths), int(query_lengths.sum()), int(key_lengths.sum())
        none = bool((query_lengths == 0).any()) or bool((key_lengths == 0).any())
        if rows < 2 or none or keys > KEYS * queries:
            return False
        return all(rows * int(n.max()) <= FILLED * int(n.sum()) for n in (query_lengths, key_lengths))

    def queries_as_batch(self, x: Tensor, zeros: bool = False) -> Tensor:
        """A row of the batch for each."""
        return self._of_queries.fill(x, zeros)

    def keys_as_batch(self, x: Tensor) -> Tensor:
        """Likewise."""
        return self._of_keys.fill(x)

    def queries_packed(self, x: Tensor) -> Tensor:
        """Without what was filled up."""
        return self._of_queries.packed(x)

    def keys_packed(self, x: Tensor) -> Tensor:
        """Likewise."""
        return self._of_keys.packed(x)

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Sequence[Piece]]]:
        """Of each tile the keys that all queries of all rows see, and those that some see."""
        for queries, shared, end in self._tiles:
            pieces = [Piece(slice(0, shared))] if shared else []
            if end > shared:
                hidden = torch.arange(shared, end) >= self._visible[:, queries, None]
                pieces.append(Piece(slice(shared, end), additive_mask(hidden, dtype)[:, None]))
            yield queries, pieces


class _Rectangle:
    """Packed rows as a rectangle, each filled up to the longest one with repetitions of its last token."""

    def __init__(self, lengths: Int[Tensor, " rows"]) -> None:
        self.rows, most = len(lengths), int(lengths.max())
        self.whole = bool((lengths == most).all())
        if not self.whole:
            place, last = torch.arange(most), lengths[:, None] - 1
            self._index = (lengths.cumsum(0)[:, None] - 1 - last + place.minimum(last)).flatten()
            self._beyond = place > last
            self._real = (~self._beyond).flatten().nonzero()[:, 0]

    def fill(self, x: Tensor, zeros: bool = False) -> Tensor:
        """(rows, tokens, …); or with zeros instead of repetitions."""
        if self.whole:
            return x.unflatten(0, (self.rows, -1))
        filled = x.index_select(0, self._index).unflatten(0, (self.rows, -1))
        return filled.masked_fill_(self._beyond.view(*self._beyond.shape, *[1] * (x.ndim - 1)), 0) if zeros else filled

    def packed(self, x: Tensor) -> Tensor:
        """Row after row again."""
        return x.flatten(0, 1) if self.whole else x.flatten(0, 1).index_select(0, self._real)


def prefix_part(
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    visible: Int[Tensor, " queries"],
    queries: Int[Tensor, " chosen"] | None = None,
    keys: Int[Tensor, " chosen_keys"] | None = None,
) -> Part:
    """A `PrefixPart`, or `PrefixOfRows` where that suits the rows."""
    kind = PrefixOfRows if PrefixOfRows.suits(query_lengths, key_lengths) else PrefixPart
    return kind(query_lengths, key_lengths, visible, queries, keys)


@dataclass(frozen=True)
class _Tile:
    """Some queries of a row and the keys they see: all of them those before `shared`, none those from `end` on."""

    queries: slice
    start: int
    shared: int
    end: int
    square: bool


def _tiles(queries: list[int], keys: list[int], visible: list[int]) -> Iterator[_Tile]:
    first = start = 0
    for n, s in zip(queries, keys, strict=True):
        if n == s and n > 0 and visible[first : first + n] == list(range(1, n + 1)):
            # Each sees itself and all before it: what the kernel calls causal, without a mask.
            yield _Tile(slice(first, first + n), start, start, start + n, square=n > 1)
        else:
            # Few keys: one tile, because what it computes in vain costs less than the calls it spares.
            step = max(n, 1) if s <= CHUNK else CHUNK if s < LONG else LONG_CHUNK
            for a in range(first, first + n, step):
                b = min(a + step, first + n)
                low, high = visible[a], visible[b - 1]
                yield _Tile(slice(a, b), start, start + _shared(low, high), start + high, square=False)
        first, start = first + n, start + s


def _shared(least: int, most: int) -> int:
    """How many keys a tile's queries see alike, if they see from `least` to `most`, and are attended to without a mask.

    The query that sees the fewest needs one of them left in the masked part. Few are not worth a call of their own.
    """
    return most if least == most else least - 1 if least > CHUNK else 0


class Kernel(ABC):
    """Attention of a rectangle of queries and keys, (batch, heads, tokens, c), and its backward.

    Args:
        scale: of the scores; 1/√c unless given.

    """

    def __init__(self, scale: float | None = None) -> None:
        self.scale = scale

    @abstractmethod
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The output, and log Σ exp."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        normaliser: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
    ) -> Sequence[Tensor]:
        """The gradients of query, key and value."""

    @property
    @abstractmethod
    def written_out(self) -> "WrittenOut":
        """The same attention, written out."""


class Flash(Kernel):
    """PyTorch's flash attention for CPUs. Every query sees a key."""

    @property
    def written_out(self) -> "WrittenOut":
        """With the same scale."""
        return WrittenOut(self.scale)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Of one kernel."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=self.scale
        )

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        normaliser: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
    ) -> Sequence[Tensor]:
        """Of one kernel."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, normaliser, 0.0, causal, attn_mask=mask, scale=self.scale
        )


class WrittenOut(Kernel):
    """Attention that holds the scores of the rectangle: for a few keys, and for scores that no kernel for CPUs has.

    A query may see no key: its output is 0 then, and its log Σ exp −∞.

    Args:
        scale: of the scores, before the cap; 1/√c unless given.
        softcap: κ, where scores s become κ tanh(s / κ). Source: Gemma 2, arXiv 2408.00118.

    """

    def __init__(self, scale: float | None = None, softcap: float | None = None) -> None:
        super().__init__(scale)
        self.softcap = softcap

    @property
    def written_out(self) -> "WrittenOut":
        """Itself."""
        return self

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """In float32, under autocast too."""
        with torch.autocast(query.device.type, enabled=False):
            scores, _ = self._scores(query, key, mask, causal)
            normaliser = scores.logsumexp(-1)
            return self._weights(scores, normaliser).to(value.dtype) @ value, normaliser

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        normaliser: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
    ) -> Sequence[Tensor]:
        """DS = P ∘ (dO Vᵀ − dO·O), times 1 − tanh² of the scores before the cap."""
        with torch.autocast(query.device.type, enabled=False):
            scores, tanh = self._scores(query, key, mask, causal)
            weights = self._weights(scores, normaliser)
            wide, given = grad.to(weights.dtype), grad.dtype
            slope = wide @ value.to(wide.dtype).transpose(-1, -2) - (wide * output).sum(-1, keepdim=True)
            slope = weights * slope * self._factor(query)
            slope = slope if tanh is None else slope * (1 - tanh.square())
            to_query, to_key = slope @ key.to(wide.dtype), slope.transpose(-1, -2) @ query.to(wide.dtype)
            return [part.to(given) for part in (to_query, to_key, weights.transpose(-1, -2) @ wide)]

    def _factor(self, query: Tensor) -> float:
        return 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale

    @staticmethod
    def _weights(scores: Tensor, normaliser: Tensor) -> Tensor:
        lowest = torch.finfo(scores.dtype).min  # −∞ less −∞ would be no number
        return (scores - normaliser.clamp(min=lowest)[..., None]).exp()

    def _scores(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor | None]:
        """The scores, and the tanh that they come from where there is a cap."""
        wide, tanh = torch.promote_types(query.dtype, torch.float32), None
        scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * self._factor(query)
        if self.softcap is not None:
            tanh = (scores / self.softcap).tanh()
            scores = tanh * self.softcap
        if mask is not None:
            scores = scores + mask
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores, tanh


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """−∞ where a key is hidden from a query, 0 elsewhere: a mask as the kernel takes it."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def heads_first(x: Float[Tensor, "tokens heads head_width"]) -> Float[Tensor, "1 heads tokens head_width"]:
    """Packed tokens as the kernel takes them."""
    return side_by_side(x).transpose(0, 1)[None]


def side_by_side(x: Tensor) -> Tensor:
    """With a head's numbers side by side, as the kernel assumes without checking."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _taken(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmax averages over disjoint keys, with their log Σ exp, as one over all of them."""
    share = (b_lse - a_lse).sigmoid()  # b's, of the sum of both normalisers
    return torch.lerp(a, b, share[..., None].to(a.dtype)), torch.logaddexp(a_lse, b_lse)
