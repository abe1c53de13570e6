"""English prose that every machine with Python already has: Python's own documentation.

It has two parts, both in the standard library: the chapters behind `help("assert")` (`pydoc_data.topics`), and the
docstrings of the modules. Together they are about 2 MB of prose, so the quickstart trains on real language and
downloads nothing.

The docstrings are read from the source files with `ast`. Importing the modules would run them, and would give another
text on another platform. The text differs a little between Python versions, so figures can be compared only within one;
the corpus' description names it.
"""

import ast
import functools
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from chiaroscuro.errors import UserError

# Shorter docstrings, such as "Return the name.", are hardly prose.
SHORTEST_DOCSTRING = 40

# What is not the library itself: installed packages, and the tests, programs and bundles that come with it.
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

    A topic is one document, and so is a module: its docstrings in the order of the source, separated by blank lines. A
    docstring that an earlier module has word for word (many inherited and copied methods do) is left out.

    Raises:
        UserError: this Python came without its topics or without the source files of its library. Half of the text
            would be a corpus too, but not one to compare figures on.

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
    """Yield a source file's docstrings, unindented, in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as "invalid escape sequence"
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
