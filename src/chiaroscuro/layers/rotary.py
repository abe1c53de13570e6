"""Rotary angles by transformers' `rope_parameters`, the scaled kinds included."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.errors import UserError, suggest
from chiaroscuro.layers.operator import is_number
from chiaroscuro.ops.attention import rotary_frequencies

PLAIN = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""What `rope_parameters` of any type may have."""

SCALING = (
    *("factor", "attention_factor", "short_factor", "long_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor"),
)
"""What some types that scale angles have."""


def frequencies_of(
    parameters: Mapping[str, Any], head_width: int, longest: int
) -> tuple[Float[Tensor, " pairs"], float]:
    """The frequency of each pair of features, and the factor on its cosine and sine.

    They are one model's, whatever the length of a sequence: a later token would otherwise turn the earlier ones. So
    `longrope` has its long factors where `longest` exceeds its `original_max_position_embeddings`, and its short ones
    where it does not; transformers asks that of each sequence. `dynamic` changes nothing up to `longest`.

    Args:
        parameters: as transformers has them: `rope_type`, `rope_theta`, and what that type needs, such as `factor`.
        head_width: c, the features that are rotated.
        longest: the configuration's `max_position_embeddings`.

    Raises:
        UserError: transformers doesn't know the type, or the type needs a parameter that is missing or unusable.

    """
    kind = parameters.get("rope_type", "default") if isinstance(parameters, Mapping) else None
    if not isinstance(kind, str):
        raise UserError(f"rope_parameters={parameters!r}: give a mapping, {{rope_type: default, rope_theta: 10000.0}}")
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"rope_parameters={dict(parameters)}: all features of a head are rotated; leave out the factor")
    _check_names(parameters, kind)
    if kind == "default":
        if not is_number(parameters.get("rope_theta")):
            raise UserError(f"rope_parameters={dict(parameters)}: give rope_theta, a number")
        return rotary_frequencies(head_width, float(parameters["rope_theta"])), 1.0
    for name in ("factor", "attention_factor"):
        if parameters.get(name) is not None and not _is_positive(parameters[name]):
            raise UserError(f"rope_parameters={dict(parameters)}: {name} must be a positive number")
    for name in ("short_factor", "long_factor"):
        _check_factors(parameters, name, head_width // 2)
    try:
        described = json.dumps(dict(parameters), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"rope_parameters={dict(parameters)}: {error}") from None
    return _frequencies(described, head_width, longest)


def _check_names(parameters: Mapping[str, Any], kind: str) -> None:
    """Refuse a misspelt name, and what would scale angles without a type that says how.

    Other names, which some checkpoints have, change nothing.
    """
    known = (*PLAIN, *SCALING)
    for name in parameters:
        close = [] if name in known else get_close_matches(name, known, n=1, cutoff=0.75)
        if close:
            raise UserError(f"rope_parameters={dict(parameters)}: unknown {name!r}: did you mean {close[0]!r}?")
        if kind == "default" and name in SCALING and parameters[name] is not None:
            raise UserError(f"rope_parameters={dict(parameters)}: {name} scales angles: give rope_type, such as linear")


def _check_factors(parameters: Mapping[str, Any], name: str, pairs: int) -> None:
    """Refuse factors of longrope of which there is not a positive one for each pair of features."""
    given = parameters.get(name)
    if given is None:
        return
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    if not listed or len(given) != pairs or not all(map(_is_positive, given)):
        raise UserError(f"rope_parameters={dict(parameters)}: {name} must be a list of {pairs} positive numbers")


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value <= sys.float_info.max


@lru_cache(maxsize=64)
def _frequencies(parameters: str, head_width: int, longest: int) -> tuple[Tensor, float]:
    # Not at the top: few need it, and it is slow to import.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = json.loads(parameters)
    if given["rope_type"] not in ROPE_INIT_FUNCTIONS:
        hint = suggest(given["rope_type"], {"default", *ROPE_INIT_FUNCTIONS})
        raise UserError(f"rope_parameters: unknown rope_type {given['rope_type']!r}: {hint}")
    model = SimpleNamespace(
        rope_parameters=given,
        head_dim=head_width,
        hidden_size=head_width,
        num_attention_heads=1,
        max_position_embeddings=longest,
        standardize_rope_params=lambda: None,
    )
    device = torch.device("cpu")
    try:
        # A table made under inference mode could never be used in training.
        with torch.inference_mode(False), torch.no_grad(), device:
            frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](model, device=device, seq_len=longest)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"rope_parameters={given}: {reason}") from None
    if not bool(frequencies.isfinite().all()) or not math.isfinite(factor):
        raise UserError(f"rope_parameters={given}: the frequencies they give are not finite")
    return frequencies.float(), float(factor)
