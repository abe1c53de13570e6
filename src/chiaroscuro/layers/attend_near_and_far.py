"""Attention from a layer's packed tokens to what is near, and from some of them to what is kept far away."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.layers.reach_state import Entries, ReachState
from chiaroscuro.ops.attention import AttentionImplementation, attend_to_all
from chiaroscuro.ops.reach_attention import gains_of_pairs, reach_attention, reach_attention_by_rows, reach_mask

FEW = 6
"""The rows that look by themselves in a batch that decodes are one in so many, or fewer: their caches are copied, which
costs more than to read as many."""


def attend_near_and_far(
    query: Float[Tensor, "queries heads head_width"],
    key: Float[Tensor, "keys key_heads head_width"],
    value: Float[Tensor, "keys key_heads head_width"],
    tokens: PackedTokens,
    keyed: PackedTokens,
    looks: Bool[Tensor, "batch time *look_heads"],
    kept: Bool[Tensor, "batch time *key_heads"],
    context: Context,
    window: int,
    sinks: int,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Float[Tensor, "queries heads head_width"]:
    """`reach_attention` of the tokens of a batch, cached ones included.

    Args:
        query: of the tokens that attend.
        key: of those that are attended to. They are put into `context.state`, where there is one.
        value: likewise.
        tokens: which tokens attend.
        keyed: which are attended to, those that attend among them.
        looks: which tokens look beyond the window, with all of their heads or with the queries of each key-value head.
        kept: which are seen from beyond it, for all key-value heads or for each.
        context: the layer's; its state is a `ReachState`.
        window: w.
        sinks: s.
        dropout: on the attention weights.
        softcap: as of `reach_attention`.

    """
    state: ReachState | None = context.state
    heads = key.shape[1] if looks.ndim == 3 or kept.ndim == 3 else 1
    if state is not None and state.begun and state.rows != heads * len(looks):
        raise UserError(f"the cache holds {state.rows // heads} rows, the input has {len(looks)}: the two must match")
    looking, keeping = _by_head(tokens.take(looks), heads), _by_head(keyed.take(kept), heads)
    everything = PackedTokens.real_of(tokens.chosen, context.real(tokens.chosen.shape[1]), tokens.segments)
    lengths, key_lengths = tokens.lengths, keyed.lengths
    places, key_places = (part.ordinals(everything) - 1 for part in (tokens, keyed))
    if heads > 1:  # each key-value head, with its group of queries, is a row of its own
        order, key_order = _by_row_and_head(lengths, heads), _by_row_and_head(key_lengths, heads)
        query = query.unflatten(1, (heads, -1)).flatten(0, 1)[order]
        key, value = (x.flatten(0, 1)[key_order, None] for x in (key, value))
        places, looking = places.repeat_interleave(heads)[order], looking[order]
        key_places, keeping = key_places.repeat_interleave(heads)[key_order], keeping[key_order]
        lengths, key_lengths = lengths.repeat_interleave(heads), key_lengths.repeat_interleave(heads)
    if state is not None:
        row = torch.arange(len(lengths), device=query.device)
        earlier = state.seen if state.begun else torch.zeros_like(lengths)
        places = places + earlier.repeat_interleave(lengths)
        key_places = key_places + earlier.repeat_interleave(key_lengths)
        new = Entries(key, value, row.repeat_interleave(key_lengths), key_places, keeping)
        idle = len(query) == 0 and not torch.is_grad_enabled()
        held = state.entries().then(new) if state.begun and not idle else new
        state.extend(new, everything.chosen.repeat_interleave(heads, 0), heads)
        if idle:
            return query if heads == 1 else query.unflatten(0, (-1, heads)).flatten(1, 2)
        key, value, key_places, keeping = held.key, held.value, held.place, held.kept
        key_lengths = torch.bincount(held.row, minlength=len(lengths))
    attention = reach_attention if context.implementation == "sdpa" else reach_attention_by_rows
    mixed = attention(
        query, key, value, lengths, key_lengths, places, key_places, looking, keeping, window, sinks, dropout, softcap
    )
    if heads > 1:
        mixed = torch.empty_like(mixed).index_copy(0, order, mixed).unflatten(0, (-1, heads)).flatten(1, 2)
    return mixed


def attend_from_newest(
    query: Float[Tensor, "batch heads head_width"],
    key: Float[Tensor, "batch key_heads head_width"],
    value: Float[Tensor, "batch key_heads head_width"],
    looks: Bool[Tensor, "batch *look_heads"],
    kept: Bool[Tensor, "batch *key_heads"],
    state: ReachState,
    implementation: AttentionImplementation = "sdpa",
    softcap: float | None = None,
) -> Float[Tensor, "batch heads head_width"]:
    """What one new token of each row sees: the window and the sinks, or all that the row keeps.

    Args:
        query: of the new tokens.
        key: of them, put into the state.
        value: likewise.
        looks: which of them look beyond the window, with all of their heads or with the queries of each key-value head.
        kept: which are to be seen from beyond it, for all key-value heads or for each.
        state: of rows that are equally long.
        implementation: of attention.
        softcap: as of `reach_attention`.

    """
    heads = state.heads
    key, value = (x.reshape(state.rows, -1, key.shape[-1]) for x in (key, value))
    state.extend_by_one(key, value, _by_head(kept, heads))
    looks = _by_head(looks, heads)
    folded = query.reshape(state.rows, key.shape[1], -1, query.shape[-1])
    mixed = [
        _attend_from_head(folded[i::heads], looks[i::heads], state, i, implementation, softcap) for i in range(heads)
    ]
    return (mixed[0] if heads == 1 else torch.stack(mixed, 1)).reshape(query.shape)


def _attend_from_head(
    query: Float[Tensor, "batch heads group head_width"],
    looks: Bool[Tensor, " batch"],
    state: ReachState,
    head: int,
    implementation: AttentionImplementation,
    softcap: float | None,
) -> Float[Tensor, "batch heads group head_width"]:
    """Of the rows of one head of those that choose for themselves."""
    vectors, near, (most, slots) = state.vectors[head], state.near, state.far_and_near(head)
    looking = len(looks) if most == near else sum(looks.tolist())
    if looking == len(looks):
        return _attend_to_slots(query, vectors, most, slots, implementation, softcap)
    if FEW * looking > len(looks):  # one attention for all, in which a mask leaves the others what is near
        seen = torch.where(looks, most if slots is None else slots, near)
        return _attend_to_slots(query, vectors, most, seen, implementation, softcap)
    mixed = _attend_to_slots(query, vectors, near, None, implementation, softcap)
    if looking:
        rows = looks.nonzero()[:, 0]
        # Whole rows, which are copied faster than parts of them.
        vectors, slots = vectors.index_select(1, rows), None if slots is None else slots[rows]
        mixed[rows] = _attend_to_slots(query[rows], vectors, most, slots, implementation, softcap)
    return mixed


@torch.no_grad()
def gains_from_far(
    query: Float[Tensor, "batch heads time head_width"],
    key: Float[Tensor, "batch key_heads time head_width"],
    value: Float[Tensor, "batch key_heads time head_width"],
    slope: Float[Tensor, "batch heads time head_width"],
    context: Context,
    window: int,
    sinks: int,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch time key_heads"], Float[Tensor, "batch time key_heads"]]:
    """What the loss loses by each token that looks, and by each that is kept: `gains_of_pairs` of every row.

    0 where there is nothing beyond the window, or nobody who could see the token, and at padding.

    Args:
        query: of all tokens, rotated.
        key: likewise.
        value: likewise.
        slope: ∂L/∂o of the heads' outputs where nothing far is seen.
        context: which tokens are real, and of which document; without a cache.
        window: w.
        sinks: s.
        softcap: as of `reach_attention`.

    """
    tokens = query.transpose(1, 2)
    everything = PackedTokens.all_of(tokens, context.segments)
    real = PackedTokens.real_of(tokens, context.real(tokens.shape[1]), context.segments)
    places = everything.ordinals(real).view(tokens.shape[:2]) - 1
    look, kept = [], []
    for row in range(len(query)):  # queries × keys are held for one row at a time
        i, chosen, nobody = places[row], real.chosen[row], torch.zeros_like(real.chosen[row])
        seen = chosen & chosen[:, None] & (i <= i[:, None])
        if context.segments is not None:
            seen = seen & (context.segments[row, :, None] == context.segments[row])
        near = seen & reach_mask(i, i, nobody, nobody, window, sinks)
        gains = gains_of_pairs(query[row], key[row], value[row], slope[row], near, seen & ~near, softcap)
        look.append(gains[0].T)
        kept.append(gains[1].T)
    return torch.stack(look), torch.stack(kept)


def _attend_to_slots(
    query: Float[Tensor, "rows heads group head_width"],
    vectors: Float[Tensor, "2 rows heads slots head_width"],
    most: int,
    slots: Int[Tensor, " rows"] | None,
    implementation: AttentionImplementation,
    softcap: float | None,
) -> Float[Tensor, "rows heads group head_width"]:
    """Attention to the first slots: `most` of them, or as many as `slots` says of each row."""
    key, value = vectors[:, :, :, :most].to(query.dtype)  # a cache may be filled under autocast, and used outside
    mask = None if slots is None else (torch.arange(most, device=query.device) < slots[:, None])[:, None, None]
    return attend_to_all(query, key, value, mask, implementation=implementation, softcap=softcap)


def _by_head(decided: Bool[Tensor, "tokens *heads"], heads: int) -> Bool[Tensor, " tokens_and_heads"]:
    """Decisions of all heads or of each, as those of each."""
    return decided.flatten() if decided.ndim == 2 else decided.repeat_interleave(heads) if heads > 1 else decided


def _by_row_and_head(lengths: Int[Tensor, " rows"], heads: int) -> Int[Tensor, " tokens_and_heads"]:
    """The order in which tokens × heads stand row by row and, in each row, head by head."""
    row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    head = torch.arange(heads, device=lengths.device)
    return (row[:, None] * heads + head).flatten().argsort(stable=True)
