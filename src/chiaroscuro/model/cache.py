"""The cache of one model: a state for each operator of each layer, and the MetaRouter's running sum."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from chiaroscuro.errors import UserError
from chiaroscuro.layers import KeptTokens, LayerStates, OperatorState
from chiaroscuro.layers.state import REMEMBERED, row_numbers
from chiaroscuro.model.config import ChiarConfig

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What transformers calls the cache in a model's forward and in its output: `cache` from 5.24 on."""


def given_cache(**by_name: Cache | None) -> Cache | None:
    """The one cache that was given by one of its names, or None.

    Raises:
        UserError: it was given by several.

    """
    given = {name: cache for name, cache in by_name.items() if cache is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are one thing: give one of them")
    return next(iter(given.values()), None)


class LayerCache(LayerStates, CacheLayerMixin):
    """The states of one layer's operators, as transformers' `Cache` wants a layer to be."""

    is_compileable = False
    is_initialized = False

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """(B, h, S, c): the keys of the one operator that keeps any; rows that keep fewer are filled with zeros."""
        return self._kept(0)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The values, likewise."""
        return self._kept(-1)

    def _kept(self, kind: int) -> Tensor | None:
        keeping = [state for state in self.kept() if isinstance(state, KeptTokens) and not state.empty]
        if len(keeping) != 1:
            return None
        vectors, real = keeping[0].rectangle()
        return vectors[kind] if real is None else vectors[kind].masked_fill(~real[:, None, :, None], 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a state is made by its operator, when that first runs."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Not how operators keep what they keep."""
        raise UserError("this cache is filled by the operators of a CHIAR-Former: pass it to one as cache=…")

    def get_seq_length(self) -> int:
        """Not known to a layer, which may keep nothing."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask over the new tokens: its width, and where it begins."""
        return query_length, 0

    def get_max_length(self) -> int:
        """−1: it grows."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.states.clear()


class RunningSums(OperatorState):
    """Sums and counts of each row's embedded tokens, for a causal MetaRouter: of the last ones, for `crop`.

    It can be cropped by up to `REMEMBERED` tokens, and still has a sum afterwards.
    """

    croppable = True

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []  # (B, t, d) and (B, t) of each call, in order

    @property
    def last(self) -> tuple[Tensor, Tensor] | None:
        """The sum (B, d) and the count (B,) of all tokens so far."""
        return (self.parts[-1][0][:, -1], self.parts[-1][1][:, -1]) if self.parts else None

    def extend(self, sums: Tensor, counts: Tensor) -> None:
        """Take up what a call of the MetaRouter returned."""
        # Copies: a view would keep the sums of the whole prompt alive.
        self.parts.append((sums[:, -REMEMBERED - 1 :].detach().clone(), counts[:, -REMEMBERED - 1 :].detach().clone()))
        while sum(count.shape[1] for _, count in self.parts[1:]) > REMEMBERED:
            self.parts.pop(0)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.parts = [(sums[rows.to(sums.device)], counts[rows.to(counts.device)]) for sums, counts in self.parts]

    def check_crop(self, tokens: int) -> None:
        """Raise a UserError where more tokens are to be cropped than are remembered."""
        if tokens >= sum(count.shape[1] for _, count in self.parts):
            raise UserError(
                f"crop of {tokens} tokens, but the causal MetaRouter can go back {REMEMBERED} at most: start a new "
                "cache"
            )

    def crop(self, tokens: int) -> None:
        """Forget the last tokens.

        Raises:
            UserError: see `check_crop`.

        """
        self.check_crop(tokens)
        while tokens:
            sums, counts = self.parts.pop()
            kept = max(0, counts.shape[1] - tokens)
            tokens -= counts.shape[1] - kept
            if kept:
                self.parts.append((sums[:, :kept], counts[:, :kept]))

    def numbers_kept(self) -> int:
        """How many numbers its sums and counts are."""
        return sum(sums.numel() + counts.numel() for sums, counts in self.parts)


class ChiarCache(Cache):
    """A Hugging Face cache for one CHIAR-Former.

    Each operator of each layer has a state of its own, as its `new_cache()` makes it. Attention keeps keys and values:
    of every token, or under `attention_context="routed"` of the routed ones. Spectral mixing keeps nothing. A causal
    MetaRouter keeps the sum and the count of the embedded tokens so far. Nothing kept carries a gradient.

    Args:
        config: of the model.

    Attributes:
        config: of the model whose operators fill it.
        tokens_seen: tokens so far, padding included.
        rows: of the batch that it holds.
        real: (rows, tokens_seen), which of these tokens were not padding; None where all are known to be real.
        unfinished: whether a forward is taking up tokens: after one that failed halfway some layers have them.

    Raises:
        UserError: the model can't be cached; the message says why.

    """

    def __init__(self, config: ChiarConfig) -> None:
        if not isinstance(config, ChiarConfig):
            raise UserError(f"ChiarCache takes a ChiarConfig, such as model.config, not a {type(config).__name__}")
        if reason := config.uncacheable():
            raise UserError(f"no cache for a model with {reason}: pass use_cache=False")
        self.config = config
        super().__init__(layers=[LayerCache() for _ in config.menus])
        self.tokens_seen = 0
        self.rows = 0
        self.real: Tensor | None = None
        self.unfinished = False
        self.meta_state = RunningSums()

    @property
    def states(self) -> list[LayerCache]:
        """The layers, as what they are."""
        return [cast(LayerCache, layer) for layer in self.layers]

    @property
    def padded(self) -> bool:
        """Whether some of the tokens were padding, so that what follows needs an attention_mask too."""
        return self.real is not None and not bool(self.real.all())

    @property
    def is_compileable(self) -> bool:
        """False: it grows, so generation does not prepare it as a static one."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works: whether every operator's state can be cropped."""
        return all(state.croppable for state in self._all())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included; the same for every layer, whatever it keeps."""
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Of a mask over all tokens seen and the new ones: its width, and where it begins."""
        return self.tokens_seen + query_length, 0

    def numbers_kept(self) -> int:
        """How many numbers the states of all operators hold."""
        return sum(layer.numbers_kept() for layer in self.states)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tokens_seen = self.rows = 0
        self.real, self.unfinished = None, False
        self.meta_state = RunningSums()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is negative, as in transformers.

        Raises:
            UserError: an operator's state can't be cropped, or not by so many tokens, or there are not as many. The
                cache is then as it was.

        """
        if not hasattr(tokens_to_remove, "__index__") or not -self.tokens_seen <= tokens_to_remove <= 0:
            raise UserError(
                f"crop({tokens_to_remove!r}) of a cache of {self.tokens_seen} tokens: give the number to remove, "
                "negative"
            )
        if tokens_to_remove == -self.tokens_seen:
            return self.reset()
        for state in self._all():
            state.check_crop(-tokens_to_remove)
        for state in self._all():
            state.crop(-tokens_to_remove)
        self.tokens_seen += tokens_to_remove
        self.real = None if self.real is None else self.real[:, : self.tokens_seen]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order that beam search chose."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows: their numbers in the order that they are to have, or true for each that is kept."""
        rows = row_numbers(indices)
        for state in self._all():
            state.select(rows)
        self.rows = len(rows)
        self.real = None if self.real is None else self.real[rows.to(self.real.device)]

    def _all(self) -> Iterator[OperatorState]:
        for layer in self.states:
            yield from layer.kept()
        if self.meta_state.parts:
            yield self.meta_state
