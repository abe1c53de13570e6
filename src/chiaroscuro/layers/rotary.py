"""Rotary angles by transformers' `rope_parameters`, the scaled kinds included."""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.errors import UserError, suggest
from chiaroscuro.layers.operator import is_number
from chiaroscuro.ops.attention import rotary_frequencies

BY_LENGTH = ("dynamic", "longrope")
"""The types whose frequencies depend on how long the sequence is."""


def frequencies_of(
    parameters: Mapping[str, Any], head_width: int, longest: int, length: int
) -> tuple[Float[Tensor, " pairs"], float]:
    """The frequency of each pair of features, and the factor on its cosine and sine.

    Args:
        parameters: as transformers has them: `rope_type`, `rope_theta`, and what that type needs, such as `factor`.
        head_width: c, the features that are rotated.
        longest: the configuration's `max_position_embeddings`.
        length: of the sequence, cached tokens included, on which some types depend.

    Raises:
        UserError: transformers doesn't know the type, or the type needs a parameter that is missing or unusable.

    """
    kind = parameters.get("rope_type", "default") if isinstance(parameters, Mapping) else None
    if not isinstance(kind, str):
        raise UserError(f"rope_parameters={parameters!r}: give a mapping, {{rope_type: default, rope_theta: 10000.0}}")
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"rope_parameters={dict(parameters)}: all features of a head are rotated; leave out the factor")
    if kind == "default":
        if not is_number(parameters.get("rope_theta")):
            raise UserError(f"rope_parameters={dict(parameters)}: give rope_theta, a number")
        return rotary_frequencies(head_width, float(parameters["rope_theta"])), 1.0
    by_length = kind in BY_LENGTH
    return _frequencies(json.dumps(dict(parameters), sort_keys=True), head_width, longest, length if by_length else 0)


@lru_cache(maxsize=64)
def _frequencies(parameters: str, head_width: int, longest: int, length: int) -> tuple[Tensor, float]:
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
            frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](model, device=device, seq_len=length or None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"rope_parameters={given}: {reason}") from None
    if not bool(frequencies.isfinite().all()) or not math.isfinite(factor):
        raise UserError(f"rope_parameters={given}: the frequencies they give are not finite")
    return frequencies.float(), float(factor)
