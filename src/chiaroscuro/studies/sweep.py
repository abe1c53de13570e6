"""Many runs from one page of YAML: named changes of a recipe, each with the same seeds.

    recipe: ../study.yaml                  # what all runs have in common; seen from the sweep's file
    output_dir: runs/sweeps/routers        # a run lives in output_dir/<variant>/seed-<n>
    results: experiments/results/routers   # where tables and plot go; unless given, output_dir
    seeds: [0, 1, 2]
    baseline: full-attention               # the variant that every other is held against
    variants:                              # by name: the fields that differ from the recipe
      full-attention: {model.operators: [[attention], [attention], [attention], [attention], [attention]]}
    grid:                                  # every combination of these is a variant too, named by its values
      model.attention_context: [all, routed]
      trainer.learning_rate: [1e-3, 2e-3]

Here that makes five variants: `full-attention`, `attention_context=all,learning_rate=0.001`, and so on. The grid starts
from the recipe as it stands; `variants` are not crossed with it. The sweep itself sets `trainer.seed` and
`trainer.output_dir`.

A run is a process of its own, `chiaroscuro train`, so that one that fails takes nothing with it. What is done is not
done again, and what was interrupted goes on: starting the sweep anew is how one resumes it. All seeds' first comes
before any second, so that a sweep broken off halfway can be read.
"""

import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import yaml
from pydantic import Field, ValidationError, model_validator

from chiaroscuro import plugins
from chiaroscuro.data import check_source
from chiaroscuro.data.tasks import TextTask
from chiaroscuro.errors import UserError
from chiaroscuro.files import write_text
from chiaroscuro.training.checkpoints import checkpoints
from chiaroscuro.training.recipe import (
    Recipe,
    Section,
    one_line,
    override_field,
    read_yaml,
    set_field,
)
from chiaroscuro.training.records import read_records

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Value = str | int | float | bool | list[Any] | None
_LOG = "log.txt"
# A name becomes a folder, and a cell of a table.
_NAME = re.compile(r"\w[\w .,=+()-]*")
_NO_NAME = re.compile(r"[^\w .,=+()-]")
_OURS = ("trainer.seed", "trainer.output_dir")
# Libraries that would each start a thread per core, in every one of as many runs as there are cores.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_POLL = 0.5  # seconds


class SweepFile(Section):
    """What a sweep's file says; see the module's docstring."""

    recipe: str
    output_dir: str
    results: str | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)]
    baseline: str
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "SweepFile":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: each once")
        changes = self.changes()
        if not changes:
            raise ValueError("nothing to run: name variants: or a grid:")
        for name, fields in changes.items():
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"variant {name!r}: a name is letters, digits and . , = + - ( ), and begins with a letter or digit"
                )
            for dotted in fields:
                if dotted in _OURS:
                    raise ValueError(f"variant {name!r}: {dotted} is set by the sweep; remove it")
                if not all(dotted.split(".")):
                    raise ValueError(f"variant {name!r}: {dotted!r} is not of the form section.field")
        if self.baseline not in changes:
            raise ValueError(f"baseline={self.baseline!r} is no variant; there are {', '.join(changes)}")
        return self

    def changes(self) -> dict[str, dict[str, Any]]:
        """What every variant changes: those with a name first, then the grid's combinations."""
        lasts = [dotted.rpartition(".")[2] for dotted in self.grid]
        labels = {
            dotted: last if lasts.count(last) == 1 else dotted for dotted, last in zip(self.grid, lasts, strict=True)
        }
        changes = dict(self.variants)
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            point = dict(zip(self.grid, values, strict=True))
            name = ",".join(f"{labels[dotted]}={_shown(value)}" for dotted, value in point.items())
            if name in changes:
                raise ValueError(f"{name!r} is there twice; name a variant, and every value of the grid, once")
            changes[name] = point
        return changes


