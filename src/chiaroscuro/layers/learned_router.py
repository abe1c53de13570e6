"""A score that is learned: Mixture-of-Depths, made causal."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro.layers.router import ScoreRouter
from chiaroscuro.ops.spectral import Spectrum


class LearnedRouter(ScoreRouter):
    """s = w·x + b, and the last operator's output is scaled by σ(s).

    Mixture-of-Depths picks the tokens with the largest s of a sequence, which looks at later ones; here a token is
    picked if s is above the running quantile that every score of ours is held against. The gradient reaches w through
    σ(s) of the picked tokens alone, so training runs sparse. With ρ = 1 nothing is routed and the scale remains.

    Args:
        operators: the menu, in order of cost.
        width: d, the features of a token.
        attention_share: ρ, the share of tokens for the last operator.
        thresholds: K − 1 fixed ones, instead of calibrated ones.

    Source: arXiv 2404.02258, without its expert choice over the sequence.

    """

    scores_entropy = False

    def __init__(
        self,
        operators: tuple[str, ...],
        width: int,
        attention_share: float = 0.25,
        thresholds: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(operators, width, attention_share, thresholds)
        self.proj = nn.Linear(width, 1)

    def null_quantiles(
        self, width: int, probabilities: Sequence[float], spectrum: Spectrum
    ) -> Float[Tensor, " probabilities"]:
        """Those of N(0, 0.02² d): w as the models draw it, against a layer-normed token."""
        # The ends of the table are finite, as those of a table of data are.
        inner = torch.tensor(probabilities, dtype=torch.float64, device="cpu").clamp(1e-4, 1 - 1e-4)
        return (0.02 * math.sqrt(width) * torch.special.ndtri(inner)).float()

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time"]:
        """s, with its gradient."""
        return self.proj(x).squeeze(-1).float()

    def scale(self, score: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
        """σ(s)."""
        return score.sigmoid()
