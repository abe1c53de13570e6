"""Attention of which some queries reach far and all reach near, over packed rows of different length.

Query i sees key j of its row, j not after i, where one of three things holds:

    near    i − j < w                       everybody sees these
    sinks   j < s                           and these
    far     i looks, and j is kept          a query that looks sees these too

with i and j the places of the tokens in their sequences. Near and far are attentions over disjoint keys, and so are the
sinks where they are computed apart. Each is computed alone, with the log of its normaliser, and they are merged by
these; none ever holds queries × keys. Rows of a few hundred tokens have blocks under a mask instead, on a CPU.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.ops.attention import attend, capped
from chiaroscuro.ops.packed_attention import (
    Kernel,
    Part,
    Piece,
    TiledPart,
    additive_mask,
    attend_in_parts,
    heads_first,
    on_a_gpu_with_kernels,
    prefix_part,
    side_by_side,
)

SPAN = 64
"""Queries of a tile of `Spans`."""

SHORT, SHORT_BLOCK = 512, 128
"""Tokens of rows that are short, and queries of a block of `attend_in_short_rows`."""

FEW = 64
"""The most sinks of a row that are a part of their own, in which all scores are held."""

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
    by_rows = dropout or not (query.device.type == "cpu" or on_a_gpu_with_kernels(query)) or len(query) == 0
    if by_rows or (softcap is not None and query.device.type == "cuda"):
        return reach_attention_by_rows(query, key, value, *places, looks, kept, window, sinks, dropout, softcap)
    if query.device.type == "cuda":
        from chiaroscuro.ops import packed_attention_cuda  # not at the top: it loads torch.compile's code generator

        near, far = near_and_far(*places, looks, kept, window, sinks)
        return packed_attention_cuda.reach_attention(query, key, value, near, far)
    if softcap is None and _whole_and_short(*places):
        rows = len(query_lengths), -1
        return attend_in_short_rows(query, key, value, looks.view(rows), kept.view(rows), window, sinks)
    if len(query_lengths) > 1 and not _total(query, key, value).isfinite():
        # A block of two rows hides one from the other by weights of 0, and 0 · NaN is NaN.
        outputs = []
        for q, k, v, i, j, looking, keeping in _rows(query, key, value, *places, looks, kept):
            n, m = (query_lengths.new_tensor([len(part)]) for part in (q, k))
            outputs.append(reach_attention(q, k, v, n, m, i, j, looking, keeping, window, sinks, softcap=softcap))
        return torch.cat(outputs)
    parts = _parts(*places, looks, kept, window, sinks)
    return attend_in_parts(query, key, value, parts, softcap=softcap)


def _total(*numbers: Tensor) -> Tensor:
    """The sum, which is no finite number where one of them is none; float16 alone would not hold it."""
    wide = torch.promote_types(numbers[0].dtype, torch.float32)
    return torch.stack([x.detach().sum(dtype=wide) for x in numbers]).sum()


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
    rows = []
    places = (query_lengths, key_lengths, query_places, key_places)
    for q, k, v, i, j, looking, keeping in _rows(query, key, value, *places, looks, kept):
        scores = torch.einsum("qhgc,khc->hgqk", q.unflatten(1, (k.shape[1], -1)), k) / math.sqrt(q.shape[-1])
        scores = capped(scores, softcap)
        seen = reach_mask(i, j, looking, keeping, window, sinks)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide).to(v.dtype)
        rows.append(torch.einsum("hgqk,khc->qhgc", F.dropout(weights, dropout), v).flatten(1, 2))
    return torch.cat(rows)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    query_places: Tensor,
    key_places: Tensor,
    looks: Tensor,
    kept: Tensor,
) -> Iterator[tuple[Tensor, ...]]:
    """Of each row its queries, keys and values, their places, which look, and which are kept."""
    queries, keys = query_lengths.tolist(), key_lengths.tolist()
    lengths = (queries, keys, keys, queries, keys, queries, keys)
    parts = (query, key, value, query_places, key_places, looks, kept)
    yield from zip(*(part.split(own) for part, own in zip(parts, lengths, strict=True)), strict=True)


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


def _whole_and_short(
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    query_places: Int[Tensor, " queries"],
    key_places: Int[Tensor, " keys"],
) -> bool:
    """Whether all rows have the same number of tokens, a small one, which all attend and are attended to."""
    time, ragged = divmod(len(query_places), len(query_lengths))
    if ragged or not 0 < time <= SHORT or len(key_places) != len(query_places):
        return False
    place = torch.arange(time).repeat(len(query_lengths))
    alike = all(bool((lengths == time).all()) for lengths in (query_lengths, key_lengths))
    return alike and torch.equal(query_places, place) and torch.equal(key_places, place)


def attend_in_short_rows(
    query: Float[Tensor, "tokens heads head_width"],
    key: Float[Tensor, "tokens key_heads head_width"],
    value: Float[Tensor, "tokens key_heads head_width"],
    looks: Bool[Tensor, "rows time"],
    kept: Bool[Tensor, "rows time"],
    window: int,
    sinks: int,
) -> Float[Tensor, "tokens heads head_width"]:
    """`reach_attention` of short rows of T tokens each, which all attend and are attended to.

    In so short a row far attention spares fewer scores than it costs to find out which. The first w tokens are plainly
    causal. Those after them go in blocks, each against all keys before its end, under a mask.
    """
    rows, time = looks.shape
    query, key, value = (x.unflatten(0, (rows, time)).transpose(1, 2) for x in (query, key, value))
    place = torch.arange(time)
    first = min(window, time)
    with torch.autocast("cpu", enabled=False):  # what comes in full precision is attended to in it, as in long rows
        blocks = [attend(query[:, :, :first], key[:, :, :first], value[:, :, :first])]
        for begin in range(first, time, SHORT_BLOCK):
            end = min(begin + SHORT_BLOCK, time)
            own, seen = slice(begin, end), slice(0, end)
            mask = reach_mask(place[own], place[seen], looks[:, own], kept[:, seen], window, sinks)
            blocks.append(attend(query[:, :, own], key[:, :, seen], value[:, :, seen], mask[:, None]))
    return torch.cat(blocks, 2).transpose(1, 2).flatten(0, 1)


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
    """Who sees what, as disjoint spans of keys: near; beyond it, what those that look see; and the others' sinks."""
    near, start = _near(query_lengths, key_lengths, query_places, key_places, window)
    sink = key_places < sinks
    far = (_far(near, start, *group) for group in ((looks, kept | sink), (~looks, sink)))
    return near, [part for part in far if len(part.queries)]


