"""The position-wise feed-forward sub-layers; a layer has one, which all its operators share."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

FeedForwardKind = Literal["gelu", "swiglu"]


class FeedForward(nn.Sequential):
    """W₂ GELU(W₁ x + b₁) + b₂, d → m → d, dropout after the GELU: the paper's.

    Args:
        width: d.
        hidden: m, 4d unless given.
        dropout: in training.
        bias: whether there are b₁ and b₂.

    """

    matrices = 2

    def __init__(self, width: int, hidden: int | None = None, dropout: float = 0.0, bias: bool = True) -> None:
        hidden = hidden or self.default_hidden(width)
        super().__init__(nn.Linear(width, hidden, bias), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width, bias))

    @staticmethod
    def default_hidden(width: int) -> int:
        """4d."""
        return 4 * width

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply it to every token alone."""
        return super().forward(x)


class GatedFeedForward(nn.Module):
    """W₂ (SiLU(W₁ x) ⊙ V x), d → m → d, dropout after the product: SwiGLU (arXiv 2002.05202), Llama's.

    Args:
        width: d.
        hidden: m; unless given 8/3 d to the nearest multiple of 8, which has as many parameters as two matrices of 4d.
        dropout: in training.

    """

    matrices = 3

    def __init__(self, width: int, hidden: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = hidden or self.default_hidden(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width, bias=False)

    @staticmethod
    def default_hidden(width: int) -> int:
        """8/3 d to the nearest multiple of 8."""
        return max(8, round(width / 3) * 8)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply it to every token alone."""
        return self.down(self.dropout(nn.functional.silu(self.gate(x)) * self.up(x)))


FEED_FORWARDS: dict[FeedForwardKind, type[FeedForward] | type[GatedFeedForward]] = {
    "gelu": FeedForward,
    "swiglu": GatedFeedForward,
}
