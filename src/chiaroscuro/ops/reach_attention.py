"""Attention of which some queries reach far and all reach near, over packed rows of different length.

Query i sees key j of its row, j not after i, where one of three things holds:

    near    i − j < w                       everybody sees these
    sinks   j < s                           and these
    far     i looks, and j is kept          a query that looks sees these too

with i and j the places of the tokens in their sequences. Near and far are attentions over disjoint keys. Each is
computed alone, with the log of its normaliser, and the two are merged by these; neither ever holds queries × keys.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.ops.attention import capped
from chiaroscuro.ops.packed_attention import (
    Kernel,
    Part,
    Piece,
    PrefixPart,
    TiledPart,
    additive_mask,
    attend_in_parts,
)

SPAN = 64
"""Queries of a tile of `Spans`."""

LONGEST_WINDOW = 2**31 - 1
"""Places of all rows lie on one line, a window apart: longer ones, times the rows, would leave 64 bits."""

PAIRS = 2**22
"""Pairs of a head's query and key that `gains_of_pairs` holds at a time."""


def reach_attention(
    query: Float[Tensor, "queries heads head_width"],
    key: Float[Tensor, "keys key_heads head_width"],
    value: Float[Tensor, "keys key_heads head_width"],
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    query_places: Int[Tensor, " queries"],
    key_places: Int[Tensor, " keys"],
    looks: Bool[Tensor, " queries"],
    kept: Bool[Tensor, " keys"],
    window: int,
    sinks: int = 0,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Float[Tensor, "queries heads head_width"]:
    """softmax(q_i k_jᵀ / √c) v_j over the keys j of i's row that are near, sinks, or kept where i looks.

    Args:
        query: the queries, row after row.
        key: the keys, row after row. Their heads divide the queries' heads, and each serves as many of them in turn.
        value: likewise.
        query_lengths: how many queries each row has; may be 0.
        key_lengths: how many keys.
        query_places: the place of each query in its sequence, rising within a row. Every query has a key at its place.
        key_places: the place of each key, rising within a row.
        looks: which queries see far keys.
        kept: which keys are seen from far.
        window: w, at least 1: how many keys each query sees up to and including its own.
        sinks: s, how many keys at the beginning of the sequence every query sees.
        dropout: of the attention weights; the caller passes 0 outside training. With dropout a row's weights are held
            in memory: queries × keys.
        softcap: κ, where scores s are to be κ tanh(s / κ). On a GPU a row's scores are then held in memory.

    """
    places = (query_lengths, key_lengths, query_places, key_places)
    by_rows = dropout or query.device.type not in ("cpu", "cuda") or len(query) == 0
    if by_rows or (softcap is not None and query.device.type == "cuda"):
        return reach_attention_by_rows(query, key, value, *places, looks, kept, window, sinks, dropout, softcap)
    if query.device.type == "cuda":
        from chiaroscuro.ops import packed_attention_cuda  # not at the top: it loads torch.compile's code generator

        near, far = near_and_far(*places, looks, kept, window, sinks)
        return packed_attention_cuda.reach_attention(query, key, value, near, far)
    parts = _parts(*places, looks, kept, window, sinks)
    return attend_in_parts(query, key, value, parts, softcap=softcap)


def reach_attention_by_rows(
    query: Float[Tensor, "queries heads head_width"],
    key: Float[Tensor, "keys key_heads head_width"],
    value: Float[Tensor, "keys key_heads head_width"],
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    query_places: Int[Tensor, " queries"],
    key_places: Int[Tensor, " keys"],
    looks: Bool[Tensor, " queries"],
    kept: Bool[Tensor, " keys"],
    window: int,
    sinks: int = 0,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Float[Tensor, "queries heads head_width"]:
    """`reach_attention` written out, row by row: the plain form that the fast one is held to."""
    if len(query_lengths) == 0:
        return query
    queries, keys = query_lengths.tolist(), key_lengths.tolist()
    rows = []
    for q, k, v, i, j, looking, keeping in zip(
        query.split(queries),
        key.split(keys),
        value.split(keys),
        query_places.split(queries),
        key_places.split(keys),
        looks.split(queries),
        kept.split(keys),
        strict=True,
    ):
        scores = torch.einsum("qhgc,khc->hgqk", q.unflatten(1, (k.shape[1], -1)), k) / math.sqrt(q.shape[-1])
        scores = capped(scores, softcap)
        seen = reach_mask(i, j, looking, keeping, window, sinks)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide).to(v.dtype)
        rows.append(torch.einsum("hgqk,khc->qhgc", F.dropout(weights, dropout), v).flatten(1, 2))
    return torch.cat(rows)


def reach_mask(
    query_places: Int[Tensor, "*#batch queries"],
    key_places: Int[Tensor, "*#batch keys"],
    looks: Bool[Tensor, "*#batch queries"],
    kept: Bool[Tensor, "*#batch keys"],
    window: int,
    sinks: int = 0,
) -> Bool[Tensor, "*#batch queries keys"]:
    """Which keys each query sees, written out."""
    i, j = query_places[..., :, None], key_places[..., None, :]
    return (j <= i) & ((j > i - window) | (j < sinks) | (looks[..., :, None] & kept[..., None, :]))


@torch.no_grad()
def gains_of_pairs(
    query: Float[Tensor, "heads time head_width"],
    key: Float[Tensor, "key_heads time head_width"],
    value: Float[Tensor, "key_heads time head_width"],
    slope: Float[Tensor, "heads time head_width"],
    near: Bool[Tensor, "time time"],
    far: Bool[Tensor, "time time"],
    softcap: float | None = None,
) -> tuple[Float[Tensor, "key_heads time"], Float[Tensor, "key_heads time"]]:
    """What the loss loses, to first order and in nats, if query i sees key j that it does not see yet.

    gᵢⱼ = −aᵢⱼ Gᵢ·(vⱼ − oᵢ), with a the attention to all that is near or far, o the output over what is near alone, and
    G = ∂L/∂o. Σⱼ aᵢⱼ (vⱼ − oᵢ) over the far keys is exactly what looking far changes in oᵢ. So the sum of a row is the
    gain of a token that looks, and the sum of a column that of a token that is kept.

    One row of a batch, some of its queries at a time.

    Args:
        query: of one row, rotated.
        key: likewise. Each of its heads serves as many heads of the queries in turn.
        value: likewise.
        slope: G.
        near: which keys each query sees now, none after its own; at least one, or the query's gains are 0.
        far: which others it would see, likewise.
        softcap: as of `reach_attention`.

    Returns:
        The gain of each token that looks, and of each that is kept, over the heads that share a key.

    """
    time = near.shape[0]
    query, slope = (x.unflatten(0, (len(key), -1)) for x in (query, slope))
    key, value = key[:, None], value[:, None]
    looking, kept = [], key.new_zeros(len(key), time, dtype=torch.promote_types(key.dtype, torch.float32))
    at_once = max(1, PAIRS // (query.shape[0] * query.shape[1] * time))
    for begin in range(0, time, at_once):
        end = min(time, begin + at_once)
        q, g = query[:, :, begin:end], slope[:, :, begin:end]
        k, v = key[:, :, :end], value[:, :, :end]
        seen, beyond = near[begin:end, :end], far[begin:end, :end]
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).to(kept.dtype)
        scores = capped(scores, softcap)
        output = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0).to(v.dtype) @ v
        weights = scores.masked_fill(~(seen | beyond), -torch.inf).softmax(-1).masked_fill(~beyond, 0.0).nan_to_num(0.0)
        change = g @ v.transpose(-1, -2) - (g * output).sum(-1, keepdim=True)
        gains = -weights * change
        looking.append(gains.sum((1, 3)))
        kept[:, :end] += gains.sum((1, 2))
    return torch.cat(looking, 1), kept


