"""The command line: `chiaroscuro COMMAND`. A command is a few lines around a function of the library.

A `UserError`, whoever raises it, becomes one line on standard error and exit code 2. With `--json` standard output
holds one JSON object and nothing else.
"""

import os
import sys
import warnings
from typing import Any, NoReturn

# Before anything of Hugging Face is imported, which reads them once: nothing phones home.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer

from chiaroscuro.allocator import keep_freed_memory

from chiaroscuro.cli import runs, models, costs  # isort: skip  # the order of the commands in the help
from chiaroscuro.cli.application import app
from chiaroscuro.errors import UserError
from chiaroscuro.report.visible import harmless

__all__ = ["app", "costs", "main", "models", "runs"]

INTERRUPTED = 130
"""The exit code that typer makes of a KeyboardInterrupt."""


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    keep_freed_memory()
    formatwarning, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        # Without its standalone mode typer returns the code of an exit, and makes one of a KeyboardInterrupt.
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            _fail("interrupted")
        if code:
            sys.exit(code)
    except UserError as error:
        _fail(str(error))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted")
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            if type(error).__name__ == "NoArgsIsHelpError":  # no command: the help is printed already
                sys.exit(2)
            context = getattr(error, "ctx", None)
            named = f" {context.info_name}" if context is not None and context.parent is not None else ""
            _fail(f"{error.format_message()} (see chiaroscuro{named} --help)")
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
            _fail("this machine has not enough memory for that: ask for something smaller")
        raise
    finally:
        warnings.formatwarning = formatwarning


def _warning(message: Any, *_: Any, **__: Any) -> str:
    """One line, without a place in the code."""
    return f"warning: {harmless(' '.join(str(message).split()))}\n"


def _fail(message: str) -> NoReturn:
    print(f"error: {harmless(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)
