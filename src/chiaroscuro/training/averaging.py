"""The mean of the weights that a run passes through, of which the newest count most (EMA).

A checkpoint holds it beside the weights, so a resumed run has the same one. Validation and the model that a run ends
with have the averaged weights; the steps go on from the others.

Source: Polyak and Juditsky, 1992; the growing memory at the beginning is that of TensorFlow's ExponentialMovingAverage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chiaroscuro.errors import UserError

FILE = "averages.safetensors"
"""In a checkpoint's folder."""


class Averages(TrainerCallback):
    """After step n, a ← d a + (1 − d) θ with d = min(decay, (1 + n) / (10 + n)): the first weights are soon forgotten.

    Args:
        model: whose parameters θ are averaged, beginning with what they are now.
        decay: of the memory: at 0.999 half of it is of the last 700 steps.

    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        # In float32 at least: a step of 1 − d is lost in the rounding of bfloat16.
        self.values = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in model.named_parameters()
        }

    def save(self, folder: Path) -> None:
        """Write them into a checkpoint's folder."""
        save_file({name: value.contiguous() for name, value in self.values.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read them from a checkpoint's folder.

        Raises:
            UserError: it has none.

        """
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} holds no averaged weights ({FILE}): set trainer.ema back to null to resume")
        for name, value in load_file(folder / FILE).items():
            self.values[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        parameters = dict(self.model.named_parameters())
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _set(parameters, self.values)
        try:
            yield
        finally:
            _set(parameters, kept)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow the model, which the Trainer has moved to its device since."""
        for name, parameter in self.model.named_parameters():
            self.values[name] = self.values[name].to(parameter.device)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take up the weights of a step."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in self.model.named_parameters():
            self.values[name].lerp_(parameter.detach().to(self.values[name].dtype), 1 - decay)


@torch.no_grad()
def _set(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
