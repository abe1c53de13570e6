"""The one exception for a user's mistake.

Whatever a user can get wrong (a missing file, an unknown field, a width that the heads don't divide) raises
[`UserError`][] with a message of one line: what is wrong, and what to do. The command line prints that line and
exits with code 2; a library user catches it as the `ValueError` that it is.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the user asked for. The message is one line and says what to do."""


class LabMissing(UserError, ImportError):
    """A part of chiaroscuro was imported that needs the packages of `chiaroscuro[lab]`."""


def suggest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, if any is close, and then all of them."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1)
    return f"{f'did you mean {close[0]!r}? ' if close else ''}known are {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or what it means where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    said = next(iter(str(error).strip().splitlines()), "")
    return said or ("it ends too early" if isinstance(error, StopIteration | EOFError) else type(error).__name__)
