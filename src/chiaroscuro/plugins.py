"""Modules of yours that register operators, routers or tasks, so that every command knows them.

A command learns of such a module in one of two ways: `chiaroscuro --import my_operators train …` names it, or an
installed package declares it under the entry points `chiaroscuro.plugins`:

    [project.entry-points."chiaroscuro.plugins"]
    my_operators = "my_package.operators"

Importing the module is all that happens, so it calls `register_operator`, `register_router` or `register_task` at its
top level. The runs of a sweep, which are processes of their own, import the same modules.
"""

import importlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

from chiaroscuro.errors import UserError

GROUP = "chiaroscuro.plugins"
_named: list[str] = []


def named() -> tuple[str, ...]:
    """The modules imported by name so far, in order: what a process started from here has to import, too."""
    return tuple(_named)


def import_modules(names: Iterable[str]) -> None:
    """Import modules by name, from the working directory too, as `python -m` does.

    Raises:
        UserError: the name is that of a file, there is no such module, or it fails when it is imported; the message
            names it and says why.

    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        if not name or name.endswith(".py"):
            module = name.removesuffix(".py").replace(os.sep, ".").strip(".")
            raise UserError(f"--import {name!r}: give the name of a module{f', {module}' if module else ''}")
        if name not in _named:
            _import(name, f"--import {name}")
            _named.append(name)


def import_installed() -> None:
    """Import the modules that installed packages declare as plugins.

    Raises:
        UserError: one of them fails when it is imported.

    """
    for point in entry_points(group=GROUP):
        _import(point.module, f"the plugin {point.name} ({point.module})")


def _import(module: str, said: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # the module is the user's: it may fail in any way
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        reason = "there is no such module" if missing else f"{type(error).__name__}: {error}"
        raise UserError(f"{said} can't be imported: {reason}") from error
