"""Thresholds that follow the row: the share of its tokens comes nearer to what is asked for on texts of another kind.

A threshold that stands still lets another share through where scores are distributed otherwise: of the noise around a
needle a few hundredths look where a quarter of prose does. Here each block of tokens has thresholds of its own,

    τ = (P τ₀ + n q) / (P + n),

where q are quantiles of the scores of the n tokens of the row just before the block, at most as many as `history` (of a
sample of them, where there are more than enough), and τ₀ the calibrated thresholds, which count for P tokens. A token's
own score has no part in its thresholds, nor has a later one.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.layers.state import REMEMBERED, OperatorState

BLOCK = 64
"""Tokens that have their thresholds in common, so that those of a whole row can be computed at once."""

PRIOR = 256
"""P, how many tokens the calibrated thresholds count for: a row's first tokens alone say little of the rest."""

SAMPLE = 512
"""So many of more tokens count: with these, the share that lies above a quantile of 0.75 errs by 0.02."""


def sampled(
    tokens: Int[Tensor, " blocks"], most: int
) -> tuple[Int[Tensor, "blocks most"], Bool[Tensor, "blocks most"]]:
    """How far before each block the tokens stand whose scores count, and which of these there are.

    All of them, or one in each of `most` equal stretches, at places in these that have no period, as texts may have.

    Args:
        tokens: n.
        most: how many count at most.

    """
    number = torch.arange(most, device=tokens.device)
    # The fractional parts of k φ, in 2⁻¹⁶, and whole numbers throughout, so that each call finds the same places.
    within = number * 40503 % 65536
    spread = (number * 65536 + within) * tokens[:, None] // (most * 65536)
    whole = tokens[:, None] <= most
    return 1 + torch.where(whole, number, spread), ~whole | (number < tokens[:, None])


def thresholds_of_blocks(
    scores: Float[Tensor, "tokens heads"],
    first: Int[Tensor, " blocks"],
    start: Int[Tensor, " blocks"],
    history: int,
    standing: Float[Tensor, " thresholds"],
    levels: Float[Tensor, " thresholds"],
) -> Float[Tensor, "blocks thresholds"]:
    """τ of some blocks.

    Args:
        scores: of tokens, row after row.
        first: where among them the row's first token stands, or would stand if it were there yet, of each block.
        start: the place of the block's first token in its row.
        history: how many tokens before it count.
        standing: τ₀. Where one is infinite, so is τ.
        levels: which quantiles they are, from 0 to 1.

    """
    tokens = start.clamp(max=history)
    back, there = sampled(tokens, min(history, SAMPLE))
    index = ((first + start)[:, None] - back).masked_fill(~there, 0)
    found = scores[index.clamp(0, len(scores) - 1)]  # blocks beyond a row's end stand for nothing
    ordered = found.masked_fill(~there[..., None], torch.inf).flatten(1).sort(-1).values  # those come last
    position = levels.to(ordered) * (there.sum(-1, keepdim=True) * scores.shape[1] - 1).clamp(min=0)
    low, high = (ordered.gather(1, end.long()) for end in (position.floor(), position.ceil()))
    quantile = torch.lerp(low, high, position - position.floor())
    weight = tokens[:, None]
    mixed = (PRIOR * standing + weight * quantile) / (PRIOR + weight)
    return torch.where(weight > 0, mixed, standing)


