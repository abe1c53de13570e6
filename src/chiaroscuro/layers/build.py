"""A block from names: what a model, a test or a notebook makes its layers with."""

from collections.abc import Mapping, Sequence
from typing import Any

from chiaroscuro.errors import UserError
from chiaroscuro.layers.block import RoutedBlock
from chiaroscuro.layers.feed_forward import FEED_FORWARDS
from chiaroscuro.layers.operator import Operator, is_number, is_whole
from chiaroscuro.layers.registry import (
    Entry,
    build_kv_router,
    build_operator,
    build_router,
    check_kv_heads,
    hosts_of,
    split_entry,
)
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
            not given have their defaults, and names that no part of the block has are ignored.
        layer: the layer's number, for a router that draws by it.
        block: the class, `RoutedBlock` or a subclass.

    Raises:
        UserError: an unknown name or option, an impossible one, or a menu that is empty or names an operator twice.

    """
    fields = fields or {}
    if not is_whole(width) or width < 1:
        raise UserError(f"a width of {width!r}: must be a positive whole number")
    entries: dict[str, Entry] = {}
    for entry in menu:
        name, _ = split_entry(entry)
        if name in entries:
            raise UserError(f"menu {list(menu)}: names {name!r} twice")
        entries[name] = entry
    host = hosts_of(menu)
    built = {name: build_operator(width, entry, fields) for name, entry in entries.items() if host[name] == name}
    operators: dict[str, Operator] = {name: built[host[name]] for name in entries}
    kv_router = None
    if keeping := [operator for operator in built.values() if operator.keeps(operator.options)]:
        kv_router = build_kv_router(width, fields, layer)
        for operator in keeping:
            own = operator.key_heads(width, operator.options)
            check_kv_heads(fields.get("kv_router", "threshold"), getattr(kv_router.options, "heads", 1), own)
    router = None
    if len(operators) > 1:
        router = build_router(width, tuple(operators), fields.get("router", "threshold"), fields, layer)
    kind = fields.get("feed_forward", "gelu")
    if kind not in FEED_FORWARDS:
        raise UserError(f"feed_forward={kind!r}: choose one of {', '.join(FEED_FORWARDS)}")
    dropout = fields.get("hidden_dropout", 0.0)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"hidden_dropout={dropout!r}: must be a number from 0 to below 1")
    epsilon = fields.get("norm_epsilon")
    if epsilon is not None and not (is_number(epsilon) and epsilon > 0):
        raise UserError(f"norm_epsilon={epsilon!r}: must be a positive number")
    if not isinstance(fields.get("bias", True), bool):
        raise UserError(f"bias={fields['bias']!r}: must be true or false")
    kernel = fields.get("short_conv")
    hidden = fields.get("intermediate_size")
    if hidden is not None and not (is_whole(hidden) and hidden >= 1):
        raise UserError(f"intermediate_size={hidden!r}: must be a positive whole number")
    # Llama's has no biases, whatever its attention has.
    biased = {"bias": fields.get("bias", True)} if kind == "gelu" else {}
    return block(
        width,
        operators,
        router,
        FEED_FORWARDS[kind](width, hidden, dropout, **biased),
        kv_router=kv_router,
        norm=fields.get("norm", "pre"),
        norm_type=fields.get("norm_type", "layer"),
        norm_epsilon=epsilon,
        spectrum=fields.get("spectrum", "orthonormal"),
        dropout=dropout,
        execution=fields.get("execution") or "sparse",
        short_conv=None if kernel is None else NeighbourMixing(width, kernel=kernel),
    )
