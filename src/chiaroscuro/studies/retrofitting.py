"""A retrofitted copy of a decoder: routed, fitted on text and needles, and measured against the model that it was."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from rich.console import Console
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from chiaroscuro.analysis.memory import prefill_memory
from chiaroscuro.analysis.perplexity import Blocks, evaluate_blocks
from chiaroscuro.analysis.speed import decoding, forward_pass, machine, take_turns
from chiaroscuro.data import TokenBlocks, load_corpus, tokenize_corpus
from chiaroscuro.data.needles import Haystack
from chiaroscuro.errors import UserError
from chiaroscuro.files import refuse_unwritable, write_bytes, write_text
from chiaroscuro.layers.registry import with_history
from chiaroscuro.model.cache import CACHE
from chiaroscuro.model.loading import (
    load_checkpoint,
    load_checkpoint_config,
    load_checkpoint_tokenizer,
    longest_sequence,
)
from chiaroscuro.report.retrofit_figure import draw_retrofit
from chiaroscuro.report.retrofit_page import render_retrofit
from chiaroscuro.retrofitting.fitting import fit
from chiaroscuro.retrofitting.in_place import retrofit
from chiaroscuro.retrofitting.inside import noting_decisions, watching
from chiaroscuro.retrofitting.routed_cache import numbers_held
from chiaroscuro.retrofitting.routed_model import attention_modules, key_heads
from chiaroscuro.studies.controls import compare_controls, compare_lookers
from chiaroscuro.studies.evaluation import first_blocks
from chiaroscuro.studies.fitting import LONGEST_TEXT, refuse_few_rows, refuse_no_far
from chiaroscuro.studies.needles import DEPTHS, needles_found
from chiaroscuro.training import save_whole

FIGURES, PICTURE, PAGE = "retrofit.json", "retrofit.png", "retrofit.md"
FITTED = "fitted.json"
"""What was asked for and what the fit found, in the folder of a copy whose report is not written yet."""

TRIED = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Kept shares among which `target` finds the least."""


@dataclass(frozen=True)
class Measured:
    """How much to measure.

    Attributes:
        length: T of the text that perplexity is measured on.
        rows: of it.
        needles: lengths of the rows with needles.
        costs: lengths of prefill, and of the context that decoding goes on from.
        tries: needles of each depth and length.
        seconds: of the speeds of each length; 0 for none.

    `length` defaults to 2,048 tokens, `needles` and `costs` to 1,024 and 2,048, each cut to what the model reads.

    """

    length: int | None = None
    rows: int = 8
    needles: tuple[int, ...] | None = None
    costs: tuple[int, ...] | None = None
    tries: int = 4
    seconds: float = 20.0

    def within(self, most: int) -> "Measured":
        """The same with all lengths, for a model that reads so many tokens."""
        both = tuple(sorted({min(length, most) for length in (1024, 2048)}))
        length, needles, costs = self.length or min(2048, most), self.needles or both, self.costs or both
        return replace(self, length=length, needles=needles, costs=costs)