@dataclass(frozen=True)
class Near:
    """What every query sees of what is near: a span of keys on the line of all rows, its own the last.

    Attributes:
        begin: the first key.
        end: the one after the last.

    """

    begin: Int[Tensor, " queries"]
    end: Int[Tensor, " queries"]


@dataclass(frozen=True)
class Far:
    """What some queries see beyond their window: of some keys, those of their row up to a certain one.

    Attributes:
        queries: which queries.
        keys: which keys, in order.
        first: where each query's row begins among these keys.
        visible: how many of them it sees from there, at least 1.

    """

    queries: Int[Tensor, " chosen"]
    keys: Int[Tensor, " chosen_keys"]
    first: Int[Tensor, " chosen"]
    visible: Int[Tensor, " chosen"]


def near_and_far(
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    query_places: Int[Tensor, " queries"],
    key_places: Int[Tensor, " keys"],
    looks: Bool[Tensor, " queries"],
    kept: Bool[Tensor, " keys"],
    window: int,
    sinks: int,
) -> tuple[Near, list[Far]]:
    """Who sees what, as disjoint spans of keys: near, what those that look see beyond, and the others' sinks."""
    rows = torch.arange(len(query_lengths), device=query_lengths.device)
    row, key_row = rows.repeat_interleave(query_lengths), rows.repeat_interleave(key_lengths)
    # Places of all rows on one line, on which they rise. A query sees nothing of the row before.
    apart = key_places.max() + window + 1
    line, key_line = row * apart + query_places, key_row * apart + key_places
    start, begin = torch.searchsorted(key_line, row * apart), torch.searchsorted(key_line, line - window, right=True)
    near = Near(begin, torch.searchsorted(key_line, line, right=True))
    sink, far = key_places < sinks, []
    for queries, keys in ((looks, kept | sink), (~looks, sink)):
        # How many of these keys lie before the window, counted from the first of the query's row.
        count = F.pad(keys.cumsum(0), (1, 0))
        visible = count[begin] - count[start]
        index = (queries & (visible > 0)).nonzero()[:, 0]
        if len(index):
            far.append(Far(index, keys.nonzero()[:, 0], count[start[index]], visible[index]))
    return near, far


