"""How many floating-point operations a model is, exactly, and under the protocols that others count by.

Counted is what a forward executes: every matrix product and short convolution (2 operations a multiply-add) and every
transform (a real FFT of length d, 2.5 d log₂ d; up to `MATRIX_UP_TO` the product 2 d²). Norms, activations, softmax and
entropies are not: they cost time by the bytes that they move, not by their operations. The backward of a product is two
products, that of a transform, which has nothing to learn, one. What a kernel computes a second time to save memory is
not counted, as is the custom.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import LlamaConfig

from chiaroscuro.errors import UserError
from chiaroscuro.layers import Count, NeighbourMixing, Operator, Work
from chiaroscuro.layers.feed_forward import FEED_FORWARDS
from chiaroscuro.layers.operator import hosts, is_number, make_options
from chiaroscuro.layers.spectral_mixing import transform_operations
from chiaroscuro.layers.thresholds import refuse_impossible_share
from chiaroscuro.model.config import ChiarConfig

TARGET = 0.35
"""The lower end of the 35–40% that the paper claims to save (v2)."""


@dataclass(frozen=True)
class FlopCount:
    """Operations by what they are spent on.

    Attributes:
        by_operator: operations by name: the operators, their parts, and what all layers share.
        of_operators: the part of them that operators do, without routers, short convolutions, feed-forward, MetaRouter
            and head.
        numbers_kept: numbers that the caches of operators and short convolutions hold afterwards, for one sequence.
        published: multiply-adds by the formula of the author's code.

    """

    by_operator: dict[str, float]
    of_operators: float = 0.0
    numbers_kept: float = 0.0
    published: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.by_operator.values())


def count_flops(
    config: ChiarConfig,
    length: int,
    *,
    share: float | None = None,
    kv_share: float | None = None,
    training: bool = False,
    causal: bool = True,
    head: bool = True,
) -> FlopCount:
    """Operations of one sequence.

    Args:
        config: of the model; its `execution` and `attention_context` say what runs on which tokens.
        length: T.
        share: ρ, of tokens at the last operator of a menu of several, the others alike; the config's
            `attention_share` unless given. Where the config spreads it over the layers, it is their mean. The exact
            number of pairs depends on where the routed tokens stand; this is its mean.
        kv_share: of tokens that are kept, where that is decided, likewise; the config's unless given.
        training: forward and backward, not the forward alone.
        causal: whether a token attends to those before it alone, T (T + 1) / 2 pairs, as the kernels have it. False
            counts T² pairs, as kernels that compute and mask do. What a window leaves out is not computed by any.
        head: with the product that makes the logits. The config of a classifier, which makes them for no token, has
            none to count.

    Raises:
        UserError: a length below 1, a share outside 0 to 1, or an operator that is not counted here.

    """
    share = _checked(config, length, share)
    head = head and not (config.architectures or [""])[0].endswith("ForSequenceClassification")
    kept = _checked(config, length, kv_share, "kv_share")
    return _count(config, Work(length, length, training=training, causal=causal), share, kept, head)


def count_decode_flops(
    config: ChiarConfig, length: int, *, share: float | None = None, kv_share: float | None = None, rows: int = 1
) -> FlopCount:
    """Operations of one token that is decoded alone, on a cache of `length` earlier ones; its mean over the routing.

    Args:
        config: of the model.
        length: of the cache.
        share: as for `count_flops`.
        kv_share: likewise.
        rows: how many sequences are decoded at once. The count is of one of them, but the transforms of many tokens
            take fewer operations each.

    Raises:
        UserError: as `count_flops`.

    """
    kept = _checked(config, length, kv_share, "kv_share")
    return _count(config, Work(1, 1, past=length, rows=rows), _checked(config, length, share), kept, head=True)


def _count(config: ChiarConfig, work: Work, share: float, kv_share: float, head: bool) -> FlopCount:
    """Operations of the work on one sequence at these mean shares, summed over layers and operators."""
    d, length = config.hidden_size, work.length
    router = config.router_class
    once = transform_operations(d, length * work.rows)
    dense = config.execution == "dense" or (work.training and router.trains_densely)
    counted: dict[str, float] = {}
    counts: list[Count] = []
    kept = 0.0
    shares = {} if config.attention_spread is None else config.layer_shares("attention_share", share)
    kv_shares = {} if config.kv_spread is None else config.layer_shares("kv_share", kv_share)
    for i, (names, menu) in enumerate(zip(config.menus, config.entries, strict=True)):
        if config.short_conv is not None:
            options = make_options(NeighbourMixing, {"kernel": config.short_conv})
            convolved = NeighbourMixing.count(d, options, work)
            _add(counted, "short convolution", sum(convolved.operations.values()))
            kept += convolved.numbers_kept
        routes = len(menu) > 1
        host = hosts({name: operator for name, (operator, _) in zip(names, menu, strict=True)})
        keeps = any(
            operator.keeps(options) for name, (operator, options) in zip(names, menu, strict=True) if host[name] == name
        )
        asked = [config.router_class] * routes + [config.kv_router_class] * keeps
        if routes:
            own_products = router.count(d, len(menu), config.router_options, work)
            _add(counted, "router", _number(router, own_products) * length)
        if len(asked) > routes:
            own_products = config.kv_router_class.count(d, 2, config.kv_router_options, work)
            _add(counted, "router", _number(config.kv_router_class, own_products) * length)
        spectrum = any(each.reads_entropy for each in asked)
        if spectrum:
            # The entropy's transform, which a filter takes over. A choice by thresholds alone sends no gradient back.
            learns = router.differentiates_entropy or any(operator.reads_spectrum for operator, _ in menu)
            _add(counted, "router", (work.transform if learns else 1) * once * length)
        for k, (operator, options) in enumerate(menu):
            if host[names[k]] != names[k]:
                continue
            parts = [
                _part(len(menu), j, shares.get(i, share)) for j, name in enumerate(names) if host[name] == names[k]
            ]
            tokens, last = length if dense else length * sum(parts), length * parts[-1]
            own = replace(
                work,
                tokens=tokens,
                kept=kv_shares.get(i, kv_share),
                routed=routes and not dense,
                dense=routes and dense,
                spectrum_at_hand=spectrum,
                last=last if len(parts) > 1 or (routes and dense) else None,
            )
            counts.append(_whole(operator, operator.count(d, options, own)))
            for name, number in counts[-1].operations.items():
                _add(counted, name, number)
        _add(counted, "feed-forward", work.product * _feed_forward(config) * length)
    if config.meta_router != "none":
        _add(counted, "meta-router", work.product * 2 * d * (length if config.meta_router == "causal" else 1))
    if head:
        _add(counted, "head", work.product * 2 * d * config.vocab_size * length)
    return FlopCount(
        counted,
        of_operators=sum(sum(count.operations.values()) for count in counts),
        numbers_kept=kept + sum(count.numbers_kept for count in counts),
        published=sum(count.published for count in counts),
    )


def count_llama_flops(
    config: LlamaConfig, length: int, *, training: bool = False, causal: bool = True, head: bool = True
) -> FlopCount:
    """Operations of one sequence of a Llama, counted alike: what ours is compared with.

    Raises:
        UserError: a length below 1.

    """
    _check_length(length)
    d, layers = config.hidden_size, config.num_hidden_layers
    head_width = config.head_dim or d // config.num_attention_heads
    attended = config.num_attention_heads * head_width
    keyed = (config.num_key_value_heads or config.num_attention_heads) * head_width
    pairs = length * ((length + 1) / 2 if causal else length)
    counted = {
        "attention projections": layers * 4 * d * (attended + keyed) * length,
        "attention scores": layers * 4 * attended * pairs,
        "feed-forward": layers * 6 * d * config.intermediate_size * length,
    }
    if head:
        counted["head"] = 2 * d * config.vocab_size * length
    return FlopCount({name: (3 if training else 1) * number for name, number in counted.items()})


def count_published_flops(config: ChiarConfig, length: int, *, share: float | None = None) -> FlopCount:
    """The count in the author's code: multiply-adds of attention alone, Σ_layers part · T (3d² + T d + T d + d²).

    `part` is 1 for a layer of attention, ρ where attention is one of several, 0 elsewhere. It takes every pair of
    tokens, and keys and values only of the tokens that are routed; feed-forward, head and transforms cost nothing.

    Source: the author's code; the paper, the tables' column of FLOPs.
    """
    routed = copy.deepcopy(config)
    routed.execution = "sparse"  # the formula takes the share of the tokens, whatever is executed
    counted = _count(routed, Work(length, length), _checked(config, length, share), config.kv_share, head=False)
    return FlopCount({"attention": counted.published})


def full_attention(config: ChiarConfig) -> ChiarConfig:
    """The baseline of a model: attention alone in every layer, and no MetaRouter. To be counted, not to be built."""
    baseline = copy.deepcopy(config)
    baseline.operators = [["attention"]] * len(config.menus)
    baseline.meta_router = "none"
    baseline.window, baseline.sinks, baseline.attention_context = None, 0, "all"
    baseline.attention_spread = baseline.kv_spread = None
    return baseline


def compare_protocols(config: ChiarConfig, length: int, share: float | None = None) -> dict[str, dict[str, Any]]:
    """A model against full attention under every protocol, forward and in training.

    `exact` counts what is executed, `no-head` leaves out the product that makes the logits, and `paper` is
    `count_published_flops`; it counts a forward, of which a training step is three.

    Returns:
        By protocol and step: operations of one sequence, those of the baseline, their ratio, and the part that is
        saved.

    """
    baseline = full_attention(config)
    compared: dict[str, dict[str, Any]] = {}
    for protocol, head in (("exact", True), ("no-head", False)):
        compared[protocol] = {}
        for step, training in (("forward", False), ("training", True)):
            ours, theirs = (
                count_flops(c, length, share=share, training=training, head=head).total for c in (config, baseline)
            )
            compared[protocol][step] = _compared(ours, theirs)
    ours, theirs = (count_published_flops(c, length, share=share).total for c in (config, baseline))
    compared["paper"] = {"forward": _compared(ours, theirs), "training": _compared(3 * ours, 3 * theirs)}
    return compared


def saving(config: ChiarConfig, length: int, share: float | None = None) -> float:
    """The part of full attention's operations that a training step saves, `exact`ly; negative where it costs more."""
    counts = (count_flops(c, length, share=share, training=True).total for c in (config, full_attention(config)))
    return _compared(*counts)["saving"]


