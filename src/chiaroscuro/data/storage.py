"""Where prepared data is kept, under which name, and how it gets there whole.

Every file here can be made again from its source, so the rules are few: a name is a fingerprint of everything
that decides the content (a stale file is then never found, instead of having to be recognised), and a file
appears whole or not at all. Two processes that start together may both do the work; they write the same
bytes, and the last one wins.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chiaroscuro.errors import UserError


def default_cache_dir() -> Path:
    """Return `$CHIAROSCURO_CACHE`, or `~/.cache/chiaroscuro` where that is not set."""
    return Path(os.environ.get("CHIAROSCURO_CACHE") or "~/.cache/chiaroscuro").expanduser()


def fingerprint(**parts: str | int | None) -> str:
    """Return 24 hexadecimal digits that change when any of the named parts does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Say in one line that a disk is full or a folder can't be written.

    Raises:
        UserError: instead of an OSError in the block, or an error that a library made of one.

    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = root_cause(error)
        if not (isinstance(cause, OSError) and cause.errno):  # without a number it is no news from the system
            raise
        raise UserError(
            f"cannot write to the cache folder {folder}: {one_line(cause)}; "
            "make room there, or name another folder in CHIAROSCURO_CACHE"
        ) from error


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target` to write to; it becomes `target` when the block ends well.

    Raises:
        UserError: the folder can't be made or written, or the disk is full.

    """
    with writing_to(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def root_cause(error: BaseException) -> BaseException:
    """Return the error at the bottom of a chain of `raise … from`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
