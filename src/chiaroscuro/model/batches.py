"""Batches that a model is calibrated or fitted on, checked before anything is computed from them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.model.modeling import ChiarForCausalLM, refuse_other_fields
from chiaroscuro.ops.linear_cross_entropy import IGNORED

Batch = Tensor | Mapping[str, Any]
"""`input_ids` of shape (B, T), alone or beside what a model's forward takes."""


def fields_of(batch: Batch) -> Mapping[str, Any]:
    """A batch as a mapping."""
    return {"input_ids": batch} if isinstance(batch, Tensor) else batch


def predicted_by(batch: Batch, real: Bool[Tensor, "batch time"] | None) -> Int[Tensor, "batch time"]:
    """What each token of a batch is to predict, and −100 where that is nothing.

    Args:
        batch: its `labels` or `shift_labels` say it, and without them each token predicts the next of its document.
        real: which tokens are; None for all.

    """
    fields = fields_of(batch)
    labels = _without_beginnings(fields) if fields.get("labels") is None else fields["labels"]
    real = None if real is None else real.to(labels.device)
    return ChiarForCausalLM.targets_of(labels, fields.get("shift_labels"), real)


def _without_beginnings(fields: Mapping[str, Any]) -> Int[Tensor, "batch time"]:
    """The ids as labels, with −100 where a document begins within a row, which nothing before it predicts."""
    ids: Tensor = fields["input_ids"]
    places, bounds = fields.get("position_ids"), fields.get("cu_seq_lens_q")
    labels = ids.clone()
    if places is not None:
        begins = (places[:, 1:] <= places[:, :-1]).to(ids.device).expand(len(ids), -1)
        labels[:, 1:].masked_fill_(begins, IGNORED)
    elif bounds is not None:
        labels[:, bounds[1:-1].to(ids.device)] = IGNORED
    return labels


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """All batches, in memory.

    Raises:
        UserError: there is something that is no batch.

    """
    if not isinstance(batches, Iterable):
        raise UserError(f"batches={batches!r}: give a list of input_ids of shape (B, T), or a data loader")
    given = list(batches)
    for batch in given:
        ids = fields_of(batch).get("input_ids") if isinstance(batch, Tensor | Mapping) else None
        if (
            not isinstance(ids, Tensor)
            or ids.ndim != 2
            or ids.dtype not in (torch.int64, torch.int32)
            or not ids.numel()
        ):
            raise UserError(
                "every batch needs input_ids of shape (B, T), one whole number at least: give a list of such batches"
            )
        refuse_other_fields(fields_of(batch))
        if lists := [name for name, value in fields_of(batch).items() if isinstance(value, list | tuple)]:
            raise UserError(f"{lists[0]} of a batch is a list: give a tensor, one number for each token")
    return given


def check_some_tokens(batches: Sequence[Batch]) -> None:
    """Raise a UserError where a calibration has no batches, or padding alone."""
    if not batches:
        raise UserError("calibrate got no batches: give at least one with some tokens")
    masks = [fields_of(batch).get("attention_mask") for batch in batches]
    if not any(mask is None or mask.any() for mask in masks):
        raise UserError("calibrate got padding alone: give batches with some real tokens")


def check_vocabulary(batches: Sequence[Batch], vocabulary: int) -> None:
    """Raise a UserError where a batch has a token, or a label, that is not in the vocabulary."""
    for batch in batches:
        fields = fields_of(batch)
        for name in ("input_ids", "labels", "shift_labels"):
            ids = fields.get(name)
            if ids is None:
                continue
            known = ids if name == "input_ids" else ids[ids != IGNORED]
            if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < vocabulary:
                raise UserError(
                    f"{name} with a token outside the vocabulary, vocab_size={vocabulary}: use the model's own "
                    "tokenizer"
                )


def check_predictions(batches: Sequence[Batch], held_out: int) -> None:
    """Raise a UserError where a fit has no gradients, too few batches, or some in which nothing is predicted.

    Of those that are fitted on, and of those held out, one at least has to predict something.

    Args:
        batches: of `checked_batches`.
        held_out: how many of the last ones are.

    """
    if torch.is_inference_mode_enabled():
        raise UserError("a fit needs gradients: call it outside torch.inference_mode()")
    if len(batches) < 2:
        raise UserError(f"{len(batches)} batches to fit on: give two or more, of which the last are held out")
    predicted = [_predicts(fields_of(batch)) for batch in batches]
    for name, part in (("fitted on", predicted[:-held_out]), ("held out", predicted[-held_out:])):
        if not any(part):
            raise UserError(
                f"in the batches that are {name} there is nothing to predict: every label is {IGNORED} or at padding"
            )


def check_shapes(batch: Batch, names: Sequence[str]) -> None:
    """Raise a UserError where one of these fields, or `position_ids`, is not of the shape of `input_ids`.

    Labels among them must be whole numbers, too.
    """
    fields = fields_of(batch)
    ids = fields["input_ids"]
    for name in names:
        given = fields.get(name)
        if given is not None and (not isinstance(given, Tensor) or given.shape != ids.shape):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise UserError(f"{name} of shape {shape} beside input_ids of shape {tuple(ids.shape)}: must be alike")
    for name in {"labels", "shift_labels"}.intersection(names):
        if isinstance(given := fields.get(name), Tensor) and given.dtype not in (torch.int64, torch.int32):
            raise UserError(f"{name} of dtype {given.dtype}: need torch.int64 or torch.int32")
    places = fields.get("position_ids")
    if places is not None and (not isinstance(places, Tensor) or places.shape not in (ids.shape, (1, ids.shape[1]))):
        shape = tuple(places.shape) if isinstance(places, Tensor) else type(places).__name__
        raise UserError(f"position_ids of shape {shape} beside input_ids of shape {tuple(ids.shape)}: must be alike")


def _predicts(fields: Mapping[str, Any]) -> bool:
    """Whether some token of a batch predicts something."""
    check_shapes(fields, ("attention_mask", "labels", "shift_labels"))
    ids, shifted = fields["input_ids"], fields.get("shift_labels")
    mask = fields.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if shifted is not None:
        return bool(((shifted != IGNORED) & real.to(shifted.device)).any())
    labels = ids if fields.get("labels") is None else fields["labels"]
    real = real.to(labels.device)
    return bool(((labels != IGNORED) & real)[:, 1:].logical_and(real[:, :-1]).any())
