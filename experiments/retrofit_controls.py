"""Other ways to keep as many tokens of a retrofitted model, and their perplexity: `chiaroscuro.studies.controls`.

    python -m experiments.retrofit_controls ORIGINAL COPY CORPUS [--length 2048] [--rows 5]

`chiaroscuro retrofit` measures them while it makes the copy; this measures those of a copy that is there. The figures,
on the first rows of the corpus' validation split, go to experiments/results/retrofit/smollm2-controls.json.
"""

import argparse
import json
from pathlib import Path

import torch

from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.data import TokenBlocks, load_corpus, tokenize_corpus
from chiaroscuro.data.needles import Haystack
from chiaroscuro.studies.controls import compare_controls
from chiaroscuro.studies.evaluation import first_blocks
from chiaroscuro.studies.retrofitting import load_decoder

RESULTS = Path("experiments/results/retrofit/smollm2-controls.json")
NOISE = 2**22
"""Tokens of the train split from which the rows are drawn on which the gates of whole heads learn."""


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("original", "copy", "corpus"):
        parser.add_argument(name)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=5)
    given = parser.parse_args()
    (original, tokenizer), (copy, _) = (load_decoder(name) for name in (given.original, given.copy))
    tokens = tokenize_corpus(load_corpus(given.corpus), tokenizer)
    blocks = first_blocks(TokenBlocks(tokens["validation"], given.length), given.rows)
    haystack = Haystack(tokenizer, torch.from_numpy(tokens["train"].tokens[:NOISE].astype("int64")))
    found = {
        "original": evaluate_blocks(original, blocks, batch_size=1).perplexity,
        "fitted": evaluate_blocks(copy, blocks, batch_size=1).perplexity,
        **compare_controls(original, copy, blocks, haystack),
    }
    for name, perplexity in found.items():
        print(f"{name:<20} {perplexity:7.2f}  {perplexity / found['original'] - 1:+.1%}")
    RESULTS.write_text(json.dumps({"length": given.length, "rows": given.rows, "perplexity": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
