"""H of shuffled features: if it routes as well as H, the order of the feature axis carries nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Work
from chiaroscuro.layers.router import ScoreRouter, SeededOptions
from chiaroscuro.layers.spectral_mixing import transform_operations
from chiaroscuro.ops import spectral_entropy


class PermutedRouter(ScoreRouter):
    """H(P x), P one permutation of the d features, drawn once from the seed and the same in every layer.

    White noise stays white noise, so the null and an uncalibrated layer's thresholds are those of H.
    """

    Options = SeededOptions
    permutation: Tensor

    def __init__(self, width: int, operators: Sequence[str], layer: int = 0, **options: Any) -> None:
        super().__init__(width, operators, layer, **options)
        self.register_buffer("permutation", torch.empty(width, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the permutation: the seed's, whatever was drawn before."""
        generator = torch.Generator("cpu").manual_seed(self.options.router_seed)
        self.permutation.copy_(torch.randperm(len(self.permutation), generator=generator, device="cpu"))

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"], context: Context
    ) -> Float[Tensor, "batch time"]:
        """H of the permuted features."""
        return spectral_entropy(x.detach()[..., self.permutation], self.options.spectrum).float()

    @classmethod
    def count(cls, width: int, operators: int, options: Any, work: Work) -> int | float:
        """A transform of its own, without a gradient."""
        return transform_operations(width, work.length * work.rows)
