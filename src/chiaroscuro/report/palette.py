"""The colours and signs of the operators, the same in every picture.

Chiaroscuro is painting by light and dark: the cheap operator stays in the shadow, attention is where the
light falls. The pigments are an old master's: bone black, lead-tin yellow, verdigris, vermilion, lapis
lazuli, madder. Each operator has a sign besides its colour, for readers who don't distinguish the colours, and for
pipes. How light an operator is follows from the cost that its class states; its name is not asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from chiaroscuro.analysis.routing import RoutingTrace
from chiaroscuro.layers.registry import OPERATORS


@dataclass(frozen=True)
class OperatorStyle:
    """How one operator looks."""

    ink: str
    """Colour on a light ground, at least 4.5 : 1 on `PAPER`."""
    glow: str
    """Colour on a dark ground, at least 4.5 : 1 on `NIGHT`."""
    brackets: tuple[str, str]
    """Around a token where there is no colour."""
    underline: str
    """CSS text-decoration-style beside the colour; empty for none."""
    area: str
    """Colour of an area, where there is nothing to read."""
    letter: str = ""
    """One letter, no two operators of a trace the same."""


PAPER, NIGHT = "#f8f3e9", "#13100d"
SHADOW, LIGHT = "#3a2a14", "#ffcb66"

_OTHERS = (
    OperatorStyle("#0b665c", "#5fc9b8", ("{", "}"), "dotted", "#0b665c"),
    OperatorStyle("#a32a20", "#ff8f7d", ("<", ">"), "dashed", "#a32a20"),
    OperatorStyle("#2b4c9b", "#8fb2ff", ("(", ")"), "double", "#2b4c9b"),
    OperatorStyle("#7a2f80", "#dd9be4", ("/", "/"), "wavy", "#7a2f80"),
)
_ENDS = (0, 2)  # of the scale that `Operator.cost` gives
_CHEAPEST = OperatorStyle("#5a5347", "#948a7a", ("", ""), "", "#5a5347")
_COSTLIEST = OperatorStyle("#8f5200", LIGHT, ("[", "]"), "solid", "#e59a1c")


def operator_styles(trace: RoutingTrace) -> dict[str, OperatorStyle]:
    """Choose a style for every operator in the trace."""
    return styles_of(name for layer in trace.layers for name in layer.operators)


def styles_of(operators: Iterable[str]) -> dict[str, OperatorStyle]:
    """Choose a style for every operator named: the cheapest first, the costliest last, the others as they appear.

    The cheapest is one that costs as little as dct, the costliest one that costs as much as attention.
    Of the others the first four differ in colour and sign. Beyond four, colours repeat; names and letters still differ.
    """
    names = list(dict.fromkeys(operators))
    costs = {name: OPERATORS[name].cost for name in names if name in OPERATORS}
    dark, light = (next((name for name, cost in costs.items() if cost == end), None) for end in _ENDS)
    others = [name for name in names if name not in (dark, light)]
    looks: dict[Any, OperatorStyle] = {dark: _CHEAPEST, light: _COSTLIEST}
    looks |= {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    letters: dict[str, str] = {}
    for name in filter(None, looks):
        letters[name] = next(c for c in f"{name.lower()}0123456789" if c.isalnum() and c not in letters.values())
    return {name: replace(looks[name], letter=letters[name]) for name in (dark, *others, light) if name is not None}


def costliest(trace: RoutingTrace) -> str:
    """Name the operators at the expensive end of the routed menus: what `RoutingTrace.depth` counts."""
    return " or ".join(dict.fromkeys(trace.layers[index].operators[-1] for index in trace.routed_layers))


def blend(dark: str, light: str, fraction: float) -> str:
    """Mix the colour that lies the fraction of the way from one hexadecimal colour to the other."""
    pairs = zip(bytes.fromhex(dark[1:]), bytes.fromhex(light[1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * fraction):02x}" for a, b in pairs)