def _near(
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    query_places: Int[Tensor, " queries"],
    key_places: Int[Tensor, " keys"],
    window: int,
) -> tuple[Near, Int[Tensor, " queries"]]:
    """What is near, and the first key of each query's row."""
    rows = torch.arange(len(query_lengths), device=query_lengths.device)
    row, key_row = rows.repeat_interleave(query_lengths), rows.repeat_interleave(key_lengths)
    # Places of all rows on one line, on which they rise. A query sees nothing of the row before.
    apart = key_places.max() + window + 1
    line, key_line = row * apart + query_places, key_row * apart + key_places
    begin = torch.searchsorted(key_line, line - window, right=True)
    return Near(begin, torch.searchsorted(key_line, line, right=True)), torch.searchsorted(key_line, row * apart)


def _before(near: Near, start: Int[Tensor, " queries"], keys: Bool[Tensor, " keys"]) -> tuple[Tensor, Tensor]:
    """How many of these keys lie before the window of each query's row, and before the row."""
    count = F.pad(keys.cumsum(0), (1, 0))
    return count[near.begin] - count[start], count[start]


def _far(
    near: Near, start: Int[Tensor, " queries"], queries: Bool[Tensor, " queries"], keys: Bool[Tensor, " keys"]
) -> Far:
    """What these queries see of these keys before their windows."""
    visible, first = _before(near, start, keys)
    index = (queries & (visible > 0)).nonzero()[:, 0]
    return Far(index, keys.nonzero()[:, 0], first[index], visible[index])


