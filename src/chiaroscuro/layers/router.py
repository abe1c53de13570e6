"""Routers: which operator gets which token.

A router sees a token's vector and its spectral entropy and answers with a tensor: either the operator's index for
every token (B, T), or a weight for every operator (B, T, K). Most routers are a score per token and thresholds on it
([`ScoreRouter`][]); only the score differs between them, and those with a score of their own have a file of their own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from chiaroscuro.layers.thresholds import QUANTILES, Thresholds
from chiaroscuro.ops import null_entropy_quantiles
from chiaroscuro.ops.spectral import Spectrum


def pick_thresholds(operators: tuple[str, ...], low: float, high: float) -> tuple[float, ...]:
    """The paper's rule for its two thresholds: which of them splits a menu.

    Three operators: both. {dct, attention}: their mean. {dct, rbf} at the low one, {rbf, attention} at the high one.
    Any other pair splits at the mean.

    Raises:
        ValueError: a menu of more than three operators, for which two thresholds don't suffice.

    Source: the paper, v1 and v2, routing.

    """
    if len(operators) > 3:
        raise ValueError(f"two thresholds split at most three operators, the menu has {len(operators)}: {operators}")
    if len(operators) == 3:
        return low, high
    if operators == ("dct", "rbf"):
        return (low,)
    if operators == ("rbf", "attention"):
        return (high,)
    return ((low + high) / 2,)


class ScoreRouter(nn.Module):
    """A score per token against K − 1 thresholds: operator k for a token above k of them.

    A subclass says what the score is, and, where it is not H, how it is distributed before any data were seen. The
    choice has no gradient. A score that is to learn gets one through `scale`.

    Args:
        operators: the menu, in order of cost.
        width: d, the features of a token.
        attention_share: ρ, the share of tokens that running calibration sends to the last operator.
        thresholds: K − 1 fixed ones, instead of calibrated ones.
        spectrum: the spectrum whose null the uncalibrated thresholds are of.

    """

    scores_entropy = True
    """Whether the score is a spectral entropy, so that fixed entropy thresholds mean something to it."""

    def __init__(
        self,
        operators: tuple[str, ...],
        width: int,
        attention_share: float = 0.25,
        thresholds: tuple[float, ...] | None = None,
        spectrum: Spectrum = "orthonormal",
    ) -> None:
        super().__init__()
        # The type is named because a model may be made under a default of bfloat16, which would round the table.
        probabilities = torch.linspace(0, 1, QUANTILES, dtype=torch.float64, device="cpu").tolist()
        null = self.null_quantiles(width, probabilities, spectrum)
        self.calibration = Thresholds(len(operators), null, attention_share, thresholds)

    def null_quantiles(
        self, width: int, probabilities: Sequence[float], spectrum: Spectrum
    ) -> Float[Tensor, " probabilities"]:
        """Quantiles of the score over white noise, at which an uncalibrated layer stands: here those of H."""
        return null_entropy_quantiles(width, probabilities, spectrum)

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time"]:
        """The number that is held against the thresholds.

        A subclass may ask by name for more: `position_ids` and `input_ids`, both (B, T).
        """
        raise NotImplementedError

    def scale(self, score: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"] | None:
        """What the last operator's output is multiplied by: None for nothing, or a function of the score."""
        return None

    def forward(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"]
    ) -> Int[Tensor, "batch time"]:
        """The operator's index for every token."""
        return self.decide(self.score(x, entropy))

    def decide(self, score: Float[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
        """How many thresholds each score lies above."""
        return (score[..., None] > self.calibration.values).sum(-1)


class ThresholdRouter(ScoreRouter):
    """The paper's default: the score is the spectral entropy H itself."""

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time"]:
        """H."""
        return entropy


class SoftRouter(nn.Module):
    """softmax(W [x, H] + b): every operator runs on every token, and the outputs are averaged by these weights.

    So execution is always dense.

    Args:
        operators: the menu.
        width: d, the features of a token.

    """

    one_operator_a_token = False

    def __init__(self, operators: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width + 1, len(operators))

    def forward(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time operators"]:
        """A weight for every operator, summing to 1."""
        return self.proj(torch.cat([x, entropy[..., None].to(x.dtype)], dim=-1)).softmax(-1)


class HardRouter(SoftRouter):
    """The argmax of the soft router's weights, with its gradient passed straight through.

    In training the weights are one-hot in the forward and soft in the backward (which therefore needs every
    operator's output, so execution is dense); in inference the index alone remains. Straight-through: arXiv 1308.3432.
    """

    one_operator_a_token = True

    def forward(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time operators"] | Int[Tensor, "batch time"]:
        """One-hot weights in training, the index of the operator in inference."""
        soft = super().forward(x, entropy)
        choice = soft.argmax(-1)
        if not self.training:
            return choice
        # The difference is exactly 0, so the weights are exactly 0 and 1 in any precision.
        return F.one_hot(choice, soft.shape[-1]).to(soft.dtype) + (soft - soft.detach())
