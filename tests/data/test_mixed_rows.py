"""Rows of several sources: each gives its part, the first is read once, and none is left out where it need not be."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiaroscuro.data import MixedRows


@given(
    own=st.integers(1, 200),
    others=st.lists(st.tuples(st.integers(1, 300), st.floats(0.05, 0.3)), min_size=1, max_size=3),
)
def test_each_source_gives_its_part(own: int, others: list[tuple[int, float]]) -> None:
    rows = MixedRows(
        [(0, i) for i in range(own)], [([(n, i) for i in range(c)], p) for n, (c, p) in enumerate(others, 1)]
    )
    read = [rows[i] for i in range(len(rows))]
    assert read[:own] == [(0, i) for i in range(own)]
    for n, (count, part) in enumerate(others, 1):
        its = Counter(i for source, i in read if source == n)
        assert its.total() == max(1, round(part / (1 - sum(p for _, p in others)) * own))
        assert max(its.values()) - (min(its.values()) if len(its) == count else 0) <= 1  # evenly
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_large_source_is_spread_over() -> None:
    rows = MixedRows(list(range(4)), [(list(range(100, 200)), 0.5)])
    assert [rows[i] for i in range(len(rows))] == [0, 1, 2, 3, 100, 125, 150, 175]


@pytest.mark.parametrize("parts", [[0.0], [-0.1], [0.5, 0.5], [1.2]])
def test_wrong_parts(parts: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive, and less than 1 in all"):
        MixedRows([1], [([2], part) for part in parts])
