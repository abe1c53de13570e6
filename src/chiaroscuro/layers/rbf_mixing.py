"""Kernel mixing by random Fourier features, the third operator of the paper's v1."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chiaroscuro.ops import causal_mask, fourier_features, rbf_mix


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

    """

    cost = 1
    cacheable = False
    frequencies: Tensor

    def __init__(self, width: int, features: int = 64, gamma: float = 1.0, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.gamma = gamma
        self.register_buffer("frequencies", torch.empty(width, features))
        self.reset_parameters()
        self.out_proj = nn.Linear(2 * features, width)

    def reset_parameters(self) -> None:
        """Draw the frequencies."""
        nn.init.normal_(self.frequencies, std=math.sqrt(2 * self.gamma))

    def forward(
        self, x: Float[Tensor, "batch time width"], attention_mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time width"]:
        """Mix every token with those that it may see; `attention_mask` is true for real tokens."""
        batch, time, _ = x.shape
        real = x.new_ones(batch, time, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        mask = causal_mask(real, time)
        if not self.causal:
            mask = mask | real[:, None, None, :]
        return self.out_proj(rbf_mix(fourier_features(x, self.frequencies.to(x.dtype)), mask))
