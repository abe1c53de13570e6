"""The full operator: multi-head causal self-attention with rotary positions."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chiaroscuro.ops.attention import AttentionImplementation, attend, causal_mask, rotary_table, rotate


@runtime_checkable
class KeyValueStore(Protocol):
    """What attention needs of a cache: take this step's keys and values, give all of them since the beginning."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]: ...  # noqa: D102


class SelfAttention(nn.Module):
    """softmax(q kᵀ / √c) v over h heads of width c = d / h, causal, with rotary positions on q and k.

    Args:
        width: d, the features of a token.
        heads: h; must divide d into heads of even width.
        dropout: on the attention probabilities, in training.
        rope_theta: the base of the rotary angles.

    Raises:
        ValueError: the heads don't divide the width, or into an odd one.

    Source: arXiv 1706.03762; RoPE arXiv 2104.09864, rotate-half convention.

    """

    cost = 2
    cacheable = True

    def __init__(self, width: int, heads: int, dropout: float = 0.0, rope_theta: float = 10000.0) -> None:
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} does not divide into {heads} heads of even width")
        self.heads = heads
        self.dropout = dropout
        self.rope_theta = rope_theta
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
    ) -> Float[Tensor, "batch time width"]:
        """Attend from every token.

        Args:
            x: the tokens; with a cache, those that came new.
            attention_mask: true for real tokens, over the cached ones too.
            position_ids: each token's position; counted from 0 where not given.
            mask: `causal_mask` of the attention mask, where the caller has it for all layers.
            rotary: `rotary_table` of the positions, likewise.
            cache: keys and values of earlier tokens, which takes up these.
            implementation: `"sdpa"` or `"eager"`.

        """
        if rotary is None:
            if position_ids is None:
                position_ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            rotary = rotary_table(position_ids, x.shape[-1] // self.heads, self.rope_theta)
        if mask is None and attention_mask is not None:
            mask = causal_mask(attention_mask.bool(), x.shape[1])
        query = rotate(self._split(self.q_proj(x)), rotary)
        key = rotate(self._split(self.k_proj(x)), rotary)
        value = self._split(self.v_proj(x))
        if cache is not None:
            key, value = cache.update(key, value)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, mask, dropout, implementation)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
