"""What routing can save: the operations of a model beside those of full attention."""

from typing import Any

from chiaroscuro.analysis.flops import (
    TARGET,
    attention_part,
    compare_protocols,
    count_flops,
    full_attention,
    largest_share,
    shortest_length,
)
from chiaroscuro.model.config import ChiarConfig

CLAIMED = "35–40%"
"""The part of all operations that the paper says its model, v2, saves."""


def describe_flops(config: ChiarConfig, length: int, share: float | None = None) -> dict[str, Any]:
    """Count the operations of one sequence, beside those of full attention, and say when routing saves any.

    Args:
        config: the model to count.
        length: T, tokens of the sequence.
        share: ρ; the config's own attention_share unless given.

    Returns:
        Plain data, ready for JSON: operations by operator for a forward and a training step, totals under each
        protocol (multiply-adds under `paper`), attention's part of the whole, the length from which on `target` of a
        training step is saved, and the largest share at which it is saved at this length.

    """
    operators = {
        step: {
            "ours": count_flops(config, length, share=share, training=training).by_operator,
            "full attention": count_flops(full_attention(config), length, training=training).by_operator,
        }
        for step, training in (("forward", False), ("training", True))
    }
    return {
        "length": length,
        "share": config.attention_share if share is None else share,
        "attention_context": config.attention_context,
        "kv_share": config.kv_share if config.keeping_layers else None,
        "execution": config.execution,
        "by_operator": operators,
        "protocols": compare_protocols(config, length, share),
        "attention_part": attention_part(config, length),
        "claimed": CLAIMED if _has_size_of_v2(config) else None,
        "target": TARGET,
        "shortest_length": shortest_length(config, share),
        "largest_share": largest_share(config, length),
    }


def _has_size_of_v2(config: ChiarConfig) -> bool:
    theirs = ChiarConfig.preset("v2-400m")
    return (config.hidden_size, config.num_hidden_layers) == (theirs.hidden_size, theirs.num_hidden_layers)
