"""`fit` for a retrofitted model: its scores, its thresholds, and its shares by layer. Other models go on to their own.

What is fitted to what, and why layer after layer, is said in `chiaroscuro.model.fitting`; how layers of another library
are run one by one, in `chiaroscuro.retrofitting.calibration`.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chiaroscuro.errors import UserError
from chiaroscuro.layers import FittedRouter, build_router
from chiaroscuro.layers.registry import build_kv_router, split_entry
from chiaroscuro.model.batches import (
    Batch,
    check_predictions,
    check_vocabulary,
    checked_batches,
)
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.fitting import fit as fit_chiar
from chiaroscuro.model.modeling import ChiarForCausalLM
from chiaroscuro.model.score_fitting import (
    HELD_OUT,
    SAMPLE,
    FitReport,
    SideFit,
    SideFitting,
    asked_shares,
    check_share,
    check_spread,
    fitted_entry,
    with_target,
)
from chiaroscuro.model.spread import SPREADS, weights_of
from chiaroscuro.ops.linear_cross_entropy import CHUNK, IGNORED
from chiaroscuro.retrofitting.calibration import WholeBatch, by_scores, calibrate_in_turn, decoder_layers, run_layer
from chiaroscuro.retrofitting.routed_attention import LOOK_SIDE, Probe, ReachedError
from chiaroscuro.retrofitting.routed_model import FIELD, RoutedModel
from chiaroscuro.retrofitting.whole import without_routing

HARMED = 6
"""Batches of those held out, at most, that the harm of each layer is measured on: a whole forward each."""


@torch.no_grad()
def fit(
    model: Any,
    batches: Iterable[Batch],
    *,
    look: float | None = None,
    kept: float | None = None,
    hidden: int | None = None,
    spread: bool | None = None,
    budget: float | None = None,
) -> FitReport:
    """Fit the scores by which a trained model's tokens look far, and by which they are kept to be seen from far.

    Args:
        model: a `ChiarForCausalLM`, or a model that was retrofitted. Changed in place.
        batches: two or more, as for `calibrate`; the last fifth of them is held out. The loss is that of their
            `labels`, and without these of each next token.
        look: the share of the tokens that is to look far. Of a retrofitted model a side whose router is "fitted" takes
            its own share unless given, and stays as it is where that is 0 or 1; a router of another kind stays too.
        kept: the share that is to be kept; likewise.
        hidden: the width of the layer in between; None for a linear score.
        spread: whether a share is a mean over the layers, each of which gets a part in proportion to the root of its
            harm: by default for a retrofitted model, not for a `ChiarForCausalLM`.
        budget: instead of look and kept, one such mean for both sides, or for the one that the model has.

    Raises:
        UserError: see `chiaroscuro.model.fitting.fit`. The model is then as it was.

    Source: arXiv 2603.02227 (fitted afterwards, not along); arXiv 2603.17484 and 2512.17452 for the two sides.

    """
    if not isinstance(model, RoutedModel | ChiarForCausalLM):
        raise UserError(
            f"fit takes a ChiarForCausalLM or a retrofitted model, not a {type(model).__name__}: retrofit(model, …) "
            "routes a decoder of transformers"
        )
    if not isinstance(model, RoutedModel):
        spread = False if spread is None else spread
        return fit_chiar(model, batches, look=look, kept=kept, hidden=hidden, spread=spread, budget=budget)
    check_spread(spread)
    shares = asked_shares(look, kept, budget)
    spread = spread is not False or budget is not None
    said = getattr(model.config, FIELD)
    for side, (field, _) in SPREADS.items():
        fitted = all(isinstance(reach.routers[side], FittedRouter) for reach in model.reaches.values())
        if shares[side] is None and fitted and 0 < said[field] < 1:
            shares[side] = said[field]
    given = checked_batches(batches)
    _check(model, shares, given)
    before = _State(model)
    try:
        with evaluation_mode(model):
            return _Fitting(model, given, {s: v for s, v in shares.items() if v is not None}, hidden).run(spread)
    except BaseException:
        before.put_back()
        raise


def _check(model: RoutedModel, shares: Mapping[str, Any], batches: list[Batch]) -> None:
    if model.device.type == "meta":
        raise UserError("the model's weights are offloaded: load it whole, fit it, and save it")
    if all(share is None for share in shares.values()):
        raise UserError("nothing to fit: all look and all are kept; give look, kept, or a budget")
    for side, share in shares.items():
        check_share(side, share)
    check_predictions(batches, math.ceil(len(batches) * HELD_OUT))
    check_vocabulary(batches, model.config.vocab_size)


class _State:
    """The routers of a model and what its configuration says of them."""

    def __init__(self, model: RoutedModel) -> None:
        self.model = model
        self.routers = {i: reach.routers for i, reach in model.reaches.items()}
        self.said = copy.deepcopy(getattr(model.config, FIELD))

    def put_back(self) -> None:
        for i, routers in self.routers.items():
            for side, router in routers.items():
                self.model.reaches[i].replace(side, router)
        setattr(self.model.config, FIELD, self.said)


class _Fitting:
    """One fit of a retrofitted model; arguments as of `fit`, the shares by side."""

    def __init__(self, model: RoutedModel, batches: list[Batch], shares: dict[str, float], hidden: int | None) -> None:
        self.model, self.batches, self.shares = model, batches, shares
        self.fitting = len(batches) - math.ceil(len(batches) * HELD_OUT)
        self.reaches = model.reaches
        self.layers = decoder_layers(model)
        most = math.ceil(SAMPLE / self.fitting)
        said = getattr(model.config, FIELD)
        self.entries: dict[str, Any] = {}
        self.fits: dict[tuple[str, int], SideFitting] = {}
        for side, share in shares.items():
            present = said["router" if side == "look" else "kv_router"]
            self.entries[side] = fitted_entry(
                present, split_entry(present)[1].get("hidden") if hidden is None else hidden
            )
            for i, reach in self.reaches.items():
                router = self._router(side, i).to(model.device)
                quota = None if router.options.hidden is None else most
                self.fits[side, i] = SideFitting(side, i, router, share, quota)
                reach.replace(side, router)

    def _router(self, side: str, layer: int) -> FittedRouter:
        width = self.model.config.hidden_size
        fields = {"router": self.entries[side], "kv_router": self.entries[side]}
        made: Any = (
            build_router(width, LOOK_SIDE, self.entries[side], fields, layer)
            if side == "look"
            else build_kv_router(width, fields, layer)
        )
        return made

    def run(self, spread: bool) -> FitReport:
        """Measure the gains, fit in turn, and spread the shares."""
        said = getattr(self.model.config, FIELD)
        for side in self.shares:
            field, weights = SPREADS[side]
            said[field], said[weights] = self.shares[side], None
            said["router" if side == "look" else "kv_router"] = self.entries[side]
        with without_routing(self.model):
            wholes = [WholeBatch(self.model, self.layers, batch) for batch in self.batches]
            gains = [self.gains(whole) for whole in wholes]
            results = self.in_turn(wholes, gains)
            if spread:
                self.spread(results, wholes[self.fitting :][:HARMED])
                calibrate_in_turn(self.model, self.layers, wholes, self.shares)
        return FitReport.of(results, self.shares)

    def gains(self, whole: WholeBatch) -> dict[str, dict[int, Tensor]]:
        """By side and layer, the gains of a batch's tokens, in the model where nobody looks and nobody is kept."""
        probes = {i: Probe(reach.window, reach.sinks) for i, reach in self.reaches.items()}
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(_checkpointed(self.layers))
            for i, reach in self.reaches.items():
                stack.enter_context(reach.as_whole(look=False, kept=False))
                reach.probe = probes[i]
            try:
                logits = self.model(**whole.inputs, use_cache=False).logits.flatten(0, 1)
                loss = F.cross_entropy(
                    logits.float(), whole.predicted.flatten().long(), ignore_index=IGNORED, reduction="sum"
                )
                slopes = torch.autograd.grad(loss, [probe.zeros for probe in probes.values()])
            finally:
                for reach in self.reaches.values():
                    reach.probe = None
        if not math.isfinite(float(loss)):
            raise UserError(f"the loss is {float(loss)}: the model's weights or its input hold NaN or infinity")
        found: dict[str, dict[int, Tensor]] = {"look": {}, "kept": {}}
        for (i, probe), slope in zip(probes.items(), slopes, strict=True):
            for side, values in probe.gains(slope).items():
                found[side][i] = values
        return found

    def in_turn(
        self, wholes: list[WholeBatch], gains: list[dict[str, dict[int, Tensor]]]
    ) -> dict[tuple[str, int], SideFit]:
        """Fit layer after layer, each on what those before it give when they are routed; calibrate each."""
        states = [whole.x for whole in wholes]
        results: dict[tuple[str, int], SideFit] = {}
        for i, layer in enumerate(self.layers):
            if i not in self.reaches:
                states = [run_layer(layer, x, whole, i) for x, whole in zip(states, wholes, strict=True)]
                continue
            reach = self.reaches[i]
            with reach.stopping():
                inputs = [_stopped(layer, x, whole, i) for x, whole in zip(states, wholes, strict=True)]
            for side in self.shares:
                results[side, i] = self.fit_one(side, i, wholes, inputs, gains)
                router = reach.routers[side]
                seen = [router(x, x.new_zeros(x.shape[:2])) for x in inputs]
                scores = [d.score[w.real].flatten() for d, w in zip(seen, wholes, strict=True) if d.score is not None]
                router.calibration.set_from(torch.cat(scores), self.model.layer_shares(side)[i])
            with by_scores(reach):
                states = [run_layer(layer, x, whole, i) for x, whole in zip(states, wholes, strict=True)]
        return results

    def fit_one(
        self,
        side: str,
        i: int,
        wholes: list[WholeBatch],
        inputs: list[Tensor],
        gains: list[dict[str, dict[int, Tensor]]],
    ) -> SideFit:
        """Fit one side of one layer."""
        one, reach = self.fits[side, i], self.reaches[i]
        valid = [with_target(side, reach.window, reach.sinks, whole.real, whole.segments) for whole in wholes]
        values = [gain[side][i][chosen].double() for gain, chosen in zip(gains, valid, strict=True)]
        for n, (x, chosen, target) in enumerate(zip(inputs, valid, values, strict=True)):
            if n == self.fitting:
                one.solve()
            one.add(x[chosen], target, held_out=n >= self.fitting)
        return one.result()

    def spread(self, results: dict[tuple[str, int], SideFit], held_out: list[WholeBatch]) -> None:
        """Spread the shares over the layers by their harms, in the configuration and in the results."""
        harms = dict.fromkeys(results, 0.0)
        count = 0
        for whole in held_out:
            counted = whole.predicted != IGNORED
            with _noting_outputs(self.layers) as outputs:
                log_p = self.model(**whole.inputs, use_cache=False).logits[counted].float().log_softmax(-1)
            count += len(log_p)
            for side, i in results:
                routed = self.reaches[i].as_whole(**{"look": True, "kept": True} | {side: None})
                with routed, _given(self.layers[:i], outputs):  # before layer i nothing is another than it was
                    logits = self.model(**whole.inputs, use_cache=False).logits[counted]
                for ours, theirs in zip(logits.split(CHUNK), log_p.split(CHUNK), strict=True):
                    log_q = ours.float().log_softmax(-1)
                    harms[side, i] += float(F.kl_div(log_q, theirs, reduction="sum", log_target=True))
        for side in self.shares:
            weights = weights_of([harms[side, i] / max(count, 1) for i in self.reaches])
            getattr(self.model.config, FIELD)[SPREADS[side][1]] = weights
            for i, share in self.model.layer_shares(side).items():
                results[side, i] = replace(results[side, i], share=share, harm=harms[side, i] / max(count, 1))


