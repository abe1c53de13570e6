"""How much time and memory models take for the same work, measured in turn in one process.

On a machine that does other work too, an absolute time says little, and so do two measurements one after the other. So
the candidates take turns at the same work, round after round. Reported are medians, their middle half (the quartiles),
and ratios of medians.
"""

import copy
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from chiaroscuro.errors import UserError
from chiaroscuro.layers import Context, PackedTokens, RoutedBlock, Spectra
from chiaroscuro.model import ChiarCache, ChiarForCausalLM
from chiaroscuro.model.cache import CACHE
from chiaroscuro.model.config import ChiarConfig

DECODED = 16
"""Tokens of a turn in decoding: routing makes one token cheaper than the next, so a turn is the sum over some."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: the median over its turns, and the quartiles."""

    median: float
    lower: float
    upper: float
    turns: int


def take_turns(
    candidates: Mapping[str, Work], seconds: float, turns: int = 3, rehearse: bool = False
) -> dict[str, Timing]:
    """Time the candidates in turn, again and again, until the time is up.

    Args:
        candidates: what to run, by name. Each runs once before the timing starts.
        seconds: how long to continue.
        turns: the least number of turns of each, whatever the time; 2 or more.
        rehearse: also run a candidate before each of its turns. For work of milliseconds, which would otherwise start
            with the caches as the candidate before left them.

    """
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < turns:
        for name, run in candidates.items():
            if rehearse:
                run()
            _finish()
            start = time.perf_counter()
            run()
            _finish()
            times[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in times.items():
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(median, lower, upper, len(values))
    return timings


def can_be_cached(model: PreTrainedModel) -> bool:
    """Whether a model can be decoded with a cache: all but some CHIAR-Formers."""
    return not (isinstance(model.config, ChiarConfig) and model.config.uncacheable())


def forward_pass(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> Work:
    """A prefill: all layers fill a cache, if the model can have one; logits are made for the last token only."""
    cached = can_be_cached(model)
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=cached, logits_to_keep=1)

    return run


def training_step(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> Work:
    """Forward, backward and AdamW at a learning rate of 0, so that the routing stays as it was calibrated."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


@torch.no_grad()
def decoding(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> Work:
    """Decode `DECODED` tokens one after another on a cache of `ids`, then crop the cache to what it was.

    A CHIAR-Former, and so the baseline, has a cache of its own, which is not copied at every token; another model has
    transformers' `DynamicCache`, which is. The tokens are given, not sampled, so every candidate reads the same. A
    layer with a sliding window of its own can't be cropped: then the cache is copied before, in the time measured.
    """
    model.eval()
    cache: Any = ChiarCache(model.config) if isinstance(model, ChiarForCausalLM) else DynamicCache(config=model.config)
    model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    following = ids[:, torch.arange(DECODED) % ids.shape[1]].flip(1)
    slides = any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ()))

    @torch.no_grad()
    def run() -> None:
        held = copy.deepcopy(cache) if slides else cache
        for token in following.split(1, dim=1):
            model(input_ids=token, **{CACHE: held}, use_cache=True)
        if not slides:
            held.crop(-following.shape[1])

    return run


def spectral_part(block: RoutedBlock, x: Tensor, training: bool) -> dict[str, Work]:
    """A routed pre-norm block on x, and the part of it that routing by entropy and the spectral operator cost.

    This part is the transform and the entropy of every token, the choice, and the filter and inverse transform of the
    tokens that take it; in training with their gradients. Without gradients the three steps are timed separately, too.
    """
    block.train(training)
    inputs = x.detach().requires_grad_(training)
    source = block.operator_norms["input"](x).detach().requires_grad_(training)

    def finish(y: Tensor) -> None:
        if training:
            y.sum().backward()
            block.zero_grad()
            inputs.grad = source.grad = None

    def whole() -> None:
        with torch.set_grad_enabled(training):
            finish(block(inputs)[0])

    router = cast(Any, block.router)
    first, mixing = next((k, operator) for k, (_, operator) in enumerate(block.menu) if operator.reads_spectrum)

    def transform() -> Spectra:
        spectra = Spectra(source, block.spectrum)
        _ = spectra.coefficients  # computed here, and kept
        return spectra

    def mix(spectra: Spectra, entropy: Tensor) -> Tensor:
        tokens = PackedTokens.of(router(source, entropy).operator_index == first)
        return mixing(source, Context(spectra=spectra), tokens)

    def part() -> None:
        with torch.set_grad_enabled(training):
            spectra = transform()
            finish(mix(spectra, spectra.entropy()))

    works: dict[str, Work] = {"layer": whole, "router and transform": part}
    if not training:
        spectra = transform()
        alone: dict[str, Callable[[], Any]] = {
            "transform": transform,
            "entropy": spectra.entropy,
            "choice, filter and way back": partial(mix, spectra, spectra.entropy()),
        }
        works |= {name: torch.no_grad()(work) for name, work in alone.items()}
    return works


KINDS = {
    "matrix products": r"mm$|linear|matmul",
    "attention": r"attention",
    "activation": r"gelu|silu",
    "norms": r"layer_norm|rsqrt",
    "transform": r"fft|dct",
    "moving": r"copy|index|scatter|gather|cat$|flip|fill|zero|clone|sort|embedding",
}
"""Operations of PyTorch by what they are for; what fits nowhere is element by element."""


def profile_by_kind(work: Work, device: str = "cpu") -> dict[str, float]:
    """Seconds of one run by kind of operation, each operation without those that it calls.

    Args:
        work: what is run.
        device: where it runs; of `"cuda"` these are the seconds of the kernels that the operations started.

    """
    on_gpu = device == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes two lines to standard error at each use
    work()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])]) as profile:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    found = dict.fromkeys([*KINDS, "element by element"], 0.0)
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel, which counts with its operation
            continue
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "element by element")
        found[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    return found


def peak_memory(make: Callable[[], Work], device: str = "cpu") -> int:
    """Peak memory in bytes of preparing some work and running it once, above what the process held before.

    Call it once in a fresh process: memory that was used and freed before would be used again, and not be counted.

    Args:
        make: builds the model and gives the work.
        device: where it works: of `"cuda"` the GPU's memory is measured, of all else the process's.

    Raises:
        UserError: there is no /proc, from which Linux's figures are read.

    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        run = make()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    run = make()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak: calibration is no part of the step
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        raise UserError("peak memory is read from /proc, which this system lacks: leave out the task memory") from None
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found is not None
    return 1024 * int(found[1])


def _finish() -> None:
    """Wait for the GPU, which runs asynchronously."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """The machine that the measurements are made on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    facts: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"torch": torch.__version__}


@cache
def code_version() -> str:
    """The code that is measured: in a clone its commit, with "-dirty" where files differ from it; else the version."""
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):
            commit = ["git", "describe", "--always", "--dirty", "--exclude=*"]
            return subprocess.run(commit, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    return metadata.version("chiaroscuro")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
