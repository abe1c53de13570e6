"""How much the rbf operator mixes tokens, by the weights that tokens give each other, and how much of it is leakage."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers import RBFMixing
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.ops import causal_mask, rbf_weights


@torch.no_grad()
def self_weights(model: ChiarPreTrainedModel, batches: Iterable[Tensor]) -> dict[int, dict[str, float]]:
    """The diagonal of A = softmax(φ φᵀ) in every layer that has rbf on its menu, at the layer's own input.

    1 is the identity, which mixes nothing; a token that gives all n tokens in its view the same weight gives itself
    1/n. If no operator before rbf has mixed tokens, all copies of a word have the same vector and share the weight,
    which mixes nothing either. The batches have no padding, and all tokens count, whether or not the router sends them
    to rbf.

    Args:
        model: a CHIAR-Former with rbf on a menu.
        batches: `input_ids` (B, T).

    Returns:
        By layer number: `mean` over the tokens, `uniform` (the mean if all weights were equal) and `smallest`;
        `copies`, the weight of a token and all its copies together; and `later`, the weight of all later tokens that
        are not copies. The last two are means over the tokens.

    Raises:
        UserError: no layer has rbf, or there is no batch.

    """
    layers = {i: block for i, block in enumerate(model.trunk.blocks) if "rbf" in block.operator_names}
    if not layers:
        raise UserError(f"no layer has rbf on its menu, menus {model.config.operators}: there is nothing to measure")
    found: dict[int, list[Tensor]] = {i: [] for i in layers}
    copies: dict[int, list[Tensor]] = {i: [] for i in layers}
    later: dict[int, list[Tensor]] = {i: [] for i in layers}
    uniform: list[Tensor] = []
    for batch in batches:
        ids = batch.to(model.device)
        same = ids[:, :, None] == ids[:, None, :]
        with evaluation_mode(model):
            outputs: Any = model.trunk(ids, use_cache=False, output_hidden_states=True)
        for i, block in layers.items():
            x = outputs.hidden_states[i]
            source = block.operator_input(x)
            rbf = cast(RBFMixing, block.operators["rbf"])
            real = torch.ones_like(ids, dtype=torch.bool, device=x.device)
            mask = causal_mask(real, x.shape[1])
            mask = mask if rbf.options.rbf_causal else mask | real[:, None, None, :]
            weights = rbf_weights(rbf.features_of(source), mask)
            found[i].append(weights.diagonal(dim1=1, dim2=2).flatten().cpu())
            copies[i].append((weights * same).sum(-1).flatten().cpu())
            later[i].append((weights * ~same).triu(1).sum(-1).flatten().cpu())
            if i == min(layers):
                uniform.append((1 / mask[:, 0].sum(-1)).flatten().cpu())
    if not uniform:
        raise UserError("no batch to measure on: give at least one")
    alike = torch.cat(uniform).mean().item()
    return {
        i: {
            "mean": (own := torch.cat(parts)).mean().item(),
            "smallest": own.min().item(),
            "uniform": alike,
            "copies": torch.cat(copies[i]).mean().item(),
            "later": torch.cat(later[i]).mean().item(),
        }
        for i, parts in found.items()
    }
