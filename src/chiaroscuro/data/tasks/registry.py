"""Tasks by name: how recipes and commands find them, and how to make one of your own known to both."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from chiaroscuro.data.storage import default_cache_dir
from chiaroscuro.data.tasks.imdb import Imdb
from chiaroscuro.data.tasks.language_modelling import LanguageModelling
from chiaroscuro.data.tasks.listops import FlatListops, NestedListops
from chiaroscuro.data.tasks.mqar import MultiQueryRecall
from chiaroscuro.data.tasks.passkey import MultiKeyNeedle, Passkey
from chiaroscuro.data.tasks.retrieval import Retrieval
from chiaroscuro.data.tasks.task import Task
from chiaroscuro.errors import UserError, suggest

TASKS: dict[str, type[Task]] = {}

# What a recipe's data section says beside the task's options.
RESERVED = ("task", "sequence_length")


def register_task(name: str, cls: type[Task]) -> None:
    """Make a task available under `name`: to a recipe's `data.task`, to mixtures, and to `chiaroscuro task`.

    Args:
        name: not one that is taken.
        cls: a subclass of `TextTask`, `ClassificationTask` or `TokenTask` that is a dataclass; its fields are the
            options that the recipe's data section takes.

    Raises:
        UserError: the name is taken, or the class is no such thing.

    """
    if not isinstance(name, str) or not name or name.strip() != name:
        raise UserError(f"task name {name!r}: give a string without spaces around it")
    if not (inspect.isclass(cls) and issubclass(cls, Task) and not inspect.isabstract(cls)):
        raise UserError(f"task {name!r}: {cls!r} is not a class that derives from Task and has all its methods")
    if "__dataclass_fields__" not in cls.__dict__:
        raise UserError(f"task {name!r}: {cls.__qualname__} is not a dataclass; decorate it by @dataclass(frozen=True)")
    if TASKS.get(name, cls) is not cls:
        raise UserError(f"task {name!r} is taken by {TASKS[name].__qualname__}: choose another name")
    if cls.__dict__.get("name", name) != name:
        raise UserError(f"task {name!r}: {cls.__qualname__} is already registered as {cls.name!r}; derive a class")
    for field in fields(cls):
        if field.name in RESERVED:
            raise UserError(f"task {name!r}: an option can't be called {field.name!r}, a recipe's data section has it")
    cls.name = name
    TASKS[name] = cls


def find_task(name: str) -> type[Task]:
    """The class of a task, or a UserError that suggests a name."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: {suggest(name, TASKS)}")
    return TASKS[name]


def task_options(name: str) -> list[str]:
    """The names of a task's options."""
    return [field.name for field in fields(find_task(name))]


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """A task with these options; nothing is loaded.

    Args:
        name: a registered task.
        options: its options; None stands for the default.

    Raises:
        UserError: there is no such task, or it doesn't take such an option or value.

    """
    cls, known = find_task(name), task_options(name)
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in known:
            raise UserError(f"{option}={value!r}: the task {name} has no such option; {suggest(option, known)}")
    types = get_type_hints(cls, include_extras=True)
    for option, value in given.items():
        try:
            TypeAdapter(types[option]).validate_python(value, strict=True)
        except ValidationError as error:
            what = error.errors(include_url=False)[0]["msg"]
            raise UserError(f"{option}={value!r}: {what[0].lower()}{what[1:]}") from None
    for field in fields(cls):
        if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{field.name} is missing: the task {name} needs it")
    return cls(**given)


def load_task(name: str, cache_dir: Path | None = None, /, **options: Any) -> Any:
    """Load a task's data, or generate it: `make_task(name, options).load(cache_dir)`.

    Args:
        name: a registered task.
        cache_dir: where its rows are kept; [`default_cache_dir`][] if not given.
        options: the task's options.

    Raises:
        UserError: there is no such task, it doesn't take such an option or value, or its source can't be read.

    """
    return make_task(name, options).load(cache_dir or default_cache_dir())


register_task("language-modelling", LanguageModelling)
register_task("imdb", Imdb)
register_task("listops-flat", FlatListops)
register_task("listops-nested", NestedListops)
register_task("mqar", MultiQueryRecall)
register_task("passkey", Passkey)
register_task("niah", MultiKeyNeedle)
register_task("retrieval", Retrieval)
