"""How well a model predicts labels of texts, or targets at positions of a sequence: loss and accuracy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Protocol, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from chiaroscuro.analysis.routing_summary import to_summarise
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
        routings: of every batch what `to_summarise` keeps, if it was asked for.

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
class DepthAccuracy:
    """How well a model predicts the targets at one depth.

    Attributes:
        depth: what the depth is called.
        accuracy: the share of these targets that are right.
        predictions: their number.
        answer_accuracy: the share of the answers at this depth that are right from their first to their last target.
        answers: their number.

    """

    depth: str
    accuracy: float
    predictions: int
    answer_accuracy: float
    answers: int


@dataclass(frozen=True)
class TargetEvaluation:
    """How well a model predicts the targets of a split.

    An *answer* is a run of positions that all have a target. The model reads the right beginning of an answer, so an
    answer whose targets are all right is one that greedy generation would give.

    Attributes:
        loss: mean negative log-likelihood of the target, in nats, over the positions that have one.
        accuracy: the share of these positions whose likeliest token is the target. It has no interval: the positions
            of a sequence are not independent.
        predictions: the number of these positions.
        answer_accuracy: the share of answers whose targets are all right.
        answers: the number of answers.
        depths: the same for each depth that has targets, if the rows say how deep theirs lie.
        routings: of every batch what `to_summarise` keeps, where it was asked for.

    """

    loss: float
    accuracy: float
    predictions: int
    answer_accuracy: float
    answers: int
    depths: tuple[DepthAccuracy, ...]
    routings: list[tuple[Any, Any]]

    def figures(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        figures: dict[str, Any] = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "predictions": self.predictions,
            "answer_accuracy": self.answer_accuracy,
            "answers": self.answers,
        }
        return figures | ({"depths": [asdict(depth) for depth in self.depths]} if self.depths else {})


class TargetRows(Protocol):
    """Sequences with a target for some of their positions, such as `chiaroscuro.data.tasks.TokenRows`."""

    @property
    def depths(self) -> tuple[str, ...]:
        """What each depth of a target is called; none if the targets have no depth."""

    @property
    def target_depths(self) -> Int[np.ndarray, " predictions"]:
        """The depth of each target of all rows, an index into `depths`; read only where there are some."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


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
        UserError: there is no row, or the loss is not finite.

    """
    loss, hits, _, routings = _measured(
        model, rows, collate, "labels", batch_size, output_routing, progress, inputs or {}
    )
    correct, count = int(hits.sum()), len(hits)
    return ClassificationEvaluation(loss, correct / count, wilson_interval(correct, count), count, routings)


def evaluate_targets(
    model: PreTrainedModel,
    rows: TargetRows,
    collate: Callable[[Any], dict[str, Any]],
    *,
    batch_size: int = 8,
    output_routing: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TargetEvaluation:
    """Predict the targets of every row, and average over targets, over answers, and over those of each depth.

    Args:
        model: a causal language model; put into evaluation mode and back.
        rows: the sequences and their targets.
        collate: turns a list of rows into a batch of tensors, with `shift_labels` (B, T) among them: the target of each
            position, −100 where there is none.
        batch_size: see `evaluate_rows`, as for the others.
        output_routing: see there.
        progress: see there.

    Raises:
        UserError: no row has a target, or the loss is not finite.

    """
    loss, hits, starts, routings = _measured(
        model,
        cast(Dataset[Any], rows),
        collate,
        "shift_labels",
        batch_size,
        output_routing,
        progress,
        {"use_cache": False},
    )
    whole = whole_answers(hits, starts)
    return TargetEvaluation(
        loss=loss,
        accuracy=float(hits.mean()),
        predictions=len(hits),
        answer_accuracy=float(whole.mean()),
        answers=len(whole),
        depths=accuracy_by_depth(hits, starts, rows.target_depths, rows.depths) if rows.depths else (),
        routings=routings,
    )


def whole_answers(
    hits: Bool[np.ndarray, " predictions"], starts: Bool[np.ndarray, " predictions"]
) -> Bool[np.ndarray, " answers"]:
    """Which answers are right from their first to their last target.

    Args:
        hits: which targets the model predicts.
        starts: which targets begin an answer; the first one does.

    """
    return np.logical_and.reduceat(hits, np.flatnonzero(starts))


def accuracy_by_depth(
    hits: Bool[np.ndarray, " predictions"],
    starts: Bool[np.ndarray, " predictions"],
    depths: Int[np.ndarray, " predictions"],
    names: Sequence[str],
) -> tuple[DepthAccuracy, ...]:
    """The accuracy over the targets and over the answers of each depth, in the order of the names.

    Args:
        hits: which targets the model predicts.
        starts: which targets begin an answer; the first one does.
        depths: the depth of each target, an index into the names. An answer lies where its first target lies.
        names: what each depth is called. A depth without answers is left out.

    """
    whole, of_answers = whole_answers(hits, starts), depths[starts]
    return tuple(
        DepthAccuracy(
            depth=name,
            accuracy=float(hits[depths == depth].mean()),
            predictions=int((depths == depth).sum()),
            answer_accuracy=float(whole[of_answers == depth].mean()),
            answers=int((of_answers == depth).sum()),
        )
        for depth, name in enumerate(names)
        if (of_answers == depth).any()
    )


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
) -> tuple[float, Bool[np.ndarray, " predictions"], Bool[np.ndarray, " predictions"], list[tuple[Any, Any]]]:
    """The mean loss over all predictions, which of them were right, which begin an answer, and the routings."""
    total, hits, starts, routings = 0.0, [], [], []
    asked = dict(inputs) | ({"output_routing": True} if output_routing else {})
    with evaluation_mode(model):
        for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            outputs = model(**batch, **asked)
            predicted = batch[wanted] != -100
            if predicted.any():  # else the loss is a mean over nothing
                total += outputs.loss.double().item() * int(predicted.sum())
            hits.append((outputs.logits.argmax(-1) == batch[wanted])[predicted].cpu().numpy())
            starts.append((predicted & ~_moved(predicted))[predicted].cpu().numpy())
            if output_routing:
                routings.append(to_summarise(outputs.routing, outputs.meta_gate))
            if progress is not None:
                progress(len(batch["input_ids"]))
    right = np.concatenate(hits) if hits else np.empty(0, dtype=bool)
    if len(right) == 0:
        raise UserError("there is nothing to predict: give rows with a label or a target")
    loss = total / len(right)
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: the model's weights hold numbers that are not finite")
    return loss, right, np.concatenate(starts), routings


def _moved(predicted: Bool[Tensor, "batch *time"]) -> Bool[Tensor, "batch *time"]:
    """Whether the position before has a target; where a row has but one target, there is no position before."""
    if predicted.ndim == 1:
        return torch.zeros_like(predicted)
    return nn.functional.pad(predicted, (1, -1))


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The shares p for which |correct / n − p| ≤ z √(p (1 − p) / n), n the total, z the normal quantile of the level.

    It stays between 0 and 1, and has a width even if all or none are correct. Source: Wilson 1927.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
