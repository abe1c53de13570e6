"""Where a score's thresholds stand, and what they were set from: the state of a calibration.

A router by a score needs K − 1 thresholds for K operators. They are buffers, so a calibration is saved with the
weights. Beside them lies a table of the score's quantiles, so that another share is one look-up away. A forward only
reads the thresholds and notes scores; they move when `step` is called, once per optimizer step.
"""

import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.exact_buffers import ExactBuffers

QUANTILES = 1001
"""Entries of the table: one for every thousandth of the tokens, from the smallest score to the largest."""

MOMENTUM = 0.1
"""Weight of the newest step in the running table: it forgets by half in 6.6 steps. At 2,000 tokens a step its noise
is that of about 40,000 tokens: at ρ = 0.25 it moves the share by 0.002 (more where a text's tokens are alike)."""

ATOM = 1e-4
"""Scores that differ by less than this part of the middle nine tenths of all scores count as one."""

FORGOTTEN = 256
"""Training forwards without a `step` after which there is a warning: more than anyone accumulates in one."""


def refuse_impossible_share(name: str, share: Any) -> None:
    """Raise a UserError if this is no share, a number from 0 to 1."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= cast(Any, share) <= 1:
        raise UserError(f"{name}={share!r}: must be a number from 0 to 1")


def shares_to_thresholds(
    quantiles: Float[Tensor, " quantiles"], share: float, operators: int
) -> Float[Tensor, " thresholds"]:
    """The K − 1 thresholds that send `share` of the tokens to the last operator and split the rest evenly.

    A share of 0 gives an infinite top threshold and a share of 1 gives minus infinity: exactly none, and exactly all.

    Raises:
        ValueError: a share that is not from 0 to 1.

    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share!r} of the tokens: must be from 0 to 1")
    position = levels_of(share, operators) * (len(quantiles) - 1)
    lower = position.floor().long().clamp(max=len(quantiles) - 2)
    table = quantiles.cpu().double()  # in this order, for Apple's GPUs have no float64
    thresholds = torch.lerp(table[lower], table[lower + 1], position - lower)
    thresholds = torch.stack(
        [_off_atoms(table, place, t) for place, t in zip(position.tolist(), thresholds, strict=True)]
    )
    if share <= 0:
        thresholds[-1] = torch.inf
    if share >= 1:
        thresholds[:] = -torch.inf
    return thresholds.to(quantiles)


def levels_of(share: float, operators: int) -> Float[Tensor, " thresholds"]:
    """Which quantiles the K − 1 thresholds are."""
    return torch.linspace(0, 1 - share, operators, dtype=torch.float64, device="cpu")[1:]


