"""The model that all visitors share, and dials that each turns for himself."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiaroscuro.errors import UserError
from chiaroscuro.hub import SMOLLM2, find_smollm2
from chiaroscuro.layers import Thresholds
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.loading import longest_sequence
from chiaroscuro.retrofitting.routed_model import FIELD, RoutedModel
from chiaroscuro.retrofitting.whole import without_routing
from chiaroscuro.studies.workspace import Workspace

QUICKSTART = "runs/quickstart/small"
_FIELDS = ("attention_share", "kv_share", "calibration", "entropy_thresholds", FIELD)


class Served:
    """A model, its tokenizer, and a lock: whoever turns a dial has the model for himself until it is turned back.

    Args:
        model: any causal language model, in evaluation mode.
        tokenizer: its own.
        name: what it is called on the page.

    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.name = name
        self._lock = threading.RLock()

    @property
    def longest(self) -> int:
        """The most tokens that the model reads."""
        return longest_sequence(self.model.config)

    @property
    def dials(self) -> dict[str, float]:
        """By side, `"look"` and `"kept"`, the model's own share; a side that has no dial is not there."""
        if isinstance(self.model, RoutedModel):
            said = getattr(self.model.config, FIELD)
            return {"look": said["attention_share"], "kept": said["kv_share"]}
        found = {}
        if isinstance(self.model, ChiarPreTrainedModel):
            if self.model.thresholds():
                found["look"] = float(self.model.config.attention_share)
            if self.model.kv_thresholds():
                found["kept"] = float(self.model.config.kv_share)
        return found

    @contextmanager
    def at(self, look: float | None, kept: float | None) -> Iterator[Any]:
        """Inside the block the model is the caller's, at these shares; afterwards it is as it was, to the bit.

        Args:
            look: the share that looks far, or goes to the last operator; as it is unless given.
            kept: the share that is kept; likewise.

        Raises:
            UserError: a share that is impossible.

        """
        with self._lock:
            thresholds = [module for module in self.model.modules() if isinstance(module, Thresholds)]
            before = [(t.values.clone(), t.share, t.running) for t in thresholds]
            fields = {name: copy.deepcopy(getattr(self.model.config, name, None)) for name in _FIELDS}
            try:
                own = self.dials
                turned = {side: share for side, share in (("look", look), ("kept", kept)) if share != own.get(side)}
                turned = {side: float(share) for side, share in turned.items() if side in own and share is not None}
                if turned:
                    self.model.set_attention_share(turned.get("look"), kv_share=turned.get("kept"))
                yield self.model
            finally:
                for one, (values, share, running) in zip(thresholds, before, strict=True):
                    one.values.copy_(values)
                    one.share, one.running = share, running
                for name, value in fields.items():
                    if hasattr(self.model.config, name):
                        setattr(self.model.config, name, value)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """Inside the block the model is the caller's, and everybody looks and everything is kept."""
        with self._lock:
            if isinstance(self.model, RoutedModel | ChiarPreTrainedModel):
                with without_routing(self.model):
                    yield self.model
            else:
                yield self.model


def serve(checkpoint: str | None) -> Served:
    """The model to show: a checkpoint; without one the quickstart's model, or else SmolLM2.

    Raises:
        UserError: the checkpoint can't be used, or there is none to choose.

    """
    if checkpoint is None:
        if not Path(QUICKSTART).exists() and find_smollm2() is None:
            raise UserError(
                f"no checkpoint, no {QUICKSTART}, no SmolLM2: name a checkpoint, or run chiaroscuro quickstart first"
            )
        checkpoint = QUICKSTART if Path(QUICKSTART).exists() else SMOLLM2
    workspace = Workspace(checkpoint)
    return Served(workspace.language_model("app"), workspace.tokenizer, checkpoint)
