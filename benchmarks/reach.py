"""Near for everyone, far for some, against full attention on SDPA: training step, prefill, decoding, and the cache.

    python -m benchmarks.reach [--length 1024 --length 4096 …]

12 layers, d 256, `[local, attention]` in all but the last, which is full attention; w = 128, s = 4; random weights and
tokens, and scores by `norm`, which need no fitting and cost next to nothing. The candidates take turns, and every ratio
stands beside the one that the counts of operations predict. Figures go to benchmarks/results/reach.json.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM
from chiaroscuro.allocator import keep_freed_memory
from chiaroscuro.analysis.flops import count_decode_flops, count_flops
from chiaroscuro.analysis.speed import code_version, decoding, forward_pass, machine, take_turns, training_step
from chiaroscuro.model.calibration import calibrate

RESULTS = Path("benchmarks/results/reach.json")
LENGTHS = (256, 1024, 4096, 8192, 16384)
TOKENS = 8192
LAYERS = 12
HELD = 2**17
"""Tokens whose caches, one of each candidate, fit into the memory: longer batches are not decoded."""
CANDIDATES: dict[str, dict[str, Any]] = {
    "full attention": {},
    "look .25, kept .25": {"attention_context": "kept", "attention_share": 0.25, "kv_share": 0.25},
    "look 1, kept .25": {"attention_context": "kept", "attention_share": 1.0, "kv_share": 0.25},
    "look .25, all kept": {"attention_context": "all", "attention_share": 0.25},
}


def build(name: str, ids: torch.Tensor) -> ChiarForCausalLM:
    """A candidate, with thresholds from the tokens that it will be timed on."""
    torch.manual_seed(0)
    fields = CANDIDATES[name]
    menu = ["local", "attention"] if fields else ["attention"]
    window = {"window": 128, "sinks": 4} if fields else {}
    config = ChiarConfig(
        hidden_size=256,
        num_attention_heads=4,
        vocab_size=8192,
        operators=[menu] * (LAYERS - 1) + [[{"attention": {"window": None, "sinks": 0, "attention_context": "all"}}]],
        max_position_embeddings=2 * max(LENGTHS),
        meta_router="none",
        router="norm",
        kv_router="norm",
        **window,
        **fields,
    )
    model = ChiarForCausalLM(config)
    if fields:
        calibrate(model, [ids])
    return model


def measure(task: str, length: int, batch: int) -> list[dict[str, Any]]:
    """All candidates at one task."""
    ids = torch.randint(8192, (batch, length), generator=torch.Generator().manual_seed(length))
    models = {name: build(name, ids) for name in CANDIDATES}
    make = {"train": training_step, "forward": forward_pass, "decode": decoding}[task]
    timings = take_turns({name: make(model, ids) for name, model in models.items()}, 10.0)
    cells = []
    for name, model in models.items():
        cell = {"code": code_version(), "task": task, "length": length, "batch": batch, "candidate": name}
        cell |= asdict(timings[name])
        cell["ratio"] = timings["full attention"].median / timings[name].median
        cell["predicted"] = _operations(models["full attention"], task, length) / _operations(model, task, length)
        if task == "decode":
            cell["cache_numbers"] = _kept(model, ids)
            cell["cache_ratio"] = cell["cache_numbers"] / (cells[0] if cells else cell)["cache_numbers"]
        cells.append(cell)
    return cells


def _operations(model: ChiarForCausalLM, task: str, length: int) -> float:
    if task == "decode":
        return count_decode_flops(model.config, length).total
    return count_flops(model.config, length, training=task == "train", head=task == "train").total


@torch.no_grad()
def _kept(model: ChiarForCausalLM, ids: torch.Tensor) -> int:
    cache = ChiarCache(model.config)
    model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    return cache.numbers_kept()


def main() -> None:
    """Measure what the results lack, and print it."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, action="append")
    lengths = parser.parse_args().length or LENGTHS
    if wrong := [length for length in lengths if not 2 <= length <= max(LENGTHS)]:
        parser.error(f"--length {wrong[0]}: give 2 to {max(LENGTHS)} tokens")
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"machine": machine(), "cells": []}
    if found["machine"] != machine():
        print(f"error: {RESULTS} holds results of another machine: move it away to measure this one", file=sys.stderr)
        raise SystemExit(2)
    console = Console()
    for length in lengths:
        for task, batch in (
            ("decode", 1),
            ("decode", 16),
            ("forward", max(1, TOKENS // length)),
            ("train", max(1, TOKENS // length)),
        ):
            done = {(cell["task"], cell["length"], cell["batch"]) for cell in found["cells"]}
            if (task, length, batch) in done or batch * length > HELD:
                continue
            cells = measure(task, length, batch)
            found["cells"] += cells
            RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            for cell in cells:
                kept = f"  cache {cell['cache_ratio']:.2f}" if task == "decode" else ""
                console.print(
                    f"{task} {batch}×{length} {cell['candidate']}: {1e3 * cell['median']:.0f} ms, "
                    f"{cell['ratio']:.2f}× ({cell['predicted']:.2f}× predicted){kept}",
                    highlight=False,
                )


if __name__ == "__main__":
    main()
