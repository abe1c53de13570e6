"""Trackers of experiments by the names that transformers knows them by: wandb, trackio, mlflow, comet_ml and others.

A run has none unless its recipe names one, and it is the tracker's own library that sends anything anywhere.
"""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from chiaroscuro.errors import UserError, suggest
from chiaroscuro.training.records import scalars

OURS = "tensorboard"
"""What every run writes anyway."""

_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_") and name != "on_log"]
"""What a tracker may be told beside records."""


def trackers(names: Sequence[str]) -> list[TrainerCallback]:
    """The callbacks of these trackers.

    Raises:
        UserError: a name that transformers does not know, or whose library is not installed.

    """
    made: list[TrainerCallback] = []
    for name in names:
        if name == OURS:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"trainer.report_to={name!r}: no such tracker; {suggest(name, INTEGRATION_TO_CALLBACK)}")
        try:
            made.append(_Flat(INTEGRATION_TO_CALLBACK[name]()))
        except (RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"trainer.report_to={name!r}: {reason} (pip install {name}, or leave it out)") from None
    return made


class _Flat(TrainerCallback):
    """A tracker's callback, which is given a record's numbers under flat names.

    Args:
        tracker: of transformers.

    """

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker
        for event in _EVENTS:
            if getattr(type(tracker), event) is not getattr(TrainerCallback, event):
                setattr(self, event, getattr(tracker, event))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A record."""
        if logs and "kind" in logs:
            self.tracker.on_log(args, state, control, logs=scalars(logs), **kwargs)
