"""Names for operators and routers, and the one rule by which they are built and called.

A class is found by its name and given, by name, exactly those of the offered arguments that it asks for. So an
operator that needs only the tokens is `forward(self, x)`, and one that needs the padding too adds
`attention_mask` to its signature; neither has to know what others ask for.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers.learned_router import LearnedRouter
from chiaroscuro.layers.permuted_router import PermutedRouter
from chiaroscuro.layers.random_router import RandomRouter
from chiaroscuro.layers.rbf_mixing import RBFMixing
from chiaroscuro.layers.router import HardRouter, SoftRouter, ThresholdRouter
from chiaroscuro.layers.self_attention import SelfAttention
from chiaroscuro.layers.spectral_mixing import SpectralMixing

OPERATORS: dict[str, type[nn.Module]] = {"dct": SpectralMixing, "rbf": RBFMixing, "attention": SelfAttention}
ROUTERS: dict[str, type[nn.Module]] = {
    "threshold": ThresholdRouter,
    "random": RandomRouter,
    "permuted": PermutedRouter,
    "learned": LearnedRouter,
    "soft": SoftRouter,
    "hard": HardRouter,
}


def register_operator(name: str, cls: type[nn.Module]) -> None:
    """Make an operator of yours available to menus under `name`.

    Args:
        name: what `ChiarConfig.operators` will call it; not one that is taken.
        cls: a `torch.nn.Module`. Its constructor may ask by name for any of `width`, `heads`, `dropout` (of the
            attention probabilities), `rope_theta`, `attention_context` and `causal` (the config's `rbf_causal`). Its
            `forward(x, …)` takes tokens (B, T, d), may ask by name for `coefficients` (the DCT of x) and
            `attention_mask` (true for real tokens), and, with defaults, as they come only where the caller has them,
            for `position_ids`, `input_ids`, `mask` (causal and padding, (B, 1, T, S)), `rotary`, `cache`,
            `implementation` and `routed` (the tokens that it was chosen for); it returns (B, T, d). Two class
            attributes are read: `cost` (a number; a menu lists its operators by rising cost: dct 0, rbf 1, attention 2;
            without it the operator may stand anywhere) and `cacheable` (True where a token's output needs nothing of
            earlier tokens but what `cache` keeps; False, the default, switches `use_cache` off).
            Sparse execution runs an operator on its own tokens where it has a method `sparse_forward(x, tokens, …)`,
            which takes all tokens and the `PackedTokens` among them, asks for the same context by name, and returns
            theirs, (N, d). An operator without one runs on every token, and those that it was chosen for take its
            output: nothing is saved.

    Raises:
        UserError: the name is taken or can't be one, or cls is no `nn.Module`.

    """
    _register(OPERATORS, "operator", name, cls)


def register_router(name: str, cls: type[nn.Module]) -> None:
    """Make a router of yours available as `ChiarConfig(router=name)`.

    Args:
        name: not one that is taken.
        cls: a `torch.nn.Module`. Its constructor may ask by name for any of `width`, `operators` (the menu's names),
            `attention_share`, `thresholds` (fixed ones, or None), `spectrum`, `layer` (its number) and `router_seed`.
            Its `forward(x, entropy)` takes the operator's input (B, T, d) and H (B, T), and returns either the
            operator's index for every token, (B, T) integers, or a weight for every operator, (B, T, K). A subclass of
            `ScoreRouter` need only say its `score(x, entropy)`, and is calibrated like the built-in ones; its score may
            ask by name for `position_ids` and `input_ids`, its `scale(score)` multiplies the last operator's output,
            and `null_quantiles` says where an uncalibrated layer stands if that is not H's null. A class attribute
            `one_operator_a_token = False` says that it gives weights in inference too: then execution is dense, the
            default, and sparse execution is refused.

    Raises:
        UserError: the name is taken or can't be one, or cls is no `nn.Module`.

    """
    _register(ROUTERS, "router", name, cls)


def find_operator(name: str) -> type[nn.Module]:
    """The operator class of that name, or a UserError that lists the names."""
    return _find(OPERATORS, "operator", name)


def find_router(name: str) -> type[nn.Module]:
    """The router class of that name, or a UserError that lists the names."""
    return _find(ROUTERS, "router", name)


def asked_names(function: Callable[..., Any]) -> frozenset[str]:
    """The arguments that a function names in its signature."""
    return frozenset(inspect.signature(function).parameters)


def accepted(cls: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that a constructor asks for."""
    asked = asked_names(cls)
    return {name: value for name, value in offered.items() if name in asked}


def _register(registry: dict[str, type[nn.Module]], kind: str, name: str, cls: type[nn.Module]) -> None:
    # A block keeps its operators in a ModuleDict, whose own attributes and dotted paths are no keys.
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise UserError(f"{kind} name {name!r}: give a string without dots that is no attribute of ModuleDict")
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise UserError(f"{kind} {name!r}: {cls!r} is not a subclass of torch.nn.Module")
    if registry.get(name, cls) is not cls:
        raise UserError(f"{kind} {name!r} is taken by {registry[name].__qualname__}: choose another name")
    registry[name] = cls


def _find(registry: dict[str, type[nn.Module]], kind: str, name: str) -> type[nn.Module]:
    if name not in registry:
        close = get_close_matches(str(name), registry, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown {kind} {name!r}: {hint}known are {', '.join(sorted(registry))}")
    return registry[name]
