"""A mean share, spread over layers that need unlike parts of it."""

import math
from collections.abc import Sequence

SPREADS = {"look": ("attention_share", "attention_spread"), "kept": ("kv_share", "kv_spread")}
"""By side, the fields of its mean share, and of the weights by which that is spread over the layers."""


def weights_of(harms: Sequence[float]) -> list[float]:
    """The weights of layers by the harm that routing each of them does: its root.

    The root is what minimises Σ hᵢ / ρᵢ under Σ ρᵢ: a harm that falls as one over the share.
    """
    return [math.sqrt(max(harm, 0.0)) for harm in harms]


def spread(weights: Sequence[float], mean: float) -> list[float]:
    """Shares of this mean in proportion to the weights, but a quarter of the mean at least and 1 at most.

    ρᵢ = min(1, max(mean / 4, c wᵢ)), with the c by which their mean is right.

    Args:
        weights: one for each layer, 0 or more; where all are 0, as if they were alike.
        mean: from 0 to 1.

    """
    if mean in (0, 1):
        return [float(mean)] * len(weights)
    largest = max(weights)
    # A layer of weight 0 has a tiny one, so that c exists where all others have come to 1.
    given = [max(weight / largest, 1e-6) if largest > 0 else 1.0 for weight in weights]

    def shares(c: float) -> list[float]:
        return [min(1.0, max(mean / 4, c * weight)) for weight in given]

    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < mean * len(given) else (low, middle)
    return shares(high)