@contextmanager
def _noting_outputs(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Inside the block, what each layer gives is noted."""
    outputs: list[Any] = []
    handles = [layer.register_forward_hook(lambda _, args, output: outputs.append(output)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _given(layers: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Inside the block these layers compute nothing, and give what they gave before."""
    with _in_place_of(layers, lambda i, _: lambda *args, **kwargs: outputs[i]):
        yield


@contextmanager
def _checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block a layer keeps nothing for the backward, which computes it again: a row of it fits in memory."""
    with _in_place_of(layers, lambda _, forward: partial(checkpoint, forward, use_reentrant=False)):
        yield


@contextmanager
def _in_place_of(layers: Sequence[nn.Module], make: Callable[[int, Any], Any]) -> Iterator[None]:
    """Inside the block layer i has the forward that is made of i and its own."""
    before = [vars(layer).get("forward") for layer in layers]  # such as a hook of accelerate's
    for i, layer in enumerate(layers):
        layer.forward = make(i, layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _stopped(layer: nn.Module, x: Tensor, whole: WholeBatch, i: int) -> Tensor:
    """What the attention module of a layer is given."""
    try:
        run_layer(layer, x, whole, i)
    except ReachedError as reached:
        return reached.hidden
    raise AssertionError("the layer did not run its attention")
