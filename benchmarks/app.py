"""How long a dial of the app takes: to route a text of 200 tokens again, and to draw it.

    python -m benchmarks.app

The model is of the size of `recipes/small.yaml`, with random weights; the figure goes to benchmarks/results/app.json.
"""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chiaroscuro import ChiarForCausalLM
from chiaroscuro.analysis.speed import machine, take_turns
from chiaroscuro.app.reading import Text, read
from chiaroscuro.app.served import Served
from chiaroscuro.app.view import ROUTING, draw_reading
from chiaroscuro.training import Recipe

RESULTS = Path("benchmarks/results/app.json")
TOKENS = 200


def main() -> None:
    """Measure, and print it."""
    torch.manual_seed(0)
    config: Any = Recipe.load("recipes/small.yaml").build_config(8192)
    model = ChiarForCausalLM(config).eval()
    ids = torch.randint(config.vocab_size, (TOKENS,)).tolist()
    text = Text(("light ",) * TOKENS, tuple(ids), (None, *(9.0,) * (TOKENS - 1)), {})
    served, shares = Served(model, None, "small"), iter(range(10**9))  # type: ignore[arg-type]

    def turn() -> None:
        draw_reading(read(served, text, 0.1 + (next(shares) % 80) / 100, None), None, ROUTING)

    timing = take_turns({"a turn of a dial": turn}, 10.0)["a turn of a dial"]
    figures = {"machine": machine(), "milliseconds": 1e3 * timing.median, "turns": timing.turns}
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    Console().print(f"{figures['milliseconds']:.0f} ms, median of {timing.turns}", highlight=False)


if __name__ == "__main__":
    main()
