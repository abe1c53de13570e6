"""Every operator is told from every other, with and without colour, and every colour can be read."""

import itertools

from hypothesis import given
from traces import make_trace, traces

from chiaroscuro.layers import Operator
from chiaroscuro.layers.registry import OPERATORS
from chiaroscuro.report.figures import line_look
from chiaroscuro.report.palette import LIGHT, NIGHT, PAPER, SHADOW, blend, operator_styles, styles_of


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2's contrast ratio."""
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


NAMES = ("dct", "rbf", "haar", "hash", "dot", "attention")


def test_operators_differ_in_every_way_they_are_shown():
    styles = operator_styles(make_trace("ab", [NAMES]))
    assert list(styles) == list(NAMES)
    for one, other in itertools.combinations(styles.values(), 2):
        for field in ("ink", "glow", "brackets", "underline", "letter"):
            assert getattr(one, field) != getattr(other, field), field


def test_every_colour_is_readable():
    for style in operator_styles(make_trace("ab", [NAMES])).values():
        assert contrast(style.ink, PAPER) >= 4.5
        assert contrast(style.glow, NIGHT) >= 4.5
        # The terminal writes with the shadow on the glow.
        assert contrast(SHADOW, style.glow) >= 3 if style.underline else True


def test_more_operators_than_colours_still_have_names_and_letters():
    names = tuple(f"op{i}" for i in range(8))
    styles = operator_styles(make_trace("ab", [("dct",), names, ("attention",)]))
    assert list(styles) == ["dct", *names, "attention"]
    assert len({style.letter for style in styles.values()}) == 10


def test_the_look_follows_from_the_cost_and_not_from_the_name(monkeypatch):
    cheap, costly = (type("Named", (Operator,), {"cost": cost}) for cost in (0, 2))
    monkeypatch.setitem(OPERATORS, "shade", cheap)
    monkeypatch.setitem(OPERATORS, "gaze", costly)
    mine, usual = styles_of(["gaze", "rbf", "shade"]), styles_of(["dct", "rbf", "attention"])
    assert list(mine) == ["shade", "rbf", "gaze"]
    for one, other in zip(mine.values(), usual.values(), strict=True):
        assert (one.ink, one.brackets, one.area) == (other.ink, other.brackets, other.area)


@given(traces())
def test_every_operator_of_a_trace_has_a_style(trace):
    assert set(operator_styles(trace)) == {name for layer in trace.layers for name in layer.operators}


def test_blend_ends_at_both_ends():
    assert blend(SHADOW, LIGHT, 0) == SHADOW
    assert blend(SHADOW, LIGHT, 1) == LIGHT


def test_no_two_lines_of_a_picture_look_alike() -> None:
    looks = {str(line_look(number)) for number in range(36)}
    assert len(looks) == 36
