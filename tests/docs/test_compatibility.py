"""The page on transformers' own tests is that of the committed figures, in which nothing fails without a reason."""

import json
from pathlib import Path

from experiments.transformers_tests import CONTROL, known, render

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_figures() -> None:
    figures = json.loads((ROOT / "experiments/results/transformers-tests.json").read_text())
    assert (ROOT / "docs/compatibility.md").read_text() == render(figures)
    assert not figures["not as listed"]
    for model, one in figures["models"].items():
        assert one["failed, listed"].keys() <= known(model).keys()
    assert figures["models"][CONTROL]["passed"] > 100
