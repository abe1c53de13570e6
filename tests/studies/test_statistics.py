"""Means and intervals as scipy gives them, and as a table of Student's t does."""

import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from chiaroscuro.studies.statistics import compare, estimate

VALUES = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=8)


@given(VALUES)
def test_an_estimate_is_that_of_scipy(values: list[float]) -> None:
    found = estimate(values)
    assert found.count == len(values)
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert found.sd == pytest.approx(stats.tstd(values), abs=1e-9)
    if stats.tstd(values) < 1e-3:
        return
    test = stats.ttest_1samp(values, 0)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=8))
def test_a_comparison_is_the_paired_test_of_scipy(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
    found = compare(ours, theirs)
    if stats.tstd([one - other for one, other in pairs]) < 1e-3:
        return
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-7, abs=1e-7)
    assert found.p == pytest.approx(test.pvalue, rel=1e-7)


def test_three_values_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.sd) == (2.0, 1.0)
    assert found.high - found.mean == pytest.approx(4.3026527 / math.sqrt(3))  # t of 2 degrees of freedom at 97.5%


def test_of_one_value_nothing_is_known_but_itself() -> None:
    assert asdict(estimate([5.0])) == {"count": 1, "mean": 5.0, "sd": None, "low": None, "high": None}
    assert compare([5.0], [4.0]).p is None


def test_equal_values_have_an_interval_of_no_width_and_no_p() -> None:
    found = compare([3.0, 4.0], [1.0, 2.0])
    assert (found.mean, found.sd, found.low, found.high, found.p) == (2.0, 0.0, 2.0, 2.0, None)


def test_differences_that_are_equal_up_to_rounding_are_equal() -> None:
    found = compare([0.3, 0.4, 0.5], [0.1, 0.2, 0.3])
    assert 0 < found.sd < 1e-15
    assert found.p is None