def _shown(value: Any) -> str:
    """A value as a part of a name: lists in brackets, and a hyphen for what a name can't hold (`bpe:4096`, a path)."""
    if isinstance(value, list):
        return f"({','.join(map(_shown, value))})"
    return _NO_NAME.sub("-", value) if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True, eq=False)
class SweepRun:
    """One variant with one seed.

    Attributes:
        variant: Its name.
        seed: Of weights, order and dropout.
        recipe: What it trains.
        content: The same, as YAML holds it.
    """

    variant: str
    seed: int
    recipe: Recipe
    content: dict[str, Any] = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where it lives."""
        return Path(self.recipe.trainer.output_dir)

    @property
    def title(self) -> str:
        """How it is called in a line of text."""
        return f"{self.variant} seed {self.seed}"

    def validations(self) -> list[dict[str, Any]]:
        """Its validation records so far, oldest first."""
        return [record for record in read_records(self.folder / "metrics.jsonl") if record["kind"] == "validation"]

    def is_done(self) -> bool:
        """Whether its last validation and its model are there."""
        seen = self.validations() if (self.folder / "model").is_dir() else []
        return bool(seen) and seen[-1]["step"] == self.recipe.steps()

    def last_look(self) -> tuple[int, float]:
        """(step, seconds trained) of its newest record, from the end of the file alone; (0, 0) where there is none."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 2**16))
                lines = file.read().splitlines()
        except OSError:
            return 0, 0.0
        for line in reversed(lines):
            try:
                record = json.loads(line)
                return record["step"], record["seconds"]
            except (ValueError, KeyError, TypeError):  # the first line is cut off, the last may be half-written
                continue
        return 0, 0.0


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every run was checked.

    Attributes:
        file: What was asked for.
        changes: By variant, the fields that differ from the recipe.
        runs: Seed by seed, in the order of the variants.
    """

    file: SweepFile
    changes: dict[str, dict[str, Any]]
    runs: list[SweepRun]

    @property
    def folder(self) -> Path:
        """Where the runs are."""
        return Path(self.file.output_dir)

    @property
    def results(self) -> Path:
        """Where tables and plot go."""
        return Path(self.file.results or self.file.output_dir)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Sweep":
        """Read a sweep's file, and make and check the recipe of every run.

        Args:
            path: The YAML file.
            overrides: `"section.field=value"`, for the recipe that all runs have in common.

        Raises:
            UserError: if file or recipe can't be read, or say something unknown, missing or impossible.
        """
        path = Path(path)
        content = read_yaml(path, "sweep", "recipe:, output_dir:, seeds:, baseline: and variants:")
        try:
            file = SweepFile.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path}: {one_line(error, content, sections={'': SweepFile}, what='sweep')}") from None
        recipe = read_yaml(path.parent / file.recipe, "recipe", "model: and trainer:")
        for override in overrides:
            override_field(recipe, override)
        changes = file.changes()
        runs = [_run(file, recipe, name, fields, seed) for seed in file.seeds for name, fields in changes.items()]
        if len({isinstance(run.recipe.data.build_task(), TextTask) for run in runs}) > 1:
            raise UserError(f"{path}: some variants model a text and others tell labels, which no figure compares")
        return cls(file, changes, runs)

    def refuse_missing_sources(self) -> None:
        """Raise if a run that is to be trained names a folder of data that isn't there.

        Raises:
            UserError: naming the variant and the folder.
        """
        for run in self.runs:
            if not run.is_done():
                mixture = run.recipe.mixture
                for data in [run.recipe.data, *(mixture.tasks.values() if mixture else [])]:
                    try:
                        check_source(data.options.get("source"))
                    except UserError as error:
                        raise UserError(f"variant {run.variant!r}: {error}") from None

    def refuse_other_recipes(self) -> None:
        """Raise if a folder holds a run, finished or to be resumed, that another recipe began.

        Raises:
            UserError: naming the folder, the first field that differs, and both values.
        """
        for run in self.runs:
            begun = run.folder / "recipe.yaml"
            if begun.is_file() and ((run.folder / "model").is_dir() or checkpoints(run.folder)):
                try:
                    run.recipe.refuse_to_resume(Recipe.load(begun))
                except UserError as error:
                    raise UserError(f"{run.folder} holds another run: {error}") from None


def _run(file: SweepFile, recipe: Mapping[str, Any], variant: str, changes: Mapping[str, Any], seed: int) -> SweepRun:
    content = copy.deepcopy(dict(recipe))
    try:
        for name, value in copy.deepcopy(dict(changes)).items():
            set_field(content, name, value)
        set_field(content, "trainer.seed", seed)
        set_field(content, "trainer.output_dir", str(Path(file.output_dir) / variant / f"seed-{seed}"))
        checked = Recipe.from_dict(content)
        checked.steps()
    except UserError as error:
        raise UserError(f"variant {variant!r}: {error}") from None
    return SweepRun(variant, seed, checked, content)


# ---- running -----------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """Who wants to know how it goes."""

    def started(self, run: SweepRun) -> None:
        """A run's process has begun."""

    def ended(self, run: SweepRun, error: str | None) -> None:
        """It is over; the error is a line for one that failed."""

    def looked(self) -> None:
        """Some time has passed."""


