"""Who looks, chosen by each key-value head or for all of them alike: what a quarter on both sides costs.

    python -m experiments.look_by_head MODEL CORPUS [--rows 14] [--length 1024] [--measured 4]

One copy is fitted for each, on the same rows, and measured on the first rows of 2,048 tokens of the corpus' validation
split; no weight changes. The figures go to experiments/results/retrofit/look-by-head.json.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from chiaroscuro import fit, retrofit
from chiaroscuro.allocator import keep_freed_memory
from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.data import TokenBlocks, load_corpus, tokenize_corpus
from chiaroscuro.data.needles import Haystack
from chiaroscuro.model.loading import load_checkpoint, load_checkpoint_tokenizer
from chiaroscuro.retrofitting.inside import watching
from chiaroscuro.retrofitting.routed_model import key_heads
from chiaroscuro.studies.command import exit_code
from chiaroscuro.studies.evaluation import first_blocks

RESULTS = Path("experiments/results/retrofit/look-by-head.json")
NOISE = 2**22
"""Tokens of the train split from which the rows are drawn that scores are fitted on."""

LENGTH, SHARE = 2048, 0.25


def main() -> None:
    """Fit, measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "corpus"):
        parser.add_argument(name)
    for name, default in (("rows", 14), ("length", 1024), ("measured", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    keep_freed_memory()
    original: Any = load_checkpoint(given.model)
    tokenizer = load_checkpoint_tokenizer(given.model)
    tokens = tokenize_corpus(load_corpus(given.corpus), tokenizer)
    blocks = first_blocks(TokenBlocks(tokens["validation"], LENGTH), given.measured)
    rows = Haystack(tokenizer, torch.from_numpy(tokens["train"].tokens[:NOISE].astype("int64"))).mixture(
        given.rows, given.length
    )
    before = evaluate_blocks(original, blocks, batch_size=1).loss
    found: dict[str, Any] = {**vars(given), "share": SHARE}
    found["full attention"] = math.exp(before)
    by_head: Any = {"fitted": {"heads": key_heads(original.config)}}
    for name, router in (("by head", by_head), ("all heads alike", "fitted")):
        model = copy.deepcopy(original)
        retrofit(model, attention_share=SHARE, kv_share=SHARE, router=router, kv_router=by_head)
        fit(model, rows, look=SHARE, kept=SHARE)
        with watching(model) as seen:
            after = evaluate_blocks(model, blocks, batch_size=1).loss
        found[name] = {
            "perplexity": math.exp(after),
            "rise": math.expm1(after - before),
            "look": mean(seen.look.values()),
            "kept": mean(seen.kept.values()),
        }
        print(name, found[name])
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
