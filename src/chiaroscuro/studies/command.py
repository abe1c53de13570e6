"""A study as a command: mistakes are one line on standard error, with exit code 2."""

import sys
from collections.abc import Callable

from chiaroscuro.errors import UserError


def exit_code(work: Callable[[], None]) -> int:
    """Do the work of a command: 0, or 2 and one line where it can't be done."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a study reads and writes files of the repository
        print(f"error: {error.filename}: {error.strerror}; run this in a clone of the repository", file=sys.stderr)
        return 2
    return 0