def _parts(
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    query_places: Int[Tensor, " queries"],
    key_places: Int[Tensor, " keys"],
    looks: Bool[Tensor, " queries"],
    kept: Bool[Tensor, " keys"],
    window: int,
    sinks: int,
) -> list[Part]:
    """Who sees what, as parts for a CPU: as in `near_and_far`, but few sinks of rows that are alike by themselves."""
    near, start = _near(query_lengths, key_lengths, query_places, key_places, window)
    whole = len(query_places) == len(kept) and bool((near.end == torch.arange(1, len(near.end) + 1)).all())
    width = min(window, int(key_places.max()) + 1)  # what a band computes grows with its window
    parts: list[Part] = [Band(near.begin, width) if whole else Spans(query_lengths, near.begin, near.end)]
    rows = torch.arange(len(query_lengths))
    row, key_row = rows.repeat_interleave(query_lengths), rows.repeat_interleave(key_lengths)
    sink = key_places < sinks
    sunk = torch.bincount(key_row[sink], minlength=len(rows))
    visible, _ = _before(near, start, sink)
    beside = bool(visible.any()) and not bool(looks.all())  # where all look, the sinks are among what is far
    if beside and sunk.max() <= FEW and _alike(query_lengths) and _alike(sunk):
        parts.append(Sinks(len(rows), visible, sink.nonzero()[:, 0]))
        groups = [(looks, kept & ~sink)]
    else:
        groups = [(looks, kept | sink), (~looks, sink)]
    for queries, keys in groups:
        far = _far(near, start, queries, keys)
        if len(far.queries):
            counts = [torch.bincount(x, minlength=len(rows)) for x in (row[far.queries], key_row[far.keys])]
            parts.append(prefix_part(counts[0], counts[1], far.visible, queries=far.queries, keys=far.keys))
    return parts


def _alike(lengths: Int[Tensor, " rows"]) -> bool:
    return bool((lengths == lengths[0]).all())


