"""The callback by which thresholds follow the data under any `transformers.Trainer`."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chiaroscuro.errors import UserError
from chiaroscuro.model.modeling import ChiarPreTrainedModel


class MoveThresholds(TrainerCallback):
    """Running calibration: once per optimizer step, never inside a forward.

    The model may be wrapped (DistributedDataParallel, torch.compile, a peft model).

    Raises:
        UserError: there is no CHIAR-Former in the model. (One without routers has nothing to move, and is no mistake.)

    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer, before anything is saved."""
        for module in kwargs["model"].modules():
            if isinstance(module, ChiarPreTrainedModel):
                module.step_calibration()
                return
        raise UserError(f"MoveThresholds: a {type(kwargs['model']).__name__} has no thresholds to move; leave it out")
