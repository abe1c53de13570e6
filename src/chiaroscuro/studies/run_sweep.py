"""A sweep, from its file to its tables.

The tables are written again after every run, from the folders of the runs, so an unfinished sweep has tables of what is
done. A finished sweep writes its tables without running anything.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from chiaroscuro.errors import UserError
from chiaroscuro.files import alone_in
from chiaroscuro.report.sweep_table import number, write_results
from chiaroscuro.studies.ray_runs import RayCluster
from chiaroscuro.studies.sweep import Sweep, SweepRun, carry_out, default_jobs
from chiaroscuro.studies.sweep_results import collect_figures, describe_sweep, metric_of


class SweepInterrupted(UserError):
    """Ctrl-C, or a SIGTERM. The message says how to go on."""


def run_sweep(
    path: str | Path,
    console: Console,
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """Train the runs that a sweep lacks, and write its tables and plots.

    Args:
        path: The sweep's YAML file (see `chiaroscuro.studies.sweep`).
        console: Where progress is shown.
        overrides: `"section.field=value"`, changes of the recipe that all runs share.
        jobs: Runs at once; unless given, one per GPU or, where there is none, per core.
        ray: The address of a Ray cluster, whose machines do the runs; unless given, this machine does.

    Returns:
        What is in results.json: see `describe_sweep`.

    Raises:
        UserError: before anything runs, if a recipe is impossible, its data are missing, a folder holds another run, or
            another sweep is at work there. A run that fails raises nothing: it is listed in the table, and in the
            results under "failed".
        SweepInterrupted: on Ctrl-C, when the runs at work have saved and stopped.
    """
    sweep = Sweep.load(path, overrides)
    sweep.refuse_missing_sources()
    sweep.results.mkdir(parents=True, exist_ok=True)
    with alone_in(sweep.folder) as lock:
        sweep.refuse_other_recipes()
        cluster = None if ray is None else RayCluster(ray)
        jobs = jobs or (default_jobs() if cluster is None else cluster.jobs)
        with _Board(sweep, jobs, console) as board:
            board.write()  # if the tables can't be written, fail now and not after the first run
            try:
                begin = None if cluster is None else cluster.start
                carry_out(board.waiting(), jobs=jobs, lock=lock, watcher=board, start=begin)
            except KeyboardInterrupt:
                raise SweepInterrupted(
                    f"stopped with {len(board.figures)} of {len(sweep.runs)} runs done; the same command goes on"
                ) from None
            return board.write()


class _Board:
    """Shows the progress of a sweep, and collects its results."""

    def __init__(self, sweep: Sweep, jobs: int, console: Console) -> None:
        self.sweep, self.jobs, self.console = sweep, jobs, console
        self.figures: dict[SweepRun, dict[str, Any]] = {}
        self.failed: dict[SweepRun, str] = {}
        for run in sweep.runs:
            if run.is_done():
                self.collect(run)
        self.bars: dict[SweepRun, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "_Board":
        self.say(
            f"{self.sweep.folder}: {len(self.sweep.runs)} runs, {len(self.figures)} of them done, {self.jobs} at once"
        )
        self.whole = self.progress.add_task("sweep", total=len(self.sweep.runs), shown="")
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def waiting(self) -> list[SweepRun]:
        """The runs that are neither done nor failed."""
        return [run for run in self.sweep.runs if run not in self.figures and run not in self.failed]

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    # ---- what happens ----------------------------------------------------------------------------------------

    def started(self, run: SweepRun) -> None:
        self.bars[run] = self.progress.add_task(run.title, total=run.recipe.steps(), shown="starts")
        if not self.console.is_terminal:
            self.say(f"{run.title}: started")

    def ended(self, run: SweepRun, error: str | None) -> None:
        self.progress.remove_task(self.bars.pop(run))
        if error is None:
            self.collect(run)
        else:
            self.failed[run] = error
        outcome = _metric_line(self.figures[run]) if run in self.figures else f"failed: {self.failed[run]}"
        self.say(f"{run.title}: {outcome}  [{self._count()}]")
        try:
            self.write()
        except UserError as error:  # the others go on; the last writing raises
            self.say(f"the tables can't be written now: {error}")

    def looked(self) -> None:
        parts = 0.0
        for run, bar in self.bars.items():
            step, _ = run.last_look()
            total = run.recipe.steps()
            parts += step / total
            self.progress.update(bar, completed=step, shown=f"step {step:,} of {total:,}" if step else "starts")
        self.progress.update(self.whole, completed=len(self.figures) + len(self.failed) + parts, shown=self._count())

    def _count(self) -> str:
        words = [f"{len(self.figures)} of {len(self.sweep.runs)} done"]
        words += [f"{len(self.bars)} running"] if self.bars else []
        words += [f"{len(self.failed)} failed"] if self.failed else []
        left = self._left()
        words += [f"about {timedelta(seconds=round(left))} left"] if left else []
        return ", ".join(words)

    def _left(self) -> float | None:
        """Estimated seconds to the end, by the pace of finished runs of the same variant, or else of all."""
        paces: dict[str, list[float]] = {}
        parts: dict[SweepRun, float] = {}
        for run, figures in self.figures.items():
            paces.setdefault(run.variant, []).append(figures["seconds"])
        for run in self.bars:
            step, seconds = run.last_look()
            parts[run] = step / run.recipe.steps()
            if step:
                paces.setdefault(run.variant, []).append(seconds / parts[run])
        if not paces:
            return None
        usual = mean(pace for each in paces.values() for pace in each)
        unfinished = self.waiting()
        each = [mean(paces.get(run.variant, [usual])) * (1 - parts.get(run, 0.0)) for run in unfinished]
        return sum(each) / max(1, min(self.jobs, len(unfinished)))

    # ---- what came of it -------------------------------------------------------------------------------------

    def collect(self, run: SweepRun) -> None:
        try:
            self.figures[run] = collect_figures(run)
        except UserError as error:
            self.failed[run] = str(error)

    def write(self) -> dict[str, Any]:
        found = describe_sweep(self.sweep, self.figures, self.failed)
        write_results(found, self.sweep.results)
        return found


def _metric_line(figures: Mapping[str, Any]) -> str:
    name = metric_of(figures)
    return f"{name} {number(figures[name], name)}, {timedelta(seconds=round(figures['seconds']))} of training"
