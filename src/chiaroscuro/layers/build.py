"""A block from names: what a model, a test or a notebook makes its layers with."""

from collections.abc import Mapping, Sequence
from typing import Any

from chiaroscuro.errors import UserError
from chiaroscuro.layers.block import RoutedBlock
from chiaroscuro.layers.feed_forward import FEED_FORWARDS
from chiaroscuro.layers.operator import Operator
from chiaroscuro.layers.registry import Entry, build_operator, build_router, split_entry
from chiaroscuro.layers.short_convolution import NeighbourMixing


def build_block(
    width: int,
    menu: Sequence[Entry],
    fields: Mapping[str, Any] | None = None,
    layer: int = 0,
    block: type[RoutedBlock] = RoutedBlock,
) -> RoutedBlock:
    """The block that a menu and the fields of a model describe.

    Args:
        width: d, the features of a token.
        menu: operators in order of cost: names, or names with options.
        fields: of a model, by the names that `ChiarConfig` gives them: `router`, `norm`, `feed_forward`, `execution`,
            `hidden_dropout`, `short_conv`, … and options of operators and routers, such as `num_attention_heads`. Those
            not given have their defaults.
        layer: the layer's number, for a router that draws by it.
        block: the class, `RoutedBlock` or a subclass.

    Raises:
        UserError: an unknown name or option, an impossible one, or a menu that is empty or names an operator twice.

    """
    fields = fields or {}
    operators: dict[str, Operator] = {}
    for entry in menu:
        name, _ = split_entry(entry)
        if name in operators:
            raise UserError(f"menu {list(menu)}: names {name!r} twice")
        operators[name] = build_operator(width, entry, fields)
    router = None
    if len(operators) > 1:
        router = build_router(width, tuple(operators), fields.get("router", "threshold"), fields, layer)
    kind = fields.get("feed_forward", "gelu")
    if kind not in FEED_FORWARDS:
        raise UserError(f"feed_forward={kind!r}: choose one of {', '.join(FEED_FORWARDS)}")
    dropout = fields.get("hidden_dropout", 0.0)
    kernel = fields.get("short_conv")
    hidden = fields.get("intermediate_size")
    # Llama's has no biases, whatever its attention has.
    biased = {"bias": fields.get("bias", True)} if kind == "gelu" else {}
    return block(
        width,
        operators,
        router,
        FEED_FORWARDS[kind](width, hidden, dropout, **biased),
        norm=fields.get("norm", "pre"),
        norm_type=fields.get("norm_type", "layer"),
        norm_epsilon=fields.get("norm_epsilon"),
        spectrum=fields.get("spectrum", "orthonormal"),
        dropout=dropout,
        execution=fields.get("execution") or "sparse",
        short_conv=None if kernel is None else NeighbourMixing(width, kernel=kernel),
    )
