"""A sweep: variants of a recipe, each trained with the same seeds, described in one YAML file.

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

These are five variants: `full-attention`, `attention_context=all,learning_rate=0.001`, and so on. The grid changes the
recipe as it is; `variants` are not crossed with it. The sweep itself sets `trainer.seed` and `trainer.output_dir`.

`{seed}` in `trainer.init_from` and `tokenizer` stands for the run's seed, so that a variant can go on from another one,
which comes before it in the file: `trainer.init_from: runs/sweeps/routers/full-attention/seed-{seed}`. Such a run waits
until that one has ended.

Every run is a process of its own, `chiaroscuro train`, so a failure doesn't affect the others. Finished runs are not
repeated and interrupted ones are resumed: to resume a sweep, start it again. The first seed of all variants comes
before the second of any, so the tables of a half-finished sweep already compare all variants.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from chiaroscuro.files import alone_in, write_text
from chiaroscuro.training.checkpoints import checkpoints
from chiaroscuro.training.recipe import (
    Folder,
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
# A name is used as a folder and in tables.
_NAME = re.compile(r"\w[\w .,=+()-]*")
_NO_NAME = re.compile(r"[^\w .,=+()-]")
_OURS = ("trainer.seed", "trainer.output_dir")
# Without these, every run would start a thread per core, and there are as many runs as cores.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_POLL = 0.5  # seconds


class SweepFile(Section):
    """The content of a sweep's file; see the module's docstring."""

    recipe: str
    output_dir: Folder
    results: Folder | None = None
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
            raise ValueError(f"baseline={self.baseline!r} is not a variant; the variants are {', '.join(changes)}")
        return self

    def changes(self) -> dict[str, dict[str, Any]]:
        """The changes of every variant: the named variants first, then the combinations of the grid."""
        lasts = [dotted.rpartition(".")[2] for dotted in self.grid]
        labels = {
            dotted: last if lasts.count(last) == 1 else dotted for dotted, last in zip(self.grid, lasts, strict=True)
        }
        changes = dict(self.variants)
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            point = dict(zip(self.grid, values, strict=True))
            name = ",".join(f"{labels[dotted]}={_shown(value)}" for dotted, value in point.items())
            if name in changes:
                raise ValueError(f"{name!r} is there twice; give every variant and every value of the grid once")
            changes[name] = point
        return changes


def _shown(value: Any) -> str:
    """A value as part of a name: lists in parentheses, other characters as hyphens (`bpe:4096`, a path)."""
    if isinstance(value, list):
        return f"({','.join(map(_shown, value))})"
    return _NO_NAME.sub("-", value) if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True, eq=False)
class SweepRun:
    """One variant with one seed.

    Attributes:
        variant: The name of the variant.
        seed: The seed of weights, data order and dropout.
        recipe: The recipe that it trains.
        content: The recipe as in YAML.
    """

    variant: str
    seed: int
    recipe: Recipe
    content: dict[str, Any] = field(repr=False)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.recipe.trainer.output_dir)

    @property
    def log(self) -> Path:
        """What its process writes."""
        return self.folder / _LOG

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{self.variant} seed {self.seed}"

    def validations(self) -> list[dict[str, Any]]:
        """The validation records so far, oldest first."""
        return [record for record in read_records(self.folder / "metrics.jsonl") if record["kind"] == "validation"]

    def is_done(self) -> bool:
        """Whether its last validation and its model exist."""
        seen = self.validations() if (self.folder / "model").is_dir() else []
        return bool(seen) and seen[-1]["step"] == self.recipe.steps()

    def last_look(self) -> tuple[int, float]:
        """(step, seconds of training) of the newest record, read from the end of the file; (0, 0) if there is none."""
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
            except (ValueError, KeyError, TypeError):  # the first line is cut off, and the last may be incomplete
                continue
        return 0, 0.0


@dataclass(frozen=True)
class Sweep:
    """A sweep, with the recipe of every run checked.

    Attributes:
        file: The content of the sweep's file.
        changes: The fields that differ from the recipe, by variant.
        runs: Seed by seed, in the order of the variants.
    """

    file: SweepFile
    changes: dict[str, dict[str, Any]]
    runs: list[SweepRun]

    @property
    def folder(self) -> Path:
        """The folder of the runs."""
        return Path(self.file.output_dir)

    @property
    def results(self) -> Path:
        """The folder of the tables and plots."""
        return Path(self.file.results or self.file.output_dir)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Sweep":
        """Read a sweep's file; build and check the recipe of every run.

        Args:
            path: The YAML file.
            overrides: `"section.field=value"`, changes of the recipe that all runs share.

        Raises:
            UserError: if the file or the recipe can't be read, or has unknown, missing or impossible fields.
        """
        path = Path(path)
        content = read_yaml(path, "sweep", "recipe:, output_dir:, seeds:, baseline: and variants:")
        try:
            file = SweepFile.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path}: {one_line(error, content, sections={'': SweepFile}, what='sweep')}") from None
        recipe = read_yaml(path.parent / file.recipe, "recipe", "model: and trainer:")
        for override in overrides:
            if (name := override.partition("=")[0].strip()) in _OURS:
                raise UserError(f"{override}: {name} is set by the sweep; change seeds or output_dir in {path}")
            override_field(recipe, override)
        changes = file.changes()
        runs = [_run(file, recipe, name, fields, seed) for seed in file.seeds for name, fields in changes.items()]
        if len({isinstance(run.recipe.data.build_task(), TextTask) for run in runs}) > 1:
            raise UserError(f"{path}: some variants model a text and others classify, which no metric compares")
        return cls(file, changes, runs)

    def refuse_missing_sources(self) -> None:
        """Raise if a run that is still to be trained names a data folder that doesn't exist.

        Raises:
            UserError: naming the variant and the folder.
        """
        for run in self.runs:
            if not run.is_done():
                mixture = run.recipe.mixture
                data = [run.recipe.data, *(mixture.tasks.values() if mixture else [])]
                sources = [each.options.get("source") for each in data]
                trainer = run.recipe.trainer
                for source in (*sources, *trainer.validation_texts.values(), *trainer.training_texts):
                    try:
                        check_source(source)
                    except UserError as error:
                        raise UserError(f"variant {run.variant!r}: {error}") from None

    def refuse_other_recipes(self) -> None:
        """Raise if a folder holds a run of another recipe, finished or resumable, or one that somebody else is at.

        Raises:
            UserError: naming the folder, and the first field that differs with both values.
        """
        for run in self.runs:
            if run.folder.is_dir() and not run.is_done():
                with alone_in(run.folder):  # or it is in use
                    pass
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
        for section, name in ((content, "tokenizer"), (content.get("trainer"), "init_from")):
            if isinstance(section, dict) and isinstance(section.get(name), str):
                section[name] = section[name].replace("{seed}", str(seed))
        set_field(content, "trainer.seed", seed)
        set_field(content, "trainer.output_dir", str(Path(file.output_dir) / variant / f"seed-{seed}"))
        checked = Recipe.from_dict(content)
        checked.steps()
    except UserError as error:
        raise UserError(f"variant {variant!r}: {error}") from None
    return SweepRun(variant, seed, checked, content)


# ---- running -----------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """Is told about the progress of a sweep."""

    def started(self, run: SweepRun) -> None:
        """A run's process has started."""

    def ended(self, run: SweepRun, error: str | None) -> None:
        """The process has ended; `error` is a line if it failed."""

    def looked(self) -> None:
        """Some time has passed."""


