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
    features: Float[Tensor, "batch keys features"], mask: Bool[Tensor, "#batch 1 time keys"]
) -> Float[Tensor, "batch time features"]:
    """A φ with A = softmax(φ φᵀ), for the last T of the tokens, each one's row over those that `mask` lets it see.

    Raises:
        ValueError: the mask is not T × S with T ≤ S, the number of tokens.

    Source: the paper, v1, RBF kernel mixing. The published form has no mask and so reads the future.

    """
    return rbf_weights(features, mask).to(features.dtype) @ features


def rbf_weights(
    features: Float[Tensor, "batch keys features"], mask: Bool[Tensor, "#batch 1 time keys"]
) -> Float[Tensor, "batch time keys"]:
    """A of `rbf_mix`, in float32 or wider; arguments and errors are the same."""
    keys, (queries, width) = features.shape[-2], mask.shape[-2:]
    if width != keys or queries > keys:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, features {tuple(features.shape)}: need a mask of (…, T, {keys}) "
            f"with T up to {keys}"
        )
    scores = features[:, keys - queries :] @ features.transpose(-1, -2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1, dtype=wide)
