"""Text that is hard to keep byte for byte, and the real data in ../shared, if it is there."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

# Spaces at both ends, empty lines, other scripts, an emoji of four bytes, the end-of-text token as text.
LINES = [
    " = Title = ",
    " ",
    "The quick brown fox jumps over the lazy dog .",
    "",
    "  Größe 寸法 🙂",
    "<|endoftext|> tail",
]
TEXTS = {
    "train": "\n".join(LINES * 40) + "\n",
    "validation": "\n".join(LINES * 4) + "\n",
    "test": "\n".join(LINES * 3) + "\n",
}


def shared(name: str) -> Path:
    """Return a folder of ../shared/data, or skip the test that needs it."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/data/{name}, which is not beside this checkout")
    return folder
