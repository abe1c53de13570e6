"""What happens beside the training loop: thresholds move, progress shows, Ctrl-C is heard."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chiaroscuro.training.records import append_record, forget_after, scalars, terminal_line


class MoveThresholds(TrainerCallback):
    """Running calibration: once per optimizer step, never inside a forward."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer, before anything is saved."""
        kwargs["model"].step_calibration()


class Reporter(TrainerCallback):
    """Shows every record on the terminal, in TensorBoard and in `metrics.jsonl`, and the way still to go.

    Only the main process has one.
    """

    def __init__(self, run: Path, console: Console, tokens_per_step: int) -> None:
        self.metrics = run / "metrics.jsonl"
        self.tensorboard = run / "tensorboard"
        self.tokens_per_step = tokens_per_step
        self.writer: SummaryWriter | None = None
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the logs where the checkpoint left them."""
        forget_after(self.metrics, state.global_step)
        # purge_step does the same for TensorBoard: what an interrupted run wrote beyond its checkpoint is
        # hidden.
        self.writer = SummaryWriter(str(self.tensorboard), purge_step=state.global_step + 1)
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, rate="")
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        speed = self.progress.tasks[self.task].speed
        rate = f"{speed * self.tokens_per_step:,.0f} tok/s" if speed else ""
        self.progress.update(self.task, completed=state.global_step, rate=rate)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write and print a record."""
        record = logs or {}
        append_record(self.metrics, record)
        if self.writer is not None:
            for name, value in scalars(record).items():
                self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()
        # One line stays one line: no markup, no numbers in colour, no wrapping in a log file.
        self.progress.console.print(
            terminal_line(record, state.max_steps), markup=False, highlight=False, soft_wrap=True
        )


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends the run after the step in hand, saved; a second one ends it at once.

    A step cut in half can't be resumed: its gradient, its dropout and its thresholds belong together. With
    several processes the signal would reach each at another step, so there it keeps its usual meaning.
    """

    def __init__(self, *, alone: bool) -> None:
        self.heard = False
        self._usual: dict[int, Any] = {}
        self._listen = alone and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._listen:
            self._usual = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        signal.signal(number, self._usual[number])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if asked to."""
        if self.heard:
            control.should_save = control.should_training_stop = True
