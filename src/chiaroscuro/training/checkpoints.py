"""Checkpoints that are complete, or not there, and that can prove it later.

A checkpoint is half a dozen files. Written in place, a killed run or a full disk would leave some of them behind, and
the next resume would trip over a truncated optimizer or, worse, over an older one. So a run writes to a scratch folder
of its own, and renames what is finished (see [`chiaroscuro.files`][]).

The last file written is a manifest with the size and the SHA-256 of every other one. It tells a complete folder from
one that a copy, a quota or a failing disk cut short afterwards, and a run's checkpoint from a folder of the user's that
happens to have the name of one: that is never deleted.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiaroscuro.errors import UserError
from chiaroscuro.files import whole_folder
from chiaroscuro.training.recipe import Recipe

MANIFEST = "manifest.json"
SCRATCH = ".unfinished"
"""Where a run writes what it then renames; with a file `OURS` in it, so that a folder of the user's is told apart."""
OURS = "written-by-chiaroscuro"
GO_ON = "what was saved before is intact. Make room, then resume"
"""What to do when a run can't save."""
_NAME = re.compile(r"checkpoint-(\d+)")


class Interval(BaseModel):
    """What happened since the last training record: a resumed run's next record is to cover all of its interval.

    Attributes:
        step: The last record's step.
        seconds: The seconds trained until then.
        loss: Sum over the steps since then, mean over the processes.
        divergence: Of distillation, sum over the steps of the mean KL, mean over the processes.
        uncounted: Of distillation, sum of the part of the cross-entropies that the loss does not count; likewise.
        collapse_term: Sum of what the collapse penalty took off these losses, mean over the processes.
        second: Of mixed training, sum of the losses of the second tasks, without the penalty; likewise.
        beside: Task and figures of every second forward, those of the main process.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    divergence: float = 0.0
    uncounted: float = 0.0
    collapse_term: float = 0.0
    second: float = 0.0
    beside: list[tuple[str, dict[str, float]]] = Field(default_factory=list)


class Facts(BaseModel):
    """What a run notes beside a checkpoint's files.

    Attributes:
        tokens: The identity of the data: changes with the text, its labels and the tokenizer.
        processes: How many processes trained.
        sequences: How many sequences a step learned from, over all processes; None in older checkpoints.
        seconds: The seconds trained, without validation and saving.
        interval: Since the last training record; None in older checkpoints.
    """

    tokens: str
    processes: int
    sequences: int | None = None
    seconds: float
    interval: Interval | None = None


class _File(BaseModel):
    size: int
    sha256: str


class _Manifest(BaseModel):
    facts: Facts
    files: dict[str, _File]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file is as it was written.

    Attributes:
        path: The folder.
        step: Optimizer steps taken.
        facts: What the run noted.
    """

    path: Path
    step: int
    facts: Facts


# ---- writing -----------------------------------------------------------------------------------------------


def save_whole(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | None = None,
    beside: Mapping[str, str] | None = None,
    new: bool = True,
) -> None:
    """Save a model and its tokenizer for `from_pretrained`, whole or not at all.

    Args:
        folder: Where.
        model: The model.
        tokenizer: Its tokenizer.
        recipe: What it was trained by, saved beside the weights as recipe.yaml.
        beside: More files of text, by name.
        new: Whether the folder must not exist; one that does is replaced otherwise.

    Raises:
        UserError: if there is such a folder, or the file system refuses.
    """
    with whole_folder(folder, new=new) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if recipe is not None:
            (unfinished / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        for name, text in (beside or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")


@contextmanager
def scratch_in(run: Path) -> Iterator[Path]:
    """Give a run's scratch folder, empty; a killed run's is replaced, and at the end it is removed."""
    folder = run / SCRATCH
    refuse_foreign_scratch(run)
    _remove_scratch(folder)
    folder.mkdir()
    try:
        (folder / OURS).touch()
        yield folder
    finally:
        _remove_scratch(folder)


def _remove_scratch(folder: Path) -> None:
    """As far as the file system lets us, and the mark that it is ours last, whenever the process is killed."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != OURS:
                path.unlink(missing_ok=True)
        if {path.name for path in folder.iterdir()} <= {OURS}:
            shutil.rmtree(folder, ignore_errors=True)


def refuse_foreign_scratch(run: Path) -> None:
    """Raise if the place of the scratch folder is taken by something that no run wrote.

    Raises:
        UserError: naming it.
    """
    folder = run / SCRATCH
    empty = folder.is_dir() and not any(folder.iterdir())  # of a run that was killed before it left its mark
    if os.path.lexists(folder) and not (folder / OURS).is_file() and not empty:
        raise UserError(f"{folder} is in the way and no run wrote it; move it, or name another trainer.output_dir")


def seal(folder: Path, facts: Facts) -> None:
    """Write the manifest: size and SHA-256 of every file in `folder`, and `facts`."""
    files = {
        path.relative_to(folder).as_posix(): _File(size=path.stat().st_size, sha256=_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(_Manifest(facts=facts, files=files).model_dump_json(indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_way(place: Path) -> Path | None:
    """Rename what stands where a checkpoint is to come, unless it is a sealed one, which may be replaced.

    Returns:
        Its new place, or None if nothing was renamed.
    """
    if not os.path.lexists(place) or is_sealed(place):
        return None
    number = 1
    while os.path.lexists(aside := place.with_name(f"{place.name}.aside-{number}")):
        number += 1
    return place.rename(aside)


def prune(run: Path, newest_step: int, keep: int) -> None:
    """Delete all but the `keep` newest sealed checkpoints up to `newest_step`.

    Later ones are left over from before a resume that passed over them: they must not push out the good ones that came
    before them.
    """
    ours = [path for step, path in checkpoints(run) if step <= newest_step and is_sealed(path)]
    for path in ours[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


# ---- reading -----------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run, complete or not, oldest first."""
    return [(step, path) for step, path in named_like_checkpoints(run) if path.is_dir()]


def named_like_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that has a checkpoint's name, be it a file, ordered by step."""
    named = ((_NAME.fullmatch(path.name), path) for path in run.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in named if match)


def newest_complete(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest checkpoint that is as it was written; `say` gets a line for each one passed over."""
    for step, path in reversed(checkpoints(run)):
        try:
            return Checkpoint(path, step, _verified(path))
        except (OSError, ValueError) as flaw:
            say(f"passing over {path.name}, which is incomplete: {flaw}")
    return None


def is_sealed(folder: Path) -> bool:
    """Whether a run finished writing this folder; its files may have been damaged since."""
    try:
        _manifest_of(folder)
    except (OSError, ValueError):
        return False
    return True


def _manifest_of(folder: Path) -> _Manifest:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    try:
        return _Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except ValidationError:
        raise ValueError(f"{MANIFEST} is damaged") from None


def _verified(folder: Path) -> Facts:
    """Return the facts of a sealed folder; a file that is not as it was sealed is a ValueError."""
    manifest = _manifest_of(folder)
    for name, sealed in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != sealed.size:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes of {sealed.size:,}")
        if _sha256(path) != sealed.sha256:
            raise ValueError(f"{name} is not what was written")
    return manifest.facts
