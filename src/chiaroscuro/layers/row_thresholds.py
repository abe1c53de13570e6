"""Thresholds that follow the row: the share of its tokens is held on a text other than the one calibrated on.

A threshold that stands still lets another share through where scores are distributed otherwise: of the noise around a
needle a few hundredths look where a quarter of prose does. Here each block of tokens has thresholds of its own,

    τ = (P τ₀ + n q) / (P + n),

where q are quantiles of the scores of the n tokens of the row just before the block, at most as many as `history` (of
every kth of them, where there are more than enough), and τ₀ the calibrated thresholds, which count for P tokens. No
token's own score, and no later one, has a part in it.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.state import REMEMBERED, OperatorState

BLOCK = 64
"""Tokens that have their thresholds in common, so that those of a whole row can be computed at once."""

PRIOR = 256
"""P, how many tokens the calibrated thresholds count for. With less, rows of a text differ more than they should."""

SAMPLE = 512
"""Of more tokens every kth counts: with these, the share that lies above a quantile of 0.75 errs by 0.02."""


class RowScores(OperatorState):
    """The last scores of each row, and how they continue.

    Args:
        history: how many tokens before a block its thresholds follow.

    Attributes:
        columns: how many tokens of each row were scored, padding included.

    """

    croppable = True
    _scores: Float[Tensor, "rows held heads"]
    """Of each row's last real tokens, the newest last. Where a row had fewer, the first columns mean nothing."""
    _seen: Int[Tensor, " rows"]
    """How many real tokens each row has had."""
    _real: Bool[Tensor, "rows remembered"]
    """Which of the last columns held a real token."""
    _next: Float[Tensor, "rows thresholds"]
    """The thresholds of the token that comes next, where `_known`."""

    def __init__(self, history: int) -> None:
        self.history = history
        self._end = 0  # how many tokens each row had after the last of them
        self._forget()

    def _forget(self) -> None:
        self.columns = 0
        self._known = False
        self._plain = True  # all were real, so that rows are equally long
        # Tokens that were decoded alone, which are not in `_scores` and `_real` yet: their scores, and which are real.
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def follow(
        self,
        scores: Float[Tensor, "rows time heads"],
        real: Bool[Tensor, "rows time"] | None,
        standing: Float[Tensor, " thresholds"],
        levels: Float[Tensor, " thresholds"],
        past: int = 0,
    ) -> Float[Tensor, "rows time thresholds"]:
        """Take up the scores of new tokens, and say which thresholds each is compared with.

        Args:
            scores: of each new token, one or one for each head; a row's heads have their thresholds in common.
            real: which tokens are real; None where all are. What is said of others means nothing.
            standing: τ₀. Where one is infinite, so is τ.
            levels: which quantiles they are, from 0 to 1.
            past: how many tokens of each row there were, padding included. Where some were not scored, as with a share
                of 1, the history begins anew.

        """
        rows, time = scores.shape[:2]
        if past != self._end:
            self._forget()
        self._end = past + time
        if self.columns and rows != len(self._seen):
            raise UserError(f"the cache holds {len(self._seen)} rows, the input has {rows}: the two must match")
        self._plain &= real is None
        if real is None:
            real = torch.ones(rows, time, dtype=torch.bool, device=scores.device)
        if not self.columns:
            self._scores = scores.new_zeros(rows, 0, scores.shape[2], dtype=torch.float32)
            self._seen = torch.zeros(rows, dtype=torch.long, device=scores.device)
            self._real = real[:, :0]
        scores = scores.detach().float()
        if time == 1 and self._known:
            return self._follow_one(scores, real, standing, levels)
        self._settle()
        before = self._seen
        self._append(scores, real)
        # Enough blocks for a row that begins in the middle of one, and the one of the token after the last.
        blocks = (time + BLOCK - 1) // BLOCK + 1
        every = torch.arange(rows, device=scores.device)
        thresholds = self._of_blocks(every, before // BLOCK, blocks, standing, levels)
        self._next = _at(thresholds, (self._seen // BLOCK - before // BLOCK)[:, None])[:, 0]
        self._known = True
        self._scores = self._scores[:, -(self.history + BLOCK + REMEMBERED) :].clone()
        place = before[:, None] + real.cumsum(1) - 1
        return _at(thresholds, (place // BLOCK - (before // BLOCK)[:, None]).clamp(min=0))

    def _follow_one(self, scores: Tensor, real: Tensor, standing: Tensor, levels: Tensor) -> Tensor:
        """One token: its thresholds are known, and new ones are needed for rows in which a block begins after it."""
        self._waiting.append((scores, real))
        self._seen = self._seen + real[:, 0]
        self.columns += 1
        found = self._next
        if self._plain:
            beginning = torch.arange(0 if self.columns % BLOCK else len(found), device=found.device)
        else:
            beginning = (real[:, 0] & (self._seen % BLOCK == 0)).nonzero()[:, 0]
        if len(beginning):
            self._settle()
            new = self._of_blocks(beginning, self._seen[beginning] // BLOCK, 1, standing, levels)
            self._next = found.index_copy(0, beginning, new[:, 0])
        return found[:, None]

    def _append(self, scores: Tensor, real: Tensor) -> None:
        """Take up new columns: each row's real tokens to the right, in order."""
        held = self._scores.shape[1]
        valid = torch.arange(held, device=real.device) >= held - self._seen[:, None]
        order = torch.cat([valid, real], 1).int().argsort(dim=1, stable=True)
        together = torch.cat([self._scores, scores], 1)
        self._scores = together.gather(1, order[:, :, None].expand_as(together))
        self._seen = self._seen + real.sum(1)
        self._real = torch.cat([self._real, real], 1)[:, -REMEMBERED:]
        self.columns += real.shape[1]

    def _settle(self) -> None:
        """Take up what was decoded alone."""
        if self._waiting:
            scores, real = (torch.cat(parts, 1) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            self._seen = self._seen - real.sum(1)
            self.columns -= real.shape[1]
            self._append(scores, real)
            self._scores = self._scores[:, -(self.history + BLOCK + REMEMBERED) :]

    def _of_blocks(
        self, rows: Int[Tensor, " chosen"], first: Int[Tensor, " chosen"], blocks: int, standing: Tensor, levels: Tensor
    ) -> Float[Tensor, "chosen blocks thresholds"]:
        """The thresholds of some blocks of some rows, of which each row's first has this number."""
        held, heads = self._scores.shape[1:]
        starts = (first[:, None] + torch.arange(blocks, device=first.device)) * BLOCK
        stride = max(1, self.history // SAMPLE)
        place = starts[:, :, None] + torch.arange(-self.history, 0, stride, device=first.device)
        column = place + (held - self._seen[rows])[:, None, None]
        there = (place >= 0) & (column >= 0) & (column < held)
        window = self._scores[rows[:, None, None], column.clamp(0, held - 1)].masked_fill(~there[..., None], torch.inf)
        ordered = window.flatten(2).sort(-1).values  # those that are not there come last
        sampled = there.sum(-1)[..., None]
        position = levels.to(ordered) * (sampled * heads - 1).clamp(min=0)
        low, high = (ordered.gather(2, end.long()) for end in (position.floor(), position.ceil()))
        quantile = torch.lerp(low, high, position - position.floor())
        tokens = starts[..., None].clamp(max=self.history)
        mixed = (PRIOR * standing + tokens * quantile) / (PRIOR + tokens)
        return torch.where((sampled > 0) & standing.isfinite(), mixed, standing)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order."""
        if not self.columns:
            return
        self._settle()
        index = rows.to(self._seen.device)
        for name in ("_scores", "_seen", "_real", "_next"):
            setattr(self, name, getattr(self, name)[index])

    def check_crop(self, tokens: int) -> None:
        """Raise a UserError where more tokens are to be cropped than are remembered."""
        remembered = min(REMEMBERED, self._real.shape[1] + len(self._waiting)) if self.columns else 0
        if tokens > remembered:
            raise UserError(
                f"crop of {tokens} tokens, but a router remembers the scores of {remembered} that can be forgotten: "
                "start a new cache"
            )

    @torch.no_grad()
    def crop(self, tokens: int) -> None:
        """Forget the last tokens.

        Raises:
            UserError: see `check_crop`.

        """
        self.check_crop(tokens)
        self._settle()
        if not tokens:
            return
        undone = self._real[:, -tokens:].sum(1)
        column = torch.arange(self._scores.shape[1], device=undone.device) - undone[:, None]
        scores = self._scores.gather(1, column.clamp(min=0)[:, :, None].expand_as(self._scores))
        self._scores = scores[:, int(undone.max()) :]
        self._real = self._real[:, :-tokens]
        self._seen = self._seen - undone
        self._known = False
        self.columns -= tokens
        self._end -= tokens

    def numbers_kept(self) -> int:
        """How many numbers it holds."""
        return self._scores.numel() + sum(scores.numel() for scores, _ in self._waiting) if self.columns else 0


def _at(
    thresholds: Float[Tensor, "rows blocks thresholds"], block: Int[Tensor, "rows time"]
) -> Float[Tensor, "rows time thresholds"]:
    """Those of each token's block."""
    return thresholds.gather(1, block[:, :, None].expand(-1, -1, thresholds.shape[2]))
