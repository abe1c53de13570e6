"""What a checkpoint is, in numbers."""

import math
from typing import Any

from transformers import PreTrainedModel

from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.config import ChiarConfig


def describe_checkpoint(model: PreTrainedModel) -> dict[str, Any]:
    """Size, shape, menus and thresholds, ready for JSON (an infinite threshold, of a share of 0 or 1, is null).

    Args:
        model: a CHIAR-Former, or another model that one is compared with: of that, the size alone.

    """
    config = model.config
    facts: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True),
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "longest_sequence": config.max_position_embeddings,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": [],
    }
    if not isinstance(model, ChiarPreTrainedModel) or not isinstance(config, ChiarConfig):
        return facts
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
    calibrations = model.thresholds()
    for i, layer in enumerate(model.trunk.blocks):
        calibration = calibrations.get(i)
        thresholds = [] if calibration is None else calibration.values.tolist()
        facts["layers"].append(
            {
                "layer": i + 1,
                "operators": list(layer.operator_names),
                "parameters": sum(p.numel() for p in layer.parameters()),
                "thresholds": [t if math.isfinite(t) else None for t in thresholds],
                "calibration_steps": None if calibration is None else int(calibration.steps),
            }
        )
    return facts
