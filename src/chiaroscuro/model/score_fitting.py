"""A score by which tokens are routed, fitted to what each of them gains: the regression, and how well it does.

Which gains, and in which order the layers are fitted, is said in `fitting`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers import FittedRouter
from chiaroscuro.layers.registry import Entry, split_entry

RIDGE = 0.5
"""λ, beside features of variance 1 and gains of mean 1."""

NEWTON_STEPS = 12

LARGEST_SCORE = 20.0
"""Above it a score counts as this, while it is fitted: exp would leave float32."""

LEAST_GAIN = 1e-9
"""Nats that are expected of a token where none of those seen gained anything."""

HELD_OUT = 0.2
"""The part of the batches, the last ones, that nothing is fitted on."""

FEWEST_QUERIES = 16
"""What is gained by keeping a token is a target where at least so many later ones, and half a window, could see it."""

SAMPLE = 8192
"""Tokens a layer that a score of two layers is fitted on; a linear one takes all."""

STEPS, BATCH, RATE, DECAY = 400, 1024, 3e-3, 1e-2
"""Of AdamW, for a score of two layers."""


@dataclass(frozen=True)
class SideFit:
    """How well a layer's score foretells its target, on tokens that it was not fitted on.

    Attributes:
        rank_correlation: Spearman's, between score and gain.
        recall: of the tokens with the largest targets, the share that is to be routed, how many are among as many with
            the largest scores. By chance it is that share.
        captured: of what the targets of the tokens with the largest targets add up to, how much those of as many with
            the largest scores do. Few tokens may have nearly all, and the ranks of the others mean nothing.
        tokens: held out.
        fitted_tokens: that it was fitted on.
        share: of the tokens that the layer routes.
        harm: where the shares are spread, KL(full ‖ routed) in nats a prediction, with this side of this layer alone
            routed, by the mean share.

    """

    rank_correlation: float
    recall: float
    captured: float
    tokens: int
    fitted_tokens: int
    share: float
    harm: float | None = None


@dataclass(frozen=True)
class FitReport:
    """What `fit` did.

    Attributes:
        look: by layer, how well the score of who looks far does; empty where it was not fitted.
        kept: likewise of who is kept.
        look_share: the share of tokens that look, or None; the mean over the layers, and what recall is measured at.
        kept_share: the share of tokens that are kept, or None; likewise.

    """

    look: dict[int, SideFit]
    kept: dict[int, SideFit]
    look_share: float | None
    kept_share: float | None

    @classmethod
    def of(cls, results: Mapping[tuple[str, int], SideFit], shares: Mapping[str, float | None]) -> "FitReport":
        """That of what was found by side and layer, at these shares by side."""
        look, kept = ({i: one for (side, i), one in results.items() if side == name} for name in ("look", "kept"))
        return cls(look, kept, shares.get("look"), shares.get("kept"))

    @property
    def layers(self) -> list[int]:
        """The layers with a score that was fitted."""
        return sorted({*self.look, *self.kept})

    def figures(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        layers = []
        for i in self.layers:
            sides = {"look": self.look.get(i), "kept": self.kept.get(i)}
            layers.append({"layer": i, **{name: asdict(side) for name, side in sides.items() if side is not None}})
        return {"look": self.look_share, "kept": self.kept_share, "layers": layers}

    def __str__(self) -> str:
        """A line per layer and side."""
        lines = ["layer  side  rank correlation  recall  captured  held-out tokens  share"]
        for i in self.layers:
            for name, sides in (("look", self.look), ("kept", self.kept)):
                if i in sides:
                    side = sides[i]
                    ranked = f"{side.rank_correlation:16.3f}  {side.recall:6.3f}  {side.captured:8.3f}"
                    lines.append(f"{i:5}  {name}  {ranked}  {side.tokens:15,}  {side.share:5.3f}")
        return "\n".join(lines)


def asked_shares(look: Any, kept: Any, budget: Any) -> dict[str, Any]:
    """By side the share that is asked for, None where none is: a budget is the share of both.

    Raises:
        UserError: a budget beside a share, or something that is no share.

    """
    if budget is None:
        for name, share in (("look", look), ("kept", kept)):
            check_share(name, share)
        return {name: None if share is None else float(share) for name, share in (("look", look), ("kept", kept))}
    if look is not None or kept is not None:
        raise UserError(f"budget={budget!r} is the mean share of both sides: drop look and kept")
    check_share("budget", budget)
    return {"look": float(budget), "kept": float(budget)}


def check_share(name: str, share: Any) -> None:
    """Raise a UserError if this is neither None nor a share of the tokens, more than 0 and less than 1."""
    if share is None or (not isinstance(share, bool) and isinstance(share, Real) and 0 < float(share) < 1):
        return
    raise UserError(f"{name}={share!r}: must be a share of the tokens, more than 0 and less than 1")


def check_spread(spread: Any) -> None:
    """Raise a UserError if this is neither None nor true or false."""
    if spread is not None and not isinstance(spread, bool):
        raise UserError(f"spread={spread!r}: must be true or false")


def with_target(
    side: str,
    window: int,
    sinks: int,
    real: Bool[Tensor, "batch time"],
    segments: Int[Tensor, "batch time"] | None = None,
) -> Bool[Tensor, "batch time"]:
    """The tokens that have something beyond the window; or those that enough others have beyond theirs.

    Where a row holds several documents, `segments`, that is in a token's own.
    """
    place = real.cumsum(1) - 1
    last = real.sum(1, keepdim=True) - 1
    if segments is not None:
        changes = segments[:, 1:] != segments[:, :-1]
        first = place.where(F.pad(changes, (1, 0)), 0).cummax(1).values
        ends = place.where(F.pad(changes, (0, 1)), last)
        place, last = place - first, ends.flip(1).cummin(1).values.flip(1) - first
    if side == "look":
        return real & (place >= window + sinks)
    later = last + 1 - place - window
    return real & (place >= sinks) & (later >= max(FEWEST_QUERIES, window // 2))


def refuse_broken(layer: int, x: Tensor) -> None:
    """Raise a UserError if what a layer gives is not finite."""
    if not bool(x.isfinite().all()):
        raise UserError(f"layer {layer} gives NaN or infinity: the model's weights or its input hold some")


def fitted_entry(present: Entry, hidden: int | None) -> Entry:
    """A fitted router in the place of the present one, that scores as many heads and follows as much of a row."""
    before = split_entry(present)[1]
    named = {"hidden": hidden, "heads": before.get("heads"), "history": before.get("history")}
    options = {name: value for name, value in named.items() if value is not None}
    return {"fitted": options} if options else "fitted"


class SideFitting:
    """The fit of one side of one layer: tokens and their gains, then a score, then what it says of tokens held out.

    The score is the logarithm of the gain that is expected of a token, in nats: a Poisson regression, whose mean is
    exp of the score. So a rare large gain counts as much as many small ones, and scores of heads can be compared.

    Args:
        side: `"look"` or `"kept"`.
        layer: its number.
        router: whose score is fitted.
        share: of the tokens that are to be routed, which recall is measured at.
        quota: tokens of a batch that it is fitted on, drawn at random; None for all.

    """

    def __init__(self, side: str, layer: int, router: FittedRouter, share: float, quota: int | None = None) -> None:
        self.name = f"layer {layer}, side {side}"
        self.router, self.share, self.quota = router, share, quota
        self.count = 0
        self.samples: list[tuple[Tensor, Tensor]] = []
        self.answers: list[tuple[Tensor, Tensor]] = []
        self.generator = torch.Generator("cpu").manual_seed(layer)

    def add(self, x: Float[Tensor, "tokens width"], gain: Float[Tensor, "tokens heads"], held_out: bool) -> None:
        """Learn of some tokens, or be asked about them."""
        # One score for all heads is of what they gain together: one of them may need what the others do not.
        gain = gain if gain.shape[1] == self.router.options.heads else gain.sum(1, keepdim=True)
        gain = gain.clamp(min=0)
        if held_out:
            self.answers.append((self.router.fitted(x), gain))
            return
        self.count += len(x)
        if self.quota is not None:
            taken = torch.randperm(len(x), generator=self.generator)[: self.quota].to(x.device)
            x, gain = x[taken], gain[taken]
        self.samples.append((x.float(), gain.float()))

    def solve(self) -> None:
        """Set the score by what was learnt."""
        width, hidden = self.router.width, self.router.options.hidden
        if self.count < 2 * width:
            raise UserError(
                f"{self.name}: {self.count} tokens with a target to fit {width} features on: give at least "
                f"{2 * width}, in longer sequences or more of them"
            )
        x, gain = (torch.cat(parts) for parts in zip(*self.samples, strict=True))
        if not bool(gain.isfinite().all()):
            raise UserError(f"{self.name}: a gain is not finite: the model's weights or its input hold NaN or infinity")
        self.samples = []
        spread, mean = torch.std_mean(x, 0)
        spread = spread.where(spread > 1e-6 * spread.max(), 1.0)
        # What nobody gains by has the lowest score there is, and a slope: all 0 would be a score that was not fitted.
        expected = gain.mean(0).clamp(min=LEAST_GAIN)
        x, gain = (x - mean) / spread, gain / expected
        if hidden is None:
            fitted = [_poisson(x, one) for one in gain.unbind(1)]
            slope = torch.stack([w for w, _ in fitted]) / spread
            slope = slope.where(slope.abs().amax(1, keepdim=True) > 0, LEAST_GAIN)
            offset = torch.stack([b for _, b in fitted]) + expected.log()
            self.router.fitted.set_weights(slope, offset - slope @ mean)
        else:
            _fit_two_layers(self.router, x, gain, expected, mean, spread, self.generator)

    def result(self) -> SideFit:
        """How well the score does on the tokens held out, of all heads together, as one threshold takes them."""
        score, gain = (torch.cat(parts).flatten().double() for parts in zip(*self.answers, strict=True))
        tokens = sum(len(part) for part, _ in self.answers)
        top = round(self.share * len(score))
        if not 0 < top < len(score):
            raise UserError(
                f"{self.name}: {tokens} tokens with a target are held out, too few for a share of {self.share:g}: "
                "give longer sequences, or more of them"
            )
        return SideFit(
            rank_correlation(score, gain),
            top_recall(score, gain, top),
            top_captured(score, gain, top),
            tokens,
            self.count,
            self.share,
        )


def _poisson(x: Float[Tensor, "tokens width"], gain: Float[Tensor, " tokens"]) -> tuple[Tensor, Tensor]:
    """The w and b that minimise mean(exp(s) − g s) + λ |w|² / 2 with s = w·x + b, by Newton's method.

    Args:
        x: features of mean 0 and variance 1.
        gain: g, of mean 1.

    """
    x = F.pad(x, (0, 1), value=1.0)
    penalty = torch.full((x.shape[1],), RIDGE, device=x.device)
    penalty[-1] = 1e-6

    def objective(w: Tensor) -> tuple[Tensor, Tensor]:
        score = (x @ w).clamp(max=LARGEST_SCORE)
        return score, (score.exp() - gain * score).mean() + (penalty * w.square()).sum() / 2

    w = x.new_zeros(x.shape[1])
    score, value = objective(w)
    for _ in range(NEWTON_STEPS):
        rate = score.exp()
        slope = x.T @ (rate - gain) / len(x) + penalty * w
        curvature = (x * rate[:, None]).T @ x / len(x) + penalty.diag()
        step = torch.linalg.solve(curvature.double(), slope.double()).to(w)
        for halving in range(10):
            moved = w - step / 2**halving
            score, lower = objective(moved)
            if bool(lower < value):
                break
        else:
            break
        settled = bool(value - lower < 1e-5)
        w, value = moved, lower
        if settled:
            break
    return w[:-1], w[-1]


@torch.enable_grad()
def _fit_two_layers(
    router: FittedRouter,
    x: Tensor,
    gain: Tensor,
    expected: Tensor,
    mean: Tensor,
    spread: Tensor,
    generator: torch.Generator,
) -> None:
    """Fit w·gelu(U x + c) + b by AdamW to the same loss, and fold the standardisation into U and c."""
    hidden, width = router.options.hidden, router.width
    first = (torch.randn(hidden, width, generator=generator) / math.sqrt(width)).to(x)
    second = (torch.randn(gain.shape[1], hidden, generator=generator) / math.sqrt(hidden)).to(x)
    weights = [first, x.new_zeros(hidden), second, x.new_zeros(gain.shape[1])]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=DECAY)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        taken = torch.randint(len(x), (BATCH,), generator=generator).to(x.device)
        score = F.linear(F.gelu(F.linear(x[taken], weights[0], weights[1])), weights[2], weights[3])
        score = score.clamp(max=LARGEST_SCORE)
        optimizer.zero_grad()
        (score.exp() - gain[taken] * score).mean().backward()
        optimizer.step()
    first, offset, second, last = (weight.detach() for weight in weights)
    first = first / spread
    router.fitted.set_weights(second, last + expected.log(), first, offset - first @ mean)


def rank_correlation(a: Float[Tensor, " tokens"], b: Float[Tensor, " tokens"]) -> float:
    """Spearman's rank correlation; 0 where one of the two is the same for all tokens. Ties share their mean rank."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1).prod()
    return float(ranks[0] @ ranks[1] / norms) if norms > 0 else 0.0


def _ranks(values: Tensor) -> Float[Tensor, " tokens"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def top_recall(score: Float[Tensor, " tokens"], target: Float[Tensor, " tokens"], top: int) -> float:
    """Of the `top` tokens with the largest targets, the share that is among the `top` with the largest scores."""
    found = torch.isin(score.topk(top).indices, target.topk(top).indices)
    return float(found.double().mean())


def top_captured(score: Float[Tensor, " tokens"], target: Float[Tensor, " tokens"], top: int) -> float:
    """What the targets of the `top` tokens with the largest scores add up to, as a part of the most that it can be."""
    best = float(target.topk(top).values.sum())
    return float(target[score.topk(top).indices].sum()) / best if best > 0 else 1.0
