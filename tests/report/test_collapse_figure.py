"""The plot of a collapse: a panel a layer, an area an operator, for any number of either."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from chiaroscuro.analysis.collapse import CollapseTrace, trace_collapse
from chiaroscuro.report.collapse_figure import draw_collapse
from chiaroscuro.report.palette import styles_of


def fading(layers: int, looks: int) -> CollapseTrace:
    """The middle one of three operators goes from a third to nothing."""
    middle = np.linspace(1 / 3, 0, looks)
    rows = [{"layer": n + 1, "operators": ["dct", "rbf", "attention"]} for n in range(layers)]
    return trace_collapse(
        [
            {"kind": "train", "step": step, "layers": [{**row, "share": [0.3, m, 0.7 - m]} for row in rows]}
            for step, m in enumerate(middle.tolist())
        ]
    )


@pytest.mark.parametrize(("layers", "looks"), [(1, 1), (3, 50), (26, 5)])
def test_a_png_has_the_colour_of_every_operator_that_lives(layers: int, looks: int) -> None:
    content = draw_collapse(fading(layers, looks))
    pixels = imread(io.BytesIO(content))[..., :3].reshape(-1, 3)
    for name in ("dct", "attention") if looks > 1 else ():
        ink = np.array(list(bytes.fromhex(styles_of(["dct", "rbf", "attention"])[name].ink[1:]))) / 255
        drawn = 0.75 * ink + 0.25  # on white
        assert (np.abs(pixels - drawn).max(-1) < 0.02).sum() > 500, name
    assert len(np.unique(pixels, axis=0)) > 20
