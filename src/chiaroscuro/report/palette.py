"""The colours and signs of the operators, the same in every picture.

Chiaroscuro is painting by light and dark: the cheap operator stays in the shadow, attention is where the
light falls. The pigments are an old master's: bone black, lead-tin yellow, verdigris, vermilion, lapis
lazuli, madder. Each operator has a sign besides its colour, for readers who don't distinguish the colours, and for
pipes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from chiaroscuro.analysis.routing import RoutingTrace


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
    letter: str = ""
    """One letter, no two operators of a trace the same."""


PAPER, NIGHT = "#f8f3e9", "#13100d"
SHADOW, LIGHT = "#3a2a14", "#ffcb66"

_DCT = OperatorStyle("#5a5347", "#948a7a", ("", ""), "")
_ATTENTION = OperatorStyle("#8f5200", LIGHT, ("[", "]"), "solid")
_OTHERS = (
    OperatorStyle("#0b665c", "#5fc9b8", ("{", "}"), "dotted"),
    OperatorStyle("#a32a20", "#ff8f7d", ("<", ">"), "dashed"),
    OperatorStyle("#2b4c9b", "#8fb2ff", ("(", ")"), "double"),
    OperatorStyle("#7a2f80", "#dd9be4", ("/", "/"), "wavy"),
)


def operator_styles(trace: RoutingTrace) -> dict[str, OperatorStyle]:
    """Choose a style for every operator in the trace."""
    return styles_of(name for layer in trace.layers for name in layer.operators)


def styles_of(operators: Iterable[str]) -> dict[str, OperatorStyle]:
    """Choose a style for every operator named: dct first, attention last, the others as they appear.

    Of the others the first four differ in colour and sign. Beyond four, colours repeat; names and letters still differ.
    """
    names = dict.fromkeys(operators)
    others = [name for name in names if name not in ("dct", "attention")]
    plain = (
        {"dct": _DCT} | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)} | {"attention": _ATTENTION}
    )
    letters: dict[str, str] = {}
    for name in ["dct", "attention", *others]:
        letters[name] = next(c for c in f"{name.lower()}0123456789" if c.isalnum() and c not in letters.values())
    return {name: replace(look, letter=letters[name]) for name, look in plain.items() if name in names}


def costliest(trace: RoutingTrace) -> str:
    """Name the operators at the expensive end of the routed menus: what `RoutingTrace.depth` counts."""
    return " or ".join(dict.fromkeys(trace.layers[index].operators[-1] for index in trace.routed_layers))


def blend(dark: str, light: str, fraction: float) -> str:
    """Mix the colour that lies the fraction of the way from one hexadecimal colour to the other."""
    pairs = zip(bytes.fromhex(dark[1:]), bytes.fromhex(light[1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * fraction):02x}" for a, b in pairs)
