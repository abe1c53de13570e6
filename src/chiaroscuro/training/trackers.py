"""Trackers of experiments by the names that transformers knows them by: wandb, trackio, mlflow, comet_ml and others.

A run has none unless its recipe names one, and it is the tracker's own library that sends anything anywhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from chiaroscuro.errors import UserError, one_line, suggest
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
        tracker: Any = object.__new__(INTEGRATION_TO_CALLBACK[name])
        with _saying(name, f"pip install {name}, or leave it out"):
            try:
                tracker.__init__()
            except Exception:
                # Some can't be deleted when they are half made, and Python prints a traceback of it.
                tracker.__class__ = TrainerCallback
                raise
        made.append(_Flat(name, tracker))
    return made


@contextmanager
def _saying(name: str, advice: str) -> Iterator[None]:
    """Say in one line what a tracker raises."""
    try:
        yield
    except Exception as error:  # of transformers, of the tracker's library, or of the network
        raise UserError(f"trainer.report_to={name!r}: {one_line(error)} ({advice})") from None


class _Flat(TrainerCallback):
    """A tracker's callback, which is given a record's numbers under flat names.

    They are named as a `Trainer` names them, which trackers know: `loss`, and `eval_loss` for a validation.

    Args:
        name: of the tracker, in a recipe.
        tracker: of transformers.

    """

    def __init__(self, name: str, tracker: Any) -> None:
        self.name = name
        self.tracker = tracker
        for event in _EVENTS:
            if getattr(type(tracker), event) is not getattr(TrainerCallback, event):
                setattr(self, event, partial(self._tell, event))

    def _tell(self, event: str, *args: Any, **kwargs: Any) -> Any:
        with _saying(self.name, "leave it out, and resume the run where it has a checkpoint"):
            return getattr(self.tracker, event)(*args, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A record."""
        if logs and "kind" in logs:
            kind = logs["kind"]
            prefix = {"train": "", "validation": "eval_"}.get(kind, f"{kind}_")
            named = {prefix + name[len(kind) + 1 :]: value for name, value in scalars(logs).items()}
            self._tell("on_log", args, state, control, logs=named, **kwargs)
