"""A routed model as it would be without its routing: the full-attention self that it is compared with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from chiaroscuro.model.modeling import ChiarPreTrainedModel


@contextmanager
def full_attention(model: ChiarPreTrainedModel) -> Iterator[None]:
    """Inside the block, every token goes to the last operator of each menu that is routed by a score, and all are kept.

    The thresholds are lowered below every score and put back as they were, to the bit, calibrated or fixed. A training
    forward inside the block would note its scores: use `evaluation_mode` too.

    Args:
        model: any CHIAR-Former; where nothing is routed by a score, nothing changes.

    """
    sides = (model.thresholds(), model.kv_thresholds())
    with lowered([calibration.values for side in sides for calibration in side.values()]):
        yield


@contextmanager
def lowered(thresholds: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block these thresholds are below every score; afterwards they are as they were, to the bit."""
    before = [values.clone() for values in thresholds]
    try:
        for values in thresholds:
            values.fill_(-torch.inf)
        yield
    finally:
        for values, kept in zip(thresholds, before, strict=True):
            values.copy_(kept)
