"""Spectral mixing and entropy on a GPU: one kernel reads x once and writes the filtered vectors and their entropy.

As separate calls, a DCT, an entropy, a filter and an inverse DCT make some twenty passes over memory. Here a program
takes a tile of 2048 numbers, 8 tokens of width 256 or one of width 2048, and keeps them in registers and shared memory
from the first step to the last. The forward reads x and writes y and H; the backward reads x and ∂y, transforms x
again, which is cheaper than keeping its spectrum, and writes ∂x.

The transform is Makhoul's, as in `ops/spectral.py`, with its Fourier transform of length d = d₁ d₂ in two factors: with
n = n₁ d₂ + n₂ and k = k₁ + d₁ k₂,

    X_k = Re Σ_{n₂} e^{−iψ(n₂, k₂)} e^{−iφ(k₁, n₂)} Σ_{n₁} e^{−2πi n₁ k₁ / d₁} v_n,
    φ = 2π n₂ k₁ / d + π k₁ / 2d,   ψ = 2π n₂ k₂ / d₂ + π k₂ / 2d₂,

two small real matrix products with cosines and sines, and a rotation between them. The inverse is the transpose, the
same steps backwards. The first product is from the left and the second from the right, so neither needs its operand
transposed. d₁ and d₂ are at most 64. Below 16, the smallest size that a matrix unit takes, they are padded with zeros,
so narrow tokens cost more than they need to.

The cost per token of b-byte numbers: a transform takes 4 d (d₁ + d₂) FLOPs, 2^18 at d = 1024 and 2^21 at d = 4096; a
matrix product would take 2 d². The forward does two transforms per 2 b d bytes, the backward three per 3 b d. The
float32 numbers go through the matrix units in three parts of 10 bits ("tf32x3"), which keeps float32's precision.
"""

import math
from functools import lru_cache
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.ops.spectral import EPSILON, Spectrum, check_filter, check_spectrum

_EPSILON = tl.constexpr(EPSILON)

TILE = 2048
"""Numbers per program, unless one token is wider. With twice as many, a thread's registers overflow."""

PROGRAMS = 512
"""Most programs in a backward, a few per processor. Each sums its own ∂w over its tiles."""

LAUNCH = {"num_warps": 4, "num_stages": 1}
"""One stage: loading ahead of the loop would take more shared memory at d = 4096 than a processor has."""


def spectral_mix_with_entropy(
    x: Float[Tensor, "*batch width"], weight: Float[Tensor, " width"], spectrum: Spectrum = "orthonormal"
) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, "*batch"]]:
    """`chiaroscuro.ops.spectral.spectral_mix_with_entropy`, computed by the kernels of this file.

    Args:
        x: token vectors in float32, bfloat16 or float16, at least one; the width a power of two from 16 to 4096.
        weight: the filter w, one gain per frequency.
        spectrum: as in `spectral_entropy`.

    Returns:
        The filtered vectors in x's type, and H in float32.

    Raises:
        ValueError: weight is not one vector of x's width; an unknown spectrum.

    """
    check_filter(weight, x)
    check_spectrum(spectrum)
    mixed, entropy = _forward(x.reshape(-1, x.shape[-1]), weight, spectrum)
    return mixed.view(x.shape), entropy.view(x.shape[:-1])


# Custom operators: torch.compile calls them without tracing into them, and only needs the shapes of their results.
@torch.library.custom_op("chiaroscuro::spectral_mix_with_entropy", mutates_args=())
def _forward(x: Tensor, weight: Tensor, spectrum: str) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    mixed, entropy = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    sizes = _sizes(x.shape[1])
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(len(x), sizes["R"]),)](
            x, weight, mixed, entropy, _tables(x.shape[1], x.device), len(x), spectrum == "reference", **sizes, **LAUNCH
        )
    return mixed, entropy


