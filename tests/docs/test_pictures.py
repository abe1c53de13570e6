"""The pictures on the pages: each is drawn by docs/pictures.py or docs/app_pictures.py, and shown on a page."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from pages import ROOT, pages

from chiaroscuro.analysis.routing import LayerTrace, RoutingTrace

DRAWN_FROM_A_MODEL = {"routed-text.png"}
OF_THE_APP = {f"app-{name}.png" for name in ("read", "loss", "write", "measure", "runs")}


@pytest.fixture(scope="module")
def pictures() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "docs/pictures.py"))


def test_every_picture_is_drawn_and_shown(pictures: dict[str, object], tmp_path: Path) -> None:
    pictures["main"].__globals__["IMAGES"] = tmp_path  # type: ignore[attr-defined]
    pictures["main"](None)  # type: ignore[operator]
    drawn = {file.name for file in tmp_path.iterdir()} | DRAWN_FROM_A_MODEL | OF_THE_APP
    assert {file.name for file in (ROOT / "docs/images").iterdir()} == drawn
    text = "".join(page.read_text("utf-8") for page in pages())
    assert all(f"images/{name})" in text for name in drawn)


def test_a_word_of_several_tokens_is_not_broken(pictures: dict[str, object]) -> None:
    """The line breaks before a word, and every token is drawn once, where the one before it ends."""
    tokens = ("A", " long" * 11, " and", " un", "broken", " word")
    layers = tuple(
        LayerTrace(("dct", "attention"), (n % 2,) * len(tokens), (0.85,) * len(tokens), (0.86,), (0.5, 0.5))
        for n in (0, 1)
    )
    figure = pictures["routed_text"](RoutingTrace(tokens, layers, None, 0.85, 128))  # type: ignore[operator]
    (axes,) = figure.axes
    placed = {text.get_text(): text.get_position() for text in axes.texts if text.get_text() in tokens}
    assert set(placed) == set(tokens)
    assert placed[" un"][1] == placed["broken"][1] > placed["A"][1]
    assert placed["broken"][0] == pytest.approx(placed[" un"][0] + 3 * 9.03)
