"""The cache: keys and values for the layers that attend, nothing for those that don't, and the MetaRouter's sum."""

from collections.abc import Callable
from typing import Any, cast

from torch import LongTensor, Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer

from chiaroscuro.config import ChiarConfig
from chiaroscuro.errors import UserError


class ChiarCache(Cache):
    """A Hugging Face cache for one CHIAR-Former.

    A layer whose menu has `"attention"` (or another operator that asks for `cache`) keeps keys and values; a layer of
    spectral mixing alone keeps nothing. A causal MetaRouter keeps the sum and the count of the embedded tokens so far.

    Args:
        config: of the model.

    Raises:
        UserError: the model can't be cached; the message says why.

    """

    def __init__(self, config: ChiarConfig) -> None:
        if reason := config.uncacheable():
            raise UserError(f"no cache for a model with {reason}: pass use_cache=False")
        keeping = [config.keeps_keys(menu) for menu in config.menus]
        super().__init__(layers=[DynamicLayer() if keeps else DummyLayer() for keeps in keeping])
        self.tokens_seen = 0
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

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tokens_seen = 0
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
