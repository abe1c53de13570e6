"""How many floating-point operations a model is, exactly, and under the protocols that others count by.

Counted is what a forward executes: every matrix product (2 operations a multiply-add) and every transform (a real FFT
of length d, 2.5 d log₂ d; up to `MATRIX_UP_TO` the product 2 d²). Norms, activations, softmax and entropies are not:
they cost time by the bytes that they move, not by their operations. The backward of a product is two products, that of
a transform, which has nothing to learn, one. What a kernel computes a second time to save memory is not counted, as is
the custom.
"""

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from chiaroscuro.errors import UserError
from chiaroscuro.layers import RBFMixing
from chiaroscuro.layers.feed_forward import FEED_FORWARDS
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.ops.spectral import FEW, MATRIX_UP_TO

TARGET = 0.35
"""The lower end of the 35–40% that the paper claims to save (v2)."""
WEIGHING = ("soft", "hard")
"""The routers that weigh every operator, by a projection of the token and its entropy."""
RANDOM_FEATURES: int = inspect.signature(RBFMixing).parameters["features"].default


@dataclass(frozen=True)
class FlopCount:
    """Operations by what they are spent on.

    Attributes:
        by_operator: operations by name: the operators, their parts, and what all layers share.

    """

    by_operator: dict[str, float]

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.by_operator.values())


