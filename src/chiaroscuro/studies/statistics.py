"""What a few seeds can say: a mean with its interval, and whether two ways to train differ.

Runs with the same seed share their data's order, and much of their luck with it. So two variants are compared seed by
seed: the differences spread less than the values, and a difference is seen with fewer runs.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
ROUNDING = 1e-12
"""Differences whose spread is below this part of the values differ by rounding alone: they are taken as equal."""


@dataclass(frozen=True)
class Estimate:
    """A mean, and how well it is known.

    Attributes:
        count: n, the number of values.
        mean: x̄.
        sd: s, the standard deviation with n − 1; None of one value.
        low: Lower end of the 95% interval; likewise.
        high: Upper end.
    """

    count: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison(Estimate):
    """A mean difference, and how well it is known.

    Attributes:
        p: Of the hypothesis that the true mean is 0, two-sided; None of one difference, or of several equal ones.
    """

    p: float | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """x̄ ± t s / √n, with t the 97.5% quantile of Student's distribution with n − 1 degrees of freedom.

    Args:
        values: n of them, one or more, taken to be independent and normal.
    """
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(1, mean)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * sd / count**0.5
    return Estimate(count, mean, sd, mean - half, mean + half)


def compare(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """The mean difference from a baseline, pair by pair, and the paired t-test, t = x̄ / (s / √n).

    Args:
        values: One of every pair.
        baseline: The other, in the same order.
    """
    found = estimate(np.subtract(values, baseline).tolist())
    if found.sd is None or found.sd <= ROUNDING * max(map(abs, (*values, *baseline))):
        return Comparison(**asdict(found))
    t = abs(found.mean) / (found.sd / found.count**0.5)
    return Comparison(**asdict(found), p=float(2 * stats.t.sf(t, found.count - 1)))


def compare_ratios(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """The ratio to a baseline, pair by pair: `compare` of the logarithms, whose mean and ends are given as ratios.

    Args:
        values: One of every pair, positive; perplexities, say.
        baseline: The other, in the same order.

    Returns:
        The geometric mean of the ratios and its interval; `sd` stays that of the logarithms.
    """
    log = compare(np.log(values).tolist(), np.log(baseline).tolist())
    low, high = (None if end is None else math.exp(end) for end in (log.low, log.high))
    return replace(log, mean=math.exp(log.mean), low=low, high=high)
