"""How well a model predicts labels of texts, or targets at positions of a sequence: loss and accuracy."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from chiaroscuro.errors import UserError
from chiaroscuro.model.evaluation_mode import evaluation_mode


@dataclass(frozen=True)
class ClassificationEvaluation:
    """How well a model classifies the rows of a split.

    Attributes:
        loss: mean negative log-likelihood of the right label, in nats.
        accuracy: the share of rows whose likeliest label is the right one.
        interval: Wilson's 95% interval of that share. It covers the chance of which rows were drawn, not that of the
            training: for that, train with several seeds.
        rows: how many rows there were.
        routings: `outputs.routing` and `outputs.meta_gate` of every batch, if they were asked for.

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


@dataclass(frozen=True)
class TargetEvaluation:
    """How well a model predicts the targets of a split.

    Attributes:
        loss: mean negative log-likelihood of the target, in nats, over the positions that have one.
        accuracy: the share of these positions whose likeliest token is the target. It has no interval: the positions
            of a sequence are not independent.
        predictions: the number of these positions.
        routings: `outputs.routing` and `outputs.meta_gate` of every batch, where they were asked for.

    """

    loss: float
    accuracy: float
    predictions: int
    routings: list[tuple[Any, Any]]

    def figures(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {"loss": self.loss, "accuracy": self.accuracy, "predictions": self.predictions}


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
        output_routing: keep the routing of every batch; only a CHIAR-Former has one.
        progress: called with the number of rows after every batch.
        inputs: further arguments of the forward, such as the name of the task if the model has several.

    Raises:
        UserError: the loss is not finite.

    """
    loss, correct, count, routings = _measured(
        model, rows, collate, "labels", batch_size, output_routing, progress, inputs or {}
    )
    return ClassificationEvaluation(loss, correct / count, wilson_interval(correct, count), count, routings)


def evaluate_targets(
    model: PreTrainedModel,
    rows: Dataset[Any],
    collate: Callable[[Any], dict[str, Any]],
    *,
    batch_size: int = 8,
    output_routing: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TargetEvaluation:
    """Predict the targets of every row, and average over targets.

    Args:
        model: a causal language model; put into evaluation mode and back.
        rows: the sequences and their targets.
        collate: turns a list of rows into a batch of tensors, with `shift_labels` (B, T) among them: the target of each
            position, −100 where there is none.
        batch_size: see `evaluate_rows`, as for the others.
        output_routing: see there.
        progress: see there.

    Raises:
        UserError: the loss is not finite.

    """
    loss, correct, count, routings = _measured(
        model, rows, collate, "shift_labels", batch_size, output_routing, progress, {"use_cache": False}
    )
    return TargetEvaluation(loss, correct / count, count, routings)


@torch.no_grad()
def _measured(
    model: PreTrainedModel,
    rows: Dataset[Any],
    collate: Callable[[Any], dict[str, Any]],
    wanted: str,
    batch_size: int,
    output_routing: bool,
    progress: Callable[[int], None] | None,
    inputs: Mapping[str, Any],
) -> tuple[float, int, int, list[tuple[Any, Any]]]:
    """The mean loss over all predictions, how many were right, how many there were, and the routings."""
    total, correct, count, routings = 0.0, 0, 0, []
    asked = dict(inputs) | ({"output_routing": True} if output_routing else {})
    with evaluation_mode(model):
        for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            outputs = model(**batch, **asked)
            predicted = batch[wanted] != -100
            total += outputs.loss.double().item() * int(predicted.sum())
            correct += int((outputs.logits.argmax(-1) == batch[wanted])[predicted].sum())
            count += int(predicted.sum())
            if output_routing:
                routings.append((outputs.routing, outputs.meta_gate))
            if progress is not None:
                progress(len(batch["input_ids"]))
    loss = total / count
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: the model's weights hold numbers that are not finite")
    return loss, correct, count, routings


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The shares p for which |correct / n − p| ≤ z √(p (1 − p) / n), n the total, z the normal quantile of the level.

    It stays between 0 and 1, and has a width even if all or none are correct. Source: Wilson 1927.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
