"""RBF kernel mixing by random Fourier features: the operator that the paper's v1 tried and dropped."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def fourier_features(
    x: Float[Tensor, "*batch width"], frequencies: Float[Tensor, "width features"]
) -> Float[Tensor, "*batch two_features"]:
    """φ(x) = [cos(xΩ/√R), sin(xΩ/√R)], Ω of shape (d, R). Source: Rahimi and Recht 2007, as the paper scales it."""
    angle = x @ frequencies / math.sqrt(frequencies.shape[-1])
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rbf_mix(
    features: Float[Tensor, "batch time features"], mask: Bool[Tensor, "#batch 1 time time"]
) -> Float[Tensor, "batch time features"]:
    """A φ with A = softmax(φ φᵀ), each token's row over the tokens that `mask` lets it see.

    Raises:
        ValueError: the mask is not one T × T table a row.

    Source: the paper, v1, RBF kernel mixing. The published form has no mask and so reads the future.

    """
    return rbf_weights(features, mask).to(features.dtype) @ features


def rbf_weights(
    features: Float[Tensor, "batch time features"], mask: Bool[Tensor, "#batch 1 time time"]
) -> Float[Tensor, "batch time time"]:
    """A of `rbf_mix`, in float32 or wider; arguments and errors are the same."""
    time = features.shape[-2]
    if mask.shape[-2:] != (time, time):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, features {tuple(features.shape)}: need (…, {time}, {time})"
        )
    scores = features @ features.transpose(-1, -2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1, dtype=wide)
