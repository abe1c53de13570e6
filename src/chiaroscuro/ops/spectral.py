"""The spectral operators: the orthonormal DCT along the feature axis of one token, and what is made of it.

A token's vector x ∈ R^d is read as a signal of length d. Its DCT-II says how its energy is spread over
frequencies, the entropy of that spread is the routing signal H, and a learned filter on it is the cheap operator.
None of these looks at another token, so all of them are causal for free.

Three ways to compute the transform, one result: short vectors by a d × d matrix product, which a CPU or GPU does
at full speed, longer ones on a CPU by scipy, and elsewhere, or where scipy would have but one of a CPU's threads, by
one real FFT of length d (Makhoul 1980), not 2d. The tables are computed once a length, in float64, and kept.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from chiaroscuro.ops.threads import can_share_out, share_out

Spectrum = Literal["orthonormal", "reference"]

EPSILON = 1e-8
"""Keeps p and log p finite, as in the paper: p_k = X_k² / (Σ_j X_j² + ε), H = −Σ p_k log(p_k + ε) / log d."""

MATRIX_UP_TO = 64
"""The longest vector for which the matrix product is used. It does 2d² operations where the FFT does about
2.5 d log₂ d, but at the full speed of the arithmetic units; `benchmarks/dct.py` measures where they cross."""

FEW = 2**20
"""Up to so many multiply-adds (16 tokens at d = 256) the matrix product is used too: a token that is decoded alone
waits for calls, not for arithmetic."""

BLOCK = 2**17
"""Numbers that a thread transforms, or takes the entropy of, at a time on a CPU: half a megabyte of float32, which
stays in a core's cache; `benchmarks/choices.py` measures what that spares."""


