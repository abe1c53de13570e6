"""What the attention modules of a retrofitted model are given, and what they make of it, seen from outside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from chiaroscuro.retrofitting.routed_attention import Probe, Reach
from chiaroscuro.retrofitting.routed_model import RoutedModel, attention_modules


@contextmanager
def noting_inputs(model: RoutedModel) -> Iterator[dict[int, Float[Tensor, "batch time width"]]]:
    """Inside the block, what each attention module was last given, by layer: what its routers score, if it has any."""
    given: dict[int, Tensor] = {}

    def noting(layer: int) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return note

    modules = attention_modules(model)
    handles = [module.register_forward_pre_hook(noting(i), with_kwargs=True) for i, module in modules.items()]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def noting_decisions(model: Any) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Inside the block, by layer, who looked and who was kept in each forward; no layers of other models."""
    decided: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in _reaches(model)}
    with _watched(model, lambda layer, looks, kept, real: decided[layer].append((looks, kept))):
        yield decided


@contextmanager
def noting_scores(reach: Reach) -> Iterator[dict[str, list[Float[Tensor, "batch time *heads"]]]]:
    """Inside the block, by side, the scores of each forward of a module; none of a side whose tokens go all one way."""
    seen: dict[str, list[Tensor]] = {side: [] for side in reach.routers}

    def noting(side: str) -> Any:
        return lambda _, args, decision: seen[side].append(decision.score)

    handles = [router.register_forward_hook(noting(side)) for side, router in reach.routers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Shares:
    """The shares of the tokens that looked and that were kept, by layer, means over real tokens and heads.

    Both are empty where nothing was decided.
    """

    look: dict[int, float] = field(default_factory=dict)
    kept: dict[int, float] = field(default_factory=dict)


@contextmanager
def watching(model: Any) -> Iterator[Shares]:
    """Inside the block the decisions of any model are counted; afterwards the shares are there.

    Of a model that is not retrofitted there are none.
    """
    shares = Shares()
    tokens = dict.fromkeys(_reaches(model), 0)
    sums = {side: dict.fromkeys(tokens, 0.0) for side in ("look", "kept")}

    def count(layer: int, looks: Tensor, kept: Tensor, real: Tensor | None) -> None:
        tokens[layer] += looks.shape[:2].numel() if real is None else int(real.sum())
        for side, decided in (("look", looks), ("kept", kept)):
            of_real = decided if real is None else decided[real]
            sums[side][layer] += float(of_real.float().sum()) / (decided.shape[2] if decided.ndim == 3 else 1)

    with _watched(model, count):
        yield shares
    shares.look, shares.kept = (
        {i: total / tokens[i] for i, total in sums[side].items() if tokens[i]} for side in ("look", "kept")
    )


@contextmanager
def _watched(model: Any, note: Callable[[int, Tensor, Tensor, Tensor | None], None]) -> Iterator[None]:
    watchers = {i: partial(note, i) for i in _reaches(model)}
    for i, watcher in watchers.items():
        model.reaches[i].watchers.append(watcher)
    try:
        yield
    finally:
        for i, watcher in watchers.items():
            model.reaches[i].watchers.remove(watcher)


def _reaches(model: Any) -> dict[int, Reach]:
    return model.reaches if isinstance(model, RoutedModel) else {}


class Projections(NamedTuple):
    """What one row's attention in a layer follows from: softmax(cap(q kᵀ / √c)) v.

    Attributes:
        query: rotated.
        key: likewise.
        value: of the tokens.
        softcap: the cap, as of `reach_attention`.

    """

    query: Float[Tensor, "heads time head_width"]
    key: Float[Tensor, "key_heads time head_width"]
    value: Float[Tensor, "key_heads time head_width"]
    softcap: float | None


@torch.no_grad()
def projections(model: RoutedModel, ids: Int[Tensor, "1 time"]) -> dict[int, Projections]:
    """Those of one row, by layer, in one forward."""
    probes = {i: Probe(reach.window, reach.sinks) for i, reach in model.reaches.items()}
    try:
        for i, reach in model.reaches.items():
            reach.probe = probes[i]
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for reach in model.reaches.values():
            reach.probe = None
    found = {}
    for i, probe in probes.items():
        query, key, value = (part.transpose(1, 2)[0] for part in probe.parts)
        found[i] = Projections(query, key, value, probe.softcap)
    return found
