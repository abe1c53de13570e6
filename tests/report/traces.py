"""Traces written by hand, for the tests of every picture."""

import random

from hypothesis import strategies as st

from chiaroscuro.analysis.routing import LayerTrace, RoutingTrace

MENUS = [
    ("dct",),
    ("dct", "attention"),
    ("dct", "rbf", "attention"),
    ("rbf", "haar", "attention"),
    ("attention",),
]
HOSTILE = (
    "<script>alert(1)</script>",
    "\"&quot;'",
    "\n\n",
    "漢",
    "",
    " </script>",
    "\x1b[31m",
    "$x^2$",
    "{{",
    "\t",
    "\r",
)


def make_trace(tokens, menus=MENUS, gate="token", seed=0):
    draw = random.Random(seed)
    layers = []
    for menu in menus:
        thresholds = tuple(0.86 + 0.01 * k for k in range(len(menu) - 1))
        entropy = tuple(draw.gauss(0.868, 0.012) for _ in tokens)
        index = tuple(sum(h > threshold for threshold in thresholds) for h in entropy)
        share = tuple(index.count(k) / len(tokens) for k in range(len(menu)))
        layers.append(LayerTrace(menu, index, entropy, thresholds, share))
    gates = {"none": None, "one": (0.5,), "token": tuple(draw.uniform(0.2, 0.3) for _ in tokens)}
    return RoutingTrace(tuple(tokens), tuple(layers), gates[gate], 0.8684, 256)


@st.composite
def traces(draw):
    alphabet = st.characters(exclude_categories=["Cs"])
    tokens = draw(st.lists(st.sampled_from(HOSTILE) | st.text(alphabet, max_size=6), min_size=1, max_size=12))
    menus = draw(st.lists(st.sampled_from(MENUS), min_size=1, max_size=6))
    gate = draw(st.sampled_from(["none", "one", "token"]))
    return make_trace(tokens, menus, gate, draw(st.integers(0, 99)))
