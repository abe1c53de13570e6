"""Statistics of a few seeds: a mean with its interval, and whether two ways of training differ.

Runs with the same seed see the data in the same order, so part of their variation is shared. Two variants are therefore
compared seed by seed: the differences vary less than the values, and fewer runs are needed to see one.
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
        sd: s, the standard deviation with n − 1; None for a single value.
        low: Lower end of the 95% interval; None for a single value.
        high: Upper end.
    """

    count: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison(Estimate):
    """A mean difference, how well it is known, and whether it is 0.

    Attributes:
        p: Two-sided p-value of the hypothesis that the true mean is 0; None for one difference, or for several equal
            ones.
    """

    p: float | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """x̄ ± t s / √n, with t the 97.5% quantile of Student's distribution with n − 1 degrees of freedom.

    Args:
        values: n ≥ 1 values, assumed to be independent and normal.
    """
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(1, mean)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(values))
    return Estimate(count, mean, float(np.std(values, ddof=1)), mean - half, mean + half)


def compare(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """The mean difference from a baseline, pair by pair, and the paired t-test, t = x̄ / (s / √n).

    Args:
        values: One value of each pair.
        baseline: The other value of each pair, in the same order.
    """
    differences = np.subtract(values, baseline)
    found = estimate(differences.tolist())
    if found.sd is None or found.sd <= ROUNDING * max(map(abs, (*values, *baseline))):
        return Comparison(**asdict(found))
    return Comparison(**asdict(found), p=float(stats.ttest_1samp(differences, 0).pvalue))


def compare_ratios(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """The mean ratio to a baseline, pair by pair: `compare` of the logarithms, with mean and interval given as ratios.

    Args:
        values: One value of each pair, positive, such as a perplexity.
        baseline: The other value of each pair, in the same order.

    Returns:
        The geometric mean of the ratios and its interval; `sd` is that of the logarithms.
    """
    log = compare(np.log(values).tolist(), np.log(baseline).tolist())
    low, high = (None if end is None else math.exp(end) for end in (log.low, log.high))
    return replace(log, mean=math.exp(log.mean), low=low, high=high)
