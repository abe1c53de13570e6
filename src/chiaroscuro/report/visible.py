"""Text from outside, made safe to print: no terminal obeys it, and no token disappears."""

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Replace control characters except line break and tab by pictures, so that no terminal obeys them.

    The characters that change the direction of writing are named, as `⟨U+202E⟩`: they would reorder the text around
    them.
    """
    return _CONTROL.sub(lambda match: _picture(match[0]), text)


def _picture(char: str) -> str:
    code = ord(char)
    return chr(0x2400 + code) if code < 32 else "␡" if code < 160 else f"⟨U+{code:04X}⟩"


def label(piece: str) -> str:
    """Write a token on one line: ␣ space, ⏎ line break, ⇥ tab, … if its character belongs to a neighbour."""
    return harmless(piece).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "…"
