"""The cheap operator: a learned filter on a token's own spectrum."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.ops import spectral_coefficients, spectral_filter


class SpectralMixing(nn.Module):
    """iDCT(DCT(x) ⊙ w) with one learned gain w_k a frequency, initially 1: at first the identity.

    It never looks at another token, so it is causal for free and needs no cache. Source: the paper, DCT mixing.

    Args:
        width: d, the features of a token.

    """

    cost = 0
    cacheable = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        coefficients: Float[Tensor, "batch time width"] | None = None,
        mixed: Float[Tensor, "batch time width"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Filter every token.

        Args:
            x: the tokens.
            coefficients: DCT(x), where the router has computed it already.
            mixed: the result, where a kernel gave it along with the router's entropy.

        """
        if mixed is not None:
            return mixed
        if coefficients is None:
            coefficients = spectral_coefficients(x)
        return spectral_filter(coefficients, self.weight).to(x.dtype)

    def sparse_forward(
        self,
        x: Float[Tensor, "batch time width"],
        tokens: PackedTokens,
        coefficients: Float[Tensor, "batch time width"] | None = None,
        mixed: Float[Tensor, "batch time width"] | None = None,
    ) -> Float[Tensor, "tokens width"]:
        """Filter some tokens; what else is given is of all."""
        if mixed is not None:
            return tokens.take(mixed)
        if coefficients is None:
            return self(tokens.take(x)[None])[0]
        return spectral_filter(coefficients.flatten(0, 1), self.weight, tokens.index).to(x.dtype)