def default_jobs() -> int:
    """As many runs at once as this process may use GPUs or, where there is none, cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.cuda.device_count() or cores


def carry_out(runs: Sequence[SweepRun], *, jobs: int, lock: int, watcher: Watcher) -> None:
    """Train the runs, so many at once, in order; one that fails stops no other.

    Args:
        runs: What to train; those with a checkpoint are resumed.
        jobs: How many at once. With GPUs each gets one, in turn.
        lock: What `alone_in` gave.
        watcher: Told of every start and end.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the runs at work have saved and stopped.
    """
    waiting, free = deque(runs), list(range(jobs))
    devices = _devices()
    running: dict[SweepRun, tuple[subprocess.Popen[bytes], int]] = {}
    with _terminated_like_interrupted():
        try:
            while waiting or running:
                while waiting and free:
                    run, slot = waiting.popleft(), free.pop(0)
                    running[run] = _start(run, devices[slot % len(devices)] if devices else None, lock), slot
                    watcher.started(run)
                time.sleep(_POLL)
                for run, (process, slot) in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        free.append(slot)
                        watcher.ended(run, _why_failed(run, process.returncode))
                watcher.looked()
        except BaseException:
            _stop([process for process, _ in running.values()])
            raise


def _devices() -> list[str]:
    """The GPUs by the names that CUDA_VISIBLE_DEVICES knows; where that is set already, those that it leaves."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _start(run: SweepRun, device: str | None, lock: int) -> subprocess.Popen[bytes]:
    resume = bool(checkpoints(run.folder))
    run.folder.mkdir(parents=True, exist_ok=True)
    # The recipe as it was when the sweep began, however long ago: a change of its file meanwhile changes no run.
    recipe = run.folder / "recipe.yaml"
    write_text(recipe, yaml.safe_dump(run.content, sort_keys=False, allow_unicode=True))
    environment = {**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONUNBUFFERED": "1"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    arguments = ["train", str(recipe), *(["--resume"] if resume else [])]
    arguments += [word for module in plugins.named() for word in ("--import", module)]
    with (run.folder / _LOG).open("ab") as log:
        log.write(f"$ chiaroscuro {' '.join(arguments)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "chiaroscuro", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C reaches the sweep alone, which asks each run once to save and stop
            pass_fds=(lock,),
        )


def _why_failed(run: SweepRun, code: int) -> str | None:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == 0:
        return None if run.is_done() else f"it ended without its last validation; see {run.folder / _LOG}"
    lines = [line.strip() for line in (run.folder / _LOG).read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the runs save and stop; a second Ctrl-C doesn't wait for that."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM is a Ctrl-C, so that the runs are stopped then too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)
