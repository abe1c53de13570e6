"""Kernel mixing by random Fourier features, the third operator of the paper's v1."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chiaroscuro.layers.packed_tokens import AttentionContext, PackedTokens, check_attention_context
from chiaroscuro.ops import causal_mask, fourier_features, prefix_attention, rbf_mix


class RBFMixing(nn.Module):
    """W_o A φ with A = softmax(φ φᵀ) and φ(x) = [cos(xΩ/√R), sin(xΩ/√R)], Ω ~ N(0, 2γ) drawn once and kept.

    Causal unless told otherwise. As published it has no mask: with `causal=False` a language model **reads the
    future**, which is of use only to show that it does. A layer that has it can't be cached: every token weighs
    all tokens before it by their features, which no key-value cache keeps. Source: the paper, v1.

    Args:
        width: d, the features of a token.
        features: R, the number of random frequencies.
        gamma: γ, the kernel's inverse squared length; Ω has variance 2γ.
        causal: whether a token weighs only itself and those before it.
        attention_context: where only some tokens are routed here, what they weigh: `"all"` tokens, or the `"routed"`.

    Raises:
        ValueError: an unknown context.

    """

    cost = 1
    cacheable = False
    frequencies: Tensor

    def __init__(
        self,
        width: int,
        features: int = 64,
        gamma: float = 1.0,
        causal: bool = True,
        attention_context: AttentionContext = "all",
    ) -> None:
        super().__init__()
        check_attention_context(attention_context)
        self.attention_context = attention_context
        self.causal = causal
        self.gamma = gamma
        self.register_buffer("frequencies", torch.empty(width, features))
        self.reset_parameters()
        self.out_proj = nn.Linear(2 * features, width)

    def reset_parameters(self) -> None:
        """Draw the frequencies."""
        nn.init.normal_(self.frequencies, std=math.sqrt(2 * self.gamma))

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
        routed: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Mix every token with those that it may see: the dense form.

        Args:
            x: the tokens.
            attention_mask: true for real ones.
            routed: those whose output will be used; in the `"routed"` context the others are weighed by themselves
                alone.

        """
        weighed = x.new_ones(x.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if routed is not None and self.attention_context == "routed":
            weighed = weighed & routed
        mask = causal_mask(weighed, x.shape[1])
        if not self.causal:
            mask = mask | weighed[:, None, None, :]
        return self.out_proj(rbf_mix(self._features(x), mask))

    def sparse_forward(
        self,
        x: Float[Tensor, "batch time width"],
        tokens: PackedTokens,
        attention_mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "tokens width"]:
        """Mix some tokens: rows of A for them alone, in exact arithmetic those of `forward`.

        A is softmax(φ φᵀ) and mixes φ itself: attention of one head whose queries, keys and values are all φ.
        """
        keyed = tokens.keys(self.attention_context, attention_mask)
        query = self._features(tokens.take(x))[:, None]
        key = query if keyed is tokens else self._features(keyed.take(x))[:, None]
        visible = tokens.ordinals(keyed) if self.causal else keyed.lengths.repeat_interleave(tokens.lengths)
        mixed = prefix_attention(query, key, key, tokens.lengths, keyed.lengths, visible, scale=1.0)
        return self.out_proj(mixed.flatten(1))

    def _features(self, x: Tensor) -> Tensor:
        return fourier_features(x, self.frequencies.to(x.dtype))
