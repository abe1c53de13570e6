"""Short convolutions: the operator `conv`, and the part of a layer that stands before its operators."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Count, Operator, Work
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.layers.state import REMEMBERED, OperatorState
from chiaroscuro.ops.short_convolution import line_up, short_convolution, short_convolution_at

LARGEST_KERNEL = 1024
"""Far beyond what is short: the terms are added one by one."""


class LastTokens(OperatorState):
    """The last real tokens of each row: the k − 1 that the next one needs, and for `crop` up to `REMEMBERED` more.

    They lie at the end of the filled part of a buffer, which is moved to its front when it is full. A row that has had
    fewer has zeros before them.

    Args:
        kept: k − 1.

    Attributes:
        buffer: (B, capacity, d), or None before the first token.
        end: how many places of it are filled.
        remembered: how many of the tokens last seen, padding included, can be cropped.
        unpadded: how many of the tokens last seen were real in all rows.
        real: which of those before them were real, newest last; None where all were.

    """

    croppable = True

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.buffer: Tensor | None = None
        self.end = kept
        self.remembered = self.unpadded = 0
        self.real: Tensor | None = None

    def extend(
        self, x: Float[Tensor, "batch time width"], real: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch kept width"]:
        """Take up new tokens, and return the k − 1 before them; a view, to be read before the next call.

        Raises:
            UserError: another number of rows than the state holds.

        """
        batch, time, width = x.shape
        new, kept = x.detach(), self.kept
        if self.buffer is None:
            self.buffer = new.new_zeros(batch, kept + 2 * REMEMBERED, width)
        elif len(self.buffer) != batch:
            raise UserError(f"the cache holds {len(self.buffer)} rows, the input has {batch}: the two must match")
        before, line = self.buffer[:, self.end - kept : self.end], self.buffer[:, : self.end]
        if real is not None:
            self._note_padding(real)
            length = min(line.shape[1] + time, kept + REMEMBERED)
            line = torch.cat([F.pad(line, (0, 0, time, 0)), line_up(new, real).to(line.dtype)], 1)
            self._refill(_ending(line, line.shape[1] - time + real.sum(1), length))
        elif self.end + time > self.buffer.shape[1]:
            self._refill(torch.cat([line, new[:, -kept - REMEMBERED :].to(line.dtype)], 1)[:, -kept - REMEMBERED :])
        else:
            if self.buffer.is_inference() and not torch.is_inference_mode_enabled():  # can't be written to any more
                self.buffer = self.buffer.clone()
            self.buffer[:, self.end : self.end + time] = new
            self.end += time
        self.remembered = min(self.remembered + time, REMEMBERED)
        self.unpadded = 0 if real is not None else self.unpadded + time
        return before

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order."""
        if self.buffer is not None:
            self.buffer = self.buffer[rows.to(self.buffer.device)]
        if self.real is not None:
            self.real = self.real[rows.to(self.real.device)]

    def check_crop(self, tokens: int) -> None:
        """Raise a UserError where more tokens are to be cropped than are remembered."""
        if tokens > self.remembered:
            raise UserError(
                f"crop of {tokens} tokens, but a convolution keeps the last {REMEMBERED} alone: start a new cache"
            )

    def crop(self, tokens: int) -> None:
        """Forget the last tokens.

        Raises:
            UserError: see `check_crop`.

        """
        self.check_crop(tokens)
        self.remembered -= tokens
        plain = min(tokens, self.unpadded)
        self.end, self.unpadded, rest = self.end - plain, self.unpadded - plain, tokens - plain
        if rest and self.buffer is not None and self.real is not None:
            gone, self.real = self.real[:, -rest:].sum(1), self.real[:, :-rest]
            self._refill(_ending(self.buffer, self.end - gone, self.end - rest))

    def numbers_kept(self) -> int:
        """How many numbers are kept; the buffer is larger."""
        return 0 if self.buffer is None else len(self.buffer) * (self.kept + self.remembered) * self.buffer.shape[2]

    def _note_padding(self, real: Tensor) -> None:
        earlier = real.new_ones(len(real), 0) if self.real is None else self.real
        self.real = torch.cat([F.pad(earlier, (0, self.unpadded), value=True), real], 1)[:, -REMEMBERED:]

    def _refill(self, line: Tensor) -> None:
        self.buffer, self.end = F.pad(line, (0, 0, 0, REMEMBERED)), line.shape[1]


