"""Fonts for text in any script: an installed font draws it, or its characters are spelled out.

Matplotlib brings DejaVu Sans, which has no Chinese, Japanese, Korean or many other characters. If an installed font has
them, it is used for these characters; a character that no font has is written as its code point, `U+4E00`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from matplotlib.font_manager import findfont, fontManager, get_font

USUAL = "DejaVu Sans"
# These fonts claim characters that they don't draw: boxes, private meanings, bitmaps that Agg can't draw.
_UNFIT = ("Last Resort", "STIXNonUnicode", "STIXSize", "cm", "Noto Color Emoji", "Apple Color Emoji")


@dataclass(frozen=True)
class Fonts:
    """The fonts of a picture.

    Attributes:
        families: for matplotlib's `fontfamily`, in order of preference.
        missing: the characters that none of them has.
    """

    families: tuple[str, ...]
    missing: frozenset[str]

    def drawable(self, text: str) -> str:
        """The text, with the code point in place of every character that no font has."""
        return "".join(f"U+{ord(char):04X}" if char in self.missing else char for char in text)

    @property
    def note(self) -> str:
        """What a picture says about missing characters; empty if there are none."""
        return "U+…: a character that no installed font has" if self.missing else ""


def fonts_for(texts: Iterable[str]) -> Fonts:
    """Choose the fonts that some texts need: DejaVu Sans, and as few others as possible for the rest."""
    needed = {char for text in texts for char in text if ord(char) not in _characters(findfont(USUAL))}
    families = [USUAL]
    while needed:
        found = {name: {char for char in needed if ord(char) in _characters(path)} for name, path in _others().items()}
        best = max(found, key=lambda name: len(found[name]), default=None)
        if best is None or not found[best]:
            break
        families.append(best)
        needed -= found[best]
    return Fonts(tuple(families), frozenset(needed))


def _others() -> dict[str, str]:
    """The other installed fonts, upright and of normal weight, by name."""
    upright = (font for font in fontManager.ttflist if font.style == "normal" and font.weight in (400, "normal"))
    return {font.name: font.fname for font in upright if font.name != USUAL and not font.name.startswith(_UNFIT)}


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a file that is gone, or that FreeType can't read
        return frozenset()