def dct(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Orthonormal DCT-II along the last axis, X_k = s_k √(2/d) Σ_n x_n cos(π (2n + 1) k / 2d), s_0 = 1/√2, s_k = 1.

    Args:
        x: any leading shape, any length ≥ 1; float64, float32, or a half precision, which is
            transformed in float32 and returned in its own type.

    Returns:
        The coefficients, in x's shape and type. The transform is orthogonal, so `idct` is both its inverse and
        its gradient.

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
    """`spectral_entropy` from coefficients that are already at hand, so that router and filter share one transform.

    Raises:
        ValueError: an unknown spectrum.

    """
    check_spectrum(spectrum)
    tokens = coefficients.shape[:-1].numel()
    rows = torch.get_num_threads() * _rows_of_a_block(coefficients)
    if rows >= tokens or not _in_blocks(coefficients):
        return _entropy(coefficients, spectrum)
    parts = [_entropy(part, spectrum) for part in coefficients.flatten(0, -2).split(rows)]
    return torch.cat(parts).view(coefficients.shape[:-1])


def _entropy(coefficients: Tensor, spectrum: Spectrum) -> Tensor:
    width = coefficients.shape[-1]
    # ε is 0 in float16, and 0 · log 0 no number.
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
        weight: the filter w, one gain a frequency.

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

    On an NVIDIA GPU, where Triton is installed and the width a power of two from 16 to 4096, one kernel does it all.

    Args:
        x: token vectors.
        weight: the filter w, one gain a frequency.
        spectrum: as in `spectral_entropy`.

    Returns:
        The filtered vectors, in x's type, and H, in float32 for half-precision x, else in x's type.

    Raises:
        ValueError: weight is not one vector of x's width; an unknown spectrum.

    """
    if has_kernel(x):
        from chiaroscuro.ops import triton_spectral

        return triton_spectral.spectral_mix_with_entropy(x, weight, spectrum)
    coefficients = spectral_coefficients(x)
    return spectral_filter(coefficients, weight).to(x.dtype), entropy_of_spectrum(coefficients, spectrum)


def spectral_coefficients(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """`dct`, but half-precision x gives float32: what a router's entropy and a filter are computed from."""
    return _transform(x, inverse=False, keep_half=False)


def spectral_filter(
    coefficients: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"],
    index: Int[Tensor, " chosen"] | None = None,
) -> Float[Tensor, "*filtered width"]:
    """iDCT(X ⊙ w), the second half of `spectral_mix`, of all tokens or of some.

    Args:
        coefficients: X.
        weight: the filter w, one gain a frequency.
        index: of X (N, d), the rows that are wanted, in their order; all, of any shape of X, unless given.

    Raises:
        ValueError: weight is not one vector of X's width; an index of an X that is not (N, d).
        IndexError: a row that X doesn't have.

    """
    check_filter(weight, coefficients)
    if index is not None and coefficients.ndim != 2:
        raise ValueError(f"an index is of rows (N, d), X has shape {tuple(coefficients.shape)}: flatten X first")
    wanted = coefficients.shape[:-1].numel() if index is None else len(index)
    inputs = [coefficients, weight] if index is None else [coefficients, weight, index]
    several = wanted > _rows_of_a_block(coefficients) and _in_blocks(*inputs)
    same_full_precision = weight.dtype == coefficients.dtype and not _is_half(weight)
    if several and same_full_precision and _way(coefficients) is dct_by_scipy:
        return _filtered_idct(coefficients, weight, index)
    return idct((coefficients if index is None else coefficients.index_select(0, index)) * weight)


def check_filter(weight: Tensor, x: Tensor) -> None:
    """Raise ValueError unless the filter is one vector of x's width."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has width {x.shape[-1]}: need ({x.shape[-1]},)")


def check_spectrum(spectrum: str) -> None:
    """Raise ValueError at an unknown spectrum."""
    if spectrum not in get_args(Spectrum):
        raise ValueError(f"spectrum={spectrum!r}: choose one of {', '.join(map(repr, get_args(Spectrum)))}")


def has_kernel(x: Tensor) -> bool:
    """Whether `triton_spectral` takes x. A matrix product of float32 in three parts needs an NVIDIA GPU."""
    width = x.shape[-1] if x.ndim else 0
    return (
        x.device.type == "cuda"
        and torch.version.cuda is not None
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and 16 <= width <= 4096
        and width & (width - 1) == 0
        and find_spec("triton") is not None
    )


def _rows_of_a_block(x: Tensor) -> int:
    return max(1, BLOCK // max(1, x.shape[-1]))


def _in_blocks(*inputs: Tensor) -> bool:
    """Whether the rows may be split into blocks: on a CPU, and neither autograd nor the compiler looks on."""
    on_cpu = all(x.device.type == "cpu" for x in inputs)
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return on_cpu and not learning and not torch.compiler.is_compiling() and not any(map(_has_tangent, inputs))


def _has_tangent(x: Tensor) -> bool:
    """Whether a forward-mode derivative comes with x: only PyTorch's own operations take it along."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


def _transform(x: Tensor, *, inverse: bool, keep_half: bool = True) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"the DCT is of real floating numbers, got {x.dtype}: convert with x.float()")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"the DCT runs along the last axis, got shape {tuple(x.shape)}: need a width of at least 1")
    half = _is_half(x)
    wide = x.float() if half else x
    # Autocast would run the matrix product in half precision.
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        few = x.numel() * x.shape[-1] <= FEW and not torch.compiler.is_compiling()
        if few or _has_tangent(wide):
            y = dct_by_matrix(wide, inverse)
        elif torch.is_grad_enabled():
            y = _OrthonormalDCT.apply(wide, inverse)
        else:
            y = _orthonormal_dct(wide, inverse)
    return y.to(x.dtype) if half and keep_half else y


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


# An operator of its own, which torch.compile calls and doesn't look into: it would put the making of the tables into
# its graph, to be run at every call, and break the graph at complex numbers.
torch.library.define("chiaroscuro::orthonormal_dct", "(Tensor x, bool inverse) -> Tensor")
_orthonormal_dct: Callable[[Tensor, bool], Tensor] = torch.ops.chiaroscuro.orthonormal_dct.default


@torch.library.impl("chiaroscuro::orthonormal_dct", "default")
@torch.compiler.disable
def _(x: Tensor, inverse: bool) -> Tensor:
    return _way(x)(x, inverse)


