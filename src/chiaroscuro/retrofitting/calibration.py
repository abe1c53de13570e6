"""`calibrate` for a retrofitted model: its thresholds, from data. Other models go on to their own.

Here the layers are those of another library: what a layer needs beside its tokens is what its model gave it in a whole
forward. `chiaroscuro.retrofitting.fitting` runs them in the same way.
"""

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers.thresholds import refuse_impossible_share
from chiaroscuro.model.batches import (
    Batch,
    check_shapes,
    check_some_tokens,
    check_vocabulary,
    checked_batches,
    fields_of,
    predicted_by,
)
from chiaroscuro.model.calibration import calibrate as calibrate_chiar
from chiaroscuro.model.calibration import thresholds_or_as_they_were
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.modeling import segments_of
from chiaroscuro.model.score_fitting import refuse_broken
from chiaroscuro.model.spread import SPREADS
from chiaroscuro.retrofitting.inside import noting_scores
from chiaroscuro.retrofitting.routed_attention import GUESSED, SHARED, Reach, present
from chiaroscuro.retrofitting.routed_model import FIELD, RoutedModel, attention_modules
from chiaroscuro.retrofitting.whole import without_routing


@torch.no_grad()
def calibrate(
    model: Any,
    batches: Iterable[Batch],
    share: float | None = None,
    kv_share: float | None = None,
) -> dict[int, list[float]]:
    """Set the thresholds of a model from data: of these tokens each layer routes the share that it is to.

    Layer after layer, each on what those before it give with the thresholds that they have just got. The scores stay as
    they are; `fit` makes new ones. The tables of quantiles are set too, so that `model.set_attention_share` works from
    these data afterwards.

    Args:
        model: a CHIAR-Former, for which this is `chiaroscuro.model.calibration.calibrate`, or a model that was
            retrofitted. Changed in place.
        batches: `input_ids` (B, T), or mappings with `input_ids` and optionally `attention_mask` and `position_ids`,
            as a data loader gives them. All are held in memory at once, as d floats a token, and with the masks that
            the model makes of them.
        share: ρ from 0 to 1, the share that attends or looks; the model's own unless given. Of a retrofitted model it
            is the mean over the layers, which have the parts of it that they were fitted to have.
        kv_share: the share that is kept, likewise. Unless given, a side of a retrofitted model whose score was never
            fitted stays as it is.

    Returns:
        The thresholds of the look side by layer number.

    Raises:
        UserError: see `chiaroscuro.model.calibration.calibrate`. The model is then as it was.

    """
    if not isinstance(model, RoutedModel):
        return calibrate_chiar(model, batches, share, kv_share)
    asked = {"look": share, "kept": kv_share}
    given = _checked(model, batches, asked)
    unready = {side: reason for side in asked if (reason := _unready(model, side))}
    for side, reason in unready.items():
        if asked[side] is not None or len(unready) == len(asked):
            raise UserError(reason)
    sides = [side for side in asked if side not in unready]
    everyone = [router.calibration for reach in model.reaches.values() for router in reach.routers.values()]
    with _said_or_as_it_was(model), thresholds_or_as_they_were(everyone):
        for side, mean in asked.items():
            if mean is not None:
                getattr(model.config, FIELD)[SPREADS[side][0]] = float(mean)
        calibrate_sides(model, given, sides)
    return {i: reach.routers["look"].calibration.values.tolist() for i, reach in model.reaches.items()}