@_forward.register_fake
def _(x: Tensor, weight: Tensor, spectrum: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(len(x), dtype=torch.float32)


@torch.library.custom_op("chiaroscuro::spectral_mix_with_entropy_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, to_mixed: Tensor, to_entropy: Tensor, spectrum: str) -> tuple[Tensor, Tensor]:
    x, weight, to_mixed, to_entropy = (t.contiguous() for t in (x, weight, to_mixed, to_entropy))
    sizes = _sizes(x.shape[1])
    programs = min(triton.cdiv(len(x), sizes["R"]), PROGRAMS)
    to_x, to_weight = torch.empty_like(x), x.new_empty((programs, x.shape[1]), dtype=torch.float32)
    tables = _tables(x.shape[1], x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            x, weight, to_mixed, to_entropy, to_x, to_weight, tables, len(x), spectrum == "reference", **sizes, **LAUNCH
        )
    return to_x, to_weight.sum(0).to(weight.dtype)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, to_mixed: Tensor, to_entropy: Tensor, spectrum: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Any) -> None:
    *tensors, ctx.spectrum = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, to_mixed: Tensor, to_entropy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(*ctx.saved_tensors, to_mixed, to_entropy, ctx.spectrum), None


_forward.register_autograd(_gradients, setup_context=_keep)


def _sizes(width: int) -> dict[str, int]:
    """d, d₁ and d₂; P and Q, d₁ and d₂ padded; R, the tokens of a tile."""
    d1 = 2 ** math.ceil(math.log2(width) / 2)
    p, q = max(d1, 16), max(width // d1, 16)
    return {"D": width, "D1": d1, "D2": width // d1, "P": p, "Q": q, "R": max(1, TILE // (p * q))}


@lru_cache(maxsize=64)
def _tables(width: int, device: torch.device) -> Tensor:
    """Cosines and sines of 2π n₁k₁/d₁ (P × P), of φ (P × Q) and of ψ (Q × Q), concatenated.

    Those of ψ are scaled by √(2/d); `_scale` adds the factor of the zeroth frequency.
    """
    sizes = _sizes(width)
    d1, d2, p, q = (sizes[name] for name in ("D1", "D2", "P", "Q"))
    # A table made under inference mode could never be used in training.
    with torch.inference_mode(False), torch.no_grad():
        i = torch.arange(max(p, q), dtype=torch.float64, device="cpu")
        first = torch.outer(i[:p], i[:p]) * (2 * math.pi / d1)
        turn = torch.outer(i[:p], 2 * i[:q] + 0.5) * (math.pi / width)
        second = torch.outer(2 * i[:q] + 0.5, i[:q]) * (math.pi / d2)
        here1, here2 = i[:p] < d1, i[:q] < d2
        inside1, inside2 = here1[:, None] & here1, math.sqrt(2 / width) * (here2[:, None] & here2)
        angles = ((first, inside1), (turn, 1), (second, inside2))
        tables = [function(angle) * inside for angle, inside in angles for function in (torch.cos, torch.sin)]
        return torch.cat([table.flatten() for table in tables]).to(device, torch.float32)


# The kernels. A tile of R tokens is v_n as P × (R·Q), n₁ down, token and n₂ across; its spectrum is P × R × Q, k₁ by
# token by k₂. `no_type_check`: their arguments are not Python objects.


@triton.jit
@no_type_check
def _forward_kernel(
    x,
    weight,
    mixed,
    entropy,
    tables,
    rows,
    REFERENCE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
):
    tile = tl.program_id(0)
    places, inside = _places(tile, rows, D, D1, D2, P, Q, R)
    k, exists = _frequencies(D1, D2, P, Q)
    spectrum = _dct(tl.load(x + places, inside, 0.0).to(tl.float32), tables, P, Q, R) * _scale(k)
    w = tl.load(weight + k, exists, 0.0).to(tl.float32)
    tl.store(mixed + places, _idct(spectrum * w * _scale(k), tables, P, Q, R).to(mixed.dtype.element_ty), inside)
    p, _ = _shares(spectrum, k, REFERENCE)
    row = tile * R + tl.arange(0, R)
    h = -tl.sum(tl.sum(p * tl.log(p + _EPSILON), 2), 0) / tl.log(float(D))
    tl.store(entropy + row, h, row < rows)


@triton.jit
@no_type_check
def _backward_kernel(
    x,
    weight,
    to_mixed,
    to_entropy,
    to_x,
    to_weight,
    tables,
    rows,
    REFERENCE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
):
    k, exists = _frequencies(D1, D2, P, Q)
    w = tl.load(weight + k, exists, 0.0).to(tl.float32)
    to_w = tl.zeros((P, 1, Q), tl.float32)
    tile = tl.program_id(0)
    while tile * R < rows:  # not `range`: Triton 3.6's interpreter can't, with NumPy 2.4
        places, inside = _places(tile, rows, D, D1, D2, P, Q, R)
        spectrum = _dct(tl.load(x + places, inside, 0.0).to(tl.float32), tables, P, Q, R) * _scale(k)
        # y = Cᵀ(w ⊙ X), so the gradient of w ⊙ X is C ∂y.
        to_filtered = _dct(tl.load(to_mixed + places, inside, 0.0).to(tl.float32), tables, P, Q, R) * _scale(k)
        to_w += tl.sum(to_filtered * spectrum, 1, keep_dims=True)
        # ∂H/∂p_k = −(log(p_k + ε) + p_k / (p_k + ε)) / log d, and p_k = c_k X_k² / S with S = Σ_j c_j X_j² + ε.
        p, total = _shares(spectrum, k, REFERENCE)
        row = tile * R + tl.arange(0, R)
        to_h = tl.load(to_entropy + row, row < rows, 0.0)[None, :, None]
        to_p = -(tl.log(p + _EPSILON) + p / (p + _EPSILON)) / tl.log(float(D)) * to_h
        to_power = (to_p - tl.sum(tl.sum(to_p * p, 2), 0)[None, :, None]) / total
        to_spectrum = to_filtered * w + 2 * spectrum * to_power * _counts(k, REFERENCE)
        y = _idct(to_spectrum * _scale(k), tables, P, Q, R)
        tl.store(to_x + places, y.to(to_x.dtype.element_ty), inside)
        tile += tl.num_programs(0)
    tl.store(to_weight + tl.program_id(0) * D + k, to_w, exists)


@triton.jit
@no_type_check
def _dct(v, tables, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr):
    first, turn, second = tables, tables + 2 * P * P, tables + 2 * P * P + 2 * P * Q
    # The complex number a − ib, its factors c − is.
    a = tl.reshape(_dot(_table(first, P, P), v), (P, R, Q))
    b = tl.reshape(_dot(_table(first + P * P, P, P), v), (P, R, Q))
    c, s = _table(turn, P, Q)[:, None, :], _table(turn + P * Q, P, Q)[:, None, :]
    real, imaginary = tl.reshape(a * c - b * s, (P * R, Q)), tl.reshape(a * s + b * c, (P * R, Q))
    x = _dot(real, _table(second, Q, Q)) - _dot(imaginary, _table(second + Q * Q, Q, Q))
    return tl.reshape(x, (P, R, Q))


@triton.jit
@no_type_check
def _idct(x, tables, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr):
    # `_dct`, transposed step by step. The first factor's tables are symmetric.
    first, turn, second = tables, tables + 2 * P * P, tables + 2 * P * P + 2 * P * Q
    x = tl.reshape(x, (P * R, Q))
    real = tl.reshape(_dot(x, tl.trans(_table(second, Q, Q))), (P, R, Q))
    imaginary = tl.reshape(-_dot(x, tl.trans(_table(second + Q * Q, Q, Q))), (P, R, Q))
    c, s = _table(turn, P, Q)[:, None, :], _table(turn + P * Q, P, Q)[:, None, :]
    a, b = tl.reshape(real * c + imaginary * s, (P, R * Q)), tl.reshape(imaginary * c - real * s, (P, R * Q))
    return _dot(_table(first, P, P), a) + _dot(_table(first + P * P, P, P), b)


@triton.jit
@no_type_check
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
@no_type_check
def _table(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(pointer + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
@no_type_check
def _places(
    tile,
    rows,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
):
    """The memory offsets of a tile's v_n, and a mask: v = (x_0, x_2, …, x_3, x_1)."""
    n1, column = tl.arange(0, P)[:, None], tl.arange(0, R * Q)[None, :]
    row, n2 = tile * R + column // Q, column % Q
    n = n1 * D2 + n2
    place = tl.where(2 * n < D, 2 * n, 2 * D - 1 - 2 * n)
    return row.to(tl.int64) * D + place, (row < rows) & (n1 < D1) & (n2 < D2)


@triton.jit
@no_type_check
def _frequencies(D1: tl.constexpr, D2: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """The frequency k at each place of a tile, and a mask of the places that have one."""
    k1, k2 = tl.arange(0, P)[:, None, None], tl.arange(0, Q)[None, None, :]
    return k1 + D1 * k2, (k1 < D1) & (k2 < D2)


@triton.jit
@no_type_check
def _scale(k):
    """s_k of the orthonormal DCT, 1/√2 at the zeroth frequency."""
    return tl.where(k == 0, 0.7071067811865476, 1.0)


@triton.jit
@no_type_check
def _counts(k, REFERENCE: tl.constexpr):
    """The weight of a frequency's power: in the reference spectrum the zeroth counts twice."""
    return tl.where((k == 0) & REFERENCE, 2.0, 1.0)


@triton.jit
@no_type_check
def _shares(spectrum, k, REFERENCE: tl.constexpr):
    """Each frequency's share p of its token's power, and that power plus ε."""
    power = spectrum * spectrum * _counts(k, REFERENCE)
    total = tl.sum(tl.sum(power, 2), 0)[None, :, None] + _EPSILON
    return power / total, total
