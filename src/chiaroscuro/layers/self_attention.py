"""The full operator: multi-head causal self-attention with rotary positions."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chiaroscuro.layers.packed_tokens import AttentionContext, PackedTokens, check_attention_context
from chiaroscuro.ops.attention import AttentionImplementation, attend, causal_mask, rotary_table, rotate
from chiaroscuro.ops.packed_attention import prefix_attention, prefix_attention_by_rows


@runtime_checkable
class KeyValueStore(Protocol):
    """What attention from every token needs of a cache: take new keys and values, give all since the beginning."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]: ...  # noqa: D102


@runtime_checkable
class PackedKeyValueStore(Protocol):
    """What attention from some tokens needs of a cache: rows that each take their own, and give all they have."""

    @property
    def empty(self) -> bool: ...  # noqa: D102
    def extend(self, key: Tensor, value: Tensor, chosen: Tensor) -> None: ...  # noqa: D102
    def rows(self) -> Iterable[tuple[Tensor, Tensor]]: ...  # noqa: D102


class SelfAttention(nn.Module):
    """softmax(q kᵀ / √c) v over h heads of width c = d / h, causal, with rotary positions on q and k.

    Args:
        width: d, the features of a token.
        heads: h; must divide d into heads of even width.
        dropout: on the attention probabilities, in training.
        rope_theta: the base of the rotary angles.
        attention_context: where only some tokens are routed here, what they attend to: `"all"` tokens up to their own
            (the paper), or only the `"routed"` ones among these.

    Raises:
        ValueError: the heads don't divide the width, or into an odd one; an unknown context.

    Source: arXiv 1706.03762; RoPE arXiv 2104.09864, rotate-half convention.

    """

    cost = 2
    cacheable = True

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        rope_theta: float = 10000.0,
        attention_context: AttentionContext = "all",
    ) -> None:
        super().__init__()
        check_attention_context(attention_context)
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} does not divide into {heads} heads of even width")
        self.heads = heads
        self.dropout = dropout
        self.rope_theta = rope_theta
        self.attention_context = attention_context
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch keys"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        mask: Bool[Tensor, "batch 1 time keys"] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueStore | None = None,
        implementation: AttentionImplementation = "sdpa",
        routed: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Attend from every token: the dense form.

        Args:
            x: the tokens; with a cache, those that came new.
            attention_mask: true for real tokens, over the cached ones too.
            position_ids: each token's position; counted from 0 where not given.
            mask: `causal_mask` of the attention mask, where the caller has it for all layers.
            rotary: `rotary_table` of the positions, likewise.
            cache: keys and values of earlier tokens, which takes up these.
            implementation: `"sdpa"` or `"eager"`.
            routed: which tokens' output will be used; in the `"routed"` context the others are not attended to, but
                by themselves.

        Raises:
            ValueError: a cache with `routed` tokens in the `"routed"` context, which only `sparse_forward` can serve.

        """
        rotary = self._angles(x, position_ids, rotary)
        if mask is None and attention_mask is not None:
            mask = causal_mask(attention_mask.bool(), x.shape[1])
        if routed is not None and self.attention_context == "routed":
            if cache is not None:
                raise ValueError("a cache in the 'routed' context holds the routed tokens alone: use sparse execution")
            mask = causal_mask(routed if attention_mask is None else routed & attention_mask, x.shape[1])
        query = rotate(self._split(self.q_proj(x)), rotary)
        key = rotate(self._split(self.k_proj(x)), rotary)
        value = self._split(self.v_proj(x))
        if cache is not None:
            key, value = cache.update(key, value)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, mask, dropout, implementation)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def sparse_forward(
        self,
        x: Float[Tensor, "batch time width"],
        tokens: PackedTokens,
        attention_mask: Bool[Tensor, "batch keys"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: PackedKeyValueStore | None = None,
        implementation: AttentionImplementation = "sdpa",
    ) -> Float[Tensor, "tokens width"]:
        """Attend from some tokens: queries, output and rows of scores for them alone.

        Args:
            x: all tokens; with a cache, those that came new.
            tokens: those that attend, real ones.
            attention_mask: as in `forward`, as all that is not named here.
            position_ids: see there.
            rotary: see there.
            cache: keys and values of earlier tokens; takes up these: all, or the routed ones.
            implementation: `"sdpa"` for the fast kernels, `"eager"` for the formula row by row.

        Returns:
            The tokens' outputs, packed. In exact arithmetic they are `forward`'s.

        """
        keyed = tokens.keys(self.attention_context, attention_mask)
        if len(keyed) == 0 and not torch.is_grad_enabled():
            if cache is not None:
                empty = x.new_empty(0, self.heads, x.shape[-1] // self.heads)
                cache.extend(empty, empty, keyed.chosen)
            return x.new_empty(0, x.shape[-1])
        cos, sin = self._angles(x, position_ids, rotary)
        queries = tokens.take(x)
        context = queries if keyed is tokens else keyed.take(x)
        query = rotate(self._heads(self.q_proj(queries)), (tokens.take(cos), tokens.take(sin)))
        key = rotate(self._heads(self.k_proj(context)), (keyed.take(cos), keyed.take(sin)))
        value = self._heads(self.v_proj(context))
        attention = prefix_attention if implementation == "sdpa" else prefix_attention_by_rows
        dropout = self.dropout if self.training else 0.0
        visible = tokens.ordinals(keyed)
        if cache is None or cache.empty:
            mixed = attention(query, key, value, tokens.lengths, keyed.lengths, visible, dropout)
            if cache is not None:
                cache.extend(key, value, keyed.chosen)
            return self.out_proj(mixed.flatten(1))
        cache.extend(key, value, keyed.chosen)
        counts, new = tokens.lengths.tolist(), keyed.lengths.tolist()
        outputs = [query[:0]]
        rows = zip(query.split(counts), visible.split(counts), cache.rows(), new, strict=True)
        for q, seen, (k, v), m in rows:
            if len(q) == m == 1:  # the last of its row: it sees all
                outputs.append(
                    attend(q.transpose(0, 1)[None], k[None], v[None], None, dropout, implementation)[0, :, 0][None]
                )
            elif len(q):
                sizes = torch.tensor([[len(q)], [k.shape[1]]], device=x.device)
                seen = seen + k.shape[1] - m
                outputs.append(attention(q, k.transpose(0, 1), v.transpose(0, 1), sizes[0], sizes[1], seen, dropout))
        return self.out_proj(torch.cat(outputs).flatten(1))

    def _angles(
        self, x: Tensor, position_ids: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if rotary is not None:
            return rotary
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return rotary_table(position_ids, x.shape[-1] // self.heads, self.rope_theta)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