def default_jobs() -> int:
    """The number of GPUs that this process may use or, without a GPU, of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.cuda.device_count() or cores


class Process(Protocol):
    """A run at work, here or on another machine."""

    returncode: Any

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def wait(self) -> int:
        """Its exit code, when it has ended."""

    def terminate(self) -> None:
        """Ask it to save and stop."""

    def kill(self) -> None:
        """End it at once."""


def carry_out(
    runs: Sequence[SweepRun],
    *,
    jobs: int,
    lock: int,
    watcher: Watcher,
    start: Callable[[SweepRun, str | None, int], Process] | None = None,
) -> None:
    """Train the runs in order, `jobs` at once; a run that fails doesn't stop the others.

    A run that begins with the model of an earlier one waits until that has ended, and later ones may go before it.

    Args:
        runs: The runs to train; those with a checkpoint are resumed.
        jobs: Runs at once. Each gets a GPU of its own, if there are any.
        lock: What `alone_in` gives.
        watcher: Is told about every start and end.
        start: Begins a run with a GPU and the lock; a process of this machine unless given.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the running processes have saved and stopped.
    """
    waiting, free = list(runs), list(range(jobs))
    devices = _devices()
    running: dict[SweepRun, tuple[Process, int]] = {}
    start = start or _start
    with _terminated_like_interrupted():
        try:
            while waiting or running:
                while free and (run := _next(waiting, running)) is not None:
                    waiting.remove(run)
                    slot = free.pop(0)
                    running[run] = start(run, devices[slot % len(devices)] if devices else None, lock), slot
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


def _next(waiting: Sequence[SweepRun], running: Iterable[SweepRun]) -> SweepRun | None:
    """The first run that begins with no model which one at work, or one that waits before it, is to train."""
    unfinished = list(running)
    for run in waiting:
        if not any(_begins_with(run, other) for other in unfinished):
            return run
        unfinished.append(run)
    return None


def _begins_with(run: SweepRun, other: SweepRun) -> bool:
    folder = os.path.abspath(other.folder)
    named = (run.recipe.trainer.init_from, run.recipe.tokenizer)
    return any(Path(os.path.abspath(name)).is_relative_to(folder) for name in named if name)


def _devices() -> list[str]:
    """The GPUs by the names that CUDA_VISIBLE_DEVICES takes; if it is set, those that it names."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def prepare(run: SweepRun) -> tuple[list[str], dict[str, str]]:
    """Write a run's recipe and the first line of its log; the arguments of chiaroscuro, and its environment."""
    resume = bool(checkpoints(run.folder))
    run.folder.mkdir(parents=True, exist_ok=True)
    # The recipe as it was when the sweep started: later changes of its file don't affect the runs.
    recipe = run.folder / "recipe.yaml"
    write_text(recipe, yaml.safe_dump(run.content, sort_keys=False, allow_unicode=True))
    arguments = ["train", str(recipe), *(["--resume"] if resume else [])]
    arguments += [word for module in plugins.named() for word in ("--import", module)]
    with run.log.open("ab") as log:
        log.write(f"$ chiaroscuro {' '.join(arguments)}\n".encode())
    return arguments, {**dict.fromkeys(_THREADS, "1"), "PYTHONUNBUFFERED": "1"}


def _start(run: SweepRun, device: str | None, lock: int) -> Process:
    arguments, own = prepare(run)
    environment = {**os.environ, **own}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "chiaroscuro", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only the sweep, which asks each run once to save and stop
            pass_fds=(lock,),
        )


def _why_failed(run: SweepRun, code: int) -> str | None:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == 0:
        return None if run.is_done() else f"it ended without its last validation; see {run.log}"
    lines = [line.strip() for line in run.log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")


def _stop(processes: Sequence[Process]) -> None:
    """Ask the runs to save and stop, and wait for them; a second Ctrl-C kills them."""
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
    """Treat SIGTERM like Ctrl-C, so that the runs are stopped, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)
