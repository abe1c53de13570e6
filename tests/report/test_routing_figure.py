"""The figure: a real picture, legible at any length, with the null in it, and no global state touched."""

import io
import sys
import warnings

import numpy as np
import pytest
from matplotlib.image import imread
from traces import HOSTILE, MENUS, make_trace

from chiaroscuro.errors import UserError
from chiaroscuro.report.routing_figure import draw_routing, save_png

V2 = [("dct",), *[("dct", "attention")] * 26, ("attention",)]
LENGTHS = [1, 7, 60, 61, 1500]


def drawn(tokens, menus=MENUS, **options):
    figure = draw_routing(make_trace((["word", " other", "\n"] * tokens)[:tokens], menus, **options))
    figure.canvas.draw()
    return figure


def overlap(texts):
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])


@pytest.mark.parametrize("menus", [MENUS, V2], ids=["5 layers", "28 layers"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_labels_never_overlap(tokens, menus):
    figure = drawn(tokens, menus)
    names, _, spread, bar = figure.axes
    for labels in (
        names.get_xticklabels(),
        names.get_yticklabels(),
        spread.get_xticklabels(),
        bar.get_xticklabels(),
    ):
        assert not overlap(labels)


def test_tokens_are_named_while_there_is_room():
    assert [t.get_text() for t in drawn(3).axes[0].get_xticklabels()] == ["word", "␣other", "⏎"]
    assert "word" not in [t.get_text() for t in drawn(61).axes[0].get_xticklabels()]


@pytest.mark.parametrize("tokens", [1, 61])
def test_the_null_is_a_line_wherever_entropy_is(tokens):
    figure = drawn(tokens)
    for axes in (figure.axes[2], figure.axes[3]):
        assert any(set(line.get_xdata()) == {0.8684} for line in axes.lines)


def test_the_bars_are_the_shares():
    trace = make_trace(list("abcdefgh"))
    bars = draw_routing(trace).axes[1].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([s for layer in trace.layers for s in layer.share])


def test_the_stripe_below_a_row_has_one_colour_per_operator():
    trace = make_trace([*"abcdefgh"] * 6, [("dct", "rbf", "attention")])
    picture = draw_routing(trace).axes[0].images[0].get_array()
    stripe = [tuple(colour) for colour in picture[-2]]
    pairs = set(zip(trace.layers[0].operator_index, stripe, strict=True))
    assert len(pairs) == len(set(stripe)) == len(set(trace.layers[0].operator_index)) == 3


def test_a_png_is_written_that_is_not_blank(tmp_path):
    save_png(make_trace(HOSTILE), tmp_path / "routing.png")
    content = (tmp_path / "routing.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(io.BytesIO(content))
    assert pixels.std() > 0.05 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def test_any_text_is_drawn_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_png(make_trace([*HOSTILE, "$\\frac$", "👩‍🚀", "a" * 99]), tmp_path / "routing.png")


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        save_png(make_trace("ab"), tmp_path / "missing" / "routing.png")


def test_an_infinite_threshold_is_left_out():
    trace = make_trace("ab", [("dct", "attention")])
    object.__setattr__(trace.layers[0], "thresholds", (float("inf"),))
    figure = draw_routing(trace)
    figure.canvas.draw()
    assert np.isfinite(figure.axes[2].get_xlim()).all()


def test_pyplot_stays_out_of_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error now
    save_png(make_trace("ab"), tmp_path / "routing.png")
