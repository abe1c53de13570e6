"""`transformers.Trainer`, and the five places where a run of ours must differ from it.

1. **A step that diverges is not taken.** A loss or a gradient that isn't finite stops the run before the
   optimizer moves, so no weight of a saved checkpoint was touched by it.
2. **A checkpoint appears whole or not at all** (see [`checkpoints`][chiaroscuro.training.checkpoints]).
3. **Routing is looked at only in the steps that will be shown.**
4. **Validation** is the one that `chiaroscuro evaluate` has too, as the [`Objective`][] says.
5. **A checkpoint that doesn't fit the model** is an error; the Trainer would warn, and train on from
   random weights.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from chiaroscuro.analysis.routing_summary import describe_routing, mean_gate
from chiaroscuro.errors import UserError
from chiaroscuro.training.checkpoints import checkpoints, prune, seal, written_whole
from chiaroscuro.training.objectives import Objective
from chiaroscuro.training.records import describe_tasks


class TrainingDiverged(UserError):
    """The loss, the gradient or a weight is no finite number any more."""


class Clock:
    """Seconds spent training: evaluation and saving don't count, and a resumed run counts on."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far, with those before a resume."""
        return self._before + time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop counting inside the block."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


@dataclass
class Run:
    """What a run knows beside the model: where it writes, and what it has used.

    Attributes:
        folder: The run's folder.
        keep_checkpoints: How many checkpoints stay.
        tokens_per_step: What one optimizer step reads, over all processes; padding counts.
        facts: Written beside every checkpoint, and compared on resume.
        clock: Counts the seconds.
    """

    folder: Path
    keep_checkpoints: int
    tokens_per_step: int
    facts: dict[str, Any]
    clock: Clock