def attention_part(config: ChiarConfig, length: int) -> dict[str, float]:
    """What part of full attention's layer, and of its whole model, is attention: more than that nobody can save."""
    counted = count_flops(full_attention(config), length)
    layers = sum(number for name, number in counted.by_operator.items() if name != "head")
    return {"of_a_layer": counted.of_operators / layers, "of_the_model": counted.of_operators / counted.total}


def shortest_length(config: ChiarConfig, share: float | None = None, target: float = TARGET) -> int | None:
    """The shortest T from which a training step saves `target` at this share; None where none does."""
    longest = 2**24
    if saving(config, longest, share) < target:
        return None
    low, high = 0, longest  # the scores' part of the baseline only grows with T
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saving(config, middle, share) >= target else (middle, high)
    return high


def largest_share(config: ChiarConfig, length: int, target: float = TARGET) -> float | None:
    """The largest ρ, to a thousandth, at which a training step saves `target` at this length; None where none does."""
    low, high = -1, 1000  # in thousandths; the saving only falls with the share
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if saving(config, length, middle / 1000) >= target else (low, middle - 1)
    return None if low < 0 else low / 1000


def _compared(ours: float, baseline: float) -> dict[str, Any]:
    """The ratio is None where the protocol counts nothing, as the author's does of a model without attention."""
    ratio = baseline / ours if ours else None
    return {"flops": ours, "baseline": baseline, "ratio": ratio, "saving": 1 - ours / baseline}


