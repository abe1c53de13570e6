"""Files that appear whole or not at all: written beside the target, then renamed over it."""

import os
from contextlib import suppress
from pathlib import Path

from chiaroscuro.errors import UserError


def refuse_place(path: Path) -> None:
    """Refuse a file's place where none can be, before the work whose outcome it is for.

    Raises:
        UserError: the folder is missing, or the path is a folder.

    """
    if not os.path.isdir(path.parent):
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; name a file")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, replacing one that is there; an interruption leaves the old file, or none.

    Raises:
        UserError: the folder is missing, the path is a folder, or the place can't be written to.

    """
    path = Path(path)
    refuse_place(path)
    # The process id keeps two writers apart; not `tempfile`, whose files only their owner may read.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        with suppress(OSError):  # it is gone already, or the place never took it
            unfinished.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())
