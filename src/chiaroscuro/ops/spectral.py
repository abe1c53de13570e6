"""The spectral operators: the orthonormal DCT along the feature axis of one token, and what is made of it.

A token's vector x ∈ R^d is read as a signal of length d. Its DCT-II gives the energy at each frequency, the entropy of
that distribution is the routing signal H, and a learned filter on it is the cheap operator. None of these looks at
another token, so all of them are causal.

Short vectors are transformed by a d × d matrix product, longer ones by one real FFT of length d (Makhoul 1980). Both
are plain PyTorch operations, so autograd, forward mode, vmap and torch.compile need no rules of ours.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Spectrum = Literal["orthonormal", "reference"]

EPSILON = 1e-8
"""Keeps p and log p finite, as in the paper: p_k = X_k² / (Σ_j X_j² + ε), H = −Σ p_k log(p_k + ε) / log d."""

MATRIX_UP_TO = 64
"""The longest vector that is transformed by a matrix product. It takes 2d² operations where the FFT takes about
2.5 d log₂ d, but runs at the full speed of the arithmetic units. `benchmarks/dct.py` measures where they cross."""

FEW = 2**20
"""With so many multiply-adds or fewer (16 tokens at d = 256) a CPU uses the matrix product for longer vectors too: the
time of a token decoded alone is that of its calls, not of its arithmetic."""

HAS_TRITON = find_spec("triton") is not None
"""Looked up once: torch.compile can't trace the search for a package."""


def dct(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Orthonormal DCT-II along the last axis, X_k = s_k √(2/d) Σ_n x_n cos(π (2n + 1) k / 2d), s_0 = 1/√2, s_k = 1.

    Args:
        x: any leading shape, any length ≥ 1; float64, float32, or a half precision, which is
            transformed in float32 and returned in its own type.

    Returns:
        The coefficients, in x's shape and type. The transform is orthogonal: `idct` is its inverse and its transpose.

    Raises:
        TypeError: x is not of a real floating type.
        ValueError: x has no last axis, or one of length 0.

    """
    return _transform(x, inverse=False)


def idct(coefficients: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Orthonormal DCT-III along the last axis, x_n = √(2/d) Σ_k s_k X_k cos(π (2n + 1) k / 2d): the inverse of `dct`.

    Args, returns and errors as for `dct`.
    """
    return _transform(coefficients, inverse=True)


def spectral_entropy(x: Float[Tensor, "*batch width"], spectrum: Spectrum = "orthonormal") -> Float[Tensor, "*batch"]:
    """Normalised spectral entropy, H(x) = −Σ_k p_k log(p_k + ε) / log d with p_k = X_k² / (Σ_j X_j² + ε), X = dct(x).

    H is 0 where one frequency holds all the energy and 1 where all hold the same; it is 0 for d = 1.

    Args:
        x: token vectors.
        spectrum: `"reference"` counts the power of the zero frequency twice, as the author's transform does
            (its DC coefficient is √2 times too large against the others).

    Returns:
        H, without units, in float32 for half-precision x (a threshold needs more than bfloat16's three digits),
        else in x's type.

    Raises:
        TypeError: x is not of a real floating type.
        ValueError: an unknown spectrum, or x has no last axis, or one of length 0.

    Source: the paper, spectral routing; ε = 1e-8.

    """
    return entropy_of_spectrum(spectral_coefficients(x), spectrum)


def entropy_of_spectrum(
    coefficients: Float[Tensor, "*batch width"], spectrum: Spectrum = "orthonormal"
) -> Float[Tensor, "*batch"]:
    """`spectral_entropy` from coefficients already computed, so that router and filter share one transform.

    Raises:
        ValueError: an unknown spectrum.

    """
    check_spectrum(spectrum)
    width = coefficients.shape[-1]
    # In float16 ε is 0, and 0 · log 0 is NaN.
    power = (coefficients.float() if _is_half(coefficients) else coefficients).square()
    if spectrum == "reference":
        power = torch.cat([2 * power[..., :1], power[..., 1:]], dim=-1)
    if width == 1:
        return 0 * power[..., 0]
    p = power / (power.sum(-1, keepdim=True) + EPSILON)
    return -(p * torch.log(p + EPSILON)).sum(-1) / math.log(width)


def spectral_mix(x: Float[Tensor, "*batch width"], weight: Float[Tensor, " width"]) -> Float[Tensor, "*batch width"]:
    """Filter a token's features in the frequency domain: iDCT(DCT(x) ⊙ w).

    For a fixed w it is the linear map Cᵀ diag(w) C, C the DCT matrix; w = 1 gives x back.

    Args:
        x: token vectors.
        weight: the filter w, one gain per frequency.

    Returns:
        The filtered vectors, in x's type.

    Raises:
        ValueError: weight is not one vector of x's width.

    Source: the paper, DCT spectral mixing.

    """
    return spectral_filter(spectral_coefficients(x), weight).to(x.dtype)


def spectral_mix_with_entropy(
    x: Float[Tensor, "*batch width"], weight: Float[Tensor, " width"], spectrum: Spectrum = "orthonormal"
) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, "*batch"]]:
    """`spectral_mix` and `spectral_entropy` of the same x, from one transform.

    On an NVIDIA GPU with Triton installed, one kernel does it all for widths that are a power of two from 16 to 4096.

    Args:
        x: token vectors.
        weight: the filter w, one gain per frequency.
        spectrum: as in `spectral_entropy`.

    Returns:
        The filtered vectors, in x's type, and H, in float32 for half-precision x, else in x's type.

    Raises:
        ValueError: weight is not one vector of x's width; an unknown spectrum.

    """
    if has_kernel(x):
        from chiaroscuro.ops.triton import spectral as kernels

        return kernels.spectral_mix_with_entropy(x, weight, spectrum)
    coefficients = spectral_coefficients(x)
    return spectral_filter(coefficients, weight).to(x.dtype), entropy_of_spectrum(coefficients, spectrum)