def _checked(config: ChiarConfig, length: int, share: float | None, field: str = "attention_share") -> float:
    _check_length(length)
    if share is None:
        share = getattr(config, field)
    refuse_impossible_share(field, share)
    return share


def _check_length(length: int) -> None:
    if length < 1:
        raise UserError(f"length {length}: need 1 token or more")


def _part(operators: int, k: int, share: float) -> float:
    """The part of the tokens that the k-th of a menu's operators gets: ρ for the last, the others alike."""
    if operators == 1:
        return 1.0
    return share if k == operators - 1 else (1 - share) / (operators - 1)


def _feed_forward(config: ChiarConfig) -> int:
    """Of one token."""
    layer = FEED_FORWARDS[config.feed_forward]
    hidden = config.intermediate_size or layer.default_hidden(config.hidden_size)
    return 2 * layer.matrices * config.hidden_size * hidden


def _whole(operator: type[Operator], count: Any) -> Count:
    """An operator's count, which may be of somebody else's writing."""
    if not isinstance(count, Count):
        raise UserError(f"{operator.__name__}.count() gave {count!r}: give a Count")
    for number in (*count.operations.values(), count.numbers_kept, count.published):
        _number(operator, number)
    return count


def _number(counted: type, number: Any) -> int | float:
    if not (is_number(number) and math.isfinite(number)):
        raise UserError(f"{counted.__name__}.count() gave {number!r}: count with finite numbers")
    return cast(int | float, number)


def _add(counted: dict[str, float], name: str, number: float) -> None:
    counted[name] = counted.get(name, 0.0) + number
