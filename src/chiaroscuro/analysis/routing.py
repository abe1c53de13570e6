"""Where a model spends attention on one text: the operator and the entropy of every token in every layer.

A `RoutingTrace` holds plain numbers and strings, so it can be drawn (`chiaroscuro.report`) without a model, and a test
can write one by hand.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiaroscuro.errors import UserError
from chiaroscuro.layers import Router, ScoreRouter
from chiaroscuro.layers.registry import OPERATORS
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.loading import longest_sequence
from chiaroscuro.ops import null_entropy_mean


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did with each of T tokens."""

    operators: tuple[str, ...]
    """The layer's menu, cheapest operator first."""
    operator_index: tuple[int, ...]
    """(T,) which operator of the menu each token got."""
    entropy: tuple[float, ...]
    """(T,) spectral entropy H of each token's vector at the operator's input."""
    thresholds: tuple[float, ...]
    """The τ on H between neighbouring operators; empty where something else than H routes, or τ follows the row."""
    share: tuple[float, ...]
    """The fraction of tokens that each operator got, as the model counted it."""
    kept: tuple[float, ...] | None = None
    """(T,) the part of the key-value heads that keep each token to be seen from far; None where that is not decided."""

    @property
    def routed(self) -> bool:
        """Whether the layer has a choice: more than one operator on its menu."""
        return len(self.operators) > 1

    @property
    def finite_thresholds(self) -> tuple[float, ...]:
        """The thresholds that can be drawn, without those at infinity."""
        return tuple(filter(math.isfinite, self.thresholds))

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of tokens that each operator got."""
        seen = Counter(self.operator_index)
        return tuple(seen[index] for index in range(len(self.operators)))

    def operator(self, token: int) -> str:
        """Name the operator that the token got."""
        return self.operators[self.operator_index[token]]


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of one text of T tokens through all layers of a model."""

    tokens: tuple[str, ...]
    """(T,) the text of each token; joined, they are the text. Where several tokens share the bytes of one
    character, it belongs to one of them, and the others are empty."""
    layers: tuple[LayerTrace, ...]
    meta_gate: tuple[float, ...] | None
    """The MetaRouter's gate g of layer 1: one per token, or one for the text; None without a MetaRouter."""
    null_mean: float
    """Mean entropy of white noise of the same width: the line to hold every H against."""
    width: int
    """d, the size of the vectors whose entropy is measured."""

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The indices (from 0) of the layers that have a choice."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.routed)

    @property
    def keeps(self) -> bool:
        """Whether any layer decides who is kept to be seen from far."""
        return any(layer.kept is not None for layer in self.layers)

    @property
    def depth(self) -> tuple[int, ...]:
        """(T,) in how many routed layers each token got the costliest operator of the menu, usually attention."""
        routed = [self.layers[index] for index in self.routed_layers]
        return tuple(
            sum(layer.operator_index[token] == len(layer.operators) - 1 for layer in routed)
            for token in range(len(self.tokens))
        )

    def to_dict(self) -> dict[str, Any]:
        """The trace as JSON types, to 6 decimals, which is all that float32 holds of an entropy near 0.87.

        A threshold at infinity (a share of 0 or 1) is null, since JSON has no infinity.
        """
        return {
            "tokens": list(self.tokens),
            "width": self.width,
            "null_mean": round(self.null_mean, 6),
            "meta_gate": None if self.meta_gate is None else _rounded(self.meta_gate),
            "layers": [
                {
                    "layer": number,
                    "operators": list(layer.operators),
                    "share": dict(zip(layer.operators, _rounded(layer.share), strict=True)),
                    "thresholds": _rounded(layer.thresholds),
                    "operator_index": list(layer.operator_index),
                    "entropy": _rounded(layer.entropy),
                    **({} if layer.kept is None else {"kept": _rounded(layer.kept)}),
                }
                for number, layer in enumerate(self.layers, start=1)
            ],
        }


