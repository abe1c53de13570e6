"""The benchmark: what routing saves in time and memory, against full attention and a Llama of the same size.

All candidates have the same layers, width, heads and vocabulary. Weights and tokens are random: time does not depend on
what was learned, and thresholds calibrated on these tokens send the wanted share of them to attention. The candidates
take turns in one process, task by task and length by length; peak memory is measured in a process of its own each.
Every measured ratio is given together with the one that the operation counts predict.
"""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chiaroscuro.analysis.facts import refuse_beyond_memory
from chiaroscuro.analysis.flops import count_decode_flops, count_flops, count_llama_flops
from chiaroscuro.analysis.speed import (
    DECODED,
    Work,
    code_version,
    decoding,
    forward_pass,
    machine,
    peak_memory,
    profile_by_kind,
    spectral_part,
    take_turns,
    training_step,
)
from chiaroscuro.errors import UserError
from chiaroscuro.files import write_bytes, write_text
from chiaroscuro.layers import GatedFeedForward, ScoreRouter, build_block
from chiaroscuro.model import ChiarCache, ChiarForCausalLM
from chiaroscuro.model.calibration import calibrate
from chiaroscuro.model.config import ChiarConfig, default_operators
from chiaroscuro.report.performance_figure import draw_performance
from chiaroscuro.report.performance_page import render_page

Task = Literal["router", "memory", "profile", "train", "forward", "decode"]
TASKS: dict[str, Callable[[PreTrainedModel, Tensor], Work]] = {
    "train": training_step,
    "forward": forward_pass,
    "decode": decoding,
}
SHARE = 0.25
"""ρ where one is measured alone: the router's part, profiles, and peak memory, which takes a process a candidate."""
ROUTER_WIDTHS = (256, 1024)


@dataclass(frozen=True)
class Candidate:
    """One model of the comparison.

    Attributes:
        kind: our sparse or dense execution, our full-attention baseline, or transformers' Llama.
        share: ρ, the share of tokens that goes to attention in the routed layers.
        context: the tokens that they attend to.

    """

    kind: Literal["sparse", "dense", "baseline", "llama"]
    share: float | None = None
    context: Literal["all", "routed"] | None = None

    @property
    def name(self) -> str:
        """Its name in tables, plots and results."""
        if self.kind == "sparse":
            return f"{self.context}, ρ = {self.share:g}"
        return {"dense": "dense execution", "baseline": "full attention", "llama": "Hugging Face Llama"}[self.kind]


