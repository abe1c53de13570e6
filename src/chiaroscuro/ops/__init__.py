"""Pure functions on tensors: the operators' arithmetic, without parameters and without a config."""

from chiaroscuro.ops.attention import attend, attend_to_all, causal_mask, rotary_frequencies, rotary_table, rotate
from chiaroscuro.ops.linear_cross_entropy import linear_cross_entropy
from chiaroscuro.ops.null import null_entropy_mean, null_entropy_quantiles
from chiaroscuro.ops.packed_attention import prefix_attention
from chiaroscuro.ops.rbf import fourier_features, rbf_mix, rbf_weights
from chiaroscuro.ops.short_convolution import short_convolution, short_convolution_at
from chiaroscuro.ops.spectral import (
    dct,
    entropy_of_spectrum,
    has_kernel,
    idct,
    spectral_coefficients,
    spectral_entropy,
    spectral_filter,
    spectral_mix,
    spectral_mix_with_entropy,
)

__all__ = [
    "attend",
    "attend_to_all",
    "causal_mask",
    "dct",
    "entropy_of_spectrum",
    "fourier_features",
    "has_kernel",
    "idct",
    "linear_cross_entropy",
    "null_entropy_mean",
    "null_entropy_quantiles",
    "prefix_attention",
    "rbf_mix",
    "rbf_weights",
    "rotary_frequencies",
    "rotary_table",
    "rotate",
    "short_convolution",
    "short_convolution_at",
    "spectral_coefficients",
    "spectral_entropy",
    "spectral_filter",
    "spectral_mix",
    "spectral_mix_with_entropy",
]
