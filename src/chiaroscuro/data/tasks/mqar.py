"""Multi-query associative recall: pairs of a key and a value, then some of the keys again, each asking for its value.

    words     k7 v2 k3 v9 | w5 k3 w8 w1 k7 w4        (without the stroke)
    targets   .  .  .  .    .  v9 .  .  v2 .

As in zoology (Arora et al., arXiv 2312.04927), a row begins with all its pairs, and each key is asked for once. How far
from the pairs is drawn by a power law: the g-th place of a query has a probability in proportion to g^(a − 1), so that
with a small a most of them come soon and some late. All other words are noise. The keys of a row are different words,
its values too, and noise is any word but one of the row's keys: there, a key has one value only.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Any

from chiaroscuro.data.tasks.generated import GeneratedTask, below
from chiaroscuro.data.tasks.task import RecallTask
from chiaroscuro.errors import UserError

LONGEST = 2**20


@dataclass(frozen=True)
class MultiQueryRecall(RecallTask, GeneratedTask):
    """Key-value pairs, and queries for them. The depth of an answer is how many words its key stood before the query.

    Args:
        length: words of a row, an even number.
        pairs: pairs of a row, each asked for once; at most a quarter of the length.
        vocabulary: how many words there are; one half are keys, the other values.
        power: a, above 0. 1 spreads the queries evenly; the smaller it is, the nearer most of them are.

    Raises:
        UserError: an option is out of range.

    """

    train_examples: int = 20_000
    heldout_examples: int = 1000
    length: int = 64
    pairs: int = 16
    vocabulary: int = 64
    power: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 4 <= self.length <= LONGEST or self.length % 2:
            raise UserError(f"length={self.length}: must be an even number from 4 to {LONGEST:,}")
        if not 1 <= self.pairs <= self.length // 4:
            raise UserError(
                f"pairs={self.pairs}: must be from 1 to {self.length // 4}, a quarter of the length, so that each can "
                "be asked for"
            )
        if not 2 * self.pairs <= self.vocabulary <= LONGEST:
            raise UserError(
                f"vocabulary={self.vocabulary}: must be from {2 * self.pairs} to {LONGEST:,}, since half of the words "
                f"are keys and a row has {self.pairs} different ones"
            )
        if not 0 < self.power <= 1:
            raise UserError(f"power={self.power}: must be above 0 and at most 1")

    @property
    def description(self) -> str:
        """The rows in one line."""
        return f"{self.pairs} pairs of {self.vocabulary} words, asked for within {self.length} words, seed {self.seed}"

    @property
    def depths(self) -> tuple[str, ...]:
        """Distances between a key and its query, each up to twice as far as the one before."""
        return tuple(f"{2**k}–{2 ** (k + 1) - 1}" for k in range(1, (self.length - 1).bit_length()))

    def draw(self, random: Random) -> dict[str, Any]:
        """One row: the pairs, and a query for each of them at an even distance from their end."""
        half = self.vocabulary // 2
        keys, values = _some(random, half, self.pairs), [half + word for word in _some(random, half, self.pairs)]
        words = [word for pair in zip(keys, values, strict=True) for word in pair]
        taken = set(keys)
        while len(words) < self.length:
            word = below(random, self.vocabulary)
            if word not in taken:
                words.append(word)
        targets: list[str | None] = [None] * self.length
        depths: list[int | None] = [None] * self.length
        for i, gap in enumerate(self._gaps(random)):
            place = 2 * self.pairs + 2 * gap
            words[place], targets[place] = keys[i], str(values[i])
            depths[place] = (place - 2 * i).bit_length() - 2
        return {"words": [str(word) for word in words], "targets": targets, "depths": depths}

    def _gaps(self, random: Random) -> list[int]:
        """Different gaps, one for each pair, drawn by the power law.

        The smallest of the times t_g = −log u_g / p_g are a draw in proportion to p, without replacement (Efraimidis
        and Spirakis 2006).
        """
        space = (self.length - 2 * self.pairs) // 2
        times = [-math.log(1 - random.random()) * (gap + 1) ** (1 - self.power) for gap in range(space)]
        return sorted(range(space), key=times.__getitem__)[: self.pairs]


def _some(random: Random, count: int, wanted: int) -> list[int]:
    """Different whole numbers below count, in random order."""
    chosen: dict[int, None] = {}
    while len(chosen) < wanted:
        chosen[below(random, count)] = None
    return list(chosen)
