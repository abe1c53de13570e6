"""The cache: keys and values for the layers that attend, nothing for those that don't, and the MetaRouter's sum.

Under `attention_context="routed"` a layer keeps only the tokens that it routed to attention, so its rows differ in
length, and in what they hold, from layer to layer. Rows are buffers that grow by a quarter when they are full: a token
more costs its own keys and values, not a copy of all before it.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import LongTensor, Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from chiaroscuro.errors import UserError
from chiaroscuro.model.config import ChiarConfig


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one layer, as many for each row as it kept, detached: no gradient goes to an earlier call.

    Attributes:
        keys: (B, h, capacity, c), of which row b has filled the first `lengths[b]`; so `values`.
        places: (B, capacity), at which token of its sequence each one stood, for `crop`.
        lengths: how many each row keeps.
        seen: how many tokens each row has gone by, kept or not.

    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.places: Tensor | None = None
        self.lengths: list[int] = []
        self.seen = 0

    @property
    def ragged(self) -> bool:
        """Whether its rows differ in length."""
        return len(set(self.lengths)) > 1

    @property
    def empty(self) -> bool:
        """Whether no row keeps anything."""
        return not any(self.lengths)

    def numbers_kept(self) -> int:
        """How many numbers its keys and values are; the buffers are up to a quarter larger."""
        return 0 if self.keys is None else 2 * sum(self.lengths) * self.keys.shape[1] * self.keys.shape[3]

    def update(
        self,
        key_states: Float[Tensor, "batch heads time head_width"],
        value_states: Float[Tensor, "batch heads time head_width"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch heads keys head_width"], Float[Tensor, "batch heads keys head_width"]]:
        """Keep every row's new tokens, and give back all that are kept.

        Raises:
            UserError: the rows kept differ in length: there is no such rectangle.

        """
        if self.ragged:
            raise UserError("this cache was begun with an attention_mask: go on giving one, over cached and new tokens")
        batch, _, time, _ = key_states.shape
        self._check_rows(batch)
        kept = self.lengths[0] if self.lengths else 0
        self._make_room([kept + time] * batch, key_states, value_states)
        assert self.keys is not None and self.values is not None and self.places is not None
        end = kept + time
        self.keys[:, :, kept:end] = key_states.detach()
        self.values[:, :, kept:end] = value_states.detach()
        self.places[:, kept:end] = torch.arange(self.seen, self.seen + time, device=self.places.device)
        self.lengths, self.seen = [end] * batch, self.seen + time
        if kept == 0:  # as they came, so that a forward that begins a cache can be differentiated
            return key_states, value_states
        if torch.is_grad_enabled():  # not views, into which the next call writes before a backward has read them
            return (
                torch.cat([self.keys[:, :, :kept], key_states], dim=2),
                torch.cat([self.values[:, :, :kept], value_states], dim=2),
            )
        return self.keys[:, :, :end], self.values[:, :, :end]

    def extend(
        self,
        key: Float[Tensor, "tokens heads head_width"],
        value: Float[Tensor, "tokens heads head_width"],
        chosen: Bool[Tensor, "batch time"],
    ) -> None:
        """Keep the chosen ones of the new tokens; keys and values come packed, row after row."""
        batch, time = chosen.shape
        self._check_rows(batch)
        before = self.lengths or [0] * batch
        if len(key) == 0:  # no buffers either: their type is that of the first that is kept
            self.lengths, self.seen = before, self.seen + time
            return
        counts = chosen.sum(1).tolist()
        after = [n + m for n, m in zip(before, counts, strict=True)]
        self._make_room(after, key.transpose(0, 1)[None], value.transpose(0, 1)[None])
        assert self.keys is not None and self.values is not None and self.places is not None
        places = chosen.nonzero()[:, 1] + self.seen
        rows = zip(*(part.split(counts) for part in (key.detach(), value.detach(), places)), before, after, strict=True)
        for b, (k, v, place, start, end) in enumerate(rows):
            if start < end:
                self.keys[b, :, start:end] = k.transpose(0, 1)
                self.values[b, :, start:end] = v.transpose(0, 1)
                self.places[b, start:end] = place
        self.lengths, self.seen = after, self.seen + time

    def rows(
        self,
    ) -> Iterator[tuple[Float[Tensor, "heads kept head_width"], Float[Tensor, "heads kept head_width"]]]:
        """What each row keeps; there is nothing to view in an `empty` layer."""
        assert self.keys is not None and self.values is not None
        for k, v, n in zip(self.keys, self.values, self.lengths, strict=True):
            # Not views where a backward may read them after the next call has written.
            yield (k[:, :n].clone(), v[:, :n].clone()) if torch.is_grad_enabled() else (k[:, :n], v[:, :n])

    def _check_rows(self, batch: int) -> None:
        if self.lengths and len(self.lengths) != batch:
            raise UserError(f"the cache holds {len(self.lengths)} rows, the input has {batch}: need as many")

    def _make_room(self, lengths: list[int], key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        needed, batch = max(lengths, default=0), len(lengths)
        if self.keys is not None and self.values is not None and self.places is not None:
            if self.keys.is_inference() and not torch.is_inference_mode_enabled():  # where they can't be written into
                self.keys, self.values = self.keys.clone(), self.values.clone()
                self.places = self.places.clone()
            if needed <= self.keys.shape[2]:
                return
        capacity = needed + needed // 4 + 16
        buffers = []
        for old, like in ((self.keys, key_states), (self.values, value_states)):
            new = like.new_empty(batch, like.shape[1], capacity, like.shape[3])
            if old is not None:
                new[:, :, : old.shape[2]] = old
            buffers.append(new)
        places = torch.zeros(batch, capacity, dtype=torch.long, device=key_states.device)
        if self.places is not None:
            places[:, : self.places.shape[1]] = self.places
        self.keys, self.values = buffers
        self.places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note the type and the device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask over all tokens that were seen: its width, and where it begins."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not."""
        return self.seen

    def get_max_length(self) -> int:
        """−1: it grows."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.places = None
        self.lengths, self.seen, self.is_initialized = [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens that were seen, of which each row may have kept another number."""
        self.seen += tokens_to_remove
        if self.places is not None:
            self.lengths = [int((row[:n] < self.seen).sum()) for row, n in zip(self.places, self.lengths, strict=True)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in this order."""
        if self.keys is not None and self.values is not None and self.places is not None:
            indices = indices.to(self.keys.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.places = self.places[indices]
        if self.lengths:
            self.lengths = torch.tensor(self.lengths)[indices.cpu()].tolist()


class ChiarCache(Cache):
    """A Hugging Face cache for one CHIAR-Former.

    A layer whose menu has `"attention"` (or another operator that asks for `cache`) keeps keys and values: of every
    token, or under `attention_context="routed"` of the routed ones. A layer of spectral mixing alone keeps nothing. A
    causal MetaRouter keeps the sum and the count of the embedded tokens so far. Nothing kept carries a gradient.

    Args:
        config: of the model.

    Attributes:
        tokens_seen: so far, padding included.
        padded: whether some of these were padding, so that what follows needs an attention_mask too.

    Raises:
        UserError: the model can't be cached; the message says why.

    """

    def __init__(self, config: ChiarConfig) -> None:
        if reason := config.uncacheable():
            raise UserError(f"no cache for a model with {reason}: pass use_cache=False")
        keeping = [config.keeps_keys(menu) for menu in config.menus]
        super().__init__(layers=[GrowingLayer() if keeps else DummyLayer() for keeps in keeping])
        self.tokens_seen = 0
        self.padded = False
        self.meta_state: tuple[Tensor, Tensor] | None = None

    @property
    def is_compileable(self) -> bool:
        """False: it grows, so generation doesn't prepare it as a static one."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works: a sum of embeddings can't be taken back without the tokens that it is of."""
        return self.meta_state is None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included; the same for every layer, whatever it keeps."""
        return self.tokens_seen

    def numbers_kept(self) -> int:
        """How many numbers its keys and values are."""
        return sum(layer.numbers_kept() for layer in self.layers if isinstance(layer, GrowingLayer))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tokens_seen = 0
        self.padded = False
        self.meta_state = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is negative, as in transformers.

        Raises:
            UserError: the model has a causal MetaRouter, or there are not as many tokens.

        """
        if not self.is_croppable:
            raise UserError("this cache holds the sum of a causal MetaRouter and can't be cropped: start a new one")
        if not -self.tokens_seen <= tokens_to_remove <= 0:
            raise UserError(
                f"crop({tokens_to_remove}) of a cache of {self.tokens_seen} tokens: give the number to remove, negative"
            )
        super().crop(tokens_to_remove)
        self.tokens_seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order that beam search chose."""
        super().reorder_cache(cast(LongTensor, beam_idx))
        self._map_meta_state(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._map_meta_state(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._map_meta_state(lambda state: state[indices])

    def _map_meta_state(self, change: Callable[[Tensor], Any]) -> None:
        if self.meta_state is not None:
            self.meta_state = (change(self.meta_state[0]), change(self.meta_state[1]))