@torch.no_grad()
def calibrate_sides(model: RoutedModel, batches: Sequence[Batch], sides: Collection[str]) -> None:
    """Set the thresholds of these sides alone, for the shares that the configuration says; see `calibrate`."""
    layers = decoder_layers(model)
    with evaluation_mode(model), without_routing(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{GUESSED}")  # until they are set
        calibrate_in_turn(model, layers, [WholeBatch(model, layers, batch) for batch in batches], sides)


def _checked(model: RoutedModel, batches: Iterable[Batch], shares: dict[str, float | None]) -> list[Batch]:
    """The batches, where these and the shares can be used."""
    if model.device.type == "meta":
        raise UserError("the model's weights are offloaded: load it whole, calibrate it, and save it")
    for name, share in zip(("share", "kv_share"), shares.values(), strict=True):
        if share is not None:
            refuse_impossible_share(name, share)
    given = checked_batches(batches)
    for batch in given:
        check_shapes(batch, ["attention_mask"])
    check_vocabulary(given, model.config.vocab_size)
    check_some_tokens(given)
    return given


def _unready(model: RoutedModel, side: str) -> str:
    """Why a side's scores mean nothing yet; empty where they mean something."""
    return next((reason for reach in model.reaches.values() if (reason := reach.routers[side].unready())), "")


@contextmanager
def _said_or_as_it_was(model: RoutedModel) -> Iterator[None]:
    """If the block fails, the configuration says what it did, and thresholds that are a guess are said to be one."""
    before = copy.deepcopy(getattr(model.config, FIELD))
    ready = {i: set(reach.ready) for i, reach in model.reaches.items()}
    try:
        yield
    except BaseException:
        setattr(model.config, FIELD, before)
        for i, reach in model.reaches.items():
            reach.ready = ready[i]
        raise


class WholeBatch:
    """A batch in the whole model: what each layer was given beside the tokens, and what the first one was given.

    Attributes:
        x: the tokens that the first layer was given.
        given: by layer, its other arguments.
        real: which tokens are real.
        segments: the document of each token, where a row holds several.

    """

    def __init__(self, model: RoutedModel, layers: Sequence[nn.Module], batch: Batch) -> None:
        fields = fields_of(batch)
        ids = fields["input_ids"].to(model.device)
        given = ("attention_mask", "position_ids")
        beside = {name: fields[name].to(model.device) for name in given if fields.get(name) is not None}
        self.inputs = {"input_ids": ids, **beside}
        mask, places = (beside.get(name) for name in given)
        self.real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        # With a mask transformers takes a row for one document, wherever its positions restart.
        self.segments = None if mask is not None or places is None else segments_of(places.expand_as(ids), None)
        self.batch = batch
        self.given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.x = ids

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.given:
                self.x = args[0]
            self.given.append((args[1:], kwargs))

        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            model.base_model(**self.inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    @cached_property
    def predicted(self) -> Int[Tensor, "batch time"]:
        """What each token is to predict."""
        return predicted_by(self.batch, self.real).to(self.real.device)


def decoder_layers(model: RoutedModel) -> list[nn.Module]:
    """The modules that hold the attention modules, in order."""
    attention = set(attention_modules(model).values())
    return [module for module in model.modules() if any(child in attention for child in module.children())]


def run_layer(layer: nn.Module, x: Tensor, whole: WholeBatch, i: int) -> Tensor:
    """Layer i on the tokens x, with what it was given beside them in the whole model.

    Raises:
        UserError: what it gives is not finite.

    """
    args, kwargs = whole.given[i]
    before = present.set(kwargs.get(SHARED))
    try:
        output = layer(x, *args, **kwargs)
    finally:
        present.reset(before)
    x = output[0] if isinstance(output, tuple) else output
    refuse_broken(i, x)
    return x


def by_scores(reach: Reach) -> AbstractContextManager[None]:
    """Inside the block a module's scores decide; on a side whose score means nothing yet, all are routed."""
    return reach.as_whole(**{side: True if router.unready() else None for side, router in reach.routers.items()})


def calibrate_in_turn(
    model: RoutedModel, layers: Sequence[nn.Module], wholes: Sequence[WholeBatch], sides: Collection[str]
) -> None:
    """Set the thresholds of these sides layer after layer, each on what those before it give when they are routed.

    Args:
        model: in evaluation mode. The shares are those that its configuration says.
        layers: of `decoder_layers`.
        wholes: the batches.
        sides: those whose scores mean something.

    """
    states = [whole.x for whole in wholes]
    for i, layer in enumerate(layers):
        if i not in model.reaches:
            states = [run_layer(layer, x, whole, i) for x, whole in zip(states, wholes, strict=True)]
            continue
        reach = model.reaches[i]
        with by_scores(reach):
            for side, scores in _scores(layer, i, reach, sides, states, wholes).items():
                reach.routers[side].calibration.set_from(scores, model.layer_shares(side)[i])
            states = [run_layer(layer, x, whole, i) for x, whole in zip(states, wholes, strict=True)]


class _DecidedError(Exception):
    """Stops a forward once a module has decided; not a mistake."""


def _scores(
    layer: nn.Module,
    i: int,
    reach: Reach,
    sides: Collection[str],
    states: Sequence[Tensor],
    wholes: Sequence[WholeBatch],
) -> dict[str, Tensor]:
    """By side, the scores of all real tokens in layer i, of all its heads together."""

    def stop(*decided: Any) -> None:
        raise _DecidedError

    for side in sides:
        reach.routers[side].calibration.set_share(0.5)  # at 0 and 1 no score is computed
    reach.watchers.append(stop)
    try:
        with noting_scores(reach) as seen:
            for x, whole in zip(states, wholes, strict=True):
                with suppress(_DecidedError):
                    run_layer(layer, x, whole, i)
    finally:
        reach.watchers.remove(stop)
    return {
        side: torch.cat([score[whole.real].flatten() for score, whole in zip(seen[side], wholes, strict=True)])
        for side in sides
    }