def _parts(
    query_lengths: Tensor, key_lengths: Tensor, query_places: Tensor, key_places: Tensor, *who: Any
) -> list[Part]:
    """`near_and_far` as parts for a CPU."""
    near, far = near_and_far(query_lengths, key_lengths, query_places, key_places, *who)
    *_, kept, window, _ = who
    whole = len(query_places) == len(kept) and bool((near.end == torch.arange(1, len(near.end) + 1)).all())
    window = min(window, int(key_places.max()) + 1)  # what a band computes grows with its window
    parts: list[Part] = [Band(near.begin, window) if whole else Spans(query_lengths, near.begin, near.end)]
    rows = torch.arange(len(query_lengths))
    row, key_row = rows.repeat_interleave(query_lengths), rows.repeat_interleave(key_lengths)
    for part in far:
        counts = [torch.bincount(x, minlength=len(rows)) for x in (row[part.queries], key_row[part.keys])]
        parts.append(PrefixPart(counts[0], counts[1], part.visible, queries=part.queries, keys=part.keys))
    return parts


class Band(Part):
    """What is near, where every key has its query: blocks of queries, each against the keys that some of it see.

    The blocks lie on the packed line, and the kernel takes them as a batch: block b of C queries sees the C keys at its
    own places and as many blocks before as the window reaches into. The views of the keys overlap.

    Args:
        begin: the first key that each query sees, on the packed line; the last is its own.
        window: w.

    """

    def __init__(self, begin: Int[Tensor, " queries"], window: int) -> None:
        self.block = block_of(window)
        self.before = -(-(window - 1) // self.block)
        self.blocks = -(-len(begin) // self.block)
        self.filled = self.blocks * self.block - len(begin)
        place = torch.arange(self.blocks * self.block)
        first = torch.cat([begin, place[len(begin) :]]).view(-1, self.block)
        key = torch.arange((self.before + 1) * self.block) - self.before * self.block
        key = key + place.view(-1, self.block)[:, :1]
        own = place.view(-1, self.block)
        self.hidden = (key[:, None] < first[..., None]) | (key[:, None] > own[..., None])

    def _mask(self, dtype: torch.dtype) -> Tensor:
        return additive_mask(self.hidden, dtype)[:, None]

    def _queries(self, x: Tensor) -> Tensor:
        """(blocks, heads, C, c)."""
        return F.pad(x, (0, 0, 0, 0, 0, self.filled)).view(self.blocks, self.block, *x.shape[1:]).transpose(1, 2)

    def _keys(self, x: Tensor) -> Tensor:
        """(blocks, heads, keys, c), overlapping."""
        line = F.pad(x, (0, 0, 0, 0, self.before * self.block, self.filled))
        return line.unfold(0, (self.before + 1) * self.block, self.block).transpose(2, 3)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """All blocks at once."""
        output, normaliser = kernel.forward(
            self._queries(query), self._keys(key), self._keys(value), self._mask(query.dtype)
        )
        return self._line(output, len(query)), self._line(normaliser, len(query))

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        normaliser: Tensor,
        kernel: Kernel,
    ) -> Sequence[Tensor]:
        """Over the same blocks."""
        to_query, *to_keys = kernel.backward(
            self._queries(grad),
            self._queries(query),
            self._keys(key),
            self._keys(value),
            self._queries(output),
            F.pad(normaliser, (0, 0, 0, self.filled)).view(self.blocks, self.block, -1).transpose(1, 2),
            self._mask(query.dtype),
        )
        return self._line(to_query, len(query)), *(self._overlapped(part, len(key)) for part in to_keys)

    def _line(self, blocks: Tensor, length: int) -> Tensor:
        return blocks.transpose(1, 2).flatten(0, 1)[:length]

    def _overlapped(self, grad: Tensor, length: int) -> Tensor:
        """What the blocks say of each key, added up."""
        parts = grad.unflatten(2, (self.before + 1, self.block)).permute(2, 0, 3, 1, 4)
        total = grad.new_zeros(self.blocks + self.before, *parts.shape[2:])
        for shift, part in enumerate(parts):
            total[shift : shift + self.blocks] += part
        return total.flatten(0, 1)[self.before * self.block :][:length]


def block_of(window: int) -> int:
    """C, queries of a block of `Band`: about half a window, so that a third of what the kernel computes is wasted."""
    return max(16, min(64, 1 << max(0, (window // 2 - 1).bit_length())))


class Spans(TiledPart):
    """What is near, where some tokens attend and others are attended to alone: a span of keys each, tile by tile.

    Args:
        query_lengths: how many queries each row has.
        begin: the first key that each query sees, on the packed line.
        end: the one after the last.

    """

    def __init__(
        self, query_lengths: Int[Tensor, " rows"], begin: Int[Tensor, " queries"], end: Int[Tensor, " queries"]
    ) -> None:
        self.begin, self.end = begin, end
        ends = query_lengths.cumsum(0).tolist()
        self._queries = [
            slice(a, min(a + SPAN, last))
            for first, last in zip([0, *ends[:-1]], ends, strict=True)
            for a in range(first, last, SPAN)
        ]

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Sequence[Piece]]]:
        """Of each tile the keys that some of its queries see."""
        for queries in self._queries:
            first, last = int(self.begin[queries][0]), int(self.end[queries][-1])
            place = torch.arange(first, last)
            hidden = (place < self.begin[queries, None]) | (place >= self.end[queries, None])
            yield queries, [Piece(slice(first, last), additive_mask(hidden, dtype))]
