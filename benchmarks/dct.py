"""The DCT pair against one through a transform of length 2d, and its two ways, matrix product and FFT, compared.

Measured in one process, the candidates taking turns so that what else the machine does hits all alike:

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
THREADS = (1, 2)
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
    """Hold a candidate to scipy: fast and wrong is not fast."""
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


def compare_pairs() -> dict[int, dict[str, Timing]]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    double = DoubleLength(SHAPE[-1])
    check((dct, idct), x)
    check((double.dct, double.idct), x)
    results = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        candidates = {"ours": lambda: idct(dct(x)), "length 2d": lambda: double.idct(double.dct(x))}
        results[threads] = take_turns(candidates, SECONDS, rehearse=True)
    return results


def find_crossing() -> dict[int, dict[int, dict[str, Timing]]]:
    results: dict[int, dict[int, dict[str, Timing]]] = {threads: {} for threads in THREADS}
    for width in LENGTHS:
        x, gradient = torch.randn(2, TOKENS, width, generator=torch.Generator().manual_seed(width))
        for way in WAYS.values():
            check((way, partial(way, inverse=True)), x)
        for threads in THREADS:
            torch.set_num_threads(threads)
            forward = {name: partial(pair, way, x) for name, way in WAYS.items()}
            both = {f"{name}, backward": partial(pair_and_backward, way, x, gradient) for name, way in WAYS.items()}
            results[threads][width] = take_turns(forward | both, SECONDS / 3, rehearse=True)
    return results


def show(
    pairs: dict[int, dict[str, Timing]], crossing: dict[int, dict[int, dict[str, Timing]]], console: Console
) -> None:
    table = Table(title=f"idct(dct(x)) at {SHAPE} float32: ms, median (middle half)")
    for column in ("threads", "ours", "length 2d", "times faster"):
        table.add_column(column, justify="right")
    for threads, timings in pairs.items():
        ratio = timings["length 2d"].median / timings["ours"].median
        table.add_row(str(threads), shown(timings["ours"]), shown(timings["length 2d"]), f"{ratio:.2f}")
    console.print(table)
    table = Table(title=f"the pair on {TOKENS} tokens: the FFT's time over the matrix product's")
    for column in ("d", *(f"{what}, threads: {n}" for n in THREADS for what in ("forward", "and backward"))):
        table.add_column(column, justify="right")
    for width in LENGTHS:
        cells = [crossing[threads][width] for threads in THREADS]
        ratios = [
            cell["fft" + end].median / cell["matrix" + end].median for cell in cells for end in ("", ", backward")
        ]
        table.add_row(str(width), *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    console.print(f"MATRIX_UP_TO is {spectral.MATRIX_UP_TO}")


def main() -> None:
    keep_freed_memory()
    with torch.no_grad():
        pairs, crossing = compare_pairs(), find_crossing()
    show(pairs, crossing, Console())
    result = {
        "machine": machine(),
        "shape": SHAPE,
        "pair_seconds": {n: {name: asdict(t) for name, t in row.items()} for n, row in pairs.items()},
        "times_faster": {n: row["length 2d"].median / row["ours"].median for n, row in pairs.items()},
        "matrix_up_to": spectral.MATRIX_UP_TO,
        "crossing_tokens": TOKENS,
        "crossing_seconds": {
            n: {d: {name: asdict(t) for name, t in row.items()} for d, row in rows.items()}
            for n, rows in crossing.items()
        },
    }
    write_text(RESULTS, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
