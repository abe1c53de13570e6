"""The position-wise feed-forward sub-layer that all operators of a layer share."""

from jaxtyping import Float
from torch import Tensor, nn


class FeedForward(nn.Sequential):
    """W₂ GELU(W₁ x + b₁) + b₂, d → m → d, dropout after the GELU.

    Args:
        width: d.
        hidden: m, 4d in the paper.
        dropout: in training.

    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply it to every token alone."""
        return super().forward(x)
