"""`prefix_attention` on a GPU, by the kernels that PyTorch has for packed rows.

Where every row's queries see 1, 2, 3, … keys, as routed tokens that attend to each other do, that is what flash
attention calls causal, and its kernel for rows of different length takes it (in half precision, heads of up to 256).
All else goes to flex attention, which compiles a kernel for a mask given as a function: a query sees the keys from its
row's first to the last of its prefix. The kernel skips blocks of keys that none of a block of queries sees, and asks
for no mask where all of them see all; which blocks these are follows from the prefixes' ends, without queries × keys.

Flex attention is compiled anew for every pair of lengths, and packed rows have another length at every step. So queries
and keys are filled up to a power of two. Nobody sees what is added, and blocks of nothing else cost nothing.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from chiaroscuro.ops.packed_attention import prefix_attention_by_rows
from chiaroscuro.ops.reach_attention import Far, Near

BLOCK = 128
"""Queries, and keys, of a block: what flex attention's kernels take by default."""

KERNELS = 1024
"""For so many pairs of lengths, types and shapes kernels are compiled, where PyTorch would stop at 8."""

AMPERE = (8, 0)
"""The compute capability that flash attention asks for."""

_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""How newer versions of PyTorch are told that heads are grouped, which older ones find out."""

_compiled_flex_attention: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)


@torch.compiler.disable
def prefix_attention(
    query: Float[Tensor, "queries heads head_width"],
    key: Float[Tensor, "keys key_heads head_width"],
    value: Float[Tensor, "keys key_heads head_width"],
    query_lengths: Int[Tensor, " rows"],
    key_lengths: Int[Tensor, " rows"],
    visible: Int[Tensor, " queries"],
    scale: float | None = None,
) -> Float[Tensor, "queries heads head_width"]:
    """`chiaroscuro.ops.packed_attention.prefix_attention` without dropout, for tensors on a GPU."""
    if len(query) == 0:  # which no kernel takes
        return prefix_attention_by_rows(query, key, value, query_lengths, key_lengths, visible, scale=scale)
    width = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and width % 8 == 0 and width <= 256 and _capability(query) >= AMPERE:
        ordinals = torch.arange(1, len(query) + 1, device=query.device)
        ordinals = ordinals - _row_starts(query_lengths, query_lengths, len(query))
        causal = (query_lengths == key_lengths).all() & (visible == ordinals).all()
        is_causal, longest = torch.stack([causal.long(), query_lengths.max()]).tolist()
        if is_causal:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
            ends = F.pad(query_lengths.cumsum(0), (1, 0)).int()
            grouped = _GROUPED if query.shape[1] != key.shape[1] else {}
            output = varlen_attn(
                query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **grouped
            )
            return cast(Tensor, output)
    start = _row_starts(key_lengths, query_lengths, len(query))
    output = _attend_to_spans(query, key, value, start, start + visible, scale)
    return output[0].transpose(0, 1)[: len(query), :, :width]


@torch.compiler.disable
def reach_attention(
    query: Float[Tensor, "queries heads head_width"],
    key: Float[Tensor, "keys key_heads head_width"],
    value: Float[Tensor, "keys key_heads head_width"],
    near: Near,
    far: Sequence[Far],
) -> Float[Tensor, "queries heads head_width"]:
    """`chiaroscuro.ops.reach_attention.reach_attention` without dropout, for tensors on a GPU.

    Near and far are merged by their normalisers in plain operations, which carry the gradient.
    """
    output, normaliser = _with_normaliser(query, key, value, near.begin, near.end)
    for part in far:
        end = part.first + part.visible
        own, lse = _with_normaliser(query[part.queries], key[part.keys], value[part.keys], part.first, end)
        both = torch.logaddexp(normaliser[part.queries], lse)
        rest = output[part.queries] * (normaliser[part.queries] - both).exp()[..., None].to(output.dtype)
        merged = rest + own * (lse - both).exp()[..., None].to(own.dtype)
        output, normaliser = output.index_copy(0, part.queries, merged), normaliser.index_copy(0, part.queries, both)
    return output


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device)


def _attend_to_spans(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, scale: float | None = None, **more: Any
) -> Any:
    """The output (1, h, filled, c) of queries that each see the keys from `start` to before `end`; and what else."""
    mask = span_mask(start, end, len(key))
    queries, keys = mask.shape[-2:]
    with torch._dynamo.config.patch(recompile_limit=KERNELS, accumulated_recompile_limit=2 * KERNELS):
        return _compiled_flex_attention(
            _fill(query, queries),
            _fill(key, keys),
            _fill(value, keys),
            block_mask=mask,
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
            enable_gqa=query.shape[1] != key.shape[1],
            **more,
        )


def _with_normaliser(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The output (Q, h, c), and log Σ exp (Q, h)."""
    output, aux = _attend_to_spans(query, key, value, start, end, return_aux=AuxRequest(lse=True))
    return output[0].transpose(0, 1)[: len(query), :, : query.shape[-1]], aux.lse[0].T[: len(query)]


def span_mask(start: Int[Tensor, " queries"], end: Int[Tensor, " queries"], keys: int) -> BlockMask:
    """For flex attention, that each query sees the keys from `start` to before `end`.

    Queries and keys are filled up to a power of two.
    """
    queries = len(start)
    # A query that was added sees the keys from 0 to before 0.
    start, end = (F.pad(x, (0, _power_of_two(queries) - queries)) for x in (start, end))

    blocks = _power_of_two(keys) // BLOCK
    seen = _covering(start // BLOCK, -(-end // BLOCK), blocks) > 0
    first_whole = -(-start // BLOCK)
    whole = _covering(first_whole, torch.maximum(end // BLOCK, first_whole), blocks) == BLOCK
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda _batch, _head, query, key: (start[query] <= key) & (key < end[query]),
        seq_lengths=(len(start), blocks * BLOCK),
    )


def _row_starts(lengths: Tensor, query_lengths: Tensor, queries: int) -> Tensor:
    """For each query, where its row begins in what has these lengths."""
    return (lengths.cumsum(0) - lengths).repeat_interleave(query_lengths, output_size=queries)


def _covering(first: Tensor, end: Tensor, key_blocks: int) -> Tensor:
    """How many of a block's queries have each block of keys between their `first` and before their `end`."""
    first, end = first.view(-1, BLOCK), end.view(-1, BLOCK)
    steps = first.new_zeros(len(first), key_blocks + 1)
    steps.scatter_add_(1, first, torch.ones_like(first)).scatter_add_(1, end, -torch.ones_like(end))
    return steps.cumsum(1)[:, :-1]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks as flex attention has it: how many in a row, and which, these first."""
    which = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], which.int()[None, None]


def _power_of_two(length: int) -> int:
    return max(BLOCK, 1 << (length - 1).bit_length())


def _fill(x: Tensor, length: int) -> Tensor:
    """Heads first, filled up with zeros; flex attention's heads are at least 16 wide."""
    return F.pad(x, (0, max(0, 16 - x.shape[-1]), 0, 0, 0, length - len(x))).transpose(0, 1)[None]
