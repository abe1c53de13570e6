"""Attention from a layer's packed tokens to those that they may see, with what a cache holds of earlier ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chiaroscuro.layers.context import Context
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.layers.state import KeptTokens
from chiaroscuro.ops.attention import attend_to_all
from chiaroscuro.ops.packed_attention import prefix_attention, prefix_attention_by_rows


def attend_packed(
    query: Float[Tensor, "queries heads head_width"],
    vectors: tuple[Float[Tensor, "keys key_heads head_width"], ...],
    tokens: PackedTokens,
    keyed: PackedTokens,
    context: Context,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    visible: Int[Tensor, " queries"] | None = None,
) -> Float[Tensor, "queries heads head_width"]:
    """softmax(q_i k_jᵀ / √c) v_j over the keys j of i's sequence up to i's own place, cached ones included.

    Args:
        query: of the tokens that attend.
        vectors: keys and values of the tokens that are attended to, or one kind of vector that serves as both. They
            are put into `context.state`, where there is one.
        tokens: which tokens attend.
        keyed: which are attended to.
        context: the layer's; its state is a `KeptTokens`.
        dropout: on the attention weights.
        scale: instead of 1/√c.
        visible: how many of the new keys of its sequence each query sees; unless given, those up to its own place.

    """
    state: KeptTokens | None = context.state
    if len(query) == 0 and not torch.is_grad_enabled():
        if state is not None:
            state.extend(keyed.chosen, *vectors)
        return query
    visible = tokens.ordinals(keyed) if visible is None else visible
    key_lengths = keyed.lengths
    if state is None or state.empty:
        if state is not None:
            state.extend(keyed.chosen, *vectors)
    elif tokens.chosen.shape[1] == 1 and not torch.is_grad_enabled():
        # One new token per row sees all that its row keeps: a rectangle, with a mask where rows differ in length. The
        # heads of a group are so many queries of one head, so that no key is repeated.
        state.extend(keyed.chosen, *vectors)
        kept, real = state.rectangle(tokens.index)
        mask = None if real is None else real[:, None, None]
        folded = query.view(len(query), vectors[0].shape[1], -1, query.shape[-1])
        # A cache may be filled under autocast, and used outside.
        key, value = (part.to(query.dtype) for part in (kept[0], kept[-1]))
        mixed = attend_to_all(folded, key, value, mask, dropout, context.implementation, scale)
        return mixed.reshape(query.shape)
    else:
        earlier = torch.tensor(state.lengths, device=query.device)
        kept = state.packed()
        state.extend(keyed.chosen, *vectors)
        vectors = tuple(_after(old, earlier, new, key_lengths) for old, new in zip(kept, vectors, strict=True))
        visible = visible + earlier.repeat_interleave(tokens.lengths)
        key_lengths = key_lengths + earlier
    attention = prefix_attention if context.implementation == "sdpa" else prefix_attention_by_rows
    return attention(query, vectors[0], vectors[-1], tokens.lengths, key_lengths, visible, dropout, scale)


def _after(
    old: Float[Tensor, "old heads head_width"],
    old_lengths: Int[Tensor, " rows"],
    new: Float[Tensor, "new heads head_width"],
    new_lengths: Int[Tensor, " rows"],
) -> Float[Tensor, "all heads head_width"]:
    """Packed vectors of which each row has its old ones and then its new ones."""
    rows = torch.arange(len(old_lengths), device=old.device)
    row = torch.cat([rows.repeat_interleave(old_lengths), rows.repeat_interleave(new_lengths)])
    return torch.cat([old.to(new.dtype), new])[row.argsort(stable=True)]  # one may be of autocast