@torch.no_grad()
def follow_documents(
    scores: Float[Tensor, "rows time heads"],
    real: Bool[Tensor, "rows time"] | None,
    segments: Int[Tensor, "rows time"],
    history: int,
    standing: Float[Tensor, " thresholds"],
    levels: Float[Tensor, " thresholds"],
) -> Float[Tensor, "rows time thresholds"]:
    """Thresholds of rows of several documents, each of which follows its own tokens alone.

    Arguments as of `RowScores.follow`; the segments are those of a `Context`.
    """
    tokens = PackedTokens.real_of(scores, real, segments)
    packed, lengths = tokens.take(scores).detach().float(), tokens.lengths
    begins = lengths.cumsum(0) - lengths
    blocks = (lengths + BLOCK - 1) // BLOCK
    before = blocks.cumsum(0) - blocks
    document = torch.arange(len(lengths), device=lengths.device).repeat_interleave(blocks)
    number = torch.arange(len(document), device=lengths.device) - before[document]
    found = thresholds_of_blocks(packed, begins[document], number * BLOCK, history, standing, levels)
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    place = torch.arange(len(packed), device=lengths.device) - begins[owner]
    each = found[before[owner] + place // BLOCK]
    return tokens.put_in(each.new_zeros(*scores.shape[:2], len(levels)), each)


class RowScores(OperatorState):
    """The last scores of each row, and how they continue.

    Attributes:
        history: how many tokens before a block its thresholds follow.
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

    def __init__(self) -> None:
        self.history = 0
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
        history: int,
        standing: Float[Tensor, " thresholds"],
        levels: Float[Tensor, " thresholds"],
        past: int = 0,
    ) -> Float[Tensor, "rows time thresholds"]:
        """Take up the scores of new tokens, and say which thresholds each is compared with.

        Args:
            scores: of each new token, one or one for each head; a row's heads have their thresholds in common.
            real: which tokens are real; None where all are. What is said of others means nothing.
            history: how many tokens before a block count. Where it is another than before, the history begins anew.
            standing: τ₀. Where one is infinite, so is τ.
            levels: which quantiles they are, from 0 to 1.
            past: how many tokens of each row there were, padding included. Where some were not scored, as with a share
                of 1, the history begins anew.

        Raises:
            UserError: other rows than before, or tokens that begin a row that was begun.

        """
        rows, time = scores.shape[:2]
        if self.columns and not past:
            raise UserError(
                f"the cache holds {self.columns} tokens, and past=0: say in the context how many came before"
            )
        if past != self._end or history != self.history:
            self._forget()
        if self.columns and rows != len(self._seen):
            raise UserError(f"the cache holds {len(self._seen)} rows, the input has {rows}: the two must match")
        self._end, self.history = past + time, history
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
        number = (before // BLOCK)[:, None] + torch.arange(blocks, device=before.device)
        row = torch.arange(rows, device=before.device).repeat_interleave(blocks)
        thresholds = self._of_blocks(row, number.flatten(), standing, levels).view(rows, blocks, len(levels))
        self._next = _at(thresholds, (self._seen // BLOCK - before // BLOCK)[:, None])[:, 0]
        self._known = True
        self._shorten()
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
            new = self._of_blocks(beginning, self._seen[beginning] // BLOCK, standing, levels)
            self._next = found.index_copy(0, beginning, new)
        return found[:, None]

    def _append(self, scores: Tensor, real: Tensor) -> None:
        """Take up new columns: each row's real tokens to the right, in order."""
        together = torch.cat([self._scores, scores], 1)
        if not self._plain:
            held = torch.ones_like(self._scores[:, :, 0], dtype=torch.bool)
            order = torch.cat([held, real], 1).int().argsort(dim=1, stable=True)
            together = together.gather(1, order[:, :, None].expand_as(together))
        self._scores = together
        self._seen = self._seen + real.sum(1)
        self._real = torch.cat([self._real, real], 1)[:, -REMEMBERED:]
        self.columns += real.shape[1]

    def _shorten(self) -> None:
        """Hold no more than what a block, and as many tokens as can be cropped, may yet need."""
        most = self.history + BLOCK + REMEMBERED
        if self._scores.shape[1] > most:
            self._scores = self._scores[:, -most:].clone()

    def _settle(self) -> None:
        """Take up what was decoded alone."""
        if self._waiting:
            scores, real = (torch.cat(parts, 1) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            self._seen = self._seen - real.sum(1)
            self.columns -= real.shape[1]
            self._append(scores, real)
            self._shorten()

    def _of_blocks(
        self, row: Int[Tensor, " blocks"], number: Int[Tensor, " blocks"], standing: Tensor, levels: Tensor
    ) -> Float[Tensor, "blocks thresholds"]:
        """The thresholds of some blocks of some rows."""
        held = self._scores.shape[1]
        first = row * held + held - self._seen[row]
        return thresholds_of_blocks(self._scores.flatten(0, 1), first, number * BLOCK, self.history, standing, levels)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order."""
        if not self.columns:
            return
        self._settle()
        index = rows.to(self._seen.device)
        for name in ("_scores", "_seen", "_real", "_next"):
            setattr(self, name, getattr(self, name)[index])

    def check_crop(self, tokens: int) -> None:
        """Raise a UserError where more tokens are to be cropped than are remembered, and some would be left."""
        remembered = min(REMEMBERED, self._real.shape[1] + len(self._waiting)) if self.columns else 0
        if remembered < tokens < self.columns:
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
        self._end = max(0, self._end - tokens)
        if tokens >= self.columns:
            return self._forget()
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

    def numbers_kept(self) -> int:
        """How many numbers it holds."""
        return self._scores.numel() + sum(scores.numel() for scores, _ in self._waiting) if self.columns else 0


def _at(
    thresholds: Float[Tensor, "rows blocks thresholds"], block: Int[Tensor, "rows time"]
) -> Float[Tensor, "rows time thresholds"]:
    """Those of each token's block."""
    return thresholds.gather(1, block[:, :, None].expand(-1, -1, thresholds.shape[2]))
