"""What is beyond a token's window, and what it changes: in the loss of each prediction, and in each layer's attention.

A `FarContext` holds plain tensors of one row. How a model gives them is up to its kind.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chiaroscuro.ops.attention import capped
from chiaroscuro.ops.reach_attention import reach_mask


@dataclass(frozen=True)
class FarPart:
    """What far context is to each token of one layer.

    Attributes:
        moved: ‖o − o'‖ / ‖o‖, o all heads' outputs of whole attention and o' those of the window and the sinks alone.
        mass: the attention that goes beyond the window, the mean over heads.
        distance: how far that is, in tokens, the mean weighted by attention; 0 where nothing is beyond the window.

    """

    moved: Float[Tensor, " time"]
    mass: Float[Tensor, " time"]
    distance: Float[Tensor, " time"]


@dataclass(frozen=True)
class FarLayer:
    """One layer of a row: what is far, and by name what a router could go by.

    Attributes:
        part: what is far.
        scores: by name, one number a token.

    """

    part: FarPart
    scores: Mapping[str, Float[Tensor, " time"]]


@dataclass(frozen=True)
class FarContext:
    """One row, in the model of full attention.

    Attributes:
        ids: the tokens.
        gain: of each token but the last, the loss of what it predicts where all see their window alone, less the loss
            with full attention, in nats.
        loss: of each token but the last, the loss of what it predicts with full attention.
        layers: by number.
        first: the first token that has something beyond its window.

    """

    ids: Int[Tensor, " time"]
    gain: Float[Tensor, " predicted"]
    loss: Float[Tensor, " predicted"]
    layers: Mapping[int, FarLayer]
    first: int


@torch.no_grad()
def far_part(
    query: Float[Tensor, "heads time head_width"],
    key: Float[Tensor, "key_heads time head_width"],
    value: Float[Tensor, "key_heads time head_width"],
    window: int,
    sinks: int,
    softcap: float | None = None,
) -> FarPart:
    """Measure what lies beyond the window of each token of a row; queries × keys are held in memory.

    Args:
        query: rotated.
        key: likewise. Each of its heads serves as many heads of the queries in turn.
        value: likewise.
        window: w.
        sinks: s.
        softcap: as of `reach_attention`.

    """
    time = query.shape[1]
    query, key, value = query.unflatten(0, (len(key), -1)), key[:, None], value[:, None]
    place = torch.arange(time, device=query.device)
    nobody = torch.zeros(time, dtype=torch.bool, device=query.device)
    near = reach_mask(place, place, nobody, nobody, window, sinks)
    causal = place <= place[:, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = capped((query @ key.transpose(-1, -2)).to(wide) / math.sqrt(query.shape[-1]), softcap)
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    whole = weights.to(value.dtype) @ value
    close = scores.masked_fill(~near, -torch.inf).softmax(-1).to(value.dtype) @ value
    far = weights.masked_fill(near, 0.0)
    moved, size = (x.movedim(2, 0).flatten(1).norm(dim=1) for x in (whole - close, whole))
    mass = far.mean((0, 1))
    distance = (mass * (place[:, None] - place)).sum(1) / mass.sum(1).clamp_min(torch.finfo(mass.dtype).tiny)
    return FarPart(moved / size, mass.sum(1), distance)
