"""`transformers.Trainer`, and where a run differs from it.

1. **A step that diverges is not taken.** A loss or a gradient that isn't finite stops the run before the optimizer
   moves, so that it never reaches the weights of a checkpoint.
2. **Record, checkpoint, validation, in this order.** A kill during a long validation loses no step. A checkpoint
   appears whole or not at all (see [`checkpoints`][chiaroscuro.training.checkpoints]).
3. **Routing is looked at only in the steps that will be shown.**
4. **Validation** is the one of `chiaroscuro evaluate`, as the [`Objective`][] says. One that was cut short is made up
   for when the run is resumed.

5. **A sharded run has sharded checkpoints**, which any number of processes reads: see
   [`sharding`][chiaroscuro.training.sharding].

Some private methods of the parent are overridden. `tests/training/test_parent.py` fails when the parent no longer calls
them as it did.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from chiaroscuro.analysis.routing_summary import describe_routing, mean_gate
from chiaroscuro.data import StreamedBlocks
from chiaroscuro.errors import UserError
from chiaroscuro.files import move_whole, saying_why
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.ops.linear_cross_entropy import IGNORED
from chiaroscuro.retrofitting.whole import without_routing
from chiaroscuro.training.adapters import adapted, merge_adapters, without_adapters
from chiaroscuro.training.averaging import Averages
from chiaroscuro.training.callbacks import Reporter, StopOnSignal
from chiaroscuro.training.checkpoints import GO_ON, Facts, Interval, checkpoints, make_way, prune, seal
from chiaroscuro.training.distillation import kl_divergence
from chiaroscuro.training.objectives import Objective
from chiaroscuro.training.recipe import DistillSection
from chiaroscuro.training.records import describe_tasks
from chiaroscuro.training.schedule import Course
from chiaroscuro.training.sharding import (
    gather,
    held_here,
    load_optimizer,
    load_weights,
    save_shards,
    shard,
    unsharded_config,
    whole,
)
from chiaroscuro.training.streaming import gather_notes, write_notes


class TrainingDiverged(UserError):
    """The loss, the gradient or a weight is not a finite number any more."""


class ValidationStopped(Exception):
    """A Ctrl-C was heard during validation."""


class Clock:
    """Seconds spent training: validation and saving don't count, and a resumed run counts on."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far, with those before a resume."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside the block."""
        was_running = self._since is not None
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter() if was_running else None


@dataclass
class Run:
    """What a run knows beside the model.

    Attributes:
        folder: The run's folder.
        scratch: The folder in it where checkpoints are written before they are renamed.
        keep_checkpoints: How many checkpoints stay.
        tokens_per_step: What one optimizer step reads, over all processes; padding counts.
        facts: The identity of the data and the processes, saved with every checkpoint.
        clock: Counts the seconds.
        interval: What happened since the last training record.
        records: On resume, those up to the checkpoint.
        courses: The shares that change from step to step.
        distill: How to learn from the model's full-attention self, if that is asked for.
        averages: The mean of the weights, if that is kept.
        stop: Listens for Ctrl-C.
        reporter: Shows progress; only the main process has one.
        sharded: Whether its checkpoints are sharded.
        last: The newest record of each kind.
    """

    folder: Path
    scratch: Path
    keep_checkpoints: int
    tokens_per_step: int
    facts: Facts
    clock: Clock
    interval: Interval
    records: Sequence[dict[str, Any]]
    courses: Mapping[str, Course]
    distill: DistillSection | None
    averages: Averages | None
    stop: StopOnSignal
    reporter: Reporter | None
    sharded: bool
    last: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.last = {record["kind"]: record for record in self.records}


