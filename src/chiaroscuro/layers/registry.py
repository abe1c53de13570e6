"""Names for operators and routers, and how they are built from a menu's entries and a model's fields."""

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import nn

from chiaroscuro.errors import UserError, suggest
from chiaroscuro.layers.fitted_router import FittedRouter
from chiaroscuro.layers.learned_router import LearnedRouter
from chiaroscuro.layers.local_attention import LocalAttention
from chiaroscuro.layers.norm_router import NormRouter
from chiaroscuro.layers.operator import Operator, hosts, is_number, with_defaults
from chiaroscuro.layers.permuted_router import PermutedRouter
from chiaroscuro.layers.random_router import RandomRouter
from chiaroscuro.layers.rbf_mixing import RBFMixing
from chiaroscuro.layers.router import KEY_SIDE, Router, ScoreRouter, ThresholdRouter
from chiaroscuro.layers.self_attention import SelfAttention
from chiaroscuro.layers.short_convolution import ShortConvolution
from chiaroscuro.layers.soft_router import HardRouter, SoftRouter
from chiaroscuro.layers.spectral_mixing import SpectralMixing
from chiaroscuro.layers.thresholds import refuse_impossible_share

OPERATORS: dict[str, type[Operator]] = {
    "dct": SpectralMixing,
    "conv": ShortConvolution,
    "rbf": RBFMixing,
    "local": LocalAttention,
    "attention": SelfAttention,
}
ROUTERS: dict[str, type[Router]] = {
    "threshold": ThresholdRouter,
    "random": RandomRouter,
    "permuted": PermutedRouter,
    "norm": NormRouter,
    "learned": LearnedRouter,
    "fitted": FittedRouter,
    "soft": SoftRouter,
    "hard": HardRouter,
}

Entry = str | Mapping[str, Mapping[str, Any] | None]
"""An entry of a menu, or a router: a name, or a mapping from the name to options, `{"attention": {"bias": False}}`."""


def register_operator(name: str, cls: type[Operator]) -> None:
    """Make an operator of yours available to menus under `name`.

    Args:
        name: what `ChiarConfig.operators` will call it; not a name that is taken.
        cls: a subclass of `Operator`.

    Raises:
        UserError: the name is taken or can't be one; cls is no `Operator` or has no `mix`; its `Options` are no
            dataclass, or its `cost` is no finite number.

    """
    _check_class(Operator, name, cls)
    cost = cls.cost
    if cost is not None and not (is_number(cost) and math.isfinite(cost)):
        raise UserError(f"operator {name!r}: {cls.__name__}.cost={cost!r}: give a finite number, or None")
    _register(OPERATORS, name, cls)


def register_router(name: str, cls: type[Router]) -> None:
    """Make a router of yours available as `ChiarConfig(router=name)`.

    Args:
        name: not a name that is taken.
        cls: a subclass of `Router`, or of `ScoreRouter`, which brings thresholds and calibration.

    Raises:
        UserError: the name is taken or can't be one; cls is no `Router`, or has no `forward` or `score`; its `Options`
            are no dataclass.

    """
    _check_class(Router, name, cls)
    _register(ROUTERS, name, cls)


def find_operator(name: str) -> type[Operator]:
    """The operator class of that name, or a UserError that lists the names."""
    return _find(OPERATORS, "operator", name)


def find_router(name: str) -> type[Router]:
    """The router class of that name, or a UserError that lists the names."""
    return _find(ROUTERS, "router", name)


def split_entry(entry: Any) -> tuple[str, dict[str, Any]]:
    """The name and the options of an entry.

    Raises:
        UserError: it is neither a name nor a mapping from one name to options, or these can't be saved as JSON.

    """
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, _as_json(entry, options) if options else {}
    raise UserError(f"{entry!r}: give a name, or a mapping from one name to its options, {{name: {{option: value}}}}")


