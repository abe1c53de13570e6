r"""An operator of one's own: a gated short convolution, with an option, parameters and a state.

    chiaroscuro --import examples.short_convolution train recipes/small.yaml \
        'model.operators=[[dct], [dct, {gated_conv: {kernel: 3}}, attention], [attention]]' model.num_hidden_layers=3

Importing the file registers the operator as `gated_conv`, and that is all that it takes: it trains sparsely and
densely, is counted, calibrated, cached, saved and loaded like those of the library. The library's own `conv` weighs a
token's neighbours by fixed weights; here two gates, which depend on the tokens, say what is passed on and what is taken
up. Gated convolutions in language models: arXiv 2212.14052, arXiv 2302.10866.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from chiaroscuro import UserError, register_operator
from chiaroscuro.layers import Context, Count, Operator, OperatorState, PackedTokens, Work


class LastTokens(OperatorState):
    """The last k − 1 real tokens of each row, the newest at the end; zeros where a row has had fewer."""

    def __init__(self) -> None:
        self.vectors: Tensor | None = None

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order."""
        if self.vectors is not None:
            self.vectors = self.vectors[rows.to(self.vectors.device)]

    def numbers_kept(self) -> int:
        """K − 1 vectors a row."""
        return 0 if self.vectors is None else self.vectors.numel()


@dataclass(frozen=True)
class GatedConvolutionOptions:
    """Options of the convolution: `kernel`, k, how many tokens it reaches over, its own included."""

    kernel: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.kernel, bool) or not isinstance(self.kernel, int) or self.kernel < 1:
            raise UserError(f"kernel={self.kernel!r}: must be a positive whole number")


class GatedConvolution(Operator):
    """W_o (c ⊙ y), y_t = Σ_{j<k} w_j ⊙ (b ⊙ v)_{t−j} over the real tokens of a row or document; (b, c, v) = W_i x."""

    Options = GatedConvolutionOptions
    cost = 0.7  # between conv and rbf
    separates_documents = True

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.weight = nn.Parameter(torch.empty(self.options.kernel, width))
        self.out_proj = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """w_0 = 1, the others 0: at first a token is gated alone."""
        self.weight.zero_()
        self.weight[0] = 1

    def mix(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """Shift and add, over all tokens."""
        take_up, pass_on, values = self.in_proj(x).chunk(3, -1)
        line, place, document = self._line_up(pass_on * values, context)
        start, time = self.options.kernel - 1, x.shape[1]
        total = torch.zeros_like(values)
        for j, weight in enumerate(self.weight):
            shifted = line[:, start - j : start - j + time]
            same = document[:, start : start + time] == document[:, start - j : start - j + time]
            total = total + weight * shifted * same[..., None]
        return self.out_proj(take_up * total.gather(1, place[..., None].expand_as(x)))

    def mix_packed(
        self, x: Float[Tensor, "batch time width"], tokens: PackedTokens, context: Context
    ) -> Float[Tensor, "tokens width"]:
        """Gather the k tokens that each of these needs; the gate c and W_o are for these alone."""
        gate_rows, other_rows = self.in_proj.weight.split([self.width, 2 * self.width])
        pass_on, values = F.linear(x, other_rows).chunk(2, -1)
        line, place, document = self._line_up(pass_on * values, context)
        row = tokens.take(torch.arange(len(x), device=x.device)[:, None].expand(x.shape[:2]))
        here = tokens.take(place) + self.options.kernel - 1
        total = values.new_zeros(len(row), self.width)
        for j, weight in enumerate(self.weight):
            same = document[row, here] == document[row, here - j]
            total = total + weight * line[row, here - j] * same[:, None]
        return self.out_proj(F.linear(tokens.take(x), gate_rows) * total)

    def _line_up(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The kept tokens and then the row's real ones, without gaps; each token's place among these; the documents.

        Padding may lie on either side: what counts as the token before is the real one before. Takes up the new tokens
        into the state.
        """
        batch, time, width = x.shape
        real = context.real(time)
        real = torch.ones(batch, time, dtype=torch.bool, device=x.device) if real is None else real
        place = real.cumsum(1).sub(1).clamp(min=0)
        order = real.logical_not().long().argsort(dim=1, stable=True)
        packed = (x * real[..., None]).gather(1, order[..., None].expand_as(x))
        state: LastTokens | None = context.state
        kept = self.options.kernel - 1
        before = x.new_zeros(batch, kept, width)
        if state is not None and state.vectors is not None:
            before = state.vectors.to(x.dtype)
        line = torch.cat([before, packed], 1)
        if state is not None:
            newest = real.sum(1)[:, None] + torch.arange(kept, device=x.device)
            state.vectors = line.gather(1, newest[..., None].expand(-1, -1, width)).detach()
        document = torch.zeros(batch, kept + time, dtype=torch.long, device=x.device)
        if context.segments is not None:
            document = torch.cat([document[:, :kept] - 1, context.segments], 1)
        return line, place, document

    def new_cache(self) -> LastTokens:
        """The last k − 1 tokens."""
        return LastTokens()

    @classmethod
    def count(cls, width: int, options: GatedConvolutionOptions, work: Work) -> Count:
        """What is passed on, of all tokens; the gate c, the convolution and W_o, of its own."""
        own = 2 * width**2 + 2 * options.kernel * width + 2 * width**2
        operations = work.product * (4 * width**2 * work.length + own * work.tokens)
        return Count({"gated conv": operations}, numbers_kept=(options.kernel - 1) * width)


register_operator("gated_conv", GatedConvolution)