class Band(Part):
    """What is near, where every key has its query: blocks of queries, each against the keys that some of it see.

    The blocks lie on the packed line, and the kernel takes them as a batch: block b of C queries sees the C keys at its
    own places and as many blocks before as the window reaches into. The views of the keys overlap. The first blocks,
    which have fewer before them, are one rectangle; so is the last one, if it is not full.

    Args:
        begin: the first key that each query sees, on the packed line; the last is its own.
        window: w.

    """

    def __init__(self, begin: Int[Tensor, " queries"], window: int) -> None:
        self.block = block_of(window)
        self.before = -(-(window - 1) // self.block)
        length, place = len(begin), torch.arange(len(begin))
        first = min(self.before * self.block, length)
        last = max(length // self.block * self.block, first)
        self.inner, self.blocks = slice(first, last), (last - first) // self.block
        self._edges = []
        for a, b in ((0, first), (last, length)):
            if a < b:
                queries, keys = slice(a, b), slice(max(0, a - self.before * self.block), b)
                hidden = (place[keys] < begin[queries, None]) | (place[keys] > place[queries, None])
                self._edges.append((queries, keys, hidden))
        seen = (place - begin)[self.inner].view(-1, self.block)
        if bool((seen == window - 1).all()):  # no row begins there: all blocks see alike, and one mask serves them
            seen = seen[:1]
        key, own = torch.arange((self.before + 1) * self.block), torch.arange(self.block) + self.before * self.block
        self._hidden = (key < (own - seen)[..., None]) | (key > own[:, None])

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """The edges, then all inner blocks at once."""
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        normaliser = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys, hidden in self._edges:
            mask = additive_mask(hidden, query.dtype)
            q, k, v = (heads_first(x) for x in (query[queries], key[keys], value[keys]))
            out, lse = kernel.forward(q, k, v, mask)
            output[queries], normaliser[queries] = out[0].transpose(0, 1), lse[0].T
        if self.blocks:
            mask = self._mask(query.dtype)
            out, lse = kernel.forward(self._queries(query), self._keys(key), self._keys(value), mask)
            output[self.inner], normaliser[self.inner] = self._line(out), self._line(lse)
        return output, normaliser

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
        totals = [torch.zeros_like(x) for x in (query, key, value)]
        for queries, keys, hidden in self._edges:
            gradients = kernel.backward(
                heads_first(grad[queries]),
                heads_first(query[queries]),
                heads_first(key[keys]),
                heads_first(value[keys]),
                heads_first(output[queries]),
                normaliser[queries].T[None],
                additive_mask(hidden, query.dtype),
            )
            for total, place, part in zip(totals, (queries, keys, keys), gradients, strict=True):
                total[place] += part[0].transpose(0, 1)
        if self.blocks:
            to_query, *to_keys = kernel.backward(
                self._queries(grad),
                self._queries(query),
                self._keys(key),
                self._keys(value),
                self._queries(output),
                self._queries(normaliser[..., None])[..., 0],
                self._mask(query.dtype),
            )
            totals[0][self.inner] = self._line(to_query)
            for total, part in zip(totals[1:], to_keys, strict=True):
                self._add(total, part)
        return totals

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """For all heads, and for each block or for all."""
        return additive_mask(self._hidden, dtype)[:, None]

    def _queries(self, x: Tensor) -> Tensor:
        """(blocks, heads, C, c)."""
        return side_by_side(x[self.inner]).unflatten(0, (self.blocks, self.block)).transpose(1, 2)

    def _keys(self, x: Tensor) -> Tensor:
        """(blocks, heads, keys, c), overlapping."""
        line = side_by_side(x[: self.inner.stop])
        return line.unfold(0, (self.before + 1) * self.block, self.block).transpose(2, 3)

    def _line(self, blocks: Tensor) -> Tensor:
        return blocks.transpose(1, 2).flatten(0, 1)

    def _add(self, total: Tensor, grad: Tensor) -> None:
        """What the blocks say of each key."""
        line = total[: self.inner.stop].unflatten(0, (-1, self.block))
        for shift, part in enumerate(grad.unflatten(2, (self.before + 1, self.block)).permute(2, 0, 3, 1, 4)):
            line[shift : shift + self.blocks] += part


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


class Sinks(Part):
    """The sinks before each query's window, in rows that are alike: few keys, which most queries of a row see.

    Written out: flash attention is slow with so few keys, and can't have a query that sees none.

    Args:
        rows: how many rows there are. Each has as many queries and as many sinks as the others.
        visible: how many sinks each query sees.
        keys: which keys are sinks.

    """

    def __init__(self, rows: int, visible: Int[Tensor, " queries"], keys: Int[Tensor, " chosen_keys"]) -> None:
        self.rows, self.keys = rows, keys
        self._hidden = torch.arange(len(keys) // rows) >= visible.view(rows, 1, -1, 1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """All rows at once."""
        mask = additive_mask(self._hidden, query.dtype)
        query, key, value = (self._batch(x) for x in (query, key, value))
        output, normaliser = kernel.written_out.forward(query, key, value, mask)
        return self._line(output), self._line(normaliser)

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
        """Likewise."""
        mask = additive_mask(self._hidden, query.dtype)
        grad, query, key, value, output, normaliser = (
            self._batch(x) for x in (grad, query, key, value, output, normaliser)
        )
        gradients = kernel.written_out.backward(grad, query, key, value, output, normaliser, mask)
        return [self._line(part) for part in gradients]

    def _batch(self, x: Tensor) -> Tensor:
        """(rows, heads, tokens, …)."""
        return x.unflatten(0, (self.rows, -1)).transpose(1, 2)

    def _line(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)
