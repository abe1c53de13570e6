"""Kernel mixing by random Fourier features, the third operator of the paper's v1."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers.attend_packed import attend_packed
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Count, Operator, Work
from chiaroscuro.layers.packed_tokens import AttentionContext, PackedTokens, check_attention_context
from chiaroscuro.layers.state import KeptTokens
from chiaroscuro.ops import fourier_features, rbf_mix


@dataclass(frozen=True)
class RBFOptions:
    """Options of rbf.

    Attributes:
        features: R, the number of random frequencies.
        gamma: γ, the kernel's inverse squared length; Ω has variance 2γ.
        rbf_causal: whether a token weighs only itself and those before it. False is the published form, in which a
            language model **reads the future**.
        attention_context: where a layer routes only some tokens here, what they weigh: `"all"` tokens, or the
            `"routed"` ones.

    """

    features: int = 64
    gamma: float = 1.0
    rbf_causal: bool = True
    attention_context: AttentionContext = "all"

    def __post_init__(self) -> None:
        check_attention_context(self.attention_context)
        if isinstance(self.features, bool) or not isinstance(self.features, int) or self.features < 1:
            raise UserError(f"features={self.features!r}: must be a positive whole number")
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float) or not 0 < self.gamma < math.inf:
            raise UserError(f"gamma={self.gamma!r}: must be a positive number")


class RBFMixing(Operator):
    """W_o A φ with A = softmax(φ φᵀ) and φ(x) = [cos(xΩ/√R), sin(xΩ/√R)], Ω ~ N(0, 2γ) drawn once and kept.

    A φ is attention of one head whose queries, keys and values are all φ, with scale 1. So that is how the packed form
    computes it, and its state in the cache is the φ of the tokens so far. Source: the paper, v1.

    Args:
        width: d, the features of a token.
        options: see `RBFOptions`.

    """

    Options = RBFOptions
    cost = 1
    separates_documents = True
    frequencies: Tensor

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.register_buffer("frequencies", torch.empty(width, self.options.features))
        self.reset_parameters()
        self.out_proj = nn.Linear(2 * self.options.features, width)

    def reset_parameters(self) -> None:
        """Draw the frequencies."""
        nn.init.normal_(self.frequencies, std=math.sqrt(2 * self.options.gamma))

    def features_of(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch two_features"]:
        """φ(x)."""
        return fourier_features(x, self.frequencies.to(x.dtype))

    def mix(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """Mix every token with those that it may see; in the `"routed"` context the others are mixed with themselves.

        Raises:
            ValueError: a cache together with routed tokens in the `"routed"` context, which only the packed form has.

        """
        time = x.shape[1]
        features = self.features_of(x)
        if context.state is None:
            mask = context.mask_over(self._weighed(x, time, context), time, self.options.rbf_causal)
            return self.out_proj(rbf_mix(features, mask))
        if context.routed is not None and self.options.attention_context == "routed":
            raise ValueError("a cache in the 'routed' context holds the routed tokens alone: use sparse execution")
        (kept,) = (x.to(features.dtype) for x in context.state.update(features[:, None]))  # see `SelfAttention.mix`
        # Of tokens that came alone, the state may hold those alone that were routed here.
        mask = context.mask_over(self._weighed(x, kept.shape[2], context), time, self.options.rbf_causal)
        return self.out_proj(rbf_mix(kept[:, 0], mask))

    def _weighed(self, x: Tensor, keys: int, context: Context) -> Tensor:
        """Which tokens, cached ones included, are weighed by others."""
        real = context.attention_mask
        if real is None:
            real = x.new_ones((len(x), keys), dtype=torch.bool)
        if context.routed is not None and self.options.attention_context == "routed":
            real = real & context.routed
        return real

    def mix_packed(
        self, x: Float[Tensor, "batch time width"], tokens: PackedTokens, context: Context
    ) -> Float[Tensor, "tokens width"]:
        """Mix some tokens: rows of A for them alone."""
        keyed = tokens.keys(self.options.attention_context, context.real(x.shape[1]))
        query = self.features_of(tokens.take(x))[:, None]
        key = query if keyed is tokens else self.features_of(keyed.take(x))[:, None]
        visible = None if self.options.rbf_causal else keyed.lengths.repeat_interleave(tokens.lengths)
        mixed = attend_packed(query, (key,), tokens, keyed, context, scale=1.0, visible=visible)
        return self.out_proj(mixed.flatten(1))

    def new_cache(self) -> KeptTokens:
        """φ of the tokens so far, as keys and values in one."""
        return KeptTokens()

    @classmethod
    def uncacheable(cls, options: RBFOptions) -> str:
        """The published form reads tokens that have not come yet."""
        return "" if options.rbf_causal else "with rbf_causal=False weighs later tokens too, which a cache has not seen"

    @classmethod
    def count(cls, width: int, options: RBFOptions, work: Work) -> Count:
        """φ of what is mixed and weighed, the scores and the average, and the product with W_o."""
        n, features = work.tokens, options.features
        routed = work.routed and options.attention_context == "routed"
        keys = n if routed else work.length
        past = work.past * (n / work.length if routed else 1.0)
        pairs = work.pairs(keys, past, options.rbf_causal)
        # Ω is fixed, so the backward of its product is one product. Dense execution computes φ once for both.
        mapped = n + keys if work.routed and not routed else n
        return Count(
            {
                "rbf": work.transform * 2 * width * features * mapped
                + work.product * 4 * features * (width * n + 2 * pairs)
            },
            numbers_kept=2 * features * (past + keys),
        )
