"""How well a model tells the labels of texts: loss, accuracy, and how sure one can be of the accuracy."""

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from chiaroscuro.errors import UserError
from chiaroscuro.model.evaluation_mode import evaluation_mode


@dataclass(frozen=True)
class ClassificationEvaluation:
    """How well a model tells the labels of a split.

    Attributes:
        loss: mean negative log-likelihood of the right label, in nats.
        accuracy: the share of rows whose likeliest label is the right one.
        interval: Wilson's 95% interval of that share. It knows of the chance in which rows there are, and not of that
            in the training: for that, train with several seeds.
        rows: how many rows there were.
        routings: `outputs.routing` and `outputs.meta_gate` of every batch, where they were asked for.

    """

    loss: float
    accuracy: float
    interval: tuple[float, float]
    rows: int
    routings: list[tuple[Any, Any]]

    def figures(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.interval),
            "rows": self.rows,
        }


@torch.no_grad()
def evaluate_rows(
    model: PreTrainedModel,
    rows: Dataset[Any],
    collate: Callable[[Any], dict[str, Any]],
    *,
    batch_size: int = 8,
    output_routing: bool = False,
    progress: Callable[[int], None] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> ClassificationEvaluation:
    """Classify every row.

    Args:
        model: a classifier; put into evaluation mode and back.
        rows: the texts and their labels; a dataset with a length.
        collate: turns a list of rows into a batch of tensors, with `labels` (B,) among them.
        batch_size: rows at once.
        output_routing: keep what was routed where (a CHIAR-Former alone can say).
        progress: called with the number of rows after every batch.
        inputs: what else the forward is given, as the name of the task where a model has several.

    Raises:
        UserError: the loss is no finite number.

    """
    total, correct, routings = 0.0, 0, []
    asked = dict(inputs or {}) | ({"output_routing": True} if output_routing else {})
    with evaluation_mode(model):
        for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            outputs = model(**batch, **asked)
            total += outputs.loss.double().item() * len(batch["labels"])
            correct += int((outputs.logits.argmax(-1) == batch["labels"]).sum())
            if output_routing:
                routings.append((outputs.routing, outputs.meta_gate))
            if progress is not None:
                progress(len(batch["labels"]))
    count = len(cast(Sized, rows))
    loss = total / count
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: the model's weights hold numbers that are not finite")
    return ClassificationEvaluation(loss, correct / count, wilson_interval(correct, count), count, routings)


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The shares p for which |correct / n − p| ≤ z √(p (1 − p) / n), n the total, z the normal quantile of the level.

    It keeps within 0 and 1, and has a width even where all or none are correct. Source: Wilson 1927.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
