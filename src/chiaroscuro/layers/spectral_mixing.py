"""The cheap operator: a learned filter on a token's own spectrum."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro.layers.context import Context, Spectra
from chiaroscuro.layers.operator import Count, Operator, Work
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.ops.spectral import FEW, MATRIX_UP_TO


class SpectralMixing(Operator):
    """iDCT(DCT(x) ⊙ w) with one learned gain w_k per frequency, initially 1: at first the identity.

    It never looks at another token, so it is causal and needs no cache. Source: the paper, DCT mixing.

    Args:
        width: d, the features of a token.

    """

    cost = 0
    reads_spectrum = True
    separates_documents = True

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        """W = 1."""
        nn.init.ones_(self.weight)

    @property
    def spectral_weight(self) -> Float[Tensor, " width"]:
        """W."""
        return self.weight

    def mix(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """Filter every token."""
        return (context.spectra or Spectra(x)).filtered(self.weight)

    def mix_packed(
        self, x: Float[Tensor, "batch time width"], tokens: PackedTokens, context: Context
    ) -> Float[Tensor, "tokens width"]:
        """Filter some tokens."""
        if context.spectra is None:
            return self.mix(tokens.take(x)[None], context)[0]
        return context.spectra.filtered_at(self.weight, tokens.index)

    def new_cache(self) -> None:
        """Nothing to keep."""

    @classmethod
    def count(cls, width: int, options: Any, work: Work) -> Count:
        """The transform and its inverse, or the inverse alone."""
        once = transform_operations(width, work.tokens * work.rows)
        return Count({"dct": work.transform * once * work.tokens * (1 if work.spectrum_at_hand else 2)})


def transform_operations(width: int, tokens: int | float) -> int | float:
    """Operations of one DCT of length d on a CPU: 2 d² by a matrix product, 2.5 d log₂ d by an FFT.

    Args:
        width: d.
        tokens: how many are transformed at once.

    """
    if width <= MATRIX_UP_TO or max(1, tokens) * width**2 <= FEW:
        return 2 * width**2
    return 2.5 * width * math.log2(width)
