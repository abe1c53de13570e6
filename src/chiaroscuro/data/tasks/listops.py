"""ListOps: small sums in brackets, whose value is a digit.

    [MAX 2 9 [MIN 4 7 ] 0 ]        → 9

The label of an expression is its value, so there are ten. Two kinds are generated here, from a seed, and no expression
stands in two splits or twice in one:

- *flat*, the paper's: one list of 4 to 8 digits under MAX, MIN, MEAN or MEDIAN. No bracket in a bracket:
  it asks for counting, not for structure.
- *nested*, Long Range Arena's (arXiv 2011.04006): MAX, MIN, MED and SUM_MOD (the sum modulo 10) of 2 to 10 arguments,
  each a digit or, one in four, again an expression, to a depth of 10. There an expression has 500 to 2,000 tokens;
  here, at any limit, between a quarter of it and all of it.

A mean, and the median of an even number of digits, are rounded down, as both sources do. Every bracket, operator and
digit is a word of its own but for the opening bracket, which belongs to its operator.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import datasets

from chiaroscuro.data.progress import patient_bar
from chiaroscuro.data.storage import fingerprint
from chiaroscuro.data.tasks.tables import kept_table
from chiaroscuro.data.tasks.task import ClassificationTask
from chiaroscuro.errors import UserError

DIGITS = tuple(str(digit) for digit in range(10))

FLAT_DIGITS = (4, 8)
DEPTH = 10
ARGUMENTS = (2, 10)
NESTED_SHARE = 0.25
LONGEST = 2000
SHORTEST_LIMIT = 8

# So many expressions in a row that were there before, or had the wrong length: there are no more of them.
PATIENCE = 100_000

# Counts up when the same seed comes to give other expressions.
FORMAT = 1

# Rows that are written at once.
BATCH = 1000


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

Expression = tuple[str, int]


def load_flat_listops(
    *, cache_dir: Path, train_examples: int = 96_000, heldout_examples: int = 2000, seed: int = 0
) -> ClassificationTask:
    """The paper's ListOps.

    Args:
        cache_dir: where the expressions are kept.
        train_examples: rows of the train split.
        heldout_examples: rows of the validation split, and of the test split.
        seed: of the expressions. The held-out ones don't depend on how many there are to train on.

    """
    return _generated(
        "listops-flat",
        f"one list of {FLAT_DIGITS[0]} to {FLAT_DIGITS[1]} digits under MAX, MIN, MEAN or MEDIAN, seed {seed}",
        _flat,
        cache_dir,
        {"train": train_examples, "heldout": heldout_examples, "seed": seed},
    )


def load_nested_listops(
    *,
    cache_dir: Path,
    train_examples: int = 96_000,
    heldout_examples: int = 2000,
    max_length: int = 256,
    seed: int = 0,
) -> ClassificationTask:
    """Long Range Arena's ListOps.

    Args:
        cache_dir: see `load_flat_listops`, as for all that is not named here.
        train_examples: see there.
        heldout_examples: see there.
        max_length: the longest expression, in words; the shortest has a quarter of it.
        seed: see there.

    Raises:
        UserError: max_length is not within 8 … 2000.

    """
    if not SHORTEST_LIMIT <= max_length <= LONGEST:
        raise UserError(f"max_length={max_length}: an expression has from {SHORTEST_LIMIT} to {LONGEST} tokens")
    return _generated(
        "listops-nested",
        f"MAX, MIN, MED and SUM_MOD to a depth of {DEPTH}, {max_length // 4} to {max_length} tokens, seed {seed}",
        lambda draw: _nested(draw, max_length),
        cache_dir,
        {"train": train_examples, "heldout": heldout_examples, "seed": seed, "max_length": max_length},
    )


def _generated(
    name: str,
    description: str,
    draw_one: Callable[[Random], Expression | None],
    cache_dir: Path,
    options: dict[str, int],
) -> ClassificationTask:
    """A task of distinct expressions: those for the test first, then for validation, then for training."""
    heldout, total = options["heldout"], 2 * options["heldout"] + options["train"]
    key = fingerprint(task=name, format=FORMAT, **options)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("uint8")})

    def make() -> Iterator[dict[str, list[Any]]]:
        expressions = _distinct(name, draw_one, Random(options["seed"]), total)
        with patient_bar(f"generating {name}", total) as advance:
            while batch := list(islice(expressions, BATCH)):
                yield {"text": [text for text, _ in batch], "label": [label for _, label in batch]}
                advance(len(batch))

    rows = kept_table(cache_dir / "tasks" / f"{name}-{key}.arrow", features, make)
    ends = {"test": (0, heldout), "validation": (heldout, 2 * heldout), "train": (2 * heldout, total)}
    splits = {split: rows.select(range(*ends[split])) for split in ("train", "validation", "test")}
    return ClassificationTask(name, description, DIGITS, splits, key, tokenizer="words")


def _distinct(
    name: str, draw_one: Callable[[Random], Expression | None], draw: Random, total: int
) -> Iterator[Expression]:
    seen: set[str] = set()
    for _ in range(total):
        for _ in range(PATIENCE):
            expression = draw_one(draw)
            if expression is not None and expression[0] not in seen:
                break
        else:
            raise UserError(
                f"{name} has not many more than {len(seen):,} such expressions: ask for fewer or longer ones"
            )
        seen.add(expression[0])
        yield expression


def _below(draw: Random, count: int) -> int:
    """A whole number from 0 to count − 1, from the one function of `random` that never changes between versions."""
    return int(draw.random() * count)


def _flat(draw: Random) -> Expression:
    operator, evaluate = FLAT_OPERATORS[_below(draw, len(FLAT_OPERATORS))]
    low, high = FLAT_DIGITS
    values = [_below(draw, 10) for _ in range(low + _below(draw, high - low + 1))]
    return f"[{operator} {' '.join(map(str, values))} ]", evaluate(values)


class _TooLong(Exception):
    """The expression that is being drawn has passed the limit."""


def _nested(draw: Random, limit: int) -> Expression | None:
    """One expression and its value, or None for one that has not between limit // 4 and limit words."""
    words: list[str] = []

    def node(depth: int) -> int:
        if len(words) >= limit:
            raise _TooLong
        # The outermost node is an operator: a digit alone would be too short.
        if depth == DEPTH or (depth > 1 and draw.random() >= NESTED_SHARE):
            value = _below(draw, 10)
            words.append(str(value))
            return value
        operator, evaluate = NESTED_OPERATORS[_below(draw, len(NESTED_OPERATORS))]
        words.append(f"[{operator}")
        low, high = ARGUMENTS
        value = evaluate([node(depth + 1) for _ in range(low + _below(draw, high - low + 1))])
        words.append("]")
        return value

    try:
        value = node(1)
    except _TooLong:
        return None
    return (" ".join(words), value) if limit // 4 <= len(words) <= limit else None