def retrofit_copy(
    name: str,
    output: Path,
    *,
    window: int = 128,
    sinks: int = 4,
    look: float = 1.0,
    kept: float = 0.25,
    heads: bool = True,
    history: int = 2048,
    layers: Sequence[int] | None = None,
    data: str = "python-docs",
    rows: int = 48,
    length: int | None = None,
    target: float | None = None,
    measured: Measured | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Save a retrofitted copy of a model, and beside it how it compares with the model that it was.

    Args:
        name: of the checkpoint: see `load_checkpoint`.
        output: the folder of the copy. `retrofit.json`, `.md` and `.png` in it hold what is found. It must not exist,
            but for one of the same call whose report was not finished: then only that is made.
        window: see `chiaroscuro.retrofit`; as `sinks` and `layers`.
        sinks: see there.
        look: the share that looks far, the mean over the layers.
        kept: the share that is kept; likewise.
        heads: whether each key-value head chooses for itself for which tokens its queries look far, and which it keeps.
        history: how many tokens of each row its thresholds follow; 0 for thresholds that stand still.
        layers: see there.
        data: a corpus. Scores are fitted on its train split and on needles and copies in it, and measured on its
            validation split.
        rows: to fit on, of `length` tokens; the last fifth is held out.
        length: see `rows`; 1,024, or as many as the model reads, unless given.
        target: instead of `kept`, the most that the perplexity may rise, 0.01 for 1%: the least share that stays below.
        measured: how much to measure.
        console: where progress is shown.

    Returns:
        What was fitted and measured, ready for JSON.

    Raises:
        UserError: the folder exists, and not by an interrupted call of the same options; or the model or the text can't
            be used.

    """
    most = longest_sequence(load_checkpoint_config(name))
    length = min(1024, most) if length is None else length
    asked: dict[str, Any] = {"MODEL": name, "--window": window, "--sinks": sinks, "--look": look, "--kv-share": kept}
    asked |= {"--one-head": not heads, "--layers": None if layers is None else list(layers), "--data": data}
    asked |= {"--history": history, "--rows": rows, "--length": length, "--target": target}
    saved = _fitted_before(output, asked) if (output / FITTED).is_file() else None
    if saved is None:
        refuse_unwritable(output)
    if target is not None and not 0 < target < 1:
        raise UserError(f"--target {target:.0%}: must be more than 0% and less than 100%, such as 1%")
    if not 0 < kept < 1:
        raise UserError(f"--kv-share {kept:g}: must be a share of the tokens, more than 0 and less than 1")
    if not 0 < look <= 1:
        raise UserError(f"--look {look:g}: must be a share of the tokens, more than 0 and at most 1")
    refuse_few_rows(rows)
    console = console or Console(stderr=True)
    model: Any = load_checkpoint(name)
    tokenizer = load_checkpoint_tokenizer(name)
    original = copy.deepcopy(model)
    grouped = key_heads(model.config) if hasattr(model.config, "num_attention_heads") else 1
    entry = with_history({"fitted": {"heads": grouped}} if heads and grouped > 1 else "fitted", history or None)
    retrofit(
        model,
        window=window,
        sinks=sinks,
        attention_share=look,
        kv_share=kept,
        layers=layers,
        router=entry,
        kv_router=entry,
    )
    measured = (measured or Measured()).within(most)
    assert measured.length is not None and measured.needles is not None and measured.costs is not None
    for option, given in (("--needles", measured.needles), ("--costs", measured.costs)):
        if min(given, default=1) < 1:
            raise UserError(f"{option} {min(given)}: must be lengths of 1 token or more")
    lengths = {"--length": length, "--text-length": measured.length}
    lengths |= {"--needles": max(measured.needles), "--costs": max(measured.costs)}
    if longer := [f"{option} {tokens}" for option, tokens in lengths.items() if tokens > most]:
        raise UserError(f"{', '.join(longer)}: {name} reads {most} tokens at most; give less")
    if most <= window + sinks:
        raise UserError(
            f"{name} reads {most} tokens at most, all within the window and the sinks: give a shorter --window"
        )
    refuse_no_far(length, window + sinks)
    for option, row in (("--length", length), *(("--needles", row) for row in measured.needles)):
        try:
            Haystack(tokenizer).needle(row, 0.5, 0, keys=4)
        except UserError as error:  # before all that takes time
            raise UserError(f"{option} {row}: {error}") from None
    corpus = load_corpus(data, needed=("train", "validation"))
    tokens = tokenize_corpus(corpus, tokenizer)
    text = Haystack(tokenizer, torch.from_numpy(tokens["train"].tokens[:LONGEST_TEXT].astype("int64")))
    validation = TokenBlocks(tokens["validation"], measured.length)
    blocks = first_blocks(validation, measured.rows)
    found: dict[str, Any] = {"model": name, "data": corpus.name, "window": window, "sinks": sinks, "fit_rows": rows}
    found |= {"fit_length": length, "length": measured.length, "rows": len(blocks)}
    with _saying(console, "perplexity of the original"):
        before = evaluate_blocks(original, blocks, batch_size=1, window=window)
    if saved is not None:
        model = load_checkpoint(str(output))
        console.print(f"{output} is fitted already: its report is made", markup=False, highlight=False)
    else:
        with _saying(console, f"fitting on {rows} rows of {length} tokens"):
            report = fit(model, text.mixture(rows, length), look=look if look < 1 else None, kept=kept)
        saved = {"asked": asked, "found": {"fit": report.figures()}}
        # Before all that is measured, which takes as long as the fit: an interruption does not lose it.
        save_whole(output, model, tokenizer, beside={FITTED: json.dumps(saved)})
    found |= saved["found"]
    if target is not None and "tried" not in found:
        with _saying(console, f"the least share that costs at most {target:.1%}"):
            saved["found"]["tried"] = found["tried"] = _least(model, blocks, before.loss, target)
        save_whole(output, model, tokenizer, beside={FITTED: json.dumps(saved)}, new=False)
    part = _Parts(output / FITTED, saved, measured, console)
    found |= part("perplexity of the copy", lambda: compare_text(before.figures(), model, blocks, window))
    found["controls"] = part("controls of who is kept", lambda: compare_controls(original, model, blocks, text))
    if look < 1:
        found["look controls"] = part("controls of who looks", lambda: compare_lookers(model, blocks))
    found["needles"], found["costs"] = [], []
    haystack, line = Haystack(tokenizer), tokens["validation"].tokens
    for row in measured.needles:
        find = partial(compare_needles, original, model, haystack, row, measured.tries)
        found["needles"] += part(f"needles in {row} tokens", find)
    for row in measured.costs:
        weigh = partial(compare_costs, original, model, line, row, measured.seconds)
        found["costs"].append(part(f"speed and cache at {row} tokens", weigh))
    found |= {"shares": dict(model.config.chiaroscuro), "machine": machine()}
    write_text(output / FIGURES, json.dumps(found, indent=2) + "\n")
    write_bytes(output / PICTURE, draw_retrofit(found))
    write_text(output / PAGE, render_retrofit(found, PICTURE))
    (output / FITTED).unlink()
    return found


def _fitted_before(output: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved beside a copy by a call that did not come to its report.

    Raises:
        UserError: the call was another one, or the file can't be read.

    """
    try:
        saved: dict[str, Any] = json.loads((output / FITTED).read_text("utf-8"))
        other = [option for option, value in asked.items() if saved["asked"].get(option) != value]
        _ = saved["found"]["fit"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{output / FITTED} can't be read ({error}): name another folder") from None
    if other:
        raise UserError(
            f"{output} exists already, and was made with another {', '.join(other)}: name another folder, or give the "
            "same options to finish its report"
        )
    return saved


class _Parts:
    """The parts of a report, each saved when it is found, so that an interrupted call goes on after the last one.

    Args:
        file: where they are saved, beside what the fit found.
        saved: what it holds. Parts of a call that was to measure something else are not taken up.
        measured: how much to measure.
        console: where progress is shown.

    """

    def __init__(self, file: Path, saved: Mapping[str, Any], measured: Measured, console: Console) -> None:
        asked = json.loads(json.dumps(asdict(measured)))
        known = saved.get("parts", {}) if saved.get("measured") == asked else {}
        self.file, self.console = file, console
        self.saved = {**saved, "measured": asked, "parts": known}

    def __call__(self, what: str, find: Callable[[], Any]) -> Any:
        known = self.saved["parts"]
        if what not in known:
            with _saying(self.console, what):
                known[what] = json.loads(json.dumps(find()))
            write_text(self.file, json.dumps(self.saved))
        return known[what]


@contextmanager
def _saying(console: Console, what: str) -> Any:
    with console.status(what):
        yield
    console.print(f"{what}: done", highlight=False)


def _least(model: Any, blocks: Blocks, loss: float, target: float) -> list[dict[str, float]]:
    """Set the least of the kept shares whose perplexity stays within the target, by halving; what was tried.

    Raises:
        UserError: there is none; the share is then what it was.

    """
    tried, low, high = [], 0, len(TRIED)
    fitted = model.config.chiaroscuro["kv_share"]
    while low < high:
        middle = (low + high) // 2
        model.set_attention_share(kv_share=TRIED[middle])
        rise = math.expm1(evaluate_blocks(model, blocks, batch_size=1).loss - loss)
        tried.append({"kv_share": TRIED[middle], "rise": rise})
        low, high = (low, middle) if rise <= target else (middle + 1, high)
    if low == len(TRIED):
        model.set_attention_share(kv_share=fitted)
        raise UserError(
            f"with {TRIED[-1]:.0%} kept the perplexity still rises by {tried[-1]['rise']:.1%}, more than {target:.1%}: "
            "leave more layers whole (--layers), or take a longer window; the copy is saved as it was fitted"
        )
    model.set_attention_share(kv_share=TRIED[low])
    return tried


@torch.no_grad()
def compare_text(before: dict[str, Any], model: Any, blocks: Any, window: int) -> dict[str, Any]:
    """Perplexity before and after, by position and on recall tokens; and whom the copy routed."""
    with watching(model) as seen:
        after = evaluate_blocks(model, blocks, batch_size=1, window=window).figures()
    return {"before": before, "after": after, "looked": seen.look, "kept": seen.kept}


def compare_needles(
    original: PreTrainedModel, model: PreTrainedModel, haystack: Haystack, length: int, tries: int
) -> list[dict[str, Any]]:
    """How many needles both models find in rows of so many tokens, by depth; one key, and four."""
    return [
        {
            "length": length,
            "keys": keys,
            "tries": tries,
            "before": needles_found(original, haystack, length, DEPTHS, tries, keys=keys),
            "after": needles_found(model, haystack, length, DEPTHS, tries, keys=keys),
        }
        for keys in (1, 4)
    ]


def compare_costs(original: Any, model: Any, text: Any, length: int, seconds: float) -> dict[str, Any]:
    """Cache and peak memory as parts of the original's, and how many times faster prefill and decoding are.

    Beside them stands how many times faster the numbers of operations and of bytes say that they should be.

    Args:
        original: the model as it was.
        model: the retrofitted one.
        text: tokens, of which those at the beginning are read; how many are kept depends on what they say.
        length: how many.
        seconds: for each speed; 0 for none.

    """
    ids = torch.from_numpy(np.resize(text[: 2**20], length).astype(np.int64))[None].to(model.device)
    numbers = numbers_kept(model, ids), numbers_kept(original, ids)
    weights = sum(p.numel() for p in original.parameters())
    found: dict[str, Any] = {
        "length": length,
        "cache": numbers[0] / numbers[1],
        "prefill predicted": predicted_prefill(model, ids),
        "decoding predicted": (weights + numbers[1]) / (weights + numbers[0]),
    }
    if not seconds:
        return found
    for kind, work in (("prefill", forward_pass), ("decoding", decoding)):
        timings = take_turns({"before": work(original, ids), "after": work(model, ids)}, seconds, turns=3)
        found[kind] = timings["before"].median / timings["after"].median
    memory = prefill_memory(model, length), prefill_memory(original, length)
    if memory[0] and memory[1]:
        found["memory"] = memory[0] / memory[1]
    return found


@torch.no_grad()
def predicted_prefill(model: Any, ids: torch.Tensor) -> float:
    """How many times fewer operations a prefill is than the original's: its products, and its pairs of tokens.

    Counted are the products with weights, the logits of one token, and for each pair of a query's head and a key
    4 c operations, c the width of a head. Layers with a sliding window of their own are counted as whole.
    """
    time = ids.shape[1]
    head = model.get_output_embeddings()
    linear = sum(2 * m.weight.numel() * (1 if m is head else time) for m in model.modules() if isinstance(m, nn.Linear))
    modules = attention_modules(model)
    causal = time * (time + 1) / 2
    pairs = dict.fromkeys(modules, causal)
    with noting_decisions(model) as decided:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for i, reach in model.reaches.items():
        looks, kept = decided[i][-1]
        pairs[i] = reached_pairs(looks[0], kept[0], reach.window, reach.sinks)
    heads = model.config.num_attention_heads
    width = {i: 4 * heads * _head_width(module) for i, module in modules.items()}
    before, after = (
        linear + sum(width[i] * each[i] for i in modules) for each in (dict.fromkeys(modules, causal), pairs)
    )
    return float(before / after)


def _head_width(module: Any) -> int:
    """c, by either name that attention modules have for it."""
    return module.head_dim if hasattr(module, "head_dim") else module.head_size


def reached_pairs(
    looks: Bool[Tensor, "time *look_heads"], kept: Bool[Tensor, "time *key_heads"], window: int, sinks: int
) -> float:
    """How many keys the queries of one row see, all in all; the mean over heads."""
    place = torch.arange(len(looks), device=looks.device)
    near = (place + 1).clamp(max=window)
    beyond = (place + 1 - window).clamp(min=0)  # so many keys are not near, the first ones
    sunk = beyond.clamp(max=sinks)
    far = kept.double().reshape(len(kept), -1)
    far[:sinks] = 0
    reached = F.pad(far.cumsum(0), (0, 0, 1, 0))[beyond]
    return float((near + sunk + (looks.reshape(len(looks), -1) * reached).mean(1)).sum())


@torch.no_grad()
def numbers_kept(model: Any, ids: torch.Tensor) -> int:
    """How many numbers a model's cache holds after these tokens."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    return numbers_held(cache)
