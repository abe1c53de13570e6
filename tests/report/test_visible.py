"""Text from outside reaches the terminal without a character that it would obey."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiaroscuro.report.visible import harmless, label


@pytest.mark.parametrize(
    "piece, shown",
    [(" the", "␣the"), ("\n\n", "⏎⏎"), ("", "…"), ("\x1b[2J", "␛[2J"), ("\x9b", "␡"), ("漢", "漢")],
)
def test_a_label_shows_what_has_no_ink(piece, shown):
    assert label(piece) == shown
    assert all(char.isprintable() for char in label(piece))


def test_lines_and_tabs_survive():
    assert harmless("a\n\tb\r\x00") == "a\n\tb␍␀"


def test_characters_that_turn_the_direction_of_writing_are_named():
    assert harmless("abc\u202edef") == "abc⟨U+202E⟩def"


@given(st.text())
def test_no_control_character_is_left(text):
    shown = harmless(text)
    assert not any(unicodedata.category(char) == "Cc" and char not in "\n\t" for char in shown)
