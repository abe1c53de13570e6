"""What a model can learn, by name: texts, labels of texts, recall from a sequence, and tasks of yours.

A new task is one file: a dataclass that derives from [`TextTask`][], [`ClassificationTask`][], [`TokenTask`][] or
[`RecallTask`][], and [`register_task`][]. `examples/copying.py` is one.
"""

from chiaroscuro.data.tasks.generated import GeneratedTask, below
from chiaroscuro.data.tasks.registry import TASKS, load_task, make_task, register_task, task_options
from chiaroscuro.data.tasks.rows import LabelledRows, PadToLongest, TokenRows, tokenize_targets, tokenize_task
from chiaroscuro.data.tasks.task import (
    ClassificationTask,
    LabelledTexts,
    RecallTask,
    Task,
    TextTask,
    TokenTargets,
    TokenTask,
)

__all__ = [
    "TASKS",
    "ClassificationTask",
    "GeneratedTask",
    "LabelledRows",
    "LabelledTexts",
    "PadToLongest",
    "RecallTask",
    "Task",
    "TextTask",
    "TokenRows",
    "TokenTargets",
    "TokenTask",
    "below",
    "load_task",
    "make_task",
    "register_task",
    "task_options",
    "tokenize_targets",
    "tokenize_task",
]
