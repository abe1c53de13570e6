"""A task in one file: copy a sequence.

    words     7 2 9 | 7 2
    targets   . . 7 2 9        (a dot: nothing to predict)

To predict the copy, a model must look back at the original, as many tokens as it is long; with dct alone it can do no
better than guess. To train on it, from the root of the clone (a minute for 300 steps, and every copy is right):

    chiaroscuro --import examples.copying train recipes/listops-flat.yaml data.task=copying trainer.steps=300
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from chiaroscuro.data.tasks import GeneratedTask, TokenTask, below, register_task
from chiaroscuro.errors import UserError

SEPARATOR = "|"


@dataclass(frozen=True)
class Copying(TokenTask, GeneratedTask):
    """Random words, a separator, and the same words again.

    Args:
        length: words to copy; a sequence has twice as many tokens.
        vocabulary: how many different words there are.

    """

    train_examples: int = 10_000
    heldout_examples: int = 500
    length: int = 8
    vocabulary: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("length", "vocabulary"):
            if not 2 <= getattr(self, option) <= 100_000:
                raise UserError(f"{option}={getattr(self, option)}: must be from 2 to 100,000")

    @property
    def description(self) -> str:
        """The sequences in one line."""
        return f"{self.length} of {self.vocabulary} words, and the same again, seed {self.seed}"

    def draw(self, random: Random) -> dict[str, Any]:
        """One sequence: from the separator on, each position predicts the next word of the copy."""
        original = [str(below(random, self.vocabulary)) for _ in range(self.length)]
        return {
            "words": [*original, SEPARATOR, *original[:-1]],
            "targets": [None] * self.length + original,
        }


register_task("copying", Copying)
