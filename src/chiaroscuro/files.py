"""Files and folders that appear whole or not at all, and folders that one process holds alone.

What is written goes beside its target first, is forced to the disk, and is then renamed: a rename is the one step that
a file system takes at once.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from chiaroscuro.errors import UserError

ELSEWHERE = "choose another place"
"""What to do where something can't be written, unless the caller knows better."""

LOCK = ".chiaroscuro-lock"
"""The file in a folder that one process holds alone, with that process's id."""


# ---- places ------------------------------------------------------------------------------------------------


def refuse_place(path: Path) -> None:
    """Check that a file can be written to `path`, before the work that would produce its content.

    Raises:
        UserError: the parent folder is missing, or the path is a folder.

    """
    if not os.path.isdir(path.parent):
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; name a file")


def refuse_file(folder: Path, said: str) -> None:
    """Check that `folder` can be a folder: neither it nor one of its parents is a file.

    Args:
        folder: the place.
        said: how the user named it, such as "--output x".

    Raises:
        UserError: it is a file, or lies in one, or no folder can have that name.

    """
    if "\0" in str(folder):
        raise UserError(f"{said!r}: no folder can have that name, which has a null character; name another")
    for place in (folder, *folder.parents):
        try:
            is_file = place.exists() and not place.is_dir()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                return  # whoever makes the folder is told
            raise UserError(f"{said!r}: no folder can have that name ({error.strerror}); name another") from None
        if is_file:
            raise UserError(f"{said}{'' if place == folder else f': {place}'} is a file; name a folder")


def refuse_unwritable(folder: Path) -> None:
    """Check that a new folder can be made, by briefly making one in the nearest parent that exists.

    Raises:
        UserError: something of that name exists, or the file system refuses.

    """
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: name another folder")
    try:
        refuse_file(folder, str(folder))
        probe = _beside(next(place for place in folder.parents if place.exists()) / folder.name)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; {ELSEWHERE}") from None


# ---- whole files -------------------------------------------------------------------------------------------


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, replacing an existing one; an interruption leaves the old file, or none.

    A device or a pipe, such as /dev/stdout, is written to and stays what it is.

    Raises:
        UserError: the folder is missing, the path is a folder, or the file system refuses.

    """
    path = Path(path)
    refuse_place(path)
    with saying_why(path):
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with whole_file(path) as unfinished:
            unfinished.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write to; the file becomes `target` when the block succeeds.

    Where `target` is a symbolic link, the file that it points to is replaced, and the link stays.

    Raises:
        OSError: the file system refuses; `target` is then as it was.

    """
    target = Path(os.path.realpath(target))
    unfinished = _beside(target)
    try:
        yield unfinished
        _sync(unfinished)
        os.replace(unfinished, target)
        _sync(target.parent)
    finally:
        with suppress(OSError):  # already renamed, or never created
            unfinished.unlink()


# ---- whole folders -----------------------------------------------------------------------------------------


