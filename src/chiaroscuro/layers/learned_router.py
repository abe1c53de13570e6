"""A score that is learned: Mixture-of-Depths, made causal."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Work
from chiaroscuro.layers.router import HeadOptions, ScoreRouter
from chiaroscuro.layers.thresholds import normal_quantiles


class WideLinear(nn.Linear):
    """A linear layer in float32 or wider, under autocast too, where many tokens would else have the same score."""

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens features"]:
        """X Wᵀ + b."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))


class LearnedRouter(ScoreRouter):
    """s = w·x + b, and the last operator's output is scaled by σ(s); on the key side, a token's values are.

    Mixture-of-Depths picks the tokens with the largest s of a sequence, which looks at later tokens. Here a token is
    picked if its s is above the running quantile that all our scores are compared with. The gradient reaches w through
    σ(s) of the picked tokens alone, so training runs sparsely. With ρ = 1 nothing is routed and the scale remains.

    Source: arXiv 2404.02258, without its expert choice over the sequence.
    """

    Options = HeadOptions
    scores_entropy = False
    reads_entropy = False

    def __init__(self, width: int, operators: Sequence[str], layer: int = 0, **options: Any) -> None:
        super().__init__(width, operators, layer, **options)
        self.proj = WideLinear(width, self.options.heads)

    def null_quantiles(self, probabilities: Sequence[float]) -> Float[Tensor, " probabilities"]:
        """Those of N(0, 0.02² d): w as the models draw it, against a layer-normed token."""
        return (0.02 * math.sqrt(self.width) * normal_quantiles(probabilities)).float()

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"], context: Context
    ) -> Float[Tensor, "batch time *heads"]:
        """S, with its gradient."""
        score = self.proj(x).float()
        return score.squeeze(-1) if self.options.heads == 1 else score

    def scale(self, score: Float[Tensor, "batch time *heads"]) -> Float[Tensor, "batch time *heads"]:
        """σ(s)."""
        return score.sigmoid()

    @classmethod
    def count(cls, width: int, operators: int, options: Any, work: Work) -> int | float:
        """The product with w."""
        return work.product * 2 * width * options.heads
