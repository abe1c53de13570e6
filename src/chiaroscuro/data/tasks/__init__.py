"""Texts to be classified, by name: `imdb`, `listops-flat`, `listops-nested`.

Whatever the task, it is the same thing: splits named train, validation and test, a text and a label a row, and the
labels' names ([`ClassificationTask`][]). A new task is one file with a function that makes one, and a line in `TASKS`.
"""

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from chiaroscuro.data.storage import default_cache_dir
from chiaroscuro.data.tasks.imdb import load_imdb
from chiaroscuro.data.tasks.listops import load_flat_listops, load_nested_listops
from chiaroscuro.data.tasks.rows import LabelledRows, PadToLongest, tokenize_task
from chiaroscuro.data.tasks.task import ClassificationTask
from chiaroscuro.errors import UserError

__all__ = [
    "TASKS",
    "ClassificationTask",
    "LabelledRows",
    "PadToLongest",
    "check_task",
    "load_task",
    "task_options",
    "tokenize_task",
]

TASKS: dict[str, Callable[..., ClassificationTask]] = {
    "imdb": load_imdb,
    "listops-flat": load_flat_listops,
    "listops-nested": load_nested_listops,
}


def load_task(name: str, cache_dir: Path | None = None, **options: Any) -> ClassificationTask:
    """Load a task, or generate it.

    Args:
        name: one of `TASKS`.
        cache_dir: where its rows are kept; [`default_cache_dir`][] if not given.
        options: what this task takes ([`task_options`][]): `source` (imdb: a folder with train and test files, or a
            Hub name), `train_examples` and `seed` (listops: how many to generate, and from what), `max_length`
            (listops-nested: the longest expression in tokens). One that is None is as good as not given.

    Raises:
        UserError: there is no such task, it doesn't take such an option or value, or its source can't be read.

    """
    check_task(name, options)
    given = {option: value for option, value in options.items() if value is not None}
    return TASKS[name](cache_dir=cache_dir or default_cache_dir(), **given)


def check_task(name: str, options: dict[str, Any], others: Sequence[str] = ()) -> None:
    """Raise a UserError unless there is a task of that name which takes these options; nothing is loaded.

    Args:
        name: the task.
        options: as in `load_task`.
        others: what the name might have meant too, beside the tasks.

    """
    if name not in TASKS:
        known = [*others, *TASKS]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown task {name!r}: {hint}known are {', '.join(known)}")
    taken = task_options(name)
    for option, value in options.items():
        if value is not None and option not in taken:
            raise UserError(f"{option}={value!r}: the task {name} takes no {option}, only {', '.join(taken)}")


def task_options(name: str) -> list[str]:
    """The options that a task takes, by the signature of what loads it."""
    return [option for option in inspect.signature(TASKS[name]).parameters if option != "cache_dir"]
