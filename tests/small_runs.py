"""A corpus of a few thousand tokens and a model of a few thousand weights: a run of them takes about a second."""

import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "light",
    "falls",
    "on",
    "a",
    "wall",
    "and",
    "what",
    "is",
    "dark",
    "stays",
    "dark",
    "until",
    "the",
    "sun",
    "has",
    "gone",
    "round",
]


def write_corpus(folder: Path) -> Path:
    draw = random.Random(0)
    for split, lines in (("train", 26), ("validation", 35)):
        text = "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(lines))
        (folder / f"{split}.txt").write_text(text + "\n")
    return folder


def recipe_content(corpus: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": {"source": str(corpus), "sequence_length": 16},
        "tokenizer": "bpe:300",
        "trainer": {
            "output_dir": str(folder),
            "steps": 12,
            "batch_size": 4,
            "warmup_steps": 2,
            "log_every": 2,
            "evaluate_every": 6,
            "save_every": 4,
        },
    }
