"""No character of a text is a box in a picture: an installed font has it, or it is spelled out."""

import warnings

import pytest
from matplotlib import font_manager
from matplotlib.font_manager import findfont, get_font
from traces import make_trace

from chiaroscuro.report.fonts import USUAL, fonts_for
from chiaroscuro.report.routing_figure import draw_routing


def characters(family):
    return set(get_font(findfont(family)).get_charmap())


@pytest.fixture
def bare(monkeypatch):
    """A machine with matplotlib's own fonts alone."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def test_the_usual_font_is_enough_for_what_it_has():
    fonts = fonts_for(["the light", "Ü ␣ ⏎"])
    assert fonts.families == (USUAL,) and not fonts.missing and fonts.note == ""


def test_another_font_is_taken_for_what_it_alone_has(bare):
    char = chr(min(characters("STIXGeneral") - characters(USUAL)))
    fonts = fonts_for([f"a{char}"])
    assert fonts.families == (USUAL, "STIXGeneral") and fonts.drawable(char) == char


def test_what_no_font_has_is_spelled_out_and_said_once(bare):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
        figure = draw_routing(make_trace(["光", " light", "影は"]))
        figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["U+5149", "␣light", "U+5F71U+306F"]
    assert figure.get_suptitle().count("U+…: a character that no installed font has") == 1


def test_a_font_of_boxes_is_not_taken(bare):
    assert "Last Resort High-Efficiency" in {font.name for font in font_manager.fontManager.ttflist}
    assert fonts_for(["光"]).families == (USUAL,)