def count_flops(
    config: ChiarConfig,
    length: int,
    *,
    share: float | None = None,
    training: bool = False,
    causal: bool = True,
    head: bool = True,
) -> FlopCount:
    """Operations of one sequence.

    Args:
        config: of the model; its `execution` and `attention_context` say what runs on which tokens.
        length: T.
        share: ρ, of tokens at the last operator of a menu of several, the others alike; the config's
            `attention_share` unless given. The exact number of pairs depends on where the routed tokens stand; this is
            its mean.
        training: forward and backward, not the forward alone.
        causal: whether a token attends to those before it alone, T (T + 1) / 2 pairs, as the kernels have it. False
            counts T² pairs, as kernels that compute and mask do.
        head: with the product that makes the logits. The config of a classifier, which makes them for no token, has
            none to count.

    Raises:
        UserError: a length below 1, a share outside 0 to 1, or an operator that is not counted here.

    """
    share = _checked(config, length, share)
    d, once = config.hidden_size, _transform(config.hidden_size)
    product, transform = (3, 2) if training else (1, 1)
    weighs = config.router in WEIGHING
    # The straight-through gradient of the hard router needs every operator's output.
    everywhere = config.execution == "dense" or (training and config.router == "hard")
    counted: dict[str, float] = {}
    for menu in config.menus:
        routes = len(menu) > 1
        if routes:
            _add(counted, "router", product * _projection(config, menu) * length)
            # The entropy's transform, which the filter takes over. Without a filter a threshold sends no gradient back.
            _add(counted, "router", (transform if weighs or "dct" in menu else 1) * once * length)
            if config.router == "permuted":
                _add(counted, "router", once * length)
        for k, name in enumerate(menu):
            n = length * (1.0 if everywhere else _part(menu, k, share))
            routed = routes and not everywhere and config.attention_context == "routed"
            keys = n if routed else length
            pairs = n * ((keys + 1) / 2 if causal else keys)
            if name == "dct":
                _add(counted, "dct", transform * once * n * (1 if routes else 2))
            elif name == "attention":
                _add(counted, "attention projections", product * 4 * d * d * (n + keys))
                _add(counted, "attention scores", product * 4 * d * pairs)
            elif name == "rbf":
                # Ω is fixed: of its product the backward is one product too.
                mapped = n if everywhere or routed or not routes else n + keys
                _add(counted, "rbf", transform * 2 * d * RANDOM_FEATURES * mapped)
                weighed = pairs if config.rbf_causal else n * keys
                _add(counted, "rbf", product * 4 * RANDOM_FEATURES * (d * n + 2 * weighed))
            else:
                raise UserError(
                    f"operator {name!r} has no count of operations: count a model of dct, rbf and attention"
                )
        _add(counted, "feed-forward", product * _feed_forward(config) * length)
    if config.meta_router != "none":
        _add(counted, "meta-router", product * 2 * d * (length if config.meta_router == "causal" else 1))
    if head and not (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        _add(counted, "head", product * 2 * d * config.vocab_size * length)
    return FlopCount(counted)


def count_decode_flops(config: ChiarConfig, length: int, *, share: float | None = None) -> FlopCount:
    """Operations of one token that is decoded alone, on a cache of `length` earlier ones; its mean over the routing.

    Args and errors as for `count_flops`.
    """
    share = _checked(config, length, share)
    d = config.hidden_size
    once = 2 * d * d if d * d <= FEW else _transform(d)
    counted: dict[str, float] = {}
    for menu in config.menus:
        routes, dense = len(menu) > 1, config.execution == "dense"
        if routes:
            _add(counted, "router", _projection(config, menu) + once * (2 if config.router == "permuted" else 1))
        for k, name in enumerate(menu):
            part = 1.0 if dense else _part(menu, k, share)
            kept = part if routes and config.attention_context == "routed" else 1.0
            if name == "dct":
                _add(counted, "dct", once * part * (1 if routes else 2))
            elif name == "attention":
                _add(counted, "attention projections", 4 * d * d * (part + kept))
                _add(counted, "attention scores", 4 * d * part * (kept * length + 1))
            else:
                raise UserError(f"operator {name!r} keeps no cache, so no token of it is decoded alone")
        _add(counted, "feed-forward", _feed_forward(config))
    if config.meta_router != "none":
        _add(counted, "meta-router", 2 * d)
    _add(counted, "head", 2 * d * config.vocab_size)
    return FlopCount(counted)


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
    share = _checked(config, length, share)
    d = config.hidden_size
    parts = sum(1.0 if len(menu) == 1 else share for menu in config.menus if "attention" in menu)
    return FlopCount({"attention": parts * length * (4 * d * d + 2 * length * d)})


def full_attention(config: ChiarConfig) -> ChiarConfig:
    """The baseline of a model: attention alone in every layer, and no MetaRouter. To be counted, not to be built."""
    baseline = copy.deepcopy(config)
    baseline.operators = [["attention"]] * len(config.menus)
    baseline.meta_router = "none"
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
    attention = sum(number for name, number in counted.by_operator.items() if name.startswith("attention"))
    layers = counted.total - counted.by_operator.get("head", 0.0)
    return {"of_a_layer": attention / layers, "of_the_model": attention / counted.total}


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
    return next((n / 1000 for n in range(1000, -1, -1) if saving(config, length, n / 1000) >= target), None)


def _compared(ours: float, baseline: float) -> dict[str, float]:
    return {"flops": ours, "baseline": baseline, "ratio": baseline / ours, "saving": 1 - ours / baseline}


def _checked(config: ChiarConfig, length: int, share: float | None) -> float:
    _check_length(length)
    if share is None:
        share = config.attention_share
    if not 0 <= share <= 1:
        raise UserError(f"share {share}: need a share of the tokens, from 0 to 1")
    return share


def _check_length(length: int) -> None:
    if length < 1:
        raise UserError(f"length {length}: need 1 token or more")


def _transform(width: int) -> float:
    return 2 * width**2 if width <= MATRIX_UP_TO else 2.5 * width * math.log2(width)


def _projection(config: ChiarConfig, menu: Sequence[str]) -> float:
    """What the router's own matrix costs a token, where it has one."""
    if config.router in WEIGHING:
        return 2 * (config.hidden_size + 1) * len(menu)
    return 2 * config.hidden_size if config.router == "learned" else 0


def _part(menu: Sequence[str], k: int, share: float) -> float:
    """The part of the tokens that a menu's k-th operator gets: ρ for the last, the others alike."""
    if len(menu) == 1:
        return 1.0
    return share if k == len(menu) - 1 else (1 - share) / (len(menu) - 1)


def _feed_forward(config: ChiarConfig) -> int:
    """Of one token."""
    layer = FEED_FORWARDS[config.feed_forward]
    hidden = config.intermediate_size or layer.default_hidden(config.hidden_size)
    return 2 * layer.matrices * config.hidden_size * hidden


def _add(counted: dict[str, float], name: str, number: float) -> None:
    counted[name] = counted.get(name, 0.0) + number
