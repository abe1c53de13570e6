"""Text that comes from outside, made visible: no terminal obeys it, and no token of it disappears."""

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Show control characters as pictures, but for line break and tab, so that no terminal obeys them.

    So are the characters that turn the direction of writing, as `⟨U+202E⟩`: they would reorder what stands around them.
    """
    return _CONTROL.sub(lambda match: _picture(match[0]), text)


def _picture(char: str) -> str:
    code = ord(char)
    return chr(0x2400 + code) if code < 32 else "␡" if code < 160 else f"⟨U+{code:04X}⟩"


def label(piece: str) -> str:
    """Write a token on one line: ␣ space, ⏎ line break, ⇥ tab, … where a neighbour has its character."""
    return harmless(piece).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "…"
