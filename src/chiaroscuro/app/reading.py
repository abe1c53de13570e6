"""What a model does with each token of a text: who looks, who is kept, by what score, and what it costs in the loss."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from chiaroscuro.analysis.far_context import far_part
from chiaroscuro.analysis.routing import level_of, part_of_heads, refuse_broken_text, split_text
from chiaroscuro.app.served import Served
from chiaroscuro.errors import UserError
from chiaroscuro.layers import Context, ScoreRouter, SelfAttention
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.calibration import embed_batch
from chiaroscuro.model.full_attention import full_attention
from chiaroscuro.ops import spectral_entropy
from chiaroscuro.retrofitting.inside import noting_decisions, noting_inputs, noting_scores, projections
from chiaroscuro.retrofitting.routed_attention import LOOK_SIDE
from chiaroscuro.retrofitting.routed_model import RoutedModel

MOST = 1024
"""Tokens that are shown at once; a page with more is slow to draw."""


@dataclass(frozen=True)
class LayerReading:
    """What one layer did with each of T tokens.

    Attributes:
        operators: the layer's menu, cheapest first.
        index: (T,) which of them each token got; where the heads choose, the costliest that any of them chose.
        kept: (T,) the part of the key-value heads that keep it to be seen from far; None where nothing decides that.
        entropy: (T,) H of what the operator reads.
        score: (T,) what the threshold was compared with, the highest of the heads'; None where there is none.
        threshold: (T,) the last of the menu's, or of who looks; None without one.
        far: (T,) the attention that goes beyond the window in full attention; None where there is no window.
        looking: (T,) the part of the key-value heads whose queries look far; None where they do not choose.

    """

    operators: tuple[str, ...]
    index: tuple[int, ...]
    kept: tuple[float, ...] | None
    entropy: tuple[float, ...]
    score: tuple[float, ...] | None
    threshold: tuple[float, ...] | None
    far: tuple[float, ...] | None = None
    looking: tuple[float, ...] | None = None

    @property
    def attention(self) -> tuple[float, ...] | None:
        """(T,) 1 for the costliest operator, or the part of the heads that look far; None where there is no choice."""
        if self.looking is not None:
            return self.looking
        last = len(self.operators) - 1
        return tuple(float(i == last) for i in self.index) if last else None

    @property
    def level(self) -> tuple[float, ...]:
        """(T,) from 0, the cheapest operator, to 1, the costliest, the mean over heads; else who is kept, if any is."""
        if self.looking is not None:
            return self.looking
        if len(self.operators) == 1 and self.kept is not None:
            return self.kept
        return tuple(level_of(self.operators, i) for i in self.index)


@dataclass(frozen=True)
class Reading:
    """A text of T tokens in a model.

    Attributes:
        tokens: (T,) the text of each.
        layers: by number; none where the model routes nothing.
        loss: (T,) of each token, by those before it; None for the first.
        full: (T,) the same with full attention.

    """

    tokens: tuple[str, ...]
    layers: dict[int, LayerReading]
    loss: tuple[float | None, ...]
    full: tuple[float | None, ...]

    @property
    def attention(self) -> tuple[float, ...] | None:
        """(T,) `LayerReading.attention`, the mean over the layers that have a choice; None where none has."""
        return _mean(one.attention for one in self.layers.values())

    @property
    def kept(self) -> tuple[float, ...] | None:
        """(T,) by how many of the key-value heads a token is kept, the mean over the layers that decide it; or None."""
        return _mean(one.kept for one in self.layers.values())

    @property
    def level(self) -> tuple[float, ...]:
        """(T,) how bright each token is, the mean over the layers: what it got, or where all get the same, if kept."""
        levels = _mean(one.level for one in self.layers.values() if one.attention is not None) or self.kept
        return levels or (0.0,) * len(self.tokens)


def _mean(columns: Iterable[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    given = [column for column in columns if column is not None]
    return tuple(sum(values) / len(given) for values in zip(*given, strict=True)) if given else None


@dataclass(frozen=True)
class Text:
    """A text whose part that no dial changes is known.

    Attributes:
        tokens: (T,) the text of each.
        ids: theirs.
        full: (T,) the loss of each with full attention; None for the first.
        far: by layer, (T,) the attention that goes beyond the window.

    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    full: tuple[float | None, ...]
    far: dict[int, tuple[float, ...]]


@torch.no_grad()
def take_up(served: Served, text: str) -> Text:
    """Read a text once with full attention: what the dials do not change.

    Raises:
        UserError: the text is empty, too long, not Unicode, or the model gives NaN.

    """
    refuse_broken_text(text)
    if not text.strip():
        raise UserError("the text is empty: type or paste some")
    ids, tokens = split_text(served.tokenizer, text)
    most = min(MOST, served.longest)
    if len(ids) > most:
        raise UserError(f"the text has {len(ids):,} tokens, and at most {most:,} are shown: shorten it")
    if not ids or max(ids) >= served.model.config.vocab_size:
        raise UserError("the tokenizer is not the model's: nothing of this text can be read")
    given = torch.tensor([ids], device=served.model.device)
    with served.whole() as model:
        full = _losses(model, given)
        far = _far(model, given)
    return Text(tokens, tuple(ids), full, far)


