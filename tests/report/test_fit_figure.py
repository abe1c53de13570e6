"""The picture of a fit: everything that was measured lies on it."""

import pytest

from chiaroscuro.report.fit_figure import bottom_of, draw_fit


def test_a_correlation_below_zero_is_on_the_axis_whichever_side_it_is_of() -> None:
    for sides in (("look", "kept"), ("kept", "look")):
        values = dict(zip(sides, ([0.1, 0.5], [0.3, -0.4]), strict=True))
        layers = [
            {"layer": i, **{side: {"rank_correlation": own[i], "recall": 0.5} for side, own in values.items()}}
            for i in range(2)
        ]
        found = {"layers": layers, "look": 0.25, "kept": 0.25}
        assert bottom_of(found) == pytest.approx(-0.45)
        assert draw_fit(found).startswith(b"\x89PNG")
    assert bottom_of({"layers": layers[:1], "look": 0.25, "kept": None}) == 0.0
