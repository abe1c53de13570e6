"""Tasks whose rows are drawn from a seed: as many different ones as asked for, kept in the cache."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from chiaroscuro.data.progress import patient_bar
from chiaroscuro.data.storage import fingerprint
from chiaroscuro.data.tasks.tables import kept_table
from chiaroscuro.data.tasks.task import Task
from chiaroscuro.errors import UserError

# After so many draws in a row that gave nothing new, the task is taken to have no more rows.
PATIENCE = 100_000

# All rows are held in memory while they are drawn, so that none occurs twice.
MOST_EXAMPLES = 100_000_000

# Rows that are written at once.
BATCH = 1000


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task whose rows are drawn; a subclass gives `description` and `draw`.

    No input occurs in two splits or twice in one. The test rows are drawn first, then those for validation, then those
    for training, so the held-out rows don't depend on how many there are to train on.

    Args:
        train_examples: rows of the train split.
        heldout_examples: rows of the validation split, and of the test split.
        seed: of the draws.

    Attributes:
        version: to be raised when the same seed comes to give other rows.

    """

    train_examples: int = 96_000
    heldout_examples: int = 2000
    seed: int = 0

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for option in ("train_examples", "heldout_examples"):
            if not 1 <= getattr(self, option) <= MOST_EXAMPLES:
                raise UserError(f"{option}={getattr(self, option)}: must be from 1 to {MOST_EXAMPLES:,}")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: can't be negative")

    @property
    @abstractmethod
    def description(self) -> str:
        """What the rows are, in one line."""

    @abstractmethod
    def draw(self, random: Random) -> dict[str, Any] | None:
        """Draw a row.

        Args:
            random: the only source of chance. Only its method `random()` gives the same numbers in every version of
                Python ([`below`][] makes whole numbers of them).

        Returns:
            A value for each of the kind's `columns`, the first of which is the input; None where this draw gave no
            row.

        """

    def load(self, cache_dir: Path) -> Any:
        """The rows, from the cache or generated."""
        held, total = self.heldout_examples, 2 * self.heldout_examples + self.train_examples
        options = {name: value for name, value in asdict(self).items() if not name.endswith("_examples")}
        key = fingerprint(task=self.name, format=self.version, train=self.train_examples, heldout=held, **options)
        rows = kept_table(cache_dir / "tasks" / f"{self.name}-{key}.arrow", self.columns, lambda: self._batches(total))
        ends = {"train": (2 * held, total), "validation": (held, 2 * held), "test": (0, held)}
        splits = {split: rows.select(range(*end)) for split, end in ends.items()}
        return self.data(self.description, splits, key)

    def _batches(self, total: int) -> Iterator[dict[str, list[Any]]]:
        rows = self._different_rows(total)
        with patient_bar(f"generating {self.name}", total) as advance:
            while batch := list(islice(rows, BATCH)):
                yield {column: [row[column] for row in batch] for column in self.columns}
                advance(len(batch))

    def _different_rows(self, total: int) -> Iterator[dict[str, Any]]:
        random = Random(self.seed)
        seen: set[bytes] = set()  # of digests, because a long row is many times as large
        column = next(iter(self.columns))
        for _ in range(total):
            for _ in range(PATIENCE):
                row = self.draw(random)
                if row is not None and (not isinstance(row, Mapping) or set(row) != set(self.columns)):
                    drawn = (
                        f"the columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
                    )
                    raise UserError(f"{self.name}.draw() gave {drawn}: give {', '.join(self.columns)}")
                if row is not None and (digest := _digest(row[column])) not in seen:
                    break
            else:
                raise UserError(
                    f"{self.name} has hardly more than {len(seen):,} different rows with these options: ask for fewer "
                    "or longer ones"
                )
            seen.add(digest)
            yield row


def _digest(value: Any) -> bytes:
    return blake2b(str(value).encode(), digest_size=16).digest()


def below(random: Random, count: int) -> int:
    """A whole number from 0 to count − 1, by the one method of `random` whose numbers never change."""
    return int(random.random() * count)
