"""Passkey: find a number that stands somewhere in a long text of noise.

    words     … The sky is blue . k12 4 0 7 The sun is yellow . … ? k12 4 0
    targets   . . .                                               .  4  0 7

The needle in a haystack, as RULER has it (Hsieh et al., arXiv 2404.06654): the haystack is its repeated noise, five
sentences in a circle; a needle is a key and the digits of its number; the last words ask for a key. With one needle it
is RULER's single needle, and the passkey of Mohtashami and Jaggi (arXiv 2305.16300). With several it is the multi-key
needle: all but those that are asked for are there to distract. Where a needle stands is drawn evenly.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from chiaroscuro.data.tasks.generated import GeneratedTask, below
from chiaroscuro.data.tasks.task import RecallTask
from chiaroscuro.errors import UserError

HAYSTACK = "The grass is green . The sky is blue . The sun is yellow . Here we go . There and back again ."
NAMES = 64
"""Keys that needles are drawn from."""

QUESTION = "?"
DEPTHS = 10
LONGEST = 2**20
MOST_DIGITS = 32


@dataclass(frozen=True)
class Passkey(RecallTask, GeneratedTask):
    """Numbers in noise, and a question for one of them. The depth of an answer is the part of the noise before it.

    Args:
        noise: words of noise. A row is longer by the needles and the questions.
        keys: needles in a row, each with another key.
        queries: how many of them are asked for, one after the other.
        digits: of each number.

    Raises:
        UserError: an option is out of range.

    """

    train_examples: int = 20_000
    heldout_examples: int = 1000
    noise: int = 96
    keys: int = 1
    queries: int = 1
    digits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, most in (("noise", LONGEST), ("keys", NAMES), ("queries", self.keys), ("digits", MOST_DIGITS)):
            if not 1 <= getattr(self, option) <= most:
                why = ", since each query asks for another key" if option == "queries" else ""
                raise UserError(f"{option}={getattr(self, option)}: must be from 1 to {most:,}{why}")

    @property
    def description(self) -> str:
        """The rows in one line."""
        return (
            f"{self.queries} of {self.keys} numbers of {self.digits} digits in {self.noise} words of noise, "
            f"seed {self.seed}"
        )

    @property
    def depths(self) -> tuple[str, ...]:
        """Tenths of the noise."""
        return tuple(f"{10 * depth}–{10 * (depth + 1)}%" for depth in range(DEPTHS))

    def draw(self, random: Random) -> dict[str, Any]:
        """One row: the noise with its needles, and a question for the first keys that were drawn."""
        numbers: dict[str, list[str]] = {}
        while len(numbers) < self.keys:
            key = f"k{below(random, NAMES)}"
            numbers[key] = [str(below(random, 10)) for _ in range(self.digits)]
        places = {key: below(random, self.noise + 1) for key in numbers}
        circle = HAYSTACK.split()
        start = below(random, len(circle))
        noise = [circle[(start + i) % len(circle)] for i in range(self.noise)]
        words, read = [], 0
        for key in sorted(places, key=places.__getitem__):
            words += [*noise[read : places[key]], key, *numbers[key]]
            read = places[key]
        words += noise[read:]
        targets: list[str | None] = [None] * len(words)
        depths: list[int | None] = [None] * len(words)
        for key in list(numbers)[: self.queries]:
            words += [QUESTION, key, *numbers[key]]
            targets += [None, *numbers[key], None]
            depths += [None, *[DEPTHS * places[key] // (self.noise + 1)] * self.digits, None]
        return {"words": words[:-1], "targets": targets[:-1], "depths": depths[:-1]}


@dataclass(frozen=True)
class MultiKeyNeedle(Passkey):
    """RULER's multi-key needle: `Passkey` with several needles, of which one is asked for."""

    keys: int = 4
