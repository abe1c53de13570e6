"""What happens beside the training loop: shares move, progress shows, Ctrl-C is heard."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chiaroscuro.files import saying_why
from chiaroscuro.retrofitting.routed_model import FIELD, RoutedModel
from chiaroscuro.training.records import append_record, legend, routed, scalars, terminal_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from chiaroscuro.training.objectives import Objective
    from chiaroscuro.training.schedule import Course


def _chiar(wrapped: nn.Module) -> Any:
    """The model in what the trainer has wrapped around it."""
    return next(module for module in wrapped.modules() if hasattr(module, "set_attention_share"))


class TurnDials(TrainerCallback):
    """Gives the model the shares of each step, and outside the steps those that it is validated and saved with.

    Args:
        courses: the shares that change, by the model's field.
    """

    def __init__(self, courses: Mapping[str, "Course"]) -> None:
        self.courses = courses

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the steps taken before a resume have left them."""
        self._turn(kwargs["model"], {name: course.after(state.global_step) for name, course in self.courses.items()})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """For all forwards of the step, where several are accumulated."""
        step = state.global_step + 1
        self._turn(kwargs["model"], {name: course.during(step) for name, course in self.courses.items()})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before anything is validated or saved."""
        self._turn(kwargs["model"], {name: course.after(state.global_step) for name, course in self.courses.items()})

    def _turn(self, wrapped: nn.Module, shares: Mapping[str, float]) -> None:
        model = _chiar(wrapped)
        own = getattr(model.config, FIELD) if isinstance(model, RoutedModel) else vars(model.config)
        changed = {name: share for name, share in shares.items() if own[name] != share}
        # Left alone where nothing changes: thresholds that were calibrated at this share are finer than its table.
        if changed:
            model.set_attention_share(changed.get("attention_share"), kv_share=changed.get("kv_share"))


class FitScores(TrainerCallback):
    """Fits the scores by which tokens are routed, once, on what the model has become by then.

    It comes before `TurnDials`, which puts the shares back that fitting sets.

    Args:
        step: after which it does.
        fit: fits the model's scores, and says in one line how well they do.
        say: prints a line.
    """

    def __init__(self, step: int, fit: Callable[[Any], str], say: Callable[[str], None]) -> None:
        self.step = step
        self._fit = fit
        self._say = say

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step that may be routed by them; a resume after it finds them in the checkpoint."""
        if state.global_step == self.step:
            self._say(self._fit(_chiar(kwargs["model"])))


class Reporter(TrainerCallback):
    """Shows every record on the terminal, in TensorBoard and in `metrics.jsonl`, and the way still to go.

    Only the main process has one. TensorBoard's files are written here and not by transformers' TensorBoardCallback,
    which takes no nested record, puts "train/" before every name, and doesn't hide, on resume, what the interrupted run
    wrote after its checkpoint.
    """

    def __init__(self, run: Path, console: Console, tokens_per_step: int) -> None:
        self.metrics = run / "metrics.jsonl"
        self.tensorboard = run / "tensorboard"
        self.tokens_per_step = tokens_per_step
        self.writer: SummaryWriter | None = None
        self.explained = False
        self.progress = Progress(
            TextColumn("{task.description}"),
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
        self._usual = threading.excepthook
        threading.excepthook = self._hear_thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        try:
            if self.writer is not None:
                # If the run failed, that is what is told, and not that this file can't be closed either.
                with suppress(OSError) if error is not None else saying_why(self.tensorboard):
                    self.writer.close()
        finally:
            threading.excepthook = self._usual

    def _hear_thread(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread keeps its exception for the next write, which raises it: no need to print it, too."""
        if not type(failed.thread).__module__.startswith("tensorboard"):
            self._usual(failed)

    def say(self, line: str) -> None:
        """Print a line as it is: no markup, no numbers in colour, no wrapping in a log file."""
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def validating(self, objective: "Objective") -> Iterator[Callable[[int], None]]:
        """Show a bar for the validation rows; gives the function that moves it by so many rows."""
        task = self.progress.add_task("validation", total=objective.validation_rows, rate="")
        try:
            yield lambda rows: self.progress.advance(task, rows)
        finally:
            self.progress.remove_task(task)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open TensorBoard's file and show the bar."""
        from torch.utils.tensorboard import SummaryWriter  # half a second, which an error before this should not take

        # purge_step hides what an interrupted run wrote after its checkpoint.
        self.writer = SummaryWriter(str(self.tensorboard), purge_step=state.global_step + 1)
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, rate="")
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
        if not self.explained and (routed(record) or "gate" in record):
            self.say(legend(record))
            self.explained = True
        self.say(terminal_line(record, state.max_steps))


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends the run after the step in hand, saved; a second one ends it at once.

    A step cut in half can't be resumed: its gradient, its dropout and its thresholds belong together. A signal reaches
    each of several processes at another moment, or only one of them, so they tell each other after each step, and each
    batch of a validation.

    Attributes:
        heard: whether to stop, which all processes know from the same step on.

    Args:
        processes: those of the run.
        say: Prints a line.
    """

    def __init__(self, *, processes: PartialState, say: Callable[[str], None]) -> None:
        self.heard = False
        self._told = False
        self._processes = processes
        self._say = say
        self._usual: dict[int, Any] = {}
        self._listen = threading.current_thread() is threading.main_thread()

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
        self._told = True
        self.heard = self._processes.num_processes == 1
        signal.signal(number, self._usual[number])
        with suppress(RuntimeError):  # a line was being printed: the stream takes no other inside it
            self._say("stopping once the step in hand is finished and saved; Ctrl-C again stops at once")

    def ask(self) -> bool:
        """Whether any process was told to stop; all of them ask at once."""
        if self._processes.num_processes > 1 and not self.heard:
            told = torch.tensor(float(self._told), device=self._processes.device)
            self.heard = reduce(told, "sum").item() > 0
        return self.heard

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if any process was asked to."""
        if self.ask():
            control.should_save = control.should_training_stop = True
