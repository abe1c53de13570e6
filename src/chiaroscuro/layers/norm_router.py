"""A token's size as its score: what a fitted score has to beat without any fit."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Work
from chiaroscuro.layers.router import ScoreRouter
from chiaroscuro.layers.thresholds import normal_quantiles


class NormRouter(ScoreRouter):
    """‖x‖ of the layer's own input, which no norm has made alike yet; used alone, of what the router is given."""

    scores_entropy = False
    reads_entropy = False

    def null_quantiles(self, probabilities: Sequence[float]) -> Float[Tensor, " probabilities"]:
        """Those of the χ distribution with d degrees of freedom, by Fisher's √(d − ½) + z / √2."""
        return (math.sqrt(self.width - 0.5) + normal_quantiles(probabilities) / math.sqrt(2)).float()

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"], context: Context
    ) -> Float[Tensor, "batch time"]:
        """‖x‖."""
        given = x if context.layer_input is None else context.layer_input
        return given.detach().float().norm(dim=-1)

    @classmethod
    def count(cls, width: int, operators: int, options: Any, work: Work) -> int | float:
        """A product with itself, without a gradient."""
        return 2 * width
