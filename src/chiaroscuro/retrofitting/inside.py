"""What the attention modules of a retrofitted model are given, and what they make of it, seen from outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from chiaroscuro.retrofitting.routed_attention import Probe
from chiaroscuro.retrofitting.routed_model import RoutedModel, attention_modules


@contextmanager
def noting_inputs(model: RoutedModel) -> Iterator[dict[int, Float[Tensor, "batch time width"]]]:
    """Inside the block, what each routed module was last given, by layer: what its routers score."""
    given: dict[int, Tensor] = {}

    def noting(layer: int) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return note

    modules = attention_modules(model)
    handles = [modules[i].register_forward_pre_hook(noting(i), with_kwargs=True) for i in model.reaches]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def projections(
    model: RoutedModel, ids: Int[Tensor, "1 time"]
) -> dict[int, list[Float[Tensor, "heads time head_width"]]]:
    """Queries and keys, rotated, and values of one row, by layer, in one forward."""
    probes = {i: Probe(reach.window, reach.sinks) for i, reach in model.reaches.items()}
    try:
        for i, reach in model.reaches.items():
            reach.probe = probes[i]
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for reach in model.reaches.values():
            reach.probe = None
    return {i: [part.transpose(1, 2)[0] for part in probe.parts] for i, probe in probes.items()}