def _off_atoms(table: Tensor, position: float, threshold: Tensor) -> Tensor:
    """The threshold, or where many tokens share one score and it would fall on that, the middle of the nearest gap.

    Tokens of one score, such as all copies of a word in a first layer, differ by rounding alone. A threshold among them
    would send each where the rounding of that day says.
    """
    steps = table.diff()
    tolerance = ATOM * (table[(len(table) * 19) // 20] - table[len(table) // 20])
    gaps = (steps > tolerance).nonzero()[:, 0]
    cell = min(int(position), len(steps) - 1)
    if len(gaps) == 0 or steps[cell] > tolerance:
        return threshold
    nearest = gaps[(gaps + 0.5 - position).abs().argmin()]
    return (table[nearest] + table[nearest + 1]) / 2


def normal_quantiles(probabilities: Sequence[float]) -> Float[Tensor, " probabilities"]:
    """Quantiles of N(0, 1), of which the first and the last are finite, as those of a table of data are."""
    inner = torch.tensor(probabilities, dtype=torch.float64, device="cpu").clamp(1e-4, 1 - 1e-4)
    return torch.special.ndtri(inner)


def between_scores(
    scores: Float[Tensor, " tokens"], thresholds: Float[Tensor, " thresholds"]
) -> Float[Tensor, " thresholds"]:
    """Each threshold in the middle between the scores around it, so that no score lies exactly on it.

    Where one does, a forward in pieces, whose rounding differs, would route its token otherwise than a whole one.
    """
    ordered = scores.to(thresholds).sort().values
    above = torch.searchsorted(ordered, thresholds, right=True)
    inside = thresholds.isfinite() & (above > 0) & (above < len(ordered))
    low, high = ordered[(above - 1).clamp(min=0)], ordered[above.clamp(max=len(ordered) - 1)]
    return torch.where(inside, (low + high) / 2, thresholds)


def quantile_table(scores: Float[Tensor, " tokens"]) -> Float[Tensor, " quantiles"]:
    """The table of quantiles of some scores, linear between neighbours (`torch.quantile` stops at 16 M values)."""
    ordered = scores.float().sort().values
    # Places in float64, which not every device has.
    position = torch.linspace(0, len(ordered) - 1, QUANTILES, dtype=torch.float64, device="cpu")
    lower, upper = position.floor().long(), position.ceil().long()
    part = (position - lower).float()
    return torch.lerp(ordered[lower.to(scores.device)], ordered[upper.to(scores.device)], part.to(scores.device))


def pool_tables(tables: Sequence[Float[Tensor, " quantiles"]], counts: Sequence[float]) -> Float[Tensor, " quantiles"]:
    """The quantiles of all scores together, Q = F⁻¹ of F(s) = Σ nᵢ Fᵢ(s) / Σ nᵢ, from each part's own.

    The mean of the parts' quantiles would be another thing where the parts differ, as a text and a task do.

    Args:
        tables: Fᵢ⁻¹ at even levels, rising, linear in between; one or more.
        counts: nᵢ > 0, how many scores each is of.

    """
    if len(tables) == 1:
        return tables[0]
    exact = [table.cpu().double() for table in tables]
    points = torch.cat(exact).sort().values
    # Where many scores are alike F jumps: both of its values belong to the point.
    levels = torch.zeros(2, len(points), dtype=torch.float64, device=points.device)
    for table, count in zip(exact, counts, strict=True):
        last = len(table) - 1
        for side, level in zip((False, True), levels, strict=True):
            upper = torch.searchsorted(table, points, right=side)
            low, high = table[(upper - 1).clamp(min=0)], table[upper.clamp(max=last)]
            inside = (upper - 1 + (points - low) / (high - low)) / last
            inside = torch.where(upper == 0, 0.0, torch.where(upper > last, 1.0, inside))
            level += inside * (count / sum(counts))
    reached, points = levels.T.flatten(), points.repeat_interleave(2)
    wanted = torch.linspace(0, 1, len(tables[0]), dtype=torch.float64, device=points.device)
    upper = torch.searchsorted(reached, wanted).clamp(1, len(reached) - 1)
    below, above = reached[upper - 1], reached[upper]
    part = ((wanted - below) / (above - below)).nan_to_num(0.0).clamp(0, 1)
    return torch.lerp(points[upper - 1], points[upper], part).to(tables[0])


class Thresholds(ExactBuffers):
    """Thresholds of one routed layer, calibrated towards a share or fixed.

    They keep their type: in bfloat16 they would have three digits, where all of H lies between 0.82 and 0.91.

    Args:
        operators: K, the number of operators to choose from.
        quantiles: the table to start from: the null's, for an uncalibrated layer.
        share: ρ, the share of tokens for the last operator.
        fixed: K − 1 thresholds to stand still at, instead of following the data.

    Raises:
        ValueError: not K − 1 fixed thresholds in rising order, or a share that is not from 0 to 1.

    """

    values: Tensor
    quantiles: Tensor
    steps: Tensor

    def __init__(
        self,
        operators: int,
        quantiles: Float[Tensor, " quantiles"],
        share: float,
        fixed: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.operators = operators
        self.share = share
        self.running = fixed is None
        if fixed is not None and (len(fixed) != operators - 1 or list(fixed) != sorted(fixed)):
            raise ValueError(f"thresholds {fixed} for {operators} operators: need {operators - 1}, in rising order")
        # Kept to start from again: loading a checkpoint that has no calibration leaves the buffers without a value.
        self._start = (quantiles.float(), fixed)
        self.register_buffer("values", torch.empty(operators - 1, dtype=torch.float32, device="cpu"))
        self.register_buffer("quantiles", torch.empty(len(quantiles), dtype=torch.float32, device="cpu"))
        self.register_buffer("steps", torch.empty((), dtype=torch.float32, device="cpu"))
        self.reset_parameters()
        self._levels: tuple[Any, Tensor] | None = None
        self._noted: Tensor | None = None
        self._noted_count = self._notes = 0

    def forward(self, score: Float[Tensor, "*tokens"]) -> Int[Tensor, "*tokens"]:
        """How many thresholds each score lies above: the number of its operator."""
        if self.operators == 2:  # decoding counts every operation
            return (score > self.values).view_as(score).long()
        return (score[..., None] > self.values).sum(-1)

    @property
    def levels(self) -> Float[Tensor, " thresholds"]:
        """Which quantiles of the scores they are, where they lie."""
        key = (self.share, self.values.device)
        if self._levels is None or self._levels[0] != key:
            self._levels = (key, levels_of(self.share, self.operators).to(self.values))
        return self._levels[1]

    def check_present(self) -> None:
        """Raise a UserError where the thresholds can't be set, because the model's buffers are offloaded."""
        if self.values.is_meta:
            raise UserError(
                "the thresholds are offloaded, so they can't be set: load the model whole, set its share, and save it"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to where it started: uncalibrated, or at the fixed thresholds."""
        self.quantiles.copy_(self._start[0])
        self.steps.zero_()
        if self.running:
            self.set_share(self.share)
        else:
            self.set_fixed()

    @torch.no_grad()
    def set_fixed(self) -> None:
        """Put the thresholds where they were fixed."""
        assert self._start[1] is not None
        self.values.copy_(torch.tensor(self._start[1], dtype=torch.float32, device="cpu"))

    @property
    def calibrated(self) -> bool:
        """Whether the table is of data, and not yet the null's."""
        return bool(self.steps > 0)

    @property
    def noted(self) -> bool:
        """Whether scores were noted since the last step."""
        return self._noted_count > 0

    def set_share(self, share: float) -> None:
        """Turn the dial: thresholds for another share, from the table."""
        self.values.copy_(shares_to_thresholds(self.quantiles, share, self.operators))
        self.share = share

    @torch.no_grad()
    def set_from(self, scores: Float[Tensor, " tokens"], share: float) -> None:
        """Replace the table by that of these scores, and set the thresholds from it.

        Raises:
            UserError: a score is not finite.
            ValueError: a share that is not from 0 to 1.

        """
        self.refuse_broken(scores)
        table = quantile_table(scores)
        thresholds = shares_to_thresholds(table, share, self.operators)  # or an error, and nothing is changed
        self.values.copy_(between_scores(scores, thresholds))
        self.quantiles.copy_(table)
        self.steps.add_(1)
        self.share = share

    def refuse_broken(self, scores: Float[Tensor, "tokens *heads"]) -> None:
        """Raise a UserError if a score is not finite."""
        if not bool(scores.isfinite().all()):
            raise UserError(
                f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite: the model's weights or "
                "its input hold NaN or infinity, and no threshold can be set from them"
            )

    @torch.no_grad()
    def note(self, scores: Float[Tensor, "batch time *heads"], real: Bool[Tensor, "batch time"] | None) -> None:
        """Remember the scores of a forward's real tokens until the next `step`.

        Scores that are not finite are left out: they would spoil the table for good. The loss says that they are there.
        """
        scores = (scores if real is None else scores[real]).detach().flatten()
        scores = scores[scores.isfinite()]
        if len(scores):
            table = quantile_table(scores)
            if self._noted is not None:
                table = pool_tables([self._noted, table], [float(self._noted_count), float(len(scores))])
            self._noted = table
            self._noted_count += len(scores)
        self._notes += 1
        if self._notes == FORGOTTEN:
            warnings.warn(
                f"{FORGOTTEN} training forwards, and the thresholds have not followed the data: call "
                "model.step_calibration() after optimizer.step(), or give the Trainer the callback "
                "chiaroscuro.model.MoveThresholds()",
                stacklevel=2,
            )

    @torch.no_grad()
    def step(self) -> None:
        """Move the running table, and with it the thresholds, by what was noted since the last call.

        The forwards of one step (accumulated batches, a second task's, other processes') are pooled by their tokens.
        The first step replaces the null's table, later ones approach: table ← (1 − m) table + m new, m the larger of
        0.1 and 1/steps. That is a mean of quantiles: it takes the steps to be drawn alike.
        """
        tables = [torch.zeros_like(self.quantiles) if self._noted is None else self._noted]
        counts = [float(self._noted_count)]
        self._noted, self._noted_count, self._notes = None, 0, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            tables, counts = _gather(tables[0], counts[0])
        seen = [(table, count) for table, count in zip(tables, counts, strict=True) if count]
        if seen:
            self.steps.add_(1)
            momentum = max(MOMENTUM, 1 / float(self.steps))
            self.quantiles.lerp_(pool_tables(*zip(*seen, strict=True)), momentum)
            self.set_share(self.share)


def _gather(table: Tensor, count: float) -> tuple[list[Tensor], list[float]]:
    """Every process's table and count, in the same order for all."""
    mine = torch.cat([table, table.new_tensor([count])])
    all_of_them = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(all_of_them, mine)
    return [theirs[:-1] for theirs in all_of_them], [float(theirs[-1]) for theirs in all_of_them]