class RunTrainer(Trainer):
    """See the module's docstring.

    Args:
        run: What a run knows beside the model.
        objective: What there is to learn, and from what.
        kwargs: As for the parent; `args.output_dir` is the scratch folder.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    objective: Objective

    def __init__(self, *, run: Run, objective: Objective, **kwargs: Any) -> None:
        super().__init__(data_collator=objective.collate, eval_dataset=objective.validation, **kwargs)
        self.run = run
        self.objective = objective
        if run.sharded:
            shard(self.model, self.args.world_size)
            # Not before: the parent refuses a model that is sharded already, because it can't save its optimizer.
            self.is_distributed_loading_by_transformers = self.model.is_distributed_loading_by_transformers
        self._routes = hasattr(self.model, "step_calibration")  # a model of ours can say how it routed
        self._seen: list[Any] = []  # outputs of the step in hand, if it will be shown
        self._step_beside = 0  # the last step that was asked for one: with accumulation a step has several forwards
        self.add_callback(_Begin(self))

    # ---- 1. divergence -------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, or TrainingDiverged.

        Raises:
            UserError: no token of the step is predicted.

        """
        if num_items_in_batch is not None and not num_items_in_batch:
            raise UserError(
                f"step {self.state.global_step + 1} has no token to predict, for its rows are empty documents: remove "
                "empty rows from the text"
            )
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse_unless_finite("loss", loss)
        self.run.interval.loss += loss.item()
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = whole(super()._clip_grad_norm(model))
        self._refuse_unless_finite("gradient", norm)
        return norm

    def _refuse_unless_finite(self, what: str, value: Tensor) -> None:
        if not math.isfinite(value.item()):
            saved = checkpoints(self.run.folder)
            last_good = f"the last good one is {saved[-1][1]}" if saved else "none had been saved"
            raise TrainingDiverged(
                f"training diverged: the {what} is {value.item()} at step {self.state.global_step + 1}; "
                f"no checkpoint was written from it, {last_good}. Lower trainer.learning_rate and start anew"
            )

    def _refuse_broken_weights(self) -> None:
        # The optimizer can overflow a weight in a step whose loss was still finite.
        held = [held_here(parameter.detach()) for parameter in self.model.parameters()]
        largest = torch.stack([tensor.abs().max() for tensor in held if tensor.numel()]).max()
        if self.run.sharded and self.args.world_size > 1:
            largest = self.accelerator.reduce(largest, "sum")  # finite where that of every process is
        self._refuse_unless_finite("largest weight", largest)

    # ---- 2. record, checkpoint, validation -----------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The parent would validate before it saves: it is called for one of the three at a time.
        what_is_due = partial(super()._maybe_log_save_evaluate, *args, **kwargs)
        saves, evaluates = self.control.should_save, self.control.should_evaluate
        self.control.should_save = self.control.should_evaluate = False
        if self.state.global_step == self.state.max_steps:
            self.control.should_log = True  # the last step ends an interval, be it a short one
        what_is_due()
        with self.run.clock.paused():
            if saves:
                self._save_step(what_is_due)
            if evaluates:
                try:
                    self.control.should_evaluate = True
                    what_is_due()
                except ValidationStopped:
                    self.control.should_evaluate = False
                    if not saves:
                        self._save_step(what_is_due)
                    self.control.should_training_stop = True

    def _save_step(self, what_is_due: Callable[[], None]) -> None:
        self._refuse_broken_weights()
        facts = self._facts()
        target = self.run.folder / f"checkpoint-{self.state.global_step}"
        finished = self.run.scratch / target.name
        with saying_why(target, GO_ON):
            self.control.should_save = True
            what_is_due()
            self.accelerator.wait_for_everyone()
            notes = None
            if isinstance(self.train_dataset, StreamedBlocks):
                notes = gather_notes(self.train_dataset, self.args.world_size)
            if self.args.should_save:
                if notes is not None:
                    write_notes(finished, notes)
                # A pickle of the TrainingArguments, which nothing here reads: recipe.yaml says the same, and is safe.
                (finished / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                if self.run.averages is not None:
                    self.run.averages.save(finished)
                seal(finished, facts)
                if (aside := make_way(target)) and self.run.reporter is not None:
                    self.run.reporter.say(f"{target} was not a complete checkpoint; it is {aside.name} now")
                move_whole(finished, target)
                prune(self.run.folder, self.state.global_step, self.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _facts(self) -> Facts:
        names = ("loss", "divergence", "uncounted", "collapse_term", "second")
        sums = {name: self._mean_over_processes(getattr(self.run.interval, name)) for name in names}
        interval = self.run.interval.model_copy(update=sums)
        return self.run.facts.model_copy(update={"seconds": self.run.clock.seconds, "interval": interval})

    def _mean_over_processes(self, value: float) -> float:
        if self.args.world_size == 1:
            return value
        return self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.args.device), "mean").item()

    def save_final_model(self, target: Path) -> None:
        """Save the model and its tokenizer, for `from_pretrained`, whole or not at all."""
        self._refuse_broken_weights()
        finished = self.run.scratch / target.name
        with saying_why(target, GO_ON):
            self.accelerator.wait_for_everyone()
            with self._averaged():
                merge_adapters(self.model)
                self.save_model(str(finished))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (finished / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                move_whole(finished, target)

    # ---- 3. looking ----------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss; in a step that will be shown, look at the routing too."""
        step, interval = self.state.global_step + 1, self.run.interval
        shown = step == 1 or step % self.args.logging_steps == 0 or step == self.state.max_steps
        look = self._routes and shown
        inputs = {**inputs, **self.objective.inputs, **({"output_routing": True} if look else {})}
        drawn = self.objective.beside(step, self.args.process_index) if step != self._step_beside else None
        self._step_beside = step
        if drawn is not None:
            name, second = drawn
            inputs["beside"] = {**send_to_device(second, self.args.device), "output_routing": True}
        teacher = None
        if self.run.distill is not None:
            teacher = self._with_full_attention(inputs)
            inputs["output_hidden_states"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.run.distill is not None and teacher is not None:
            divergence = self._divergence(
                outputs.hidden_states[-1], teacher, inputs["shift_labels"], num_items_in_batch
            )
            uncounted = (1 - self.run.distill.cross_entropy) * self._of_text(loss, outputs)
            loss = loss - uncounted + self.run.distill.factor * divergence
            interval.divergence += divergence.item()
            interval.uncounted += uncounted.item()
        interval.collapse_term += self._part_of_step() * _collapse_term(outputs)
        if drawn is not None:
            # The Trainer multiplies by the processes what was divided by the items of all of them, as the text's loss
            # was; this one is a mean of its own.
            loss = loss - (self.args.world_size - 1) * outputs.beside.loss
            look_beside = (outputs.beside.routing, outputs.beside.meta_gate)
            second_loss, second_term = outputs.beside.loss.item(), _collapse_term(outputs.beside)
            interval.collapse_term += second_term
            interval.second += second_loss + second_term
            interval.beside.append((name, {"loss": second_loss + second_term, **mean_gate([look_beside])}))
        if look:
            self._seen.append((outputs.routing, outputs.meta_gate))
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _with_full_attention(self, inputs: dict[str, Any]) -> Tensor:
        """What the head would see if all tokens went to attention; nothing of the model is another afterwards.

        With LoRA that is the model as it was. A teacher that learned along would hold the student to nothing.
        """
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        with (
            evaluation_mode(self.model),
            without_routing(self.model),
            without_adapters(self.model),
            self.accelerator.autocast(),
        ):
            hidden: Tensor = self.model.base_model(**given, use_cache=False).last_hidden_state
            return hidden

    def _divergence(self, student: Tensor, teacher: Tensor, labels: Tensor, items: Any) -> Tensor:
        """A micro-batch's part of the mean KL of its step; the Trainer takes the mean over the processes."""
        assert self.run.distill is not None  # the caller's question
        predicted = labels != IGNORED
        if self.run.distill.by_row:
            by_row = predicted / (predicted.sum(1, keepdim=True).clamp(min=1) * len(labels))
            weights = by_row[predicted] / self.args.gradient_accumulation_steps
        else:
            # The loss, too, is divided by the items of all processes and multiplied by the processes.
            weights = torch.full((), self.args.world_size / items, device=labels.device).expand(int(predicted.sum()))
        with self.accelerator.autocast():
            head = self.model.get_output_embeddings().weight
            return kl_divergence(student[predicted], teacher[predicted], head, self.run.distill.temperature, weights)

    def _of_text(self, loss: Tensor, outputs: Any) -> Tensor:
        """Of a forward's loss the cross-entropy of the text: without the task beside it, and without the penalty."""
        beside = outputs.get("beside")
        second = 0.0 if beside is None else self.args.world_size * beside.loss
        term = outputs.get("collapse_term")
        return loss - second + (0.0 if term is None else self._part_of_step() * term)

    def _part_of_step(self) -> float:
        """What a forward's term counts in its step: by its items, which all processes share, or as one of several."""
        return self.args.world_size if self.model_accepts_loss_kwargs else 1 / self.args.gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Make a record of the Trainer's figures; its closing summary, which has no loss of its own, is none.

        The loss is the run's own sum, because the Trainer's forgets on resume what came before the checkpoint.
        """
        if "loss" not in logs:
            return
        step, seconds, interval = self.state.global_step, self.run.clock.seconds, self.run.interval
        steps = max(1, step - interval.step)
        # A second task's loss and a penalty are not part of the nats of a prediction.
        added = self._mean_over_processes(interval.second - interval.collapse_term)
        divergence = {}
        if self.run.distill is not None:
            divergence = {"kl": self._mean_over_processes(interval.divergence) / steps}
            added += self.run.distill.factor * divergence["kl"] * steps
            added -= self._mean_over_processes(interval.uncounted)
        record: dict[str, Any] = {
            **self._place("train"),
            "tokens_per_second": steps * self.run.tokens_per_step / max(seconds - interval.seconds, 1e-9),
            **self.objective.figures_of((self._mean_over_processes(interval.loss) - added) / steps),
            **divergence,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            **{name: course.during(step) for name, course in self.run.courses.items()},
        }
        if interval.beside:
            record["tasks"] = describe_tasks(interval.beside)
        self._publish(record, self._seen)
        self._seen = []
        self.run.interval = Interval(step=step, seconds=seconds)

    def _place(self, kind: str) -> dict[str, Any]:
        step = self.state.global_step
        return {
            "kind": kind,
            "step": step,
            "tokens": step * self.run.tokens_per_step,
            "seconds": self.run.clock.seconds,
        }

    def _publish(self, record: dict[str, Any], seen: list[Any]) -> None:
        if seen:
            config = self.model.config
            record |= describe_routing(seen, config.hidden_size, config.spectrum)
        self.run.last[record["kind"]] = record
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, record)

    # ---- 4. validation -------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure on the validation rows; every process goes through all of them and sees the same.

        Raises:
            ValidationStopped: on Ctrl-C; nothing is recorded.
        """
        self._refuse_broken_weights()
        reporter = self.run.reporter
        shown: AbstractContextManager[Callable[[int], None]] = nullcontext(lambda rows: None)
        if reporter is not None:
            shown = reporter.validating(self.objective)

        def progress(rows: int) -> None:
            advance(rows)
            if self.run.stop.ask():
                raise ValidationStopped

        # A loader draws a seed even if it shuffles nothing; a look must not move the dropout after it.
        with self.run.clock.paused(), torch.random.fork_rng(devices=[]), self._averaged(), shown as advance:
            figures, looks = self.objective.evaluate(
                self.model,
                batch_size=self.args.per_device_eval_batch_size,
                output_routing=self._routes,
                progress=progress,
            )
            shares = {name: course.after(self.state.global_step) for name, course in self.run.courses.items()}
            self._publish({**self._place("validation"), **figures, **shares}, looks)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside the block the model has the averaged weights, where the run keeps some."""
        return nullcontext() if self.run.averages is None else self.run.averages.in_place()

    def begin(self) -> None:
        """Before the first step, of a resumed run too."""
        # The Trainer takes the intervals of logging and saving from the checkpoint; the user may have changed them.
        self.state.compute_steps(self.args, self.state.max_steps)
        step = self.state.global_step
        is_due = step == self.state.max_steps or (step > 0 and step % self.state.eval_steps == 0)
        if is_due and self.run.last.get("validation", {}).get("step") != step:
            try:
                self.evaluate()
            except ValidationStopped:
                raise KeyboardInterrupt from None  # the checkpoint is there, and no step was begun

    def finish(self, checkpoint: Path) -> None:
        """Take up a run after its last step, with nothing left to train."""
        if adapted(self.model):  # others have their weights already
            self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)

    # ---- 5. shards -----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, whole; or of a sharded checkpoint all but the weights, which come with the optimizer."""
        if not self.run.sharded:
            super().save_model(output_dir, _internal_call)
            return
        weights = {} if _internal_call else gather(self.model)
        if not self.args.should_save:
            return
        folder, config = str(output_dir or self.args.output_dir), unsharded_config(self.model)
        if _internal_call:
            config.save_pretrained(folder)
        else:
            model = self.objective.build_model(config)
            model.load_state_dict(weights)
            model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.run.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_shards(Path(output_dir), self.model, self.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.run.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.run.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(Path(checkpoint), self.model, self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


class _Begin(TrainerCallback):
    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin()


def _collapse_term(outputs: Any) -> float:
    term = outputs.get("collapse_term")
    return 0.0 if term is None else term.item()
