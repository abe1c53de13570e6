"""One routed layer of a transformers cache: the window in a ring, and of what lies beyond it those that are kept."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from chiaroscuro.errors import UserError
from chiaroscuro.layers.reach_state import ReachState
from chiaroscuro.layers.state import LayerStates, row_numbers


class RoutedLayer(CacheLayerMixin):
    """What a routed attention module keeps of earlier tokens, in the place of a `DynamicLayer`.

    Args:
        window: w.
        sinks: s.

    Attributes:
        state: the keys and values.
        routers: what the routers know of earlier tokens, by side.
        columns: how many tokens of each row there were, padding included.
        expected: whether a routed module is about to update it.

    """

    is_croppable = True

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state = ReachState(self.window, self.sinks)
        self.routers = LayerStates()
        self.columns = 0
        self.expected = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the attention module fills the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens. The attention module, which knows who is kept, takes their keys and values up.

        Raises:
            UserError: the module is not routed.

        """
        if not self.expected:
            raise UserError("this cache was begun by a routed model, and this one is not: start a new one")
        self.expected = False
        self.columns += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """How many tokens there were, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask says of all tokens whether they are real."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """−1: it grows."""
        return -1

    def numbers_kept(self) -> int:
        """How many numbers it holds."""
        return self.state.numbers_kept() + self.routers.numbers_kept()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is negative, as transformers gives it.

        Raises:
            UserError: a number above 0, or more of them than are remembered.

        """
        if not -self.columns <= tokens_to_remove <= 0:
            raise UserError(
                f"crop({tokens_to_remove}) of a cache of {self.columns} tokens: give the number to remove, negative"
            )
        if tokens_to_remove == -self.columns:
            return self.reset()
        states = [self.state, *self.routers.kept()]
        for state in states:
            state.check_crop(-tokens_to_remove)
        for state in states:
            state.crop(-tokens_to_remove)
        self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._select(row_numbers(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.state.begun:
            self._select(torch.arange(self.state.rows // self.state.heads).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        self.state.select(rows)
        self.routers.select(rows)


def layer_of(cache: Cache, layer: int, window: int, sinks: int, time: int) -> RoutedLayer:
    """The routed layer of a cache, which takes the place of an empty `DynamicLayer`.

    Args:
        cache: of the model.
        layer: its number.
        window: w.
        sinks: s.
        time: how many new tokens there are, which the layers before have taken up already.

    Raises:
        UserError: a cache of another kind, one that was begun without routing or with another window, or one of which
            only the layers before were cropped or went on.

    """
    if not isinstance(getattr(cache, "layers", None), list):
        raise UserError(f"layer {layer} is routed and can't use a {type(cache).__name__}: pass a DynamicCache, or none")
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= layer:
        raise UserError(f"a cache of {len(cache.layers)} layers, and layer {layer} is routed: make it for this model")
    found = cache.layers[layer]
    if isinstance(found, RoutedLayer):
        if (found.window, found.sinks) != (window, sinks):
            raise UserError(
                f"this cache was begun with window={found.window}, sinks={found.sinks}, and layer {layer} has "
                f"window={window}, sinks={sinks}: start a new one"
            )
        if layer and found.columns != (before := cast(Any, cache.layers[0]).get_seq_length() - time):
            raise UserError(
                f"layer {layer} of this cache holds {found.columns} tokens and the first one {before}, as after a crop "
                "or a forward that ended halfway: start a new one"
            )
        found.expected = True
        return found
    if type(found) is not DynamicLayer or cache.offloading:
        kind = "an offloaded cache" if cache.offloading else f"a {type(found).__name__}"
        raise UserError(f"layer {layer} is routed and can't use {kind}: pass a DynamicCache, or none")
    if found.get_seq_length():
        raise UserError(f"layer {layer} is routed, and this cache was begun without routing: start a new one")
    routed = RoutedLayer(window, sinks)
    routed.expected = True
    cache.layers[layer] = routed
    return routed


def numbers_held(cache: Any) -> int:
    """How many numbers a cache of transformers holds, in routed layers and in others."""
    layers: list[Any] = cache.layers
    return sum(
        layer.numbers_kept() if isinstance(layer, RoutedLayer) else layer.keys.numel() + layer.values.numel()
        for layer in layers
    )
