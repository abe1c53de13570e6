"""Some of a batch's tokens, row after row without padding: what sparse execution runs an operator on."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

AttentionContext = Literal["all", "routed"]
"""What routed tokens look at: all tokens, or each other."""


@dataclass(frozen=True)
class PackedTokens:
    """The chosen tokens of a batch.

    Attributes:
        chosen: which they are.
        index: their places in the flattened batch, in order; None where all are chosen, so that nothing is copied.

    """

    chosen: Bool[Tensor, "batch time"]
    index: Int[Tensor, " tokens"] | None

    @classmethod
    def of(cls, chosen: Bool[Tensor, "batch time"]) -> "PackedTokens":
        """Pack those for which `chosen` is true."""
        index = chosen.flatten().nonzero().squeeze(1)
        return cls(chosen, None if len(index) == chosen.numel() else index)

    @cached_property
    def lengths(self) -> Int[Tensor, " batch"]:
        """How many of them each row has."""
        return self.chosen.sum(1)

    def __len__(self) -> int:
        return self.chosen.numel() if self.index is None else len(self.index)

    def take(self, x: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "tokens *rest"]:
        """Their entries of x, packed."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def add_to(
        self, x: Float[Tensor, "batch time width"], packed: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "batch time width"]:
        """X with `packed` added at their places."""
        if self.index is None:
            return x + packed.view_as(x)
        # Under autocast an operator answers in half precision, and the residual stream stays in full.
        return x.flatten(0, 1).index_add(0, self.index, packed.to(x.dtype)).view_as(x)

    def put_in(
        self, x: Float[Tensor, "batch time width"], packed: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "batch time width"]:
        """X with `packed` in their places."""
        if self.index is None:
            # Not `packed` alone: an operator that got no token, and so put nothing into x, has a gradient too, zeros.
            return torch.where(self.chosen[..., None], packed.view_as(x).to(x.dtype), x)
        return x.flatten(0, 1).index_copy(0, self.index, packed.to(x.dtype)).view_as(x)

    def keys(
        self, context: AttentionContext, attention_mask: Bool[Tensor, "batch keys"] | None = None
    ) -> "PackedTokens":
        """What they look at: every real token, or in the `"routed"` context themselves.

        Args:
            context: `"all"` or `"routed"`.
            attention_mask: true for real tokens, perhaps over cached ones before these too; all are real unless given.

        """
        if context == "routed":
            return self
        if attention_mask is None:
            return PackedTokens(torch.ones_like(self.chosen), None)
        return PackedTokens.of(attention_mask[:, -self.chosen.shape[1] :].bool())

    def ordinals(self, keys: "PackedTokens") -> Int[Tensor, " tokens"]:
        """How many of `keys` stand in each token's row up to and with its place."""
        return self.take(keys.chosen.cumsum(1))


def check_attention_context(context: str) -> None:
    """Raise ValueError at an unknown context."""
    if context not in get_args(AttentionContext):
        raise ValueError(f"attention_context={context!r}: choose 'all' or 'routed'")