@contextmanager
def whole_folder(target: Path, *, advice: str = ELSEWHERE, new: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `target` to write to; it becomes `target` when the block succeeds.

    Args:
        target: its final name; an older folder of that name is replaced, and only then.
        advice: what the user is told to do if the file system refuses.
        new: whether there must be none of that name, in the end too. One that somebody made meanwhile stays, and the
            error says where the finished folder is instead.

    Raises:
        UserError: the file system refuses (no space, no permission), or there is such a folder; `target` is then as it
            was.

    """
    target = Path(os.path.realpath(target))
    if new and os.path.lexists(target):
        raise UserError(f"{target} exists already: name another folder")
    unfinished = _beside(target)
    with saying_why(target, advice):
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            if new and os.path.lexists(target):
                spare = target.with_name(f"{target.name}-{uuid.uuid4().hex[:6]}")
                move_whole(unfinished, spare)
                raise UserError(f"{target} was made by somebody else meanwhile: what was to go there is in {spare}")
            move_whole(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def move_whole(folder: Path, target: Path) -> None:
    """Force a finished folder to the disk and rename it to `target`, replacing an older folder of that name.

    Raises:
        OSError: the file system refuses; `target` is then as it was.

    """
    for path in [*folder.rglob("*"), folder]:
        _sync(path)  # or a power cut could leave the new name on files that were never written
    old = _beside(target)
    replaces = os.path.lexists(target)
    if replaces and _exchange(folder, target):
        old = folder
    else:
        if replaces:  # a folder can be renamed to a free name only
            os.replace(target, old)
        try:
            os.replace(folder, target)
        except OSError:
            if replaces:
                os.replace(old, target)
            raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step, so that a process killed halfway leaves both; False if that can't be.

    Linux has a system call for it, on most file systems.
    """
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _beside(target: Path) -> Path:
    # Drawn anew, to keep two writers apart. Not by `tempfile`, whose files only their owner may read.
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some file systems can't force a folder to the disk; that is no reason to lose what was written to it.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


# ---- why it failed -----------------------------------------------------------------------------------------


@contextmanager
def saying_why(target: Path, advice: str = ELSEWHERE) -> Iterator[None]:
    """Turn a failed write in the block, whichever library reports it, into one line.

    Raises:
        UserError: naming the target, the reason, and the advice.

    """
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None or _is_of_another_place(error, target):
            raise
        raise UserError(f"cannot write {target}: {reason}; {advice}") from error


def _is_of_another_place(error: Exception, target: Path) -> bool:
    """Whether an OSError names a file that is not near the target, such as one that could not be read."""
    name = getattr(error, "filename", None)
    return isinstance(name, str) and not Path(os.path.realpath(name)).is_relative_to(os.path.realpath(target.parent))


def why_not_written(error: BaseException) -> str | None:
    """The reason if `error` is a failed write, as Python, torch, safetensors or tokenizers report it; else None."""
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else str(error)
    text = " ".join(str(error).split())
    if code := re.search(r"\(os error (\d+)\)", text):  # safetensors and tokenizers, which are written in Rust
        return os.strerror(int(code[1]))
    # A file of a few hundred bytes is written when its stream is closed, which C++ says in its own words.
    torch_says = ("PytorchStreamWriter", "inline_container", "iostream error")
    if isinstance(error, RuntimeError) and any(words in text for words in torch_says):
        full = next((code for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) if os.strerror(code) in text), None)
        return os.strerror(full) if full else "torch could not write a whole file, as when the disk is full"
    return None


# ---- one process at a time ---------------------------------------------------------------------------------


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Hold a folder, created if it is missing, against every other process that would hold it.

    The lock is the operating system's. It ends with the processes that hold it, however they end: this one, and those
    that inherited the descriptor. It leaves nothing behind, not even a folder that was created for it and stayed empty.

    Yields:
        The lock's file descriptor, for child processes that are to hold the folder too.

    Raises:
        UserError: another process holds the folder, or it can't be written to.

    """
    lock = folder / LOCK
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    with saying_why(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = _take(lock)
    if held is None:
        holder = ""
        with suppress(OSError):  # it has just let go
            holder = lock.read_text().strip()
        raise UserError(
            f"{folder} is in use: a run or a sweep is at work there{holder and f', process {holder}'}; "
            "wait for it, or stop it"
        )
    try:
        yield held
    finally:
        os.close(held)
        with suppress(OSError):
            if (last := _take(lock)) is not None:  # else a child process is still at work
                lock.unlink()
                os.close(last)
                for place in created:
                    place.rmdir()  # refused, and so the rest, where there is something in it


def _take(lock: Path) -> int | None:
    """Lock the file and write this process's id into it; None where another process holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.stat().st_ino == os.fstat(descriptor).st_ino:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its holder deleted the file meanwhile: once more, with the new one