class RunTrainer(Trainer):
    """See the module's docstring."""

    model: Any
    objective: Objective

    def __init__(self, *, run: Run, objective: Objective, **kwargs: Any) -> None:
        super().__init__(data_collator=objective.collate, eval_dataset=objective.validation, **kwargs)
        self.run = run
        self.objective = objective
        self._routes = hasattr(self.model, "step_calibration")  # one of ours, that can say how it routed
        self._seen: list[Any] = []  # outputs of the step in hand, if it will be shown
        self._beside: list[tuple[str, dict[str, float]]] = []  # task, loss and gate of every second forward
        self._collapse_term = 0.0  # what the penalty took off the losses since they were last shown
        self._step_beside = 0  # the last step that was asked for one: with accumulation a step has several forwards
        self._last_look = (0, run.clock.seconds)
        self._saving_to: Path | None = None

    # ---- 1. divergence -------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, or TrainingDiverged."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse_unless_finite("loss", loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
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
        largest = torch.stack([parameter.detach().abs().max() for parameter in self.model.parameters()]).max()
        self._refuse_unless_finite("largest weight", largest)

    # ---- 2. checkpoints ------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._refuse_broken_weights()
        is_writer, step = self.args.should_save, self.state.global_step
        facts = {**self.run.facts, "seconds": self.run.clock.seconds}
        target = self.run.folder / f"checkpoint-{step}"
        with self.run.clock.paused(), written_whole(target, is_writer=is_writer) as partial:
            self.accelerator.wait_for_everyone()
            self._saving_to = partial.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_to = None
            self.accelerator.wait_for_everyone()
            if is_writer:
                # A pickle of the TrainingArguments, which nothing here reads: recipe.yaml says it, and can be
                # trusted.
                (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                seal(partial, facts)
        if is_writer:
            prune(self.run.folder, step, self.run.keep_checkpoints)

    def save_final_model(self, target: Path) -> None:
        """Save the model and its tokenizer, for `from_pretrained`, whole or not at all."""
        with written_whole(target, is_writer=self.args.should_save) as partial:
            self.accelerator.wait_for_everyone()
            self.save_model(str(partial))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    # ---- 3. looking ----------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss; in a step that will be shown, look at the routing too."""
        step = self.state.global_step + 1
        shown = step == 1 or step % self.args.logging_steps == 0 or step == self.state.max_steps
        look = self._routes and shown
        inputs = {**inputs, **self.objective.inputs, **({"output_routing": True} if look else {})}
        drawn = self.objective.beside(step, self.args.process_index) if step != self._step_beside else None
        self._step_beside = step
        if drawn is not None:
            name, second = drawn
            inputs["beside"] = {**self._prepare_inputs(second), "output_routing": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._collapse_term += self._part_of_step() * _collapse_term(outputs)
        if drawn is not None:
            # The Trainer multiplies by the processes what was divided by the items of all of them, as the text's loss
            # was; this one is a mean of its own.
            loss = loss - (self.args.world_size - 1) * outputs.beside.loss
            look_beside = (outputs.beside.routing, outputs.beside.meta_gate)
            second_loss, second_term = outputs.beside.loss.item(), _collapse_term(outputs.beside)
            self._collapse_term += second_term
            self._beside.append((name, {"loss": second_loss + second_term, **mean_gate([look_beside])}))
        if look:
            self._seen.append((outputs.routing, outputs.meta_gate))
        return (loss, outputs) if return_outputs else loss

    def _part_of_step(self) -> float:
        """What a forward's term counts in its step: by its items, which all processes share, or as one of several."""
        return self.args.world_size if self.model_accepts_loss_kwargs else 1 / self.args.gradient_accumulation_steps

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The last step ends an interval, be it a short one.
        if self.state.global_step == self.state.max_steps:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Make the Trainer's figures a record; its closing summary, which has no loss of its own, is none."""
        if "loss" not in logs:
            return
        step, seconds = self.state.global_step, self.run.clock.seconds
        last_step, last_seconds = self._last_look
        self._last_look = (step, seconds)
        speed = (step - last_step) * self.run.tokens_per_step / max(seconds - last_seconds, 1e-9)
        # A penalty is no nats of a prediction. With several processes the Trainer's loss is the mean of all, and these
        # are the main one's own.
        added = sum(figures["loss"] for _, figures in self._beside) - self._collapse_term
        added /= max(1, step - last_step)
        record: dict[str, Any] = {
            **self._place("train"),
            "tokens_per_second": speed,
            **self.objective.figures_of(logs["loss"] - added),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
        }
        if self._beside:
            record["tasks"] = describe_tasks(self._beside)
        self._publish(record, self._seen)
        self._seen, self._beside, self._collapse_term = [], [], 0.0

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
            record |= describe_routing(seen, self.model.config.hidden_size)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, record)

    # ---- 4. validation -------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure on the validation rows; every process goes through all of them and sees the same."""
        self._refuse_broken_weights()
        # A loader draws a seed even if it shuffles nothing; a look must not move the dropout after it.
        with self.run.clock.paused(), torch.random.fork_rng(devices=[]):
            figures, looks = self.objective.evaluate(
                self.model, batch_size=self.args.per_device_eval_batch_size, output_routing=self._routes
            )
        self._publish({**self._place("validation"), **figures}, looks)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    # ---- 5. resuming ---------------------------------------------------------------------------------------

    def load_finished(self, checkpoint: Path) -> None:
        """Put the weights of a run's last checkpoint into the model, with nothing left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        progress = super()._init_training_state(max_steps, *args, **kwargs)
        # The Trainer takes the intervals of logging and saving from the checkpoint; the user may have changed
        # them.
        self.state.compute_steps(self.args, max_steps)
        self._last_look = (self.state.global_step, self.run.clock.seconds)
        return progress

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        if missing or load_result.unexpected_keys:
            raise UserError(
                f"the checkpoint does not fit the model: missing {sorted(missing)}, "
                f"unknown {sorted(load_result.unexpected_keys)}; was it written by another version?"
            )
        self.model.tie_weights()


def _collapse_term(outputs: Any) -> float:
    term = outputs.get("collapse_term")
    return 0.0 if term is None else term.item()
