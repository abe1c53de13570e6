"""What a checkpoint is, in numbers."""

import math
import os
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import chiaroscuro.model
from chiaroscuro.errors import UserError
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.config import ChiarConfig


def count_parameters(config: PreTrainedConfig) -> int | None:
    """The parameters of the model that a configuration describes, without making it; None for an unknown class.

    The class is the one in `config.architectures`; a `ChiarConfig` that names none is a `ChiarForCausalLM`.

    Raises:
        UserError: its embeddings and one product alone would not fit into the memory of this machine.

    """
    if isinstance(config, ChiarConfig):  # whose thresholds take a draw of noise of the model's width
        width = config.hidden_size
        refuse_beyond_memory(4 * width * (config.vocab_size + width), "the model's weights")
    name = (config.architectures or ["ChiarForCausalLM" if isinstance(config, ChiarConfig) else ""])[0]
    cls: Any = getattr(chiaroscuro.model, name, None) or getattr(transformers, name, None)
    if cls is None:
        return None
    with torch.device("meta"):
        return cls(config).num_parameters()


def refuse_beyond_memory(needed: float, what: str) -> None:
    """Refuse what needs more bytes than the machine has, before an attempt at it stops the machine.

    Raises:
        UserError: saying how much is needed and how much there is.

    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{what} would take {needed / 2**30:,.0f} GiB or more, and this machine has {there / 2**30:,.0f} GiB of "
            "memory: take something smaller"
        )


_RETROFITTED = ("window", "sinks", "attention_share", "kv_share", "router", "kv_router")
"""What is told of a retrofitted model, of what its configuration says was done."""


def _ready(threshold: float) -> float | str | None:
    """A threshold as JSON has it."""
    return "NaN" if math.isnan(threshold) else threshold if math.isfinite(threshold) else None


def describe_checkpoint(model: PreTrainedModel) -> dict[str, Any]:
    """Size, shape, menus and thresholds, ready for JSON.

    An infinite threshold, of a share of 0 or 1, is null; one that is not a number is the text `"NaN"`.

    Args:
        model: a CHIAR-Former, or another model that it is compared with, of which only the size is given.

    """
    config = model.config
    facts: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True),
        "width": config.hidden_size,
        "heads": getattr(config, "num_attention_heads", None),
        "vocabulary": config.vocab_size,
        "longest_sequence": getattr(config, "max_position_embeddings", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": [],
    }
    if not isinstance(model, ChiarPreTrainedModel) or not isinstance(config, ChiarConfig):
        routed = dict(getattr(config, "chiaroscuro", None) or {})
        told = {name: routed[name] for name in _RETROFITTED if name in routed}
        return facts | told | ({"routed_layers": routed["layers"]} if "layers" in routed else {})
    facts |= {
        "norm": config.norm,
        "embedding_norm": config.embedding_norm,
        "router": config.router,
        "attention_share": None if config.calibration == "fixed" else config.attention_share,
        "calibration": config.calibration,
        "spectrum": config.spectrum,
        "meta_router": config.meta_router,
        "cacheable": not config.uncacheable(),
    }
    if config.window is not None or config.keeping_layers:
        facts |= {name: getattr(config, name) for name in ("window", "sinks", "attention_context")}
    if config.keeping_layers:
        facts |= {"kv_router": config.kv_router, "kv_share": config.kv_share}
    calibrations, keeping = model.thresholds(), model.kv_thresholds()
    for i, layer in enumerate(model.trunk.blocks):
        calibration = calibrations.get(i)
        thresholds = [] if calibration is None else calibration.values.tolist()
        kept = [] if i not in keeping else keeping[i].values.tolist()
        facts["layers"].append(
            {
                "layer": i + 1,
                "operators": list(layer.operator_names),
                "parameters": sum(p.numel() for p in layer.parameters()),
                "thresholds": list(map(_ready, thresholds)),
                **({"kept_thresholds": list(map(_ready, kept))} if kept else {}),
                "calibration_steps": None if calibration is None else int(calibration.steps),
            }
        )
    return facts
