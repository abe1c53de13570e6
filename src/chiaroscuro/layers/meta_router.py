"""The MetaRouter: one gate that says how much of a whole layer the input gets."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chiaroscuro.errors import UserError

Pooling = Literal["batch", "sequence", "causal"]

INITIAL_BIAS = 2.0
"""σ(2) = 0.88, where the paper says that g starts. (Its code overwrites this with 0, and starts at 0.5.)"""


class MetaRouter(nn.Module):
    """g = σ(W x̄ + b), x̄ a mean of the embedded tokens; the first layer becomes x ← g · layer(x) + (1 − g) · x.

    Args:
        width: d, the features of a token.
        pooling: what x̄ is the mean of.
            `"causal"`: the tokens up to and with this one, so g differs from token to token and sees no future.
            `"sequence"`: all tokens of the row. **Reads the future.**
            `"batch"`: all tokens of all rows, as published. **Reads the future, and the other rows of the batch.**

    Raises:
        ValueError: an unknown pooling.

    Source: the paper, v2, MetaRouter.

    """

    def __init__(self, width: int, pooling: Pooling = "causal") -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r}: choose one of {', '.join(map(repr, get_args(Pooling)))}")
        self.pooling = pooling
        # Its own parameters, not a Linear's, which a model's general initialisation would overwrite.
        self.weight = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W = 0, b = 2: every input starts with the same open gate."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, INITIAL_BIAS)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
        past: tuple[Float[Tensor, "batch width"], Float[Tensor, " batch"]] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "#batch #time"], tuple[Float[Tensor, "batch time width"], Float[Tensor, "batch time"]]]:
        """Gate the tokens; padding is pooled nowhere.

        Args:
            x: the embedded tokens.
            attention_mask: true for real tokens.
            past: the sum and the count of the real tokens before x, from an earlier call (causal pooling alone).
            segments: the document of each token, where a row holds several; then the mean is of its own document.

        Returns:
            g, of shape (1, 1) for `"batch"`, (B, 1) for `"sequence"`, (B, T) for `"causal"`, in x's type; and the sums
            and the counts up to and including each token, of which the last are `past` of the next call.

        Raises:
            UserError: several documents in a row, and pooling over all of them.

        """
        real = x.new_ones(x.shape[:2]) if attention_mask is None else attention_mask.to(x.dtype)
        # Sums of many tokens and their count: in half precision they would stop growing.
        real = real.float()
        sums = (x.float() * real[..., None]).cumsum(1)
        counts = real.cumsum(1)
        if segments is not None:
            if self.pooling != "causal":
                raise UserError(
                    f"meta_router={self.pooling!r} pools over rows, and position_ids restart within one: it holds "
                    "several documents; give one document per row, padded"
                )
            # What was summed before each document is taken off again.
            place = torch.arange(x.shape[1], device=x.device).expand_as(segments)
            begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            first = torch.where(begins, place, 0).cummax(1).values
            sums = sums - (sums - x.float() * real[..., None]).gather(1, first[..., None].expand_as(sums))
            counts = counts - (counts - real).gather(1, first)
        if past is not None:
            sums, counts = sums + past[0][:, None], counts + past[1][:, None]
        total, count = sums[:, -1], counts[:, -1]
        if self.pooling == "causal":
            mean = sums / counts.clamp(min=1)[..., None]
        elif self.pooling == "sequence":
            mean = (total / count.clamp(min=1)[:, None])[:, None]
        else:
            mean = (total.sum(0) / count.sum().clamp(min=1))[None, None]
        gate = torch.sigmoid(F.linear(mean.to(self.weight.dtype), self.weight, self.bias))
        return gate.squeeze(-1).to(x.dtype), (sums, counts)
