"""docs/reliability.md shows the committed figures."""

import json
from pathlib import Path

from experiments.fuzz import KINDS as TRIED
from experiments.reliability import FAULTS, INPUTS, KINDS, PAGE, render

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_figures() -> None:
    faults, inputs = (json.loads((ROOT / file).read_text()) for file in (FAULTS, INPUTS))
    assert (ROOT / PAGE).read_text() == render(faults, inputs)
    assert KINDS.keys() == TRIED.keys()