def _ending(line: Tensor, ends: Int[Tensor, " batch"], length: int) -> Tensor:
    """Of each row of (B, n, d) the `length` tokens before its end."""
    index = ends[:, None] - length + torch.arange(length, device=line.device)
    return line.gather(1, index[..., None].expand(-1, -1, line.shape[2]))


@dataclass(frozen=True)
class ConvolutionOptions:
    """Options of the convolution.

    Attributes:
        kernel: k, how many tokens it reaches over, its own included.

    """

    kernel: int = 4

    def __post_init__(self) -> None:
        whole = isinstance(self.kernel, int) and not isinstance(self.kernel, bool)
        if not whole or not 1 <= self.kernel <= LARGEST_KERNEL:
            raise UserError(f"kernel={self.kernel!r}: must be a whole number from 1 to {LARGEST_KERNEL}")


class ShortConvolution(Operator):
    """y_t = Σ_{j<k} w_j ⊙ x_{t−j} over the real tokens of the row, or of the document; at first the identity.

    Each feature is convolved by itself. Source: Canon layers, Allen-Zhu 2025 (arXiv 2512.17351).

    Args:
        width: d, the features of a token.
        options: see `ConvolutionOptions`.

    """

    Options = ConvolutionOptions
    cost = 0.5
    separates_documents = True

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.weight = nn.Parameter(torch.empty(self.options.kernel, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """w_0 = 1, the others 0."""
        self.weight.zero_()
        self.weight[0] = 1

    def mix(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """Convolve all tokens."""
        before, real = self._take_up(x, context)
        return short_convolution(x, self.weight.to(x.dtype), real, context.segments, before)

    def mix_packed(
        self, x: Float[Tensor, "batch time width"], tokens: PackedTokens, context: Context
    ) -> Float[Tensor, "tokens width"]:
        """Convolve some tokens: gather what they need."""
        before, real = self._take_up(x, context)
        if len(tokens) == 0 and not torch.is_grad_enabled():
            return x.new_empty(0, self.width)
        weight = self.weight.to(x.dtype)
        if tokens.index is None:
            return short_convolution(x, weight, real, context.segments, before).flatten(0, 1)
        return short_convolution_at(x, tokens.index, weight, real, context.segments, before)

    def new_cache(self) -> LastTokens:
        """The last k − 1 tokens."""
        return LastTokens(self.options.kernel - 1)

    @classmethod
    def count(cls, width: int, options: ConvolutionOptions, work: Work) -> Count:
        """A multiplication and an addition for each of k tokens and each feature."""
        return Count(
            {"conv": work.product * 2 * options.kernel * width * work.tokens},
            numbers_kept=(options.kernel - 1 + min(work.past + work.length, REMEMBERED)) * width,
        )

    def _take_up(self, x: Tensor, context: Context) -> tuple[Tensor | None, Tensor | None]:
        """The tokens before these, if a cache has them; and which of these are real, None where all are."""
        real = context.real(x.shape[1])
        if context.state is None:
            return None, real
        if real is not None and not torch.compiler.is_compiling():  # of a padded batch, all that is decoded is real
            if "new tokens are real" not in context.shared:
                context.shared["new tokens are real"] = bool(real.all())
            real = None if context.shared["new tokens are real"] else real
        return context.state.extend(x, real), real


class NeighbourMixing(ShortConvolution):
    """x + Σ_{j<k} w_j ⊙ x_{t−j}, at first x: what a layer with `short_conv` does to the input of its operators."""

    def reset_parameters(self) -> None:
        """W = 0."""
        nn.init.zeros_(self.weight)

    def mix(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """Add to every token the convolution."""
        return x + super().mix(x, context)

    def mix_packed(
        self, x: Float[Tensor, "batch time width"], tokens: PackedTokens, context: Context
    ) -> Float[Tensor, "tokens width"]:
        """Likewise, of some tokens."""
        return tokens.take(x) + super().mix_packed(x, tokens, context)
