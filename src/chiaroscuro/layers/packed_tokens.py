"""Some of a batch's tokens, row after row without padding: what sparse execution runs an operator on."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from chiaroscuro.errors import UserError

AttentionContext = Literal["all", "routed", "kept"]
"""What routed tokens attend to beyond their window: all tokens, each other, or the tokens that are kept."""


@dataclass(frozen=True)
class PackedTokens:
    """The chosen tokens of a batch.

    Attributes:
        chosen: which they are.
        index: their places in the flattened batch, in order; None where all are chosen, so that nothing is copied.
        segments: the documents that the tokens belong to, as in `Context`. A sequence, in what follows, is a row or,
            where there are segments, a document.

    """

    chosen: Bool[Tensor, "batch time"]
    index: Int[Tensor, " tokens"] | None
    segments: Int[Tensor, "batch time"] | None = None

    @classmethod
    def of(
        cls, chosen: Bool[Tensor, "batch time"], segments: Int[Tensor, "batch time"] | None = None
    ) -> "PackedTokens":
        """Pack those for which `chosen` is true."""
        index = chosen.flatten().nonzero().squeeze(1)
        return cls(chosen, None if len(index) == chosen.numel() else index, segments)

    @classmethod
    def all_of(cls, x: Shaped[Tensor, "batch time *rest"], segments: Tensor | None = None) -> "PackedTokens":
        """All tokens."""
        return cls(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), None, segments)

    @classmethod
    def real_of(
        cls,
        x: Shaped[Tensor, "batch time *rest"],
        real: Bool[Tensor, "batch time"] | None,
        segments: Tensor | None = None,
    ) -> "PackedTokens":
        """The real tokens, which are all where `real` is None."""
        return cls.all_of(x, segments) if real is None else cls.of(real, segments)

    @classmethod
    def none_of(cls, x: Shaped[Tensor, "batch time *rest"]) -> "PackedTokens":
        """No token."""
        empty = torch.empty(0, dtype=torch.long, device=x.device)
        return cls(torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device), empty)

    @cached_property
    def lengths(self) -> Int[Tensor, " sequences"]:
        """How many of them each sequence has."""
        if self.segments is None:
            return self.chosen.sum(1)
        number = (_starts(self.segments).flatten().cumsum(0) - 1).view_as(self.segments)
        return torch.bincount(self.take(number), minlength=int(number[-1, -1]) + 1)

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

    def keys(self, context: AttentionContext, real: Bool[Tensor, "batch time"] | None = None) -> "PackedTokens":
        """What they attend to: every real token, or in the `"routed"` context themselves."""
        if context == "routed":
            return self
        if real is None:
            return PackedTokens(torch.ones_like(self.chosen), None, self.segments)
        return PackedTokens.of(real, self.segments)

    def ordinals(self, keys: "PackedTokens") -> Int[Tensor, " tokens"]:
        """How many of `keys` stand in each token's sequence up to and including its place: their `chosen` is read."""
        counted = keys.chosen.cumsum(1)
        if self.segments is not None:
            before = torch.where(_starts(self.segments), counted - keys.chosen.long(), 0)
            counted = counted - before.cummax(1).values
        return self.take(counted)


def check_attention_context(context: str) -> None:
    """Raise a UserError for an unknown context."""
    if context not in get_args(AttentionContext):
        raise UserError(f"attention_context={context!r}: choose one of {', '.join(get_args(AttentionContext))}")


def _starts(segments: Tensor) -> Tensor:
    """Where a document begins; every row begins one."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
