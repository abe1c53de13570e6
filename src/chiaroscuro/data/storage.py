"""Where prepared data is kept, and under which name.

Everything here can be made again from its source, so the rules are few. A name is a fingerprint of all that decides
the content, so an outdated file is never found and need not be recognised. A file appears whole or not at all: two
processes that start together may both do the work; they write the same bytes, and the last one wins.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chiaroscuro.errors import UserError
from chiaroscuro.files import whole_file, why_not_written


def default_cache_dir() -> Path:
    """Return `$CHIAROSCURO_CACHE`, or `~/.cache/chiaroscuro` where that is not set."""
    return Path(os.path.expanduser(os.environ.get("CHIAROSCURO_CACHE") or "~/.cache/chiaroscuro"))


def fingerprint(**parts: str | int | None) -> str:
    """Return 24 hexadecimal digits that change when any of the named parts does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def cached_file(target: Path) -> Iterator[Path]:
    """Give a path to write to; it becomes `target`, in a folder that may be new, when the block succeeds.

    Raises:
        UserError: the folder can't be made or written, or the disk is full.

    """
    with writing_to(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as unfinished:
            yield unfinished


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Say in one line that a disk is full or a cache folder can't be written.

    Raises:
        UserError: instead of an error of the file system in the block, or one that a library made of it.

    """
    try:
        yield
    except Exception as error:
        cause = root_cause(error)
        # An OSError without a number is not from the file system, but a library's complaint about a broken file.
        reason = None if isinstance(cause, OSError) and not cause.errno else why_not_written(cause)
        if reason is None:
            raise
        raise UserError(
            f"cannot write to the cache folder {folder}: {reason}; make room there, or name another folder in "
            "CHIAROSCURO_CACHE"
        ) from error


def root_cause(error: BaseException) -> BaseException:
    """Return the error at the bottom of a chain of `raise … from`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
