"""The null: the spectral entropy of white noise, with which every entropy of a model is to be compared.

An orthonormal transform of independent Gaussians gives independent Gaussians, so the null needs no transform: draw the
coefficients and take their entropy.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.ops.spectral import Spectrum, entropy_of_spectrum

_DRAWS = 8192
_AT_ONCE = 2**24
"""Coefficients that are held at a time."""
_SEED = 2606


def null_entropy_mean(width: int, spectrum: Spectrum = "orthonormal") -> float:
    """E[H] = (ψ(d/2 + 1) − ψ(3/2)) / ln d for d independent Gaussians, ψ the digamma function (0 for d = 1).

    The shares p of d independent χ²₁ are Dirichlet(½, …, ½), whose expected entropy this is. For large d it is
    1 − (2 − γ − ln 2) / ln d = 1 − 0.7296 / ln d, with an error of 1 / (d ln d): 0.0007 at d = 256, 0.004 at d = 64.
    Of the `"reference"` spectrum it is the mean of the draws that `null_entropy_quantiles` takes.
    """
    if spectrum != "orthonormal":
        return float(_null_draws(width, spectrum).mean())
    if width == 1:
        return 0.0
    half = torch.tensor([width / 2 + 1, 1.5], dtype=torch.float64, device="cpu").digamma()
    return float(half[0] - half[1]) / math.log(width)


def null_entropy_quantiles(
    width: int, probabilities: Sequence[float], spectrum: Spectrum = "orthonormal"
) -> Float[Tensor, " probabilities"]:
    """Quantiles of H over white noise, from 8192 draws with a fixed seed: the same numbers at every call.

    Args:
        width: d, the number of coefficients.
        probabilities: each in [0, 1]; 0 and 1 give the extremes of the draws.
        spectrum: as in `spectral_entropy`.

    """
    draws = _null_draws(width, spectrum)
    return torch.quantile(draws, torch.tensor(probabilities, dtype=draws.dtype, device="cpu")).float()


@lru_cache(maxsize=16)
def _null_draws(width: int, spectrum: Spectrum) -> Tensor:
    # A generator of its own, on the CPU, outside inference mode: neither a seed nor a default device changes the table.
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(_SEED)
        # In parts of a multiple of 16 draws, which PyTorch's generator gives as it gives all at once.
        part = min(_DRAWS, 16 * max(1, _AT_ONCE // (16 * width)))
        sizes = [min(part, _DRAWS - begin) for begin in range(0, _DRAWS, part)]
        drawn = (torch.randn(n, width, generator=generator, device="cpu", dtype=torch.float32) for n in sizes)
        return torch.cat([entropy_of_spectrum(coefficients, spectrum).double() for coefficients in drawn])
