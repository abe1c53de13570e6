"""Where a model of either kind spends attention on one text."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from chiaroscuro.analysis.routing import (
    LayerTrace,
    RoutingTrace,
    part_of_heads,
    refuse_no_entropy,
    text_to_route,
    trace_routing,
)
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.ops import null_entropy_mean, spectral_entropy
from chiaroscuro.retrofitting.inside import noting_decisions, noting_inputs
from chiaroscuro.retrofitting.routed_model import RoutedModel
from chiaroscuro.studies.workspace import Workspace

MENU = ("local", "attention")
"""What the tokens of a retrofitted layer get: their window alone, or what is kept beyond it too."""


def trace_text(workspace: Workspace, text: str) -> RoutingTrace:
    """Run a model once over a text, and record what every layer did with every token: see `trace_routing`.

    A layer of a retrofitted model has the menu local, attention; attention alone where everybody looks far or where the
    layer was left whole. A token has attention where the queries of any key-value head look far.

    Raises:
        UserError: as `trace_routing` does, or the model routes nothing.

    """
    model: Any = workspace.model
    if not isinstance(model, RoutedModel):
        return trace_routing(workspace.chiar("route"), workspace.tokenizer, text)
    ids, pieces = text_to_route(model, workspace.tokenizer, text)
    layers = _layers(model, torch.tensor([ids], device=model.device))
    width = int(model.config.hidden_size)
    return RoutingTrace(pieces, layers, None, null_entropy_mean(width), width)


@torch.no_grad()
def _layers(model: RoutedModel, ids: Int[Tensor, "1 time"]) -> tuple[LayerTrace, ...]:
    with evaluation_mode(model), noting_inputs(model) as given, noting_decisions(model) as decided:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    found = []
    for i, source in sorted(given.items()):
        numbers = tuple(spectral_entropy(source[0].float()).tolist())
        ((looks, keeps),) = decided.get(i, [(None, None)])
        kept = None if keeps is None else tuple(part_of_heads(keeps).tolist())
        if looks is None or model.reaches[i].look.calibration.share == 1:
            found.append(LayerTrace(MENU[-1:], (0,) * len(numbers), numbers, (), (1.0,), kept))
        else:
            looking = part_of_heads(looks)
            index = tuple((looking > 0).long().tolist())  # by some head at least
            far = sum(index) / len(index)
            found.append(LayerTrace(MENU, index, numbers, (), (1 - far, far), kept))
    refuse_no_entropy(found)
    return tuple(found)