@torch.library.register_fake("chiaroscuro::orthonormal_dct")
def _(x: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_vmap("chiaroscuro::orthonormal_dct")
def _(info: Any, in_dims: tuple[int, None], x: Tensor, inverse: bool) -> tuple[Tensor, int]:
    return _orthonormal_dct(x.movedim(in_dims[0], 0), inverse), 0


# The filter needs an operator too: numpy can't read a tensor under vmap.
torch.library.define("chiaroscuro::filtered_idct", "(Tensor coefficients, Tensor weight, Tensor? index) -> Tensor")
_filtered_idct: Callable[..., Tensor] = torch.ops.chiaroscuro.filtered_idct.default


@torch.library.impl("chiaroscuro::filtered_idct", "cpu")
@torch.compiler.disable
def _(coefficients: Tensor, weight: Tensor, index: Tensor | None) -> Tensor:
    # A block is gathered and filtered where it will lie: whole copies would cost as much as the transform.
    rows, gains = _rows(coefficients), weight.numpy(force=True)
    chosen = None if index is None else index.numpy()
    if chosen is not None and len(chosen) > 0 and not 0 <= chosen.min() <= chosen.max() < len(rows):
        raise IndexError(f"index runs from {chosen.min()} to {chosen.max()}, X has {len(rows)} rows")

    def fill(block: slice, part: np.ndarray) -> None:
        source = rows[block] if chosen is None else np.take(rows, chosen[block], axis=0, out=part, mode="clip")
        with np.errstate(all="ignore"):  # PyTorch says nothing of ∞ · 0 either
            np.multiply(source, gains, out=part)

    y = _room_for_filtered(coefficients, weight, index)
    _fill_and_transform(y, fill, inverse=True)
    return y


@torch.library.register_fake("chiaroscuro::filtered_idct")
def _room_for_filtered(coefficients: Tensor, weight: Tensor, index: Tensor | None) -> Tensor:
    return coefficients.new_empty(coefficients.shape if index is None else (index.shape[0], coefficients.shape[-1]))


@torch.library.register_vmap("chiaroscuro::filtered_idct")
def _(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor | None) -> tuple[Tensor, int]:
    def of(sample: int) -> Tensor:
        each = zip(inputs, in_dims, strict=True)
        return _filtered_idct(*(x if x is None or dim is None else x.select(dim, sample) for x, dim in each))

    return torch.stack([of(sample) for sample in range(info.batch_size)]), 0


def _way(x: Tensor) -> Callable[[Tensor, bool], Tensor]:
    """The fastest of the three; scipy's, longer vectors on a CPU, if it gets all of PyTorch's threads."""
    if x.shape[-1] <= MATRIX_UP_TO:
        return dct_by_matrix
    return dct_by_scipy if x.device.type == "cpu" and can_share_out() else dct_by_fft


class _OrthonormalDCT(torch.autograd.Function):
    """The pair as one function: the transform is orthogonal, so each one's gradient is the other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, inverse: bool) -> Tensor:
        return _orthonormal_dct(x, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.inverse = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _OrthonormalDCT.apply(grad, not ctx.inverse), None


def dct_by_matrix(x: Float[Tensor, "*batch width"], inverse: bool = False) -> Float[Tensor, "*batch width"]:
    """The transform as one matrix product, y = x Cᵀ (inverse: y = x C): the plain form that the others are held to."""
    matrix = _dct_matrix(x.shape[-1], x.dtype, x.device)
    return x @ matrix if inverse else x @ matrix.T


def dct_by_scipy(x: Float[Tensor, "*batch width"], inverse: bool = False) -> Float[Tensor, "*batch width"]:
    """Compute the transform by scipy, on a CPU: one pass over memory, several tokens in one vector register."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        rows = _rows(x)
        _fill_and_transform(y, lambda block, part: np.copyto(part, rows[block]), inverse)
    return y


def _rows(x: Tensor) -> np.ndarray:
    return x.numpy(force=True).reshape(-1, x.shape[-1])


def _fill_and_transform(y: Tensor, fill: Callable[[slice, np.ndarray], object], inverse: bool) -> None:
    """Let `fill` write y's rows, block after block, and transform each where it lies, while the cache holds it."""
    rows = _rows(y)

    def work(block: slice) -> None:
        part = rows[block]
        fill(block, part)
        done = scipy.fft.dct(part, 3 if inverse else 2, norm="ortho", overwrite_x=True)
        if not np.may_share_memory(done, part):  # scipy may work in place, and doesn't promise it
            np.copyto(part, done)

    step = _rows_of_a_block(y)
    share_out(work, (slice(first, first + step) for first in range(0, len(rows), step)))


def dct_by_fft(x: Float[Tensor, "*batch width"], inverse: bool = False) -> Float[Tensor, "*batch width"]:
    """Compute the transform by one real FFT of length d."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:  # MKL's FFT raises an error at an empty tensor
        (_idct_by_fft if inverse else _dct_by_fft)(x, y)
    return y


def _dct_by_fft(x: Tensor, y: Tensor) -> None:
    # Makhoul: with v = (x_0, x_2, …, x_3, x_1) and V = rfft(v), X_k and X_{d−k} are the real and the negated
    # imaginary part of V_k e^{−iπk/2d}. The twiddle carries one more factor i, which swaps the parts and saves
    # the negation. y first holds v, then the result.
    width = x.shape[-1]
    evens, bins = (width + 1) // 2, width // 2 + 1
    y[..., :evens] = x[..., ::2]
    y[..., evens:] = x[..., 1::2].flip(-1)
    spectrum = torch.fft.rfft(y).mul_(_twiddle(width, x.dtype, x.device))
    y[..., :bins] = spectrum.imag
    y[..., bins:] = spectrum.real[..., 1:evens].flip(-1)


def _idct_by_fft(coefficients: Tensor, y: Tensor) -> None:
    # `_dct_by_fft`, step by step backwards.
    width = coefficients.shape[-1]
    evens, bins = (width + 1) // 2, width // 2 + 1
    real = F.pad(coefficients[..., width - bins + 1 :].flip(-1), (1, 0))
    twiddle = _inverse_twiddle(width, coefficients.dtype, coefficients.device)
    spectrum = torch.complex(real, coefficients[..., :bins]).mul_(twiddle)
    v = torch.fft.irfft(spectrum, n=width, norm="forward")
    y[..., ::2] = v[..., :evens]
    y[..., 1::2] = v[..., evens:].flip(-1)


@lru_cache(maxsize=64)
def _dct_matrix(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """C with C[k, n] = s_k √(2/d) cos(π (2n + 1) k / 2d)."""
    # A table made under inference mode could never be used in training, so it is made outside of it.
    with torch.inference_mode(False), torch.no_grad():
        k = torch.arange(width, dtype=torch.float64, device="cpu")
        matrix = math.sqrt(2 / width) * torch.cos(math.pi / (2 * width) * torch.outer(k, 2 * k + 1))
        matrix[0] /= math.sqrt(2)
        return matrix.to(device, dtype)


@lru_cache(maxsize=64)
def _twiddle(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Phase, scale and swap of parts in one factor: i s_k √(2/d) e^{−iπk/2d} for k = 0 … d/2."""
    with torch.inference_mode(False), torch.no_grad():
        k = torch.arange(width // 2 + 1, dtype=torch.float64, device="cpu")
        scale = torch.full_like(k, math.sqrt(2 / width))
        scale[0] = math.sqrt(1 / width)
        return torch.polar(scale, math.pi / 2 - math.pi * k / (2 * width)).to(device, dtype.to_complex())


@lru_cache(maxsize=64)
def _inverse_twiddle(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 / (d · `_twiddle`): the way back as a product too, for complex division is slow, with the FFT's 1/d."""
    with torch.inference_mode(False), torch.no_grad():
        twiddle = _twiddle(width, torch.float64, torch.device("cpu"))
        return (width * twiddle).reciprocal().to(device, dtype.to_complex())