@torch.no_grad()
def read(served: Served, text: Text, look: float | None = None, kept: float | None = None) -> Reading:
    """Route a text at these shares, see `Served.at`: one forward."""
    given = torch.tensor([text.ids], device=served.model.device)
    with served.at(look, kept) as model:
        if isinstance(model, RoutedModel):
            loss, layers = _retrofitted(model, given, text.far)
        elif isinstance(model, ChiarPreTrainedModel):
            loss, layers = _own(model, given, text.far)
        else:
            loss, layers = text.full, {}
    return Reading(text.tokens, layers, loss, text.full)


def _losses(model: Any, ids: Int[Tensor, "1 time"]) -> tuple[float | None, ...]:
    return _of(model(input_ids=ids, use_cache=False).logits, ids)


def _of(logits: Float[Tensor, "1 time vocabulary"], ids: Int[Tensor, "1 time"]) -> tuple[float | None, ...]:
    losses = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none").tolist()
    if not all(map(math.isfinite, losses)):
        raise UserError("the model's logits are not finite: its weights hold NaN or infinity")
    return (None, *losses)


def _own(model: Any, ids: Tensor, far: dict[int, tuple[float, ...]]) -> tuple[Any, dict[int, LayerReading]]:
    output = model(input_ids=ids, use_cache=False, output_routing=True)
    layers = {}
    for i, (routing, block) in enumerate(zip(output.routing, model.base_model.layers, strict=True)):
        scored = isinstance(block.router, ScoreRouter) and routing.score is not None
        layers[i] = LayerReading(
            operators=tuple(routing.operators),
            index=tuple(routing.operator_index[0].tolist()),
            kept=None if routing.kept is None else _part(routing.kept),
            entropy=tuple(routing.entropy[0].tolist()),
            score=tuple(routing.score[0].tolist()) if scored else None,
            threshold=_thresholds(block.router, routing.score) if scored else None,
            far=far.get(i),
        )
    return _of(output.logits, ids), layers


def _retrofitted(model: RoutedModel, ids: Tensor, far: dict[int, tuple[float, ...]]) -> tuple[Any, Any]:
    with ExitStack() as stack:
        given = stack.enter_context(noting_inputs(model))
        decided = stack.enter_context(noting_decisions(model))
        scores = {i: stack.enter_context(noting_scores(reach))["look"] for i, reach in model.reaches.items()}
        logits = model(input_ids=ids, use_cache=False).logits
    layers = {}
    for i, ((looks, kept),) in decided.items():
        source, router = given[i], model.reaches[i].look
        free = 0 < router.calibration.share < 1
        score = scores[i][0] if scores[i] else None
        threshold = None if score is None else _thresholds(router, score)
        if score is not None and score.ndim == 3:
            score = score.amax(-1)
        looking = _part(looks)
        layers[i] = LayerReading(
            operators=LOOK_SIDE if free else LOOK_SIDE[1:] if router.calibration.share else LOOK_SIDE[:1],
            index=tuple(int(part > 0) for part in looking) if free else (0,) * ids.shape[1],
            kept=_part(kept),
            entropy=tuple(spectral_entropy(source[0].float()).tolist()),
            score=None if score is None else tuple(score[0].tolist()),
            threshold=threshold,
            far=far.get(i),
            looking=looking if free and looks.ndim == 3 else None,
        )
    return _of(logits, ids), layers


def _thresholds(router: ScoreRouter, score: Float[Tensor, "1 time *heads"]) -> tuple[float, ...]:
    return tuple(router.thresholds_of(score, Context())[0, :, -1].tolist())


def _part(chosen: Tensor) -> tuple[float, ...]:
    return tuple(part_of_heads(chosen).tolist())


def _far(model: Any, ids: Tensor) -> dict[int, tuple[float, ...]]:
    """By layer with a window, the attention that goes beyond it, in full attention."""
    found = {}
    if isinstance(model, RoutedModel):
        for i, (query, key, value, softcap) in projections(model, ids).items():
            reach = model.reaches[i]
            found[i] = tuple(far_part(query, key, value, reach.window, reach.sinks, softcap).mass.tolist())
    elif isinstance(model, ChiarPreTrainedModel):
        with full_attention(model):
            x, context, gate = embed_batch(model, ids)
            for i, block in enumerate(model.trunk.blocks):
                operators = [unit.operator for unit in block.units if isinstance(unit.operator, SelfAttention)]
                if operators and operators[-1].options.window is not None:
                    query, key, value = operators[-1].projected(block.operator_input(x, context), context)
                    options = operators[-1].options
                    part = far_part(query[0], key[0], value[0], options.window or 1, options.sinks)
                    found[i] = tuple(part.mass.tolist())
                x, _ = model.trunk.run_layer(i, x, gate, context)
    return found
