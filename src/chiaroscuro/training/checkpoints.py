"""Folders that appear whole or not at all, and that can prove it later.

A checkpoint is half a dozen files. Written in place, a run that is killed or a disk that fills leaves some of
them behind, and the next resume trips over a truncated optimizer or, worse, over an older one. So everything
is written to `<run>/.partial/<name>`, forced to the disk, and renamed: a rename is the one step a file system
takes at once.

The last file written is a manifest with the size and SHA-256 of every other. It is what tells a complete
folder from one that a copy, a quota or a failing disk cut short afterwards.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiaroscuro.errors import UserError
from chiaroscuro.training.recipe import Recipe

MANIFEST = "manifest.json"
PARTIAL = ".partial"
GO_ON = "what was saved before is intact. Make room, then resume"
"""What to do when a run can't save; without a run there is nothing to resume."""
ELSEWHERE = "choose another place"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was found as it was written.

    Attributes:
        path: The folder.
        step: Optimizer steps taken.
        facts: What the run noted beside the files when it wrote them.
    """

    path: Path
    step: int
    facts: dict[str, Any]


def refuse_file(folder: Path, said: str) -> None:
    """Refuse a place for a folder that is a file, or lies in one.

    Args:
        folder: The place.
        said: How the user gave it: "--output x".

    Raises:
        UserError: naming the file.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{said}{'' if place == folder else f': {place}'} is a file; name a folder")


@contextmanager
def written_whole(target: Path, *, is_writer: bool = True, advice: str = GO_ON) -> Iterator[Path]:
    """Give a folder to write into, that becomes `target` when the block ends and vanishes when it fails.

    Args:
        target: What it will be called; an older folder of that name is replaced only then.
        is_writer: False on all processes but one: they write beside it but move nothing.
        advice: What to do if the file system refuses.

    Raises:
        UserError: if the file system refuses (no space, no permission); `target` is then as it was before.
    """
    partial = target.parent / PARTIAL / target.name
    try:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield partial
        if is_writer:
            _force_to_disk(partial)
            _rename_over(partial, target)
    except BaseException as error:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        reason = _why_not_written(error)
        if reason is None:
            raise
        raise UserError(f"{target} could not be saved ({reason}); {advice}") from error
    finally:
        if is_writer and partial.parent.is_dir() and not any(partial.parent.iterdir()):
            partial.parent.rmdir()


def _why_not_written(error: BaseException) -> str | None:
    """Return the reason if this is a file system's refusal, which torch and safetensors wrap as they like."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else str(error)
    text = " ".join(str(error).split())
    torch_write = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text)
    if isinstance(error, SafetensorError) or torch_write:
        full = next((c for c in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) if os.strerror(c) in text), None)
        return os.strerror(full) if full else "the file could not be written to its end; is the disk full?"
    return None


def _force_to_disk(folder: Path) -> None:
    """Without this, a power cut could leave the new name on files that were never written."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename_over(partial: Path, target: Path) -> None:
    """Rename onto `target`; an older one steps aside first, as a rename wants an empty place."""
    aside = partial.with_name(f"{target.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    os.replace(partial, target)
    shutil.rmtree(aside, ignore_errors=True)


def save_whole(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None = None
) -> None:
    """Save a model and its tokenizer for `from_pretrained`, whole or not at all.

    Args:
        folder: Where; what is there is replaced.
        model: The model.
        tokenizer: Its tokenizer.
        recipe: What it was trained by, to lie beside the weights as recipe.yaml.

    Raises:
        UserError: if the file system refuses.
    """
    with written_whole(folder, advice=ELSEWHERE) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if recipe is not None:
            (partial / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest: size and SHA-256 of every file in `folder`, and `facts` beside them."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"facts": facts, "files": files}, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run, complete or not, oldest first."""
    named = ((_NAME.fullmatch(path.name), path) for path in run.glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in named if match)


def newest_complete(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest checkpoint that is as it was written; `say` gets a line for each one passed over."""
    for step, path in reversed(checkpoints(run)):
        try:
            return Checkpoint(path, step, _verified(path))
        except (OSError, ValueError, KeyError, TypeError) as flaw:
            say(f"passing over {path.name}, which is incomplete: {flaw}")
    return None


def _verified(folder: Path) -> dict[str, Any]:
    """Return the facts of a sealed folder; a file that isn't as it was sealed is a ValueError."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, sealed in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != sealed["size"]:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes of {sealed['size']:,}")
        if _sha256(path) != sealed["sha256"]:
            raise ValueError(f"{name} is not what was written")
    return manifest["facts"]


def prune(run: Path, newest_step: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `newest_step`.

    Later ones are remains that a resume passed over: they must not push out the good ones that came before
    them.
    """
    for _, path in [entry for entry in checkpoints(run) if entry[0] <= newest_step][:-keep]:
        shutil.rmtree(path, ignore_errors=True)
