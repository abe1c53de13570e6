"""Routers that weigh every operator: the paper's soft router, and its hard one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Work
from chiaroscuro.layers.router import Decision, Router


class SoftRouter(Router):
    """softmax(W [x, H] + b): every operator runs on every token, and the outputs are averaged by these weights.

    So execution is always dense. Source: the paper, v1, soft routing.
    """

    one_operator_per_token = False
    differentiates_entropy = True

    def __init__(self, width: int, operators: Sequence[str], layer: int = 0, **options: Any) -> None:
        super().__init__(width, operators, layer, **options)
        self.proj = nn.Linear(width + 1, len(operators))

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        entropy: Float[Tensor, "batch time"],
        context: Context | None = None,
    ) -> Decision:
        """A weight for every operator, summing to 1."""
        weights = self.weights(x, entropy)
        return Decision(weights.argmax(-1), weights=weights)

    def weights(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time operators"]:
        """The softmax."""
        return self.proj(torch.cat([x, entropy[..., None].to(x.dtype)], dim=-1)).softmax(-1)

    @classmethod
    def count(cls, width: int, operators: int, options: Any, work: Work) -> int | float:
        """The product with W."""
        return work.product * 2 * (width + 1) * operators


class HardRouter(SoftRouter):
    """The argmax of the soft router's weights, with a straight-through gradient.

    In training the weights are one-hot in the forward and soft in the backward (which therefore needs every operator's
    output, so execution is dense); in inference only the index remains. Straight-through: arXiv 1308.3432.
    """

    one_operator_per_token = True
    trains_densely = True

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        entropy: Float[Tensor, "batch time"],
        context: Context | None = None,
    ) -> Decision:
        """One-hot weights in training, the index of the operator in inference."""
        soft = self.weights(x, entropy)
        choice = soft.argmax(-1)
        if not self.training:
            return Decision(choice)
        # The difference is exactly 0, so the weights are exactly 0 and 1 in any precision.
        return Decision(choice, weights=F.one_hot(choice, soft.shape[-1]).to(soft.dtype) + (soft - soft.detach()))