def trace_routing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> RoutingTrace:
    """Run the model once over a text and record what every layer did with every token.

    No special tokens are added. The model's training or evaluation mode is restored.

    Args:
        model: a CHIAR-Former with or without a head.
        tokenizer: the one the model was trained with.
        text: at least one token, at most `config.max_position_embeddings`.

    Raises:
        UserError: the text is empty, too long or not Unicode; the tokenizer is another model's; the model
            gives NaN.

    """
    if not isinstance(model, ChiarPreTrainedModel):
        raise UserError(f"trace_routing takes a CHIAR-Former, not a {type(model).__name__}")
    ids, pieces = text_to_route(model, tokenizer, text)

    with evaluation_mode(model), torch.no_grad():  # the trunk alone: the heads have no part in the routing
        output = model.base_model(torch.tensor([ids], device=model.device), use_cache=False, output_routing=True)

    layers = tuple(
        LayerTrace(
            operators=tuple(routing.operators),
            operator_index=tuple(routing.operator_index[0].tolist()),
            entropy=tuple(routing.entropy[0].tolist()),
            thresholds=_standing(layer.router),
            share=tuple(routing.share.tolist()),
            kept=None if routing.kept is None else tuple(part_of_heads(routing.kept).tolist()),
        )
        for routing, layer in zip(output.routing, cast(Iterable[Any], model.base_model.layers), strict=True)
    )
    refuse_no_entropy(layers)
    width = model.config.hidden_size
    return RoutingTrace(
        tokens=pieces,
        layers=layers,
        meta_gate=None if output.meta_gate is None else tuple(output.meta_gate[0].tolist()),
        null_mean=null_entropy_mean(width, model.config.spectrum),
        width=width,
    )


def _standing(router: Router | None) -> tuple[float, ...]:
    """The thresholds on H that hold for all tokens of a layer."""
    if not isinstance(router, ScoreRouter) or not router.scores_its_own_entropy or router.options.history is not None:
        return ()
    return tuple(router.calibration.values.tolist())


def refuse_no_entropy(layers: Iterable[LayerTrace]) -> None:
    """Raise a UserError where the entropy of a token is no number."""
    for number, layer in enumerate(layers, start=1):
        if not all(map(math.isfinite, layer.entropy)):
            raise UserError(f"the entropy in layer {number} is not a number: the model's weights hold NaN or infinity")


def text_to_route(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], tuple[str, ...]]:
    """The ids of a text that a model can read, and the piece of text that each token stands for.

    Raises:
        UserError: the text is empty, too long or not Unicode; the tokenizer is another model's.

    """
    if not text:
        raise UserError("the text is empty: there is no token to route; give at least one character")
    refuse_broken_text(text)
    ids, pieces = split_text(tokenizer, text)
    if not ids:
        raise UserError(f"the tokenizer makes no token of the text {text[:20]!r}; give a text with something in it")
    limit = longest_sequence(model.config)
    if len(ids) > limit:
        raise UserError(
            f"the text has {len(ids)} tokens, the model takes at most {limit} (max_position_embeddings); "
            "shorten the text"
        )
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer gives token {max(ids)}, but the model's vocab_size is {model.config.vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    return ids, pieces


def level_of(menu: Sequence[str], index: int) -> float:
    """How costly an operator is, for a picture: from 0, the cheapest of its menu, to 1, the costliest.

    An operator without a choice is as costly as its class says, of attention's 2; one that says nothing counts as 1.
    """
    if len(menu) > 1:
        return index / (len(menu) - 1)
    cost = OPERATORS[menu[0]].cost if menu[0] in OPERATORS else None
    return 1.0 if cost is None else min(1.0, cost / 2)


def part_of_heads(chosen: Bool[Tensor, "batch time *heads"]) -> Float[Tensor, " time"]:
    """Of each token of the first row, the part of the key-value heads that chose it; 1 or 0 where all choose alike."""
    first = chosen[0].float()
    return first if first.ndim == 1 else first.mean(-1)


def refuse_broken_text(text: str) -> None:
    """Refuse text that no tokenizer takes: lone surrogates, which Python makes of bytes that are not UTF-8.

    Raises:
        UserError: naming the first such character.

    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at character {error.start}; give it as UTF-8") from None


def split_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], tuple[str, ...]]:
    """The ids, and the piece of text that each token stands for; every character is in exactly one piece."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        # Only the ends: starts may repeat (one character's bytes over several tokens) or leave a gap (some
        # tokenizers trim the space before a word from its span). A piece runs from where the last one ended.
        ends = [end for _, end in encoded["offset_mapping"]]
        whole = text
    else:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # The bytes of an unfinished character decode to a trailing U+FFFD; the token that completes it gets the
        # character.
        prefixes = [str(tokenizer.decode(ids[:count])) for count in range(1, len(ids) + 1)]
        ends = [len(prefix.rstrip("\ufffd")) for prefix in prefixes]
        whole = prefixes[-1] if prefixes else ""
    pieces: list[str] = []
    start = 0
    for token, end in enumerate(ends):
        end = len(whole) if token == len(ends) - 1 else max(start, end)
        pieces.append(whole[start:end])
        start = end
    return ids, tuple(pieces)


def _rounded(values: tuple[float, ...]) -> list[float | None]:
    return [round(value, 6) if math.isfinite(value) else None for value in values]