def _as_json(entry: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if `config.json` can hold them."""
    try:
        json.dumps(dict(options))
    except (TypeError, ValueError) as error:
        raise UserError(f"{entry!r}: {error}; give numbers, strings, lists and mappings, to be saved as JSON") from None
    return dict(options)


def hosts_of(menu: Sequence[Entry]) -> dict[str, str]:
    """`hosts` of a menu's operators.

    Raises:
        UserError: an unknown name, or options for an operator that has no module of its own on this menu.

    """
    given = dict(map(split_entry, menu))
    found = hosts({name: find_operator(name) for name in given})
    for name, options in given.items():
        if found[name] != name and options:
            raise UserError(f"{name!r} is one module with {found[name]!r} here: give the options to {found[name]!r}")
    return found


def build_operator(width: int, entry: Entry, model: Mapping[str, Any] | None = None) -> Operator:
    """The operator that an entry of a menu names.

    Args:
        width: d.
        entry: its name, or its name and options.
        model: fields of a model; those that bear the name of an option that the entry leaves out give its value.

    Raises:
        UserError: an unknown name or option, or options that are impossible for this width.

    """
    name, options = split_entry(entry)
    cls = find_operator(name)
    return cls(width, **with_defaults(cls, options, model or {}))


def build_router(
    width: int, operators: tuple[str, ...], entry: Entry, model: Mapping[str, Any] | None = None, layer: int = 0
) -> Router:
    """The router that `entry` names, for a menu of these operators; arguments and errors as for `build_operator`."""
    name, options = split_entry(entry)
    cls = find_router(name)
    return cls(width, operators, layer, **with_defaults(cls, options, model or {}))


def refuse_model_s_options(field: str, entry: Any) -> None:
    """Raise a UserError if a router's entry sets what is a field of the model: dials and calibrations change that.

    Args:
        field: of the model, `"router"` or `"kv_router"`.
        entry: what stands there.

    """
    share = "attention_share" if field == "router" else "kv_share"
    instead = {"attention_share": share, "thresholds": "entropy_thresholds", "spectrum": "spectrum"}
    for name in split_entry(entry)[1]:
        if name in instead:
            raise UserError(f"{field}={entry!r}: {name} is a field of the model: set {instead[name]} there")


def build_kv_router(width: int, model: Mapping[str, Any], layer: int = 0) -> ScoreRouter:
    """The router of the key side that a model's fields describe: which tokens are kept, to be seen from far.

    It is that of the field `kv_router`, whose share is the field `kv_share`; arguments and errors as for
    `build_operator`.
    """
    router = build_router(width, KEY_SIDE, model.get("kv_router", "threshold"), key_side(model), layer)
    if not isinstance(router, ScoreRouter):
        raise UserError(f"kv_router={model.get('kv_router')!r}: the key side needs a router by a score")
    return router


def with_history(entry: Entry, history: int | None) -> Entry:
    """A router's entry with another history; None for thresholds that stand still."""
    name, options = split_entry(entry)
    options = {option: value for option, value in options.items() if option != "history"}
    if history is not None:
        options["history"] = history
    return {name: options} if options else name


def check_kv_heads(entry: Entry, heads: int, own: int) -> None:
    """Refuse a router of the key side that scores another number of heads than the operator's keys have."""
    if heads not in (1, own):
        raise UserError(f"kv_router={entry!r}: heads={heads} is neither 1 nor the number of key-value heads, {own}")


def key_side(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model as a router of the key side reads them."""
    share = {}
    if "kv_share" in model:
        refuse_impossible_share("kv_share", model["kv_share"])
        share = {"attention_share": model["kv_share"]}
    return {**model, "thresholds": None, **share}


def _check_class(base: type[nn.Module], name: Any, cls: Any) -> None:
    """Refuse a name that can't be one, and a class that is no such part or lacks what the others can't do without."""
    kind = base.__name__.lower()
    # A block keeps its operators in a ModuleDict, whose own attributes and dotted paths can't be keys.
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise UserError(
            f"{kind} name {name!r}: give letters, digits, - and _, which together are no attribute of ModuleDict"
        )
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise UserError(f"{kind} {name!r}: {cls!r} is not a subclass of chiaroscuro.layers.{base.__name__}")
    for parent, method in ((Operator, "mix"), (Router, "forward"), (ScoreRouter, "score")):
        inherited = issubclass(cls, parent) and getattr(cls, method) is getattr(parent, method)
        if inherited and not (parent is ScoreRouter and cls.forward is not ScoreRouter.forward):
            raise UserError(f"{kind} {name!r}: {cls.__name__} has no {method}() of its own: write it")
    options = getattr(cls, "Options", None)
    if not (inspect.isclass(options) and is_dataclass(options)):
        raise UserError(f"{kind} {name!r}: {cls.__name__}.Options is no dataclass: make it one")


def _register(registry: dict[str, Any], name: str, cls: Any) -> None:
    if registry.get(name, cls) is not cls:
        kind = "operator" if registry is OPERATORS else "router"
        raise UserError(f"{kind} {name!r} is taken by {registry[name].__qualname__}: choose another name")
    registry[name] = cls


def _find(registry: dict[str, Any], kind: str, name: str) -> Any:
    if name not in registry:
        raise UserError(
            f"unknown {kind} {name!r}: {suggest(name, registry)}; one of yours has to be registered first (on the "
            "command line: --import MODULE)"
        )
    return registry[name]