BASELINE = Candidate("baseline")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        layers: layers of every model.
        width: d.
        heads: h.
        vocabulary: V.
        lengths: T. The batch has as many sequences as make `tokens`, at least one.
        shares: ρ of the sparse candidates, each with every context.
        contexts: attention contexts of the sparse candidates.
        tasks: some of `"router"`, `"memory"`, `"profile"`, `"train"`, `"forward"` and `"decode"`.
        tokens: B·T.
        seconds: time in which the candidates of a length take turns at a task; each has at least three turns.
        device: `"cpu"` or `"cuda"`.
        dtype: of weights and activations.

    """

    layers: int = 12
    width: int = 256
    heads: int = 4
    vocabulary: int = 8192
    lengths: tuple[int, ...] = (256, 1024, 4096, 8192, 16384)
    shares: tuple[float, ...] = (0.5, 0.25, 0.125)
    contexts: tuple[str, ...] = ("routed", "all")
    tasks: tuple[str, ...] = get_args(Task)
    tokens: int = 8192
    seconds: float = 20.0
    device: str = "cpu"
    dtype: str = "float32"

    def check(self) -> None:
        """Raise a UserError if this can't be measured."""
        if unknown := [task for task in self.tasks if task not in get_args(Task)]:
            raise UserError(f"--task {unknown[0]}: choose among {', '.join(get_args(Task))}")
        if unknown := [context for context in self.contexts if context not in ("all", "routed")]:
            raise UserError(f"--context {unknown[0]}: choose all or routed")
        if wrong := [length for length in self.lengths if length < 2]:
            raise UserError(f"--length {wrong[0]}: need 2 tokens or more")
        if impossible := [share for share in self.shares if not 0 <= share <= 1]:
            raise UserError(f"--share {impossible[0]}: need a share from 0 to 1")
        if self.layers < 3:
            raise UserError(f"--layers {self.layers}: need 3 or more, of which all but the first and last are routed")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here; leave it out to measure the CPU")
        if self.device not in ("cpu", "cuda") or self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--device {self.device} --dtype {self.dtype}: choose cpu or cuda, float32 or bfloat16")
        self.config(BASELINE)  # which checks itself
        # A lower bound: all weights, and one activation per layer, in 2 bytes each.
        weights = 12 * self.layers * self.width**2 + self.vocabulary * self.width
        activations = self.layers * self.width * max(self.tokens, *self.lengths)
        refuse_beyond_memory(2 * (weights + activations), "such a model and batch")

    def batch(self, length: int) -> int:
        """B."""
        return max(1, self.tokens // length)

    def candidates(self) -> list[Candidate]:
        """All candidates, the baseline first."""
        sparse = [Candidate("sparse", share, context) for context in self.contexts for share in self.shares]  # type: ignore[arg-type]
        return [BASELINE, Candidate("llama"), Candidate("dense", self.shares[0], "all"), *sparse]

    def candidates_at_one_share(self) -> list[Candidate]:
        """The candidates, but sparse ones only at `SHARE`, or at the first share if that is not among them."""
        share = SHARE if SHARE in self.shares else self.shares[0]
        return [candidate for candidate in self.candidates() if candidate.kind != "sparse" or candidate.share == share]

    def config(self, candidate: Candidate) -> ChiarConfig:
        """The config of one of our own models."""
        operators, routing = [["attention"]] * self.layers, dict[str, Any]()
        if candidate.kind != "baseline":
            operators = default_operators(self.layers)
            routing = {"execution": candidate.kind, "attention_context": candidate.context}
            routing["attention_share"] = candidate.share
        return ChiarConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_attention_heads=self.heads,
            operators=operators,
            meta_router="none",
            max_position_embeddings=max(self.lengths) + max(DECODED, *self.lengths),
            **routing,
        )

    def llama_config(self) -> LlamaConfig:
        """A Llama of the same size: three matrices of 8/3 d in the feed-forward where ours are two of 4d."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=GatedFeedForward.default_hidden(self.width),
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=2 * max(self.lengths),
            tie_word_embeddings=True,
        )

    def ids(self, length: int) -> Tensor:
        """The tokens, the same for every candidate."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(self.vocabulary, (self.batch(length), length), generator=generator).to(self.device)

    def build(self, candidate: Candidate, ids: Tensor) -> PreTrainedModel:
        """A candidate, with thresholds calibrated on the tokens that it will be timed on."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        if candidate.kind == "llama":
            llama: Any = LlamaForCausalLM(self.llama_config())
            return llama.to(self.device, dtype)
        model: Any = ChiarForCausalLM(self.config(candidate))
        model = model.to(self.device, dtype)
        if candidate.kind != "baseline":
            calibrate(model, [ids], candidate.share)
        return model

    def flops(self, candidate: Candidate, task: str, length: int) -> float:
        """Operations of one turn per token."""
        if candidate.kind == "llama":
            if task == "decode":
                longer, shorter = (count_llama_flops(self.llama_config(), n).total for n in (length + 1, length))
                return longer - shorter
            training = task == "train"
            return count_llama_flops(self.llama_config(), length, training=training, head=training).total / length
        config = self.config(candidate)
        if task == "decode":
            return count_decode_flops(config, length, share=candidate.share, rows=self.batch(length)).total
        training = task == "train"
        return count_flops(config, length, share=candidate.share, training=training, head=training).total / length


def run_benchmark(
    plan: Plan, results: Path, page: Path, console: Console, closing: Callable[[dict[str, Any]], str] = lambda _: ""
) -> dict[str, Any]:
    """Measure what the plan asks for and `results` lacks. Write results after every set of turns, the page at the end.

    If it is interrupted, the page has what was measured so far.

    Args:
        plan: what to measure.
        results: a JSON file. It is continued if it is of the same plan and machine, else refused.
        page: a Markdown file; the plot is written beside it, with the suffix .png.
        console: where the summary is printed.
        closing: makes the end of the page from the content of the JSON file.

    Returns:
        What is in the JSON file.

    Raises:
        UserError: the plan can't be measured, or the results are of another plan or machine.

    """
    plan.check()
    for folder in (results.parent, page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    found = _begin(plan, results)
    cells: list[dict[str, Any]] = found["cells"]
    # Length by length, the long ones last: they take as long as all before them.
    wanted = [("router", width) for width in ROUTER_WIDTHS if "router" in plan.tasks]
    wanted += [(task, length) for length in dict.fromkeys(plan.lengths) for task in plan.tasks if task != "router"]
    done = {(cell["task"], cell["length"]) for cell in cells}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    picture = page.with_suffix(".png")
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("", total=len(wanted), completed=len(done & set(wanted)))
            for task, length in wanted:
                if (task, length) in done:
                    continue
                progress.update(bar, description=f"{task} at {length}")
                cells.extend(_measure(plan, task, length))
                write_text(results, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
                progress.advance(bar)
    finally:
        if cells:
            write_bytes(picture, draw_performance(cells))
            write_text(page, render_page(found, picture.name) + closing(found))
    console.print(f"wrote {results}, {page} and {picture}", markup=False, highlight=False)
    return found


def _begin(plan: Plan, results: Path) -> dict[str, Any]:
    fresh: dict[str, Any] = {"plan": json.loads(json.dumps(asdict(plan))), "machine": machine(), "cells": []}
    if not results.is_file():
        return fresh
    try:
        old = json.loads(results.read_text(encoding="utf-8"))
        same = all(old[part] == fresh[part] for part in ("plan", "machine"))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{results} is not a results file of this command: name another place, or remove it") from None
    if not same:
        raise UserError(f"{results} holds results of another plan or machine: name another place, or remove it")
    return old


def _measure(plan: Plan, task: str, length: int) -> list[dict[str, Any]]:
    if task == "router":
        return _measure_router(plan, length)
    if task == "memory":
        return _measure_memory(plan, length)
    if task == "profile":
        return _measure_profile(plan, length)
    ids = plan.ids(length)
    models = {candidate: plan.build(candidate, ids) for candidate in plan.candidates()}
    work = {candidate.name: TASKS[task](model, ids) for candidate, model in models.items()}
    timings = take_turns(work, plan.seconds)
    cells: list[dict[str, Any]] = []
    for candidate, model in models.items():
        cell = _cell(plan, task, length, candidate, asdict(timings[candidate.name]))
        cell["ratio"] = timings[BASELINE.name].median / timings[candidate.name].median
        cell["flops_a_token"] = plan.flops(candidate, task, length)
        cell["predicted"] = plan.flops(BASELINE, task, length) / cell["flops_a_token"]
        if task == "decode" and isinstance(model, ChiarForCausalLM):
            cell["cache_numbers"] = _cache_of(model, ids)
            cell["cache_ratio"] = cell["cache_numbers"] / (cells[0] if cells else cell)["cache_numbers"]
        cells.append(cell)
    return cells


@torch.no_grad()
def _cache_of(model: ChiarForCausalLM, ids: Tensor) -> int:
    cache = ChiarCache(model.config)
    model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    return cache.numbers_kept()


def _measure_memory(plan: Plan, length: int) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    for candidate in plan.candidates_at_one_share():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                peak = pool.submit(_peak, plan, candidate, length).result()
            except BrokenProcessPool:
                raise UserError(
                    f"a training step of {candidate.name} at {length} tokens was killed, likely for its memory: "
                    "leave out that length"
                ) from None
        cell = _cell(plan, "memory", length, candidate, {"bytes": peak, "batch": 1})
        cell["ratio"] = peak / cells[0]["bytes"] if cells else 1.0
        cells.append(cell)
    return cells


def _measure_profile(plan: Plan, length: int) -> list[dict[str, Any]]:
    """Where the time goes, in full attention, Llama, and sparse execution at one share."""
    ids, cells = plan.ids(length), []
    for candidate in plan.candidates_at_one_share():
        if candidate.kind != "dense":
            model = plan.build(candidate, ids)
            for step, make in (("train", training_step), ("forward", forward_pass)):
                seconds = profile_by_kind(make(model, ids), plan.device)
                cells.append(_cell(plan, "profile", length, candidate, {"step": step, "seconds": seconds}))
    return cells


def _peak(plan: Plan, candidate: Candidate, length: int) -> int:
    """Of one sequence, in a process of its own."""
    ids = plan.ids(length)[:1]
    return peak_memory(lambda: training_step(plan.build(candidate, ids), ids), plan.device)


def _measure_router(plan: Plan, width: int) -> list[dict[str, Any]]:
    """The share of the router and the transform in a layer's time, at 1024 tokens a sequence or the plan's fewer."""
    torch.manual_seed(0)
    share, time = SHARE, min(1024, plan.tokens)
    x = torch.randn(plan.batch(time), time, width, device=plan.device, dtype=getattr(torch, plan.dtype))
    cells = []
    for context in plan.contexts:
        near = max(1, width // (plan.width // plan.heads))  # heads as wide as the plan's, or nearly
        heads = next(heads for heads in range(near, 0, -1) if width % (2 * heads) == 0)
        fields = {"num_attention_heads": heads, "attention_share": share, "attention_context": context}
        block = build_block(width, ["dct", "attention"], fields).to(x)
        assert isinstance(block.router, ScoreRouter)
        score = block.route(x).score
        assert score is not None
        block.router.calibration.set_from(score.flatten(), share)
        for training in (True, False):
            timings = take_turns(spectral_part(block, x, training), plan.seconds / 4)
            whole, part = timings.pop("layer"), timings.pop("router and transform")
            cells.append(
                {
                    "code": code_version(),
                    "task": "router",
                    "length": width,
                    "context": context,
                    "training": training,
                    "time": time,
                    "layer": asdict(whole),
                    "part": asdict(part),
                    "share_of_layer": part.median / whole.median,
                    "parts": {name: asdict(timing) for name, timing in timings.items()},
                }
            )
    return cells


def _cell(plan: Plan, task: str, length: int, candidate: Candidate, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "code": code_version(),
        "task": task,
        "length": length,
        "batch": plan.batch(length),
        "candidate": candidate.name,
        **{key: value for key, value in asdict(candidate).items() if value is not None},
        **figures,
    }
