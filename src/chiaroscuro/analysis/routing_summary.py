"""How a model routes whole batches: the share of each operator, the entropies, and the mean gate, layer by layer.

Entropies are given as quantiles at `PROBABILITIES`, beside those of white noise of the same width: an entropy means
nothing without them. Layers are numbered from 1, as in the paper.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.block import Routing
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.batches import Batch, fields_of
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.ops import null_entropy_quantiles
from chiaroscuro.ops.spectral import Spectrum

PROBABILITIES = (0.05, 0.5, 0.95)


def describe_routing(
    looks: Sequence[tuple[Sequence[Any], Tensor | None]], width: int, spectrum: Spectrum = "orthonormal"
) -> dict[str, Any]:
    """Summarise the routing of some batches, ready for JSON.

    Args:
        looks: `output.routing` and `output.meta_gate` of each batch; the gate is None without a MetaRouter.
        width: d, the width of the white noise that the entropies are compared with.
        spectrum: of these entropies.

    Returns:
        `layers` (of each its number, its `operators`, their `share`, the quantiles of the `entropy` and, where it is
        decided who is kept, the share that is `kept`), `null_entropy`, and `gate` if there is a MetaRouter.
    """
    layers = [
        {
            "layer": number,
            "operators": list(batches[0].operators),
            "share": _share(batches),
            "entropy": _entropy_quantiles(batches),
            **_kept(batches),
        }
        for number, batches in enumerate(zip(*(routing for routing, _ in looks), strict=True), start=1)
    ]
    null = null_entropy_quantiles(width, PROBABILITIES, spectrum).tolist()
    return {"layers": layers, "null_entropy": null, **mean_gate(looks)}


def to_summarise(
    routing: Sequence[Routing | None], gate: Tensor | None
) -> tuple[Sequence[Routing | None], Tensor | None]:
    """What `describe_routing` reads of a batch, off the GPU and without scores: it is held for all of a text."""

    def plain(one: Routing) -> Routing:
        parts = (one.entropy, one.operator_index, one.weights, one.kept)
        entropy, index, weights, kept = (None if part is None else part.cpu() for part in parts)
        return Routing(one.operators, entropy, cast(Tensor, index), weights=weights, kept=kept)

    return [None if one is None else plain(one) for one in routing], None if gate is None else gate.cpu()


def mean_gate(looks: Sequence[tuple[Any, Tensor | None]]) -> dict[str, float]:
    """The mean of g over some batches as `{"gate": g}`, without padding; an empty dict without a MetaRouter."""
    gates = []
    for routing, gate in looks:
        if gate is not None:
            real = routing[0].operator_index >= 0
            gates.append((gate[real] if gate.shape == real.shape else gate).detach().float().flatten())
    return {"gate": torch.cat(gates).mean().item()} if gates else {}


@torch.no_grad()
def measure_routing(model: ChiarPreTrainedModel, batches: Iterable[Batch]) -> dict[str, Any]:
    """Run a model on batches, as of `calibrate`, and summarise its routing as `describe_routing` does.

    Raises:
        UserError: the model is no CHIAR-Former.

    """
    if not isinstance(model, ChiarPreTrainedModel):
        raise UserError(f"measure_routing takes a CHIAR-Former, not a {type(model).__name__}")
    with evaluation_mode(model):
        outputs = [
            model.trunk(
                **{name: values.to(model.device) for name, values in fields_of(batch).items()},
                use_cache=False,
                output_routing=True,
            )
            for batch in batches
        ]
    return describe_routing(
        [(output.routing, output.meta_gate) for output in outputs], model.config.hidden_size, model.config.spectrum
    )


def _share(batches: Sequence[Any]) -> list[float]:
    """The share of each operator; every batch is weighted by its real tokens, since the last one may be small."""
    tokens = torch.stack([(batch.operator_index >= 0).sum() for batch in batches]).float()
    shares = torch.stack([batch.share.detach().float() for batch in batches])
    return (tokens @ shares / tokens.sum().clamp_min(1)).tolist()


def _kept(batches: Sequence[Any]) -> dict[str, float]:
    """The share of the tokens that are kept, the mean over key-value heads; nothing where that is not decided."""
    if batches[0].kept is None:
        return {}
    kept = torch.cat([batch.kept[batch.operator_index >= 0].float().flatten() for batch in batches])
    return {"kept": kept.mean().item()}


def _entropy_quantiles(batches: Sequence[Any]) -> list[float]:
    # Padding has operator_index -1. NumPy, because torch.quantile refuses more than 16 million values.
    seen = torch.cat([batch.entropy.detach()[batch.operator_index >= 0].float() for batch in batches])
    return np.quantile(seen.cpu().numpy(), PROBABILITIES).tolist() if seen.numel() else []
