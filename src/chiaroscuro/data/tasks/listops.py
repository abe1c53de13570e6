"""ListOps: nested operations on digits, whose value is a digit.

    [MAX 2 9 [MIN 4 7 ] 0 ]        → 9

The label of an expression is its value, so there are ten labels. Two kinds are generated, from a seed:

- *flat*, the paper's: one list of 4 to 8 digits under MAX, MIN, MEAN or MEDIAN, without nesting.
- *nested*, Long Range Arena's (arXiv 2011.04006): MAX, MIN, MED and SUM_MOD (the sum modulo 10) of 2 to 10 arguments,
  each a digit or, with probability 1/4, an expression itself, to a depth of 10. There an expression has 500 to 2,000
  tokens; here, for any limit, between a quarter of it and all of it.

A mean, and the median of an even number of digits, are rounded down, as both sources do. Digits and closing brackets
are words; an opening bracket and its operator are one word.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from chiaroscuro.data.tasks.generated import GeneratedTask, below
from chiaroscuro.data.tasks.task import ClassificationTask
from chiaroscuro.errors import UserError

DIGITS = tuple(str(digit) for digit in range(10))

FLAT_DIGITS = (4, 8)
DEPTH = 10
ARGUMENTS = (2, 10)
NESTED_SHARE = 0.25
LONGEST = 2000
SHORTEST_LIMIT = 8


def _mean(values: list[int]) -> int:
    return sum(values) // len(values)


def _median(values: list[int]) -> int:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def _sum_modulo_10(values: list[int]) -> int:
    return sum(values) % 10


Operator = Callable[[list[int]], int]
FLAT_OPERATORS: tuple[tuple[str, Operator], ...] = (("MAX", max), ("MIN", min), ("MEAN", _mean), ("MEDIAN", _median))
NESTED_OPERATORS: tuple[tuple[str, Operator], ...] = (
    ("MAX", max),
    ("MIN", min),
    ("MED", _median),
    ("SUM_MOD", _sum_modulo_10),
)


@dataclass(frozen=True)
class FlatListops(ClassificationTask, GeneratedTask):
    """The paper's ListOps; for the options see [`GeneratedTask`][]."""

    tokenizer = "words"
    labels = DIGITS

    @property
    def description(self) -> str:
        """The expressions in one line."""
        low, high = FLAT_DIGITS
        return f"one list of {low} to {high} digits under MAX, MIN, MEAN or MEDIAN, seed {self.seed}"

    def draw(self, random: Random) -> dict[str, Any]:
        """One expression and its value."""
        operator, evaluate = FLAT_OPERATORS[below(random, len(FLAT_OPERATORS))]
        low, high = FLAT_DIGITS
        values = [below(random, 10) for _ in range(low + below(random, high - low + 1))]
        return {"text": f"[{operator} {' '.join(map(str, values))} ]", "label": evaluate(values)}


@dataclass(frozen=True)
class NestedListops(ClassificationTask, GeneratedTask):
    """Long Range Arena's ListOps.

    Args:
        max_length: the longest expression, in words; the shortest has a quarter of it. For the others see
            [`GeneratedTask`][].

    Raises:
        UserError: max_length is not within 8 … 2000.

    """

    max_length: int = 256

    tokenizer = "words"
    labels = DIGITS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not SHORTEST_LIMIT <= self.max_length <= LONGEST:
            raise UserError(
                f"max_length={self.max_length}: an expression has from {SHORTEST_LIMIT} to {LONGEST} tokens"
            )

    @property
    def description(self) -> str:
        """The expressions in one line."""
        return (
            f"MAX, MIN, MED and SUM_MOD to a depth of {DEPTH}, {self.max_length // 4} to {self.max_length} tokens, "
            f"seed {self.seed}"
        )

    def draw(self, random: Random) -> dict[str, Any] | None:
        """One expression and its value, or None for one that has fewer than max_length // 4 or too many words."""
        words: list[str] = []

        def node(depth: int) -> int:
            if len(words) >= self.max_length:
                raise _TooLong
            # The root is an operator: a digit alone would be too short.
            if depth == DEPTH or (depth > 1 and random.random() >= NESTED_SHARE):
                value = below(random, 10)
                words.append(str(value))
                return value
            operator, evaluate = NESTED_OPERATORS[below(random, len(NESTED_OPERATORS))]
            words.append(f"[{operator}")
            low, high = ARGUMENTS
            value = evaluate([node(depth + 1) for _ in range(low + below(random, high - low + 1))])
            words.append("]")
            return value

        try:
            value = node(1)
        except _TooLong:
            return None
        if not self.max_length // 4 <= len(words) <= self.max_length:
            return None
        return {"text": " ".join(words), "label": value}


class _TooLong(Exception):
    """The expression has passed the limit."""
