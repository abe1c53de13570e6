"""Training: a recipe, `transformers.Trainer`, and a folder with everything that a run leaves."""

from typing import TYPE_CHECKING

import chiaroscuro.lab  # noqa: F401
from chiaroscuro.lazy import lazily

if TYPE_CHECKING:
    from chiaroscuro.model import MoveThresholds
    from chiaroscuro.training.checkpoints import save_whole
    from chiaroscuro.training.recipe import Recipe
    from chiaroscuro.training.records import read_records
    from chiaroscuro.training.run import TrainingInterrupted, TrainResult, train
    from chiaroscuro.training.trainer import TrainingDiverged

__all__ = [
    "MoveThresholds",
    "Recipe",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "read_records",
    "save_whole",
    "train",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "callbacks": [],
        "checkpoints": ["save_whole"],
        "recipe": ["Recipe"],
        "records": ["read_records"],
        "run": ["MoveThresholds", "TrainResult", "TrainingInterrupted", "train"],
        "trainer": ["TrainingDiverged"],
    },
)
