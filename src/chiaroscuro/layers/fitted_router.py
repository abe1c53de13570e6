"""A score that is fitted on a trained model afterwards, by `chiaroscuro.fit`: linear, or of two layers."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.exact_buffers import ExactBuffers
from chiaroscuro.layers.operator import Work
from chiaroscuro.layers.router import Decision, HeadOptions, ScoreRouter
from chiaroscuro.layers.thresholds import normal_quantiles

UNFITTED = "a score of router 'fitted' was not fitted yet, and is the same for every token"


LARGEST_HIDDEN = 2**16
"""Many times the width of any model: what is larger is a slip, and would not fit into memory."""


@dataclass(frozen=True)
class FittedOptions(HeadOptions):
    """Options of a fitted score: `heads`, and `hidden`, the width of the layer in between; None for a linear score."""

    hidden: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None and (
            isinstance(self.hidden, bool) or not isinstance(self.hidden, int) or not 1 <= self.hidden <= LARGEST_HIDDEN
        ):
            raise UserError(
                f"hidden={self.hidden!r}: must be a whole number from 1 to {LARGEST_HIDDEN:,}, or left out for a "
                "linear score"
            )


class FittedScore(ExactBuffers):
    """w·x + b, or w·gelu(U x + c) + b, for one head or several, in float32.

    Its weights are buffers: they are saved with the model, and no optimizer trains them. They are 0 until
    `set_weights`.

    Args:
        width: d, the features of a token.
        heads: scores for each token.
        hidden: rows of U; None for a linear score.

    """

    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None

    def __init__(self, width: int, heads: int = 1, hidden: int | None = None) -> None:
        super().__init__()
        last = width if hidden is None else hidden
        # The type is named because a model may be made under a default of bfloat16.
        self.register_buffer("weight", torch.zeros(heads, last, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(heads, dtype=torch.float32))
        self.register_buffer("hidden_weight", None if hidden is None else torch.zeros(hidden, width).float())
        self.register_buffer("hidden_bias", None if hidden is None else torch.zeros(hidden).float())

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch heads"]:
        """The scores."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().to(self.weight.dtype)
            if self.hidden_weight is not None:
                x = F.gelu(F.linear(x, self.hidden_weight, self.hidden_bias))
            return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def set_weights(
        self,
        weight: Float[Tensor, "heads last"],
        bias: Float[Tensor, " heads"],
        hidden_weight: Float[Tensor, "hidden width"] | None = None,
        hidden_bias: Float[Tensor, " hidden"] | None = None,
    ) -> None:
        """Set w and b, and in a score of two layers U and c."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        if self.hidden_weight is not None and self.hidden_bias is not None:
            assert hidden_weight is not None and hidden_bias is not None
            self.hidden_weight.copy_(hidden_weight)
            self.hidden_bias.copy_(hidden_bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All to 0: not fitted."""
        for buffer in self.buffers():
            buffer.zero_()


class FittedRouter(ScoreRouter):
    """A score of the operators' input that `chiaroscuro.fit` sets, on a model that was trained without it.

    Source: arXiv 2603.02227, by which a router that is trained with its model learns little.
    """

    Options = FittedOptions
    scores_entropy = False
    reads_entropy = False

    def __init__(self, width: int, operators: Sequence[str], layer: int = 0, **options: object) -> None:
        super().__init__(width, operators, layer, **options)
        self.fitted = FittedScore(width, self.options.heads, self.options.hidden)
        self._known_to_be_fitted = False

    def null_quantiles(self, probabilities: Sequence[float]) -> Float[Tensor, " probabilities"]:
        """Those of N(0, 1): the score of white noise and a w of length 1."""
        return normal_quantiles(probabilities).float()

    def reset_parameters(self) -> None:
        """Forget the fit."""
        self.fitted.reset_parameters()
        self._known_to_be_fitted = False

    def unready(self) -> str:
        """That it was not fitted, and what to do."""
        if bool(self.fitted.weight.any()):
            return ""
        return f"{UNFITTED}: run chiaroscuro fit, or chiaroscuro.fit(model, …)"

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"], context: Context
    ) -> Float[Tensor, "batch time *heads"]:
        """The score that was fitted."""
        score = self.fitted(x)
        return score.squeeze(-1) if self.options.heads == 1 else score

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        entropy: Float[Tensor, "batch time"],
        context: Context | None = None,
    ) -> Decision:
        """Score and route; a warning where that goes by a score that was never fitted."""
        if not self._known_to_be_fitted and not torch.compiler.is_compiling():
            self._known_to_be_fitted = not (reason := self.unready())
            # With a share of 0 or 1 no score is asked.
            if reason and bool(self.calibration.values.isfinite().any()):
                warnings.warn(reason, stacklevel=2)
        return super().forward(x, entropy, context)

    @classmethod
    def count(cls, width: int, operators: int, options: Any, work: Work) -> int | float:
        """The products with U, if there is one, and w, without a gradient."""
        last = width if options.hidden is None else options.hidden
        return 2 * (last * options.heads + (0 if options.hidden is None else width * options.hidden))