def spectral_coefficients(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """`dct`, but float32 for half-precision x: what a router's entropy and a filter are computed from."""
    return _transform(x, inverse=False, keep_half=False)


def spectral_filter(
    coefficients: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"],
    index: Int[Tensor, " chosen"] | None = None,
) -> Float[Tensor, "*filtered width"]:
    """iDCT(X ⊙ w), the second half of `spectral_mix`, for all tokens or for some.

    Args:
        coefficients: X.
        weight: the filter w, one gain per frequency.
        index: the rows of X (N, d) to filter, in this order. Without it, all of X, which may have any shape.

    Raises:
        ValueError: weight is not one vector of X's width; an index is given and X is not (N, d).
        IndexError: a row that X doesn't have.

    """
    check_filter(weight, coefficients)
    if index is not None and coefficients.ndim != 2:
        raise ValueError(f"an index needs X of shape (N, d), got {tuple(coefficients.shape)}: flatten X first")
    chosen = coefficients if index is None else coefficients.index_select(0, index)
    return idct(chosen * weight)


def check_filter(weight: Tensor, x: Tensor) -> None:
    """Raise ValueError unless the filter is one vector of x's width."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has width {x.shape[-1]}: need ({x.shape[-1]},)")


def check_spectrum(spectrum: str) -> None:
    """Raise ValueError at an unknown spectrum."""
    if spectrum not in get_args(Spectrum):
        raise ValueError(f"spectrum={spectrum!r}: choose one of {', '.join(map(repr, get_args(Spectrum)))}")


def has_kernel(x: Tensor) -> bool:
    """Whether `ops.triton.spectral` takes x. Its float32 products in three parts need an NVIDIA GPU."""
    width = x.shape[-1] if x.ndim else 0
    return (
        x.device.type == "cuda"
        and torch.version.cuda is not None
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and 16 <= width <= 4096
        and width & (width - 1) == 0
        and HAS_TRITON
    )


def _transform(x: Tensor, *, inverse: bool, keep_half: bool = True) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"the DCT is of real floating numbers, got {x.dtype}: convert with x.float()")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"the DCT runs along the last axis, got shape {tuple(x.shape)}: need a width of at least 1")
    half = _is_half(x)
    wide = x.float() if half else x
    if torch.compiler.is_compiling():
        _register_with_the_compiler()
        few = False  # a graph serves every number of tokens, so there only the width decides
    else:
        # On a GPU the product may run in TF32, and a token alone would get another entropy than among many.
        few = x.device.type == "cpu" and x.numel() * x.shape[-1] <= FEW
    way = dct_by_matrix if few or x.shape[-1] <= MATRIX_UP_TO else dct_by_fft
    # Autocast would run the matrix product in half precision.
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        y = way(wide, inverse)
    return y.to(x.dtype) if half and keep_half else y


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _register_with_the_compiler() -> None:
    """Let torch.compile trace what the two ways do with tensors, not their Python code.

    So a table is a constant of its graph. The Python code would show it how a table is made, to be made at every call.
    """
    for way in (dct_by_matrix, dct_by_fft):
        torch.compiler.allow_in_graph(way)


# Called while the compiler traces, not at import: `torch.compiler.allow_in_graph` imports the compiler, which takes as
# long as PyTorch itself. For the same reason the mark is set by hand that `torch.compiler.assume_constant_result` sets.
_register_with_the_compiler._dynamo_marked_constant = True  # type: ignore[attr-defined]


def dct_by_matrix(x: Float[Tensor, "*batch width"], inverse: bool = False) -> Float[Tensor, "*batch width"]:
    """The transform as one matrix product, y = x Cᵀ (inverse: y = x C)."""
    matrix = _constant(_dct_matrix, x)
    return x @ matrix if inverse else x @ matrix.T


def dct_by_fft(x: Float[Tensor, "*batch width"], inverse: bool = False) -> Float[Tensor, "*batch width"]:
    """The transform by one real FFT of length d."""
    if x.numel() == 0:  # MKL's FFT takes no empty tensor
        return x.clone()
    return _idct_by_fft(x) if inverse else _dct_by_fft(x)


def _dct_by_fft(x: Tensor) -> Tensor:
    # Makhoul: with v = (x_0, x_2, …, x_3, x_1) and V = rfft(v), X_k and X_{d−k} are the real and the negated
    # imaginary part of V_k e^{−iπk/2d}. The twiddle has one more factor i, which swaps the parts and saves the
    # negation. At k = d/2 both parts are the same coefficient, and the imaginary one is taken.
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    real, imag = torch.view_as_real(torch.fft.rfft(v) * _constant(_twiddle, x)).unbind(-1)
    return torch.cat([imag, real[..., 1 : (x.shape[-1] + 1) // 2].flip(-1)], dim=-1)


def _idct_by_fft(coefficients: Tensor) -> Tensor:
    # `_dct_by_fft`, step by step backwards.
    width = coefficients.shape[-1]
    evens, bins = (width + 1) // 2, width // 2 + 1
    real = F.pad(coefficients[..., width - bins + 1 :].flip(-1), (1, 0))
    spectrum = torch.complex(real, coefficients[..., :bins]) * _constant(_inverse_twiddle, coefficients)
    v = torch.fft.irfft(spectrum, n=width, norm="forward")
    even, odd = v[..., :evens], v[..., evens:].flip(-1)
    if width % 2:
        odd = F.pad(odd, (0, 1))
    return torch.stack([even, odd], dim=-1).flatten(-2)[..., :width]


def _constant(table: Callable[[int], np.ndarray], x: Tensor) -> Tensor:
    """The table for x's width, on x's device and in its precision."""
    width = len(range(x.shape[-1]))  # an int, where torch.compile may have a symbol for the width
    return _to_tensor(table, width, x.dtype, x.device, type(x) is Tensor)


def _to_tensor(
    table: Callable[[int], np.ndarray], width: int, dtype: torch.dtype, device: torch.device, keep: bool
) -> Tensor:
    # What lasts from call to call is a NumPy array. A tensor made under inference mode, FakeTensorMode or torch.func
    # could not be used outside of it.
    if keep and device.type not in ("cpu", "meta"):
        return _on_device(table, width, dtype, device)
    return torch.from_numpy(_rounded(table, width, dtype)).to(device)


@lru_cache(maxsize=64)
def _on_device(table: Callable[[int], np.ndarray], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.from_numpy(_rounded(table, width, dtype)).to(device)


@lru_cache(maxsize=64)
def _rounded(table: Callable[[int], np.ndarray], width: int, dtype: torch.dtype) -> np.ndarray:
    exact = table(width)
    return exact if dtype == torch.float64 else exact.astype(np.complex64 if np.iscomplexobj(exact) else np.float32)


def _dct_matrix(width: int) -> np.ndarray:
    """C with C[k, n] = s_k √(2/d) cos(π (2n + 1) k / 2d)."""
    k = np.arange(width)
    matrix = math.sqrt(2 / width) * np.cos(math.pi / (2 * width) * np.outer(k, 2 * k + 1))
    matrix[0] /= math.sqrt(2)
    return matrix


def _twiddle(width: int) -> np.ndarray:
    """Phase, scale and swap of parts in one factor: i s_k √(2/d) e^{−iπk/2d} for k = 0 … d/2."""
    k = np.arange(width // 2 + 1)
    scale = np.where(k == 0, math.sqrt(1 / width), math.sqrt(2 / width))
    return scale * np.exp(1j * (math.pi / 2 - math.pi * k / (2 * width)))


def _inverse_twiddle(width: int) -> np.ndarray:
    """1 / (d · `_twiddle`): the way back is a product too, with the FFT's 1/d in it."""
    return 1 / (width * _twiddle(width))
