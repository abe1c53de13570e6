"""The norms of a layer, by name."""

from typing import Literal, get_args

from torch import nn

from chiaroscuro.errors import UserError

NormType = Literal["layer", "rms"]

EPSILON: dict[NormType, float] = {"layer": 1e-5, "rms": 1e-6}
"""What is added to the variance, unless a model says otherwise: PyTorch's default, and Llama's."""


def make_norm(kind: NormType, width: int, epsilon: float | None = None) -> nn.LayerNorm | nn.RMSNorm:
    """A LayerNorm, (x − mean) / √(var + ε) · w + b, or an RMSNorm (arXiv 1910.07467), x / √(mean x² + ε) · w.

    Raises:
        UserError: an unknown kind.

    """
    if kind not in get_args(NormType):
        raise UserError(f"norm_type={kind!r}: choose one of {', '.join(get_args(NormType))}")
    epsilon = EPSILON[kind] if epsilon is None else epsilon
    return nn.RMSNorm(width, eps=epsilon) if kind == "rms" else nn.LayerNorm(width, eps=epsilon)
