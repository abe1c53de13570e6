"""Mixed training: in some steps, the model learns from one more batch, of another task.

Which steps, and which rows, depends on the seed and the step's number alone. So a resumed run gets the batches that an
uninterrupted one would have had, without any state to save.
"""

from collections.abc import Mapping
from random import Random

from chiaroscuro.errors import UserError


class Mixture:
    """With probability `ratio`, a step has a batch of one of the tasks, all equally likely.

    Args:
        rows: the number of train rows of each task.
        ratio: from 0 to 1; the paper's is 0.25.
        batch_size: rows of a batch on each device.
        seed: of the draws.

    Raises:
        UserError: a task has fewer rows than a batch.

    Source: the paper, v2, mixed training.

    """

    def __init__(self, rows: Mapping[str, int], ratio: float, batch_size: int, seed: int) -> None:
        for task, count in rows.items():
            if count < batch_size:
                raise UserError(
                    f"mixture.tasks.{task} has {count} rows to train on, and trainer.batch_size={batch_size}: lower it"
                )
        self.rows = dict(rows)
        self.ratio = ratio
        self.batch_size = batch_size
        self.seed = seed

    def at(self, step: int, rank: int = 0) -> tuple[str, list[int]] | None:
        """The task and the rows of a step's batch, or None if the step has none.

        Args:
            step: the number of the step.
            rank: of the process: all processes get the same task, each its own rows.

        """
        draw = Random(f"task {self.seed} {step}")
        if draw.random() >= self.ratio:
            return None
        task = draw.choice(list(self.rows))
        return task, Random(f"rows {self.seed} {step} {rank}").sample(range(self.rows[task]), self.batch_size)
