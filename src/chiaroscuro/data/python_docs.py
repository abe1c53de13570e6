"""English prose that every machine with Python already has: Python's own documentation.

Two sources, both part of the standard library: the chapters behind `help("assert")` (`pydoc_data.topics`),
and the docstrings of the library's modules. Together about 2 MB of text that people wrote for people, so the
quickstart trains on real language and downloads nothing.

The docstrings are read from the source files by `ast`. Importing the modules instead would run them, and
would give another text on another platform. The text still differs a little between Python versions, so
numbers compare only within one; the corpus says which one it is.
"""

import ast
import functools
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from chiaroscuro.errors import UserError

# Shorter docstrings ("Return the name.") are labels rather than prose.
SHORTEST_DOCSTRING = 40

# What is not the library itself: other people's packages, and the tests, programs and bundles that ship
# beside it.
SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "turtledemo",
        "ensurepip",
        "__pycache__",
    }
)


@functools.cache
def python_documents() -> dict[str, str]:
    """Return the documents, by name (`topic:assert`, `module:email.message`).

    A topic is one document, and so is a module: its docstrings in the order of the source, blank lines
    between. A docstring that an earlier module has word for word (inherited and copied methods have many) is
    left out.

    Raises:
        UserError: this Python came without its topics or without the source files of its library. Half the
            text would train just as well and compare with nothing.

    """
    documents = {f"topic:{name}": text.strip() for name, text in sorted(_topics().items())}
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            new = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
            if new:
                seen.update(new)
                name = ".".join(part for part in parts if part != "__init__")
                documents[f"module:{name}"] = "\n\n".join(new)
    if not seen:
        raise UserError(
            f"the corpus 'python-docs' needs the source files of Python's library, and {library} has none; "
            "use a full Python, or give a folder of text files"
        )
    return documents


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UserError(
            "the corpus 'python-docs' needs the module pydoc_data.topics, which this Python came without; "
            "use a full Python, or give a folder of text files"
        ) from error


def _docstrings(path: Path) -> Iterator[str]:
    """Yield a source file's docstrings, unindented, in the order in which they stand there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "invalid escape sequence", in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # a template of source code, not source code
            return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= SHORTEST_DOCSTRING:
            yield text
