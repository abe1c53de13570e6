"""Folders that appear whole or not at all, and that can prove it later.

A checkpoint is half a dozen files. Written in place, a run that is killed or a disk that fills leaves some of
them behind, and the next resume trips over a truncated optimizer or, worse, over an older one. So everything
is written to `<run>/.partial/<name>`, forced to the disk, and renamed: a rename is the one step a file system
takes at once.

The last file written is a manifest with the size and SHA-256 of every other. It is what tells a complete
folder from one that a copy, a quota or a failing disk cut short afterwards.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiaroscuro.errors import UserError
from chiaroscuro.files import move_whole, whole_folder, why_not_written
from chiaroscuro.training.recipe import Recipe

MANIFEST = "manifest.json"
PARTIAL = ".partial"
GO_ON = "what was saved before is intact. Make room, then resume"
"""What to do when a run can't save; without a run there is nothing to resume."""
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
            move_whole(partial, target)
    except BaseException as error:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        reason = why_not_written(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {target}: {reason}; {advice}") from error
    finally:
        if is_writer and partial.parent.is_dir() and not any(partial.parent.iterdir()):
            partial.parent.rmdir()


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
    with whole_folder(folder) as partial:
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
