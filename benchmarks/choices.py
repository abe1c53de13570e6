"""Choices that a measurement decided, each against what it was chosen over.

    python -m benchmarks.choices

Where a docstring says that one way takes a third of another's time, this command measured it. Each choice is a set of
ways to do the same work, the chosen one first. They take turns on one thread, so that other load on the machine affects
all alike; what counts is the ratio of the medians. Prints a table and writes benchmarks/results/choices.json.
"""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from chiaroscuro.allocator import keep_freed_memory
from chiaroscuro.analysis.speed import Timing, Work, machine, peak_memory, take_turns
from chiaroscuro.files import write_text
from chiaroscuro.layers import PackedTokens, RoutedBlock, build_block
from chiaroscuro.ops import linear_cross_entropy, packed_attention, prefix_attention

RESULTS = Path(__file__).parent / "results" / "choices.json"
REACH = import_module("chiaroscuro.ops.reach_attention")
LOSS: Any = import_module("chiaroscuro.ops.linear_cross_entropy")  # the function took its name in the package
TOKENS, WIDTH, WORDS, HEADS = 8192, 256, 8192, 4
SECONDS = 10.0
"""How long the ways of a choice take turns."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def under(module: ModuleType, name: str, values: tuple[float, ...], work: Work) -> dict[str, Work]:
    """The same work under several values of a module's constant."""

    def run(value: float) -> None:
        with mock.patch.object(module, name, value):
            work()

    return {f"{value:,}": partial(run, value) for value in values}


def tiles(time: int) -> dict[str, Work]:
    """A quarter of the tokens attend to all of their sequence, forward and backward."""
    chosen = torch.rand(TOKENS // time, time, generator=torch.Generator().manual_seed(0)) < 0.25
    tokens = PackedTokens.of(chosen)
    keyed = tokens.keys("all")
    lengths = tokens.lengths, keyed.lengths, tokens.ordinals(keyed)
    query, key, value = (normal(n, HEADS, WIDTH // HEADS).requires_grad_() for n in (len(tokens), TOKENS, TOKENS))

    def work() -> None:
        prefix_attention(query, key, value, *lengths).sum().backward()

    name = "CHUNK" if time < packed_attention.LONG else "LONG_CHUNK"
    values = dict.fromkeys((getattr(packed_attention, name), 32, 48, 64, 96, 128, 192))
    return under(packed_attention, name, tuple(values), work)


def near_and_far(time: int, module: ModuleType, name: str, values: tuple[float, ...]) -> dict[str, Work]:
    """Everybody looks and a quarter is kept, w = 128 and s = 4, forward and backward."""
    rows = TOKENS // time
    lengths, places = torch.full((rows,), time), torch.arange(time).repeat(rows)
    kept = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)) < 0.25
    numbers = [normal(TOKENS, HEADS, WIDTH // HEADS).requires_grad_() for _ in range(3)]
    where = (lengths, lengths, places, places, torch.ones_like(kept), kept)

    def work() -> None:
        REACH.reach_attention(*numbers, *where, window=128, sinks=4).sum().backward()

    return under(module, name, values, work)


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(WORDS, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return normal(TOKENS, WIDTH).requires_grad_(), (0.02 * normal(WORDS, WIDTH)).requires_grad_(), targets


def losses() -> dict[str, Work]:
    """The head and its cross-entropy in chunks, over all logits at once, and PyTorch's own in chunks, where it is."""
    hidden, weight, targets = loss_inputs()
    ways: dict[str, Callable[[], Tensor]] = {
        "in chunks": lambda: linear_cross_entropy(hidden, weight, targets),
        "all logits": lambda: F.cross_entropy(hidden @ weight.T, targets),
    }
    torch_nn: Any = torch.nn
    if hasattr(torch_nn, "LinearCrossEntropyOptions"):
        theirs = partial(torch_nn.functional.linear_cross_entropy, options=torch_nn.LinearCrossEntropyOptions())
        ways["PyTorch's, in chunks"] = lambda: theirs(hidden, weight, targets)
    return {name: lambda way=way: way().backward() for name, way in ways.items()}


def loss_chunks() -> dict[str, Work]:
    """Tokens of a chunk."""
    hidden, weight, targets = loss_inputs()
    values = LOSS.CHUNK, 64, 128, 256, 1024, 2048
    return under(LOSS, "CHUNK", values, lambda: linear_cross_entropy(hidden, weight, targets).backward())


def allocators() -> dict[str, Work]:
    """A routed layer's forward in two processes, which differ in the setting and wait for each other."""
    ways = {}
    for name, begin in (("kept", keep_freed_memory), ("given back", None)):
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin)
        ways[name] = lambda pool=pool: pool.submit(routed_layer).result()
    return ways


@cache
def layer_and_tokens() -> tuple[RoutedBlock, Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = build_block(WIDTH, ["dct", "attention"], {"num_attention_heads": HEADS})
    return block.eval(), normal(TOKENS // 1024, 1024, WIDTH)


@torch.no_grad()
def routed_layer() -> None:
    layer, x = layer_and_tokens()
    layer(x)


CHOICES: dict[str, Callable[[], dict[str, Work]]] = {
    "ops/packed_attention.py, CHUNK, T = 1024": partial(tiles, 1024),
    "ops/packed_attention.py, LONG_CHUNK, T = 8192": partial(tiles, 8192),
    "ops/reach_attention.py, SHORT, T = 512": partial(near_and_far, 512, REACH, "SHORT", (REACH.SHORT, 0)),
    "ops/packed_attention.py, KEYS, T = 1024": partial(
        near_and_far, 1024, packed_attention, "KEYS", (packed_attention.KEYS, 0)
    ),
    "ops/linear_cross_entropy.py": losses,
    "ops/linear_cross_entropy.py, CHUNK": loss_chunks,
    "allocator.py, freed memory": allocators,
}


def memory_of_losses() -> dict[str, int]:
    """Bytes that each way holds at the highest beside its inputs, in a process of its own."""
    found = {}
    for name in losses():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[name] = pool.submit(peak_of_loss, name).result()
    return found


def peak_of_loss(name: str) -> int:
    work = losses()[name]
    return peak_memory(lambda: work)


def show(timings: dict[str, dict[str, Timing]], memory: dict[str, int], console: Console) -> None:
    table = Table(title="the chosen way first: ms, median (middle half), and how many times as long")
    for column in ("choice", "way", "ms", "ratio"):
        table.add_column(column, justify="left" if column in ("choice", "way") else "right")
    for choice, ways in timings.items():
        chosen = next(iter(ways.values())).median
        for way, t in ways.items():
            spread = f"{1e3 * t.median:.3g} ({1e3 * t.lower:.3g}–{1e3 * t.upper:.3g})"
            table.add_row(choice, way, spread, f"{t.median / chosen:.2f}")
    console.print(table)
    for way, held in memory.items():
        console.print(f"the loss, {way}: {held / 2**20:.0f} MiB beside its inputs")


def main() -> None:
    torch.set_num_threads(1)
    memory = memory_of_losses()  # whose processes are to be as small as any
    keep_freed_memory()
    timings = {choice: take_turns(make(), SECONDS, rehearse=True) for choice, make in CHOICES.items()}
    show(timings, memory, Console())
    result = {
        "machine": machine(),
        "seconds": {choice: {way: asdict(t) for way, t in ways.items()} for choice, ways in timings.items()},
        "ratio": {
            choice: {way: t.median / next(iter(ways.values())).median for way, t in ways.items()}
            for choice, ways in timings.items()
        },
        "memory_of_loss": memory,
    }
    write_text(RESULTS, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
