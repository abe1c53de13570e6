"""Causal self-attention over a batch in which rows may be padded: rotary positions, the mask, the product.

Shapes: B batch, T queries, S ≥ T keys (the S − T first of them from a cache), h heads, c = d / h a head's width.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

AttentionImplementation = Literal["sdpa", "eager"]


def rotary_frequencies(head_width: int, theta: float = 10000.0) -> Float[Tensor, " pairs"]:
    """θ^(−2i/c) for each pair i of the c features of a head, in radians per position.

    Raises:
        ValueError: the head's width is odd.

    Source: RoFormer, arXiv 2104.09864.

    """
    if head_width % 2:
        raise ValueError(f"rotary positions turn pairs of features: head width {head_width} is odd")
    return theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width)


def rotary_table(
    position_ids: Int[Tensor, "batch time"], frequencies: Float[Tensor, " pairs"], factor: float = 1.0
) -> tuple[Float[Tensor, "batch time head_width"], Float[Tensor, "batch time head_width"]]:
    """Cosines and sines of the angles t · f_i for position t and pair i, each pair's angle in both halves.

    Computed in float32 whatever the model's type: in bfloat16 positions above 256 would fall together.

    Args:
        position_ids: t.
        frequencies: f, of `rotary_frequencies` or scaled ones.
        factor: on cosine and sine, which some scaled kinds have.

    Source: RoFormer, arXiv 2104.09864, in the rotate-half convention.

    """
    angle = position_ids[..., None].float() * frequencies
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos() * factor, angle.sin() * factor


def rotate(
    x: Float[Tensor, "rows heads *time head_width"],
    table: tuple[Float[Tensor, "rows *time head_width"], Float[Tensor, "rows *time head_width"]],
) -> Float[Tensor, "rows heads *time head_width"]:
    """Turn each pair (x_i, x_{i + c/2}) by its position's angle: x cos + (−x₂, x₁) sin; packed tokens have no time."""
    cos, sin = (part[:, None].to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_mask(keys_real: Bool[Tensor, "batch keys"], query_length: int) -> Bool[Tensor, "batch 1 query keys"]:
    """Query t sees key s where s ≤ t and s is a real token; the queries are the last `query_length` of the keys.

    A padded query sees itself, so that no row of the softmax is empty (which would give NaN); nothing reads it.
    """
    key_length = keys_real.shape[1]
    key = torch.arange(key_length, device=keys_real.device)
    query = key[key_length - query_length :, None]
    return ((key <= query) & keys_real[:, None, :] | (key == query))[:, None]


def attend(
    query: Float[Tensor, "batch heads query head_width"],
    key: Float[Tensor, "batch key_heads keys head_width"],
    value: Float[Tensor, "batch key_heads keys head_width"],
    mask: Bool[Tensor, "#batch #heads #query keys"] | None = None,
    dropout: float = 0.0,
    implementation: AttentionImplementation = "sdpa",
) -> Float[Tensor, "batch heads query head_width"]:
    """softmax(q kᵀ / √c + mask) v, causal.

    Args:
        query: one for each token that attends; the last T of the S positions.
        key: one for each position, those of the cache first. Their heads divide the queries' heads, and each serves as
            many of them in turn.
        value: likewise.
        mask: which key each query sees (`causal_mask`); None where no row is padded: then it is plainly causal.
        dropout: the probability with which an attention weight is dropped. The caller passes 0 outside training.
        implementation: `"sdpa"` for PyTorch's fused kernels, `"eager"` for the formula written out.

    Raises:
        ValueError: an unknown implementation.

    """
    _check_implementation(implementation)
    queries, keys = query.shape[-2], key.shape[-2]
    grouped = query.shape[1] != key.shape[1]
    if grouped and queries == 1 and queries != keys:
        # The heads of a group as so many queries of one head, so that no key is repeated.
        folded = query.view(len(query), key.shape[1], -1, query.shape[-1])
        if mask is not None and mask.shape[1] > 1:
            mask = mask.view(len(mask), key.shape[1], -1, keys)
        mixed = attend_to_all(folded, key, value, mask, dropout, implementation)
        return mixed.reshape(query.shape)  # no view: some kernels lay heads out otherwise
    if implementation == "sdpa":
        if mask is None and queries != keys:
            if queries == 1:
                return attend_to_all(query, key, value, None, dropout, implementation)
            mask = causal_mask(torch.ones(1, keys, dtype=torch.bool, device=query.device), queries)
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=grouped
        )
    if mask is None:
        mask = causal_mask(torch.ones(1, keys, dtype=torch.bool, device=query.device), queries)
    if grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return attend_to_all(query, key, value, mask, dropout, implementation)


def _check_implementation(name: str) -> None:
    if name not in get_args(AttentionImplementation):
        known = ", ".join(get_args(AttentionImplementation))
        raise ValueError(f"attention implementation {name!r}: choose one of {known}")


def capped(scores: Float[Tensor, "*dims"], softcap: float | None) -> Float[Tensor, "*dims"]:
    """κ tanh(s / κ) of scores s, or without a softcap κ the scores themselves."""
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def attend_to_all(
    query: Float[Tensor, "batch heads query head_width"],
    key: Float[Tensor, "batch heads keys head_width"],
    value: Float[Tensor, "batch heads keys head_width"],
    mask: Bool[Tensor, "#batch #heads #query keys"] | None = None,
    dropout: float = 0.0,
    implementation: AttentionImplementation = "sdpa",
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch heads query head_width"]:
    """`attend` without a causal order: every query sees every key, or those that the mask says.

    Args and errors are as for `attend`; `scale` replaces 1/√c, and with a softcap κ scores s are κ tanh(s / κ), which
    is always written out.
    """
    _check_implementation(implementation)
    if implementation == "sdpa" and softcap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = capped(scores, softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1, dtype=wide).to(value.dtype), dropout) @ value
