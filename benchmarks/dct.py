"""The DCT pair against one through a transform of length 2d, and its two ways, matrix product and FFT, compared.

Measured in one process, on one thread. The candidates take turns, so that other load on the machine affects all alike:

1. `idct(dct(x))` at (8, 256, 1024) float32 against the same through a transform of length 2d, which is what one
   writes with `torch.fft` at hand: mirror, rfft, twiddle, and back. It has its tables ready, as ours has.
2. The pair by matrix product and by FFT on 2048 tokens for d = 32 … 512, without and with its backward. `MATRIX_UP_TO`
   is the width up to which the matrix product wins.

Run `python -m benchmarks.dct`; it prints two tables and writes benchmarks/results/dct.json. Only ratios compare across
machines. Every candidate is first held to scipy in float64.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import scipy.fft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from chiaroscuro.allocator import keep_freed_memory
from chiaroscuro.analysis.speed import Timing, machine, take_turns
from chiaroscuro.files import write_text
from chiaroscuro.ops import dct, idct, spectral

RESULTS = Path(__file__).parent / "results" / "dct.json"
SHAPE = (8, 256, 1024)
LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
TOKENS = 2048
SECONDS = 3.0
"""How long a set of candidates takes turns."""


class DoubleLength:
    """The DCT pair through a real FFT of length 2d over the mirrored signal, tables precomputed."""

    def __init__(self, width: int) -> None:
        k = torch.arange(width, dtype=torch.float64)
        scale = torch.full_like(k, math.sqrt(2 / width))
        scale[0] = math.sqrt(1 / width)
        angle = math.pi * k / (2 * width)
        self.width = width
        # X_k = s_k/2 · Re(V_k e^{−iπk/2d}) = s_k/2 · (Re V_k cos + Im V_k sin), V the rfft of (x, x reversed).
        self.cos, self.sin = (scale / 2 * angle.cos()).float(), (scale / 2 * angle.sin()).float()
        # And back: x is the first half of the irfft of 2 X_k / s_k · e^{iπk/2d}, with nothing at k = d.
        self.back = torch.polar(2 / scale, angle).to(torch.complex64)

    def dct(self, x: Tensor) -> Tensor:
        """Mirror, rfft, twiddle."""
        spectrum = torch.fft.rfft(torch.cat([x, x.flip(-1)], dim=-1))[..., : self.width]
        return torch.mul(spectrum.real, self.cos).addcmul_(spectrum.imag, self.sin)

    def idct(self, coefficients: Tensor) -> Tensor:
        """Twiddle, irfft, first half."""
        spectrum = torch.zeros(*coefficients.shape[:-1], self.width + 1, dtype=torch.complex64)
        torch.mul(coefficients, self.back, out=spectrum[..., : self.width])
        return torch.fft.irfft(spectrum, n=2 * self.width)[..., : self.width].contiguous()


def shown(timing: Timing) -> str:
    return f"{1e3 * timing.median:.2f} ({1e3 * timing.lower:.2f}–{1e3 * timing.upper:.2f})"


def check(pair: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], x: Tensor) -> None:
    """Compare a candidate with scipy before it is timed."""
    forward, inverse = pair
    exact = torch.from_numpy(scipy.fft.dct(x.double().numpy(), type=2, norm="ortho", axis=-1))
    torch.testing.assert_close(forward(x).double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(inverse(forward(x)), x, rtol=0, atol=1e-4)


WAYS = {"matrix": spectral.dct_by_matrix, "fft": spectral.dct_by_fft}


def pair(way: Callable[..., Tensor], x: Tensor) -> Tensor:
    return way(way(x), inverse=True)


def pair_and_backward(way: Callable[..., Tensor], x: Tensor, gradient: Tensor) -> None:
    with torch.enable_grad():
        pair(way, x.requires_grad_()).backward(gradient)


def compare_pairs() -> dict[str, Timing]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    double = DoubleLength(SHAPE[-1])
    check((dct, idct), x)
    check((double.dct, double.idct), x)
    candidates = {"ours": lambda: idct(dct(x)), "length 2d": lambda: double.idct(double.dct(x))}
    return take_turns(candidates, SECONDS, rehearse=True)


def find_crossing() -> dict[int, dict[str, Timing]]:
    results = {}
    for width in LENGTHS:
        x, gradient = torch.randn(2, TOKENS, width, generator=torch.Generator().manual_seed(width))
        for way in WAYS.values():
            check((way, partial(way, inverse=True)), x)
        forward = {name: partial(pair, way, x) for name, way in WAYS.items()}
        both = {f"{name}, backward": partial(pair_and_backward, way, x, gradient) for name, way in WAYS.items()}
        results[width] = take_turns(forward | both, SECONDS / 3, rehearse=True)
    return results


def ratio(timings: dict[str, Timing], slower: str, faster: str) -> float:
    return timings[slower].median / timings[faster].median


def show(pairs: dict[str, Timing], crossing: dict[int, dict[str, Timing]], console: Console) -> None:
    console.print(f"idct(dct(x)) at {SHAPE} float32, ms: " + ", ".join(f"{n} {shown(t)}" for n, t in pairs.items()))
    console.print(f"ours is {ratio(pairs, 'length 2d', 'ours'):.2f} times as fast")
    table = Table(title=f"the pair on {TOKENS} tokens: the FFT's time over the matrix product's")
    for column in ("d", "forward", "with backward"):
        table.add_column(column, justify="right")
    for width, timings in crossing.items():
        ratios = ratio(timings, "fft", "matrix"), ratio(timings, "fft, backward", "matrix, backward")
        table.add_row(str(width), *(f"{figure:.2f}" for figure in ratios))
    console.print(table)
    console.print(f"MATRIX_UP_TO is {spectral.MATRIX_UP_TO}")


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    with torch.no_grad():
        pairs, crossing = compare_pairs(), find_crossing()
    show(pairs, crossing, Console())
    result = {
        "machine": machine(),
        "shape": SHAPE,
        "pair_seconds": {name: asdict(timing) for name, timing in pairs.items()},
        "times_faster": ratio(pairs, "length 2d", "ours"),
        "matrix_up_to": spectral.MATRIX_UP_TO,
        "crossing_tokens": TOKENS,
        "crossing_seconds": {d: {name: asdict(t) for name, t in row.items()} for d, row in crossing.items()},
    }
    write_text(RESULTS, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
