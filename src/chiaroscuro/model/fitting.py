"""Scores that are fitted on a trained model: which tokens gain by looking far, and which will be looked at from far.

One backward through the model in which nobody looks measures what each token gains by looking (`gain_of_looking`), and
one through that in which nobody is kept what is gained by keeping it (`gain_of_being_kept`). A regression on the
operators' input learns to tell them beforehand.
"""

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers import (
    FittedRouter,
    Operator,
    PackedTokens,
    RoutedBlock,
    Router,
    ScoreRouter,
    build_router,
)
from chiaroscuro.layers.registry import build_kv_router, split_entry
from chiaroscuro.model.batches import Batch, check_predictions, check_vocabulary, checked_batches, predicted_by
from chiaroscuro.model.calibration import State, calibrate_layer, embed_batch, set_thresholds
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.full_attention import full_attention, lowered
from chiaroscuro.model.modeling import ChiarForCausalLM
from chiaroscuro.model.score_fitting import (
    HELD_OUT,
    SAMPLE,
    FitReport,
    SideFit,
    SideFitting,
    asked_shares,
    check_spread,
    fitted_entry,
    refuse_broken,
    with_target,
)
from chiaroscuro.model.spread import SPREADS, weights_of
from chiaroscuro.ops import linear_cross_entropy
from chiaroscuro.ops.linear_cross_entropy import CHUNK, IGNORED

_FIELDS = (
    "router",
    "kv_router",
    "attention_share",
    "attention_spread",
    "kv_share",
    "kv_spread",
    "calibration",
    "entropy_thresholds",
)


@torch.no_grad()
def fit(
    model: ChiarForCausalLM,
    batches: Iterable[Batch],
    *,
    look: float | None = None,
    kept: float | None = None,
    hidden: int | None = None,
    spread: bool = False,
    budget: float | None = None,
) -> FitReport:
    """Fit the scores by which a trained model's tokens look far, and by which they are kept to be seen from far.

    The target of who looks is how much the model's loss falls by it, in nats, to first order and where nobody looks yet
    (`gain_of_looking`), of the tokens that have something beyond their window. The target of who is kept is how much it
    falls if the token is seen from beyond the window, where nobody is yet (`gain_of_being_kept`). The score is the
    logarithm of the expected gain: a Poisson regression on the operators' input, by Newton's method, or
    with `hidden` one of two layers. Layers are fitted in turn, each on what those before it give when they are routed,
    and calibrated at the shares on the same batches. Routers of other kinds make way for `"fitted"` ones.

    Args:
        model: a language model whose layers choose who attends, or who is kept, by a score. Changed in place.
        batches: two or more, as for `calibrate`; the last fifth of them is held out. The loss is that of their `labels`
            or `shift_labels`, as the model's forward takes them, and without these of each next token.
        look: the share of the tokens that is to look far, or to attend. Unless given that side stays as it is.
        kept: the share that is to be kept, where `attention_context="kept"`. Unless given that side stays as it is.
        hidden: the width of the layer in between; None for a linear score.
        spread: whether a share is a mean over the layers, each of which gets a part in proportion to the root of its
            harm: how far the model's predictions move where one side of one layer alone is routed by the mean share.
            The roots become the config's `attention_spread` and `kv_spread`, by which a dial, a calibration and
            training go afterwards.
        budget: instead of look and kept, one such mean for both sides, or for the one that the model has.

    Raises:
        UserError: no share, or an impossible one; a layer that can't be fitted, or none that can; too few batches or
            tokens; a target that is not finite. The model is then as it was.

    Source: arXiv 2603.02227 (fitted afterwards, not along); arXiv 2603.17484 and 2512.17452 for the two sides.

    """
    check_spread(spread)
    look, kept = asked_shares(look, kept, budget).values()
    spread = spread or budget is not None
    sides = _check(model, look, kept, both=budget is None)
    look, kept = (share if side in dict(sides) else None for side, share in (("look", look), ("kept", kept)))
    given = checked_batches(batches)
    held_out = math.ceil(len(given) * HELD_OUT)
    check_predictions(given, held_out)
    check_vocabulary(given, model.config.vocab_size)
    entries = {name: fitted_entry(getattr(model.config, name), hidden) for name in ("router", "kv_router")}
    fields = model.config.fields() | entries | {"thresholds": None}
    fits: dict[tuple[str, int], SideFitting] = {}
    for side, i in sides:
        router = _new_router(side, i, model.trunk.blocks[i], fields)
        share = look if side == "look" else kept
        assert share is not None
        quota = None if hidden is None else math.ceil(SAMPLE / (len(given) - held_out))
        fits[side, i] = SideFitting(side, i, router.to(model.device), share, quota)
    with evaluation_mode(model):
        with full_attention(model):
            targets = [dict(_targets(model, batch, sides)) for batch in given]
        with _installed(model, fits, fields, look, kept):
            results = _fit_in_turn(model, given, targets, fits, len(given) - held_out)
            if spread:
                harms = _harms(model, given[len(given) - held_out :], sides)
                for place, share in _spread(model.config, harms).items():
                    results[place] = replace(results[place], share=share, harm=harms[place])
                with lowered(_unready(model, fits)):
                    _calibrate(model, given, {place: result.share for place, result in results.items()})
    return FitReport.of(results, {"look": look, "kept": kept})


@dataclass(frozen=True)
class _Target:
    """Of a batch, the gains that a score is to foretell: of which tokens, and what."""

    valid: Bool[Tensor, "batch time"]
    values: Float[Tensor, "tokens heads"]


@dataclass(frozen=True)
class FittedSide:
    """A side that decides by a fitted score: the config's field of its share, the share, and the score's `hidden`."""

    field: str
    share: float
    hidden: int | None


def fitted_sides(config: ChiarConfig) -> dict[str, FittedSide]:
    """The sides of a model that decide by a fitted score, `"look"` and `"kept"`."""
    sides = {}
    if config.routed_layers and issubclass(config.router_class, FittedRouter):
        hidden = split_entry(config.router)[1].get("hidden")
        sides["look"] = FittedSide("attention_share", config.attention_share, hidden)
    if config.keeping_layers and issubclass(config.kv_router_class, FittedRouter):
        hidden = split_entry(config.kv_router)[1].get("hidden")
        sides["kept"] = FittedSide("kv_share", config.kv_share, hidden)
    return sides


def _check(model: ChiarForCausalLM, look: Any, kept: Any, both: bool) -> list[tuple[str, int]]:
    """The sides and layers that are to be fitted; or an error, if one of them can't be, or `both` and not both can."""
    if not isinstance(model, ChiarForCausalLM):
        raise UserError(f"fit takes a ChiarForCausalLM, not a {type(model).__name__}")
    if model.device.type == "meta":
        raise UserError("the model's weights are offloaded: load it whole, fit it, and save it")
    if look is None and kept is None:
        raise UserError("nothing to fit: give look, the share that looks far, kept, the share that is kept, or both")
    found = []
    for i, block in enumerate(model.trunk.blocks):
        routers = {"look": block.router if look is not None else None}
        routers["kept"] = block.kv_router if kept is not None else None
        for side, router in routers.items():
            if router is not None:
                _check_router(side, i, block, router)
                found.append((side, i))
    for name, share in (("look", look), ("kept", kept)):
        if share is not None and name not in dict(found) and (both or not found):
            raise UserError(
                f"no layer chooses who looks far (menus {model.config.menus}): load the model with other menus, such "
                "as operators=[['local', 'attention'], …]"
                if name == "look"
                else f"no layer decides who is kept (attention_context={model.config.attention_context!r}): load the "
                "model with attention_context='kept'"
            )
    return found


def _check_router(side: str, i: int, block: RoutedBlock, router: Router) -> None:
    if not isinstance(router, ScoreRouter):
        raise UserError(f"layer {i} routes by weights, and not by a score: there is nothing to fit there")
    if router.scale(torch.zeros(1, 1)) is not None:
        raise UserError(
            f"the score of layer {i} scales what it routes, and the model was trained so: fit one that was trained "
            "with another router, such as threshold or random"
        )
    if side == "kept" and type(_reaching(side, block)).gain_of_being_kept is Operator.gain_of_being_kept:
        raise UserError(f"layer {i} has the menu {block.operator_names}, none of which says who is seen from far")


def _reaching(side: str, block: RoutedBlock) -> Operator:
    """The operator whose reach the side decides about: the menu's last one, or the one that asks who is kept."""
    operators = [unit.operator for unit in block.units]
    if side == "kept":
        return next(operator for operator in operators if operator.keeps(operator.options))
    last = len(block.operator_names) - 1
    return next(unit.operator for unit in block.units if last in unit.indices)


def _new_router(side: str, i: int, block: RoutedBlock, fields: dict[str, Any]) -> FittedRouter:
    width = fields["hidden_size"]
    if side == "kept":
        built: Any = build_kv_router(width, fields, i)
    else:
        built = build_router(width, block.operator_names, fields["router"], fields, i)
    return built


def _targets(
    model: ChiarForCausalLM, batch: Batch, sides: list[tuple[str, int]]
) -> Iterable[tuple[tuple[str, int], _Target]]:
    """Run a batch inside `full_attention`, and give the targets of each side and layer."""
    x, context, _ = state = embed_batch(model, batch)
    looking = [i for side, i in sides if side == "look"]
    keeping = [i for side, i in sides if side == "kept"]
    predicted = predicted_by(batch, context.attention_mask)
    gains = {
        "look": gain_of_looking(model, state, predicted, looking) if looking else {},
        "kept": gain_of_being_kept(model, state, predicted, keeping) if keeping else {},
    }
    for side, i in sides:
        options: Any = _reaching(side, model.trunk.blocks[i]).options
        window, sinks = getattr(options, "window", None) or 1, getattr(options, "sinks", 0)
        real = context.real(x.shape[1])
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        valid = with_target(side, window, sinks, real, context.segments)
        yield (side, i), _Target(valid, gains[side][i][valid].double())


def _fit_in_turn(
    model: ChiarForCausalLM,
    batches: list[Batch],
    targets: list[dict[tuple[str, int], _Target]],
    fits: Mapping[tuple[str, int], SideFitting],
    fitting: int,
) -> dict[tuple[str, int], SideFit]:
    """Fit layer after layer, each on what the layers before it give when they are routed by their scores.

    Where those before it are not routed a layer's input holds what is far, and a score would read it there.

    Args:
        model: with the routers of the fits in it.
        batches: as of `fit`.
        targets: of each batch.
        fits: by side and layer.
        fitting: how many batches, the first ones, to fit on; the others are held out.

    """
    states = [embed_batch(model, batch) for batch in batches]
    results: dict[tuple[str, int], SideFit] = {}
    with lowered(_unready(model, fits)):
        for i, block in enumerate(model.trunk.blocks):
            own = {place: one for place, one in fits.items() if place[1] == i}
            for n, (x, context, _) in enumerate(states if own else []):
                if n == fitting:
                    for one in own.values():
                        one.solve()
                source = block.operator_input(x, context)
                for place, one in own.items():
                    valid, values = targets[n][place].valid, targets[n][place].values
                    one.add(source[valid], values, held_out=n >= fitting)
            results |= {place: one.result() for place, one in own.items()}
            shares = [{i: own[side, i].share} if (side, i) in own else {} for side in ("look", "kept")]
            states = calibrate_layer(model, i, states, *shares)
    return results


def _unready(model: ChiarForCausalLM, fits: Collection[tuple[str, int]]) -> list[Tensor]:
    """The thresholds of routers with scores that nobody fits now, and nobody has: lowered, they choose all tokens."""
    waiting = []
    for i, block in enumerate(model.trunk.blocks):
        for side, router in (("look", block.router), ("kept", block.kv_router)):
            if isinstance(router, ScoreRouter) and (side, i) not in fits and router.unready():
                waiting.append(router.calibration.values)
    return waiting


@torch.enable_grad()
def gain_of_looking(
    model: ChiarForCausalLM, state: State, predicted: Int[Tensor, "batch time"], layers: Collection[int]
) -> dict[int, Float[Tensor, "batch time 1"]]:
    """How much the loss falls if one token of one layer looks far: g_i = −∂L/∂y_i · (y'_i − y_i), in nats.

    That is to first order, with y_i what the layer gives of token i, and y'_i what it would, were the token sent to the
    last operator of the menu and not to the first. L, the sum over all predictions, and y are those of the model in
    which nobody looks. One backward measures all tokens of all layers.

    Where everybody looks the same derivative says little: the loss is near its minimum there.

    Args:
        model: in evaluation mode and inside `full_attention`.
        state: of `embed_batch`.
        predicted: the token that each position is to predict, −100 for none.
        layers: which layers to measure, each with thresholds.

    """
    x, context, gate = state
    outputs, changes = [], []
    x = x.detach().requires_grad_()
    for i in range(len(model.trunk.layers)):
        if i not in layers:
            x, _ = model.trunk.run_layer(i, x, gate, context)
            continue
        with torch.no_grad():
            looked, _ = model.trunk.run_layer(i, x, gate, context)
        refuse_broken(i, looked)
        thresholds = model.thresholds()[i].values
        thresholds.fill_(torch.inf)
        try:
            x, _ = model.trunk.run_layer(i, x, gate, context)
        finally:
            thresholds.fill_(-torch.inf)
        refuse_broken(i, x)
        outputs.append(x)
        changes.append(looked - x.detach())
    slopes = _slopes(model, x, predicted, outputs)
    gains = [-(slope * change).sum(-1, keepdim=True) for slope, change in zip(slopes, changes, strict=True)]
    return dict(zip(sorted(layers), gains, strict=True))


@torch.enable_grad()
def gain_of_being_kept(
    model: ChiarForCausalLM, state: State, predicted: Int[Tensor, "batch time"], layers: Collection[int]
) -> dict[int, Float[Tensor, "batch time key_heads"]]:
    """How much the loss falls if one token of one layer is kept, to be seen from far: `Operator.gain_of_being_kept`.

    L and its derivative are those of the model in which nobody is kept in these layers, and all look. Arguments as of
    `gain_of_looking`.
    """
    x, context, gate = state
    inputs, outputs = [], []
    x = x.detach().requires_grad_()
    for i, block in enumerate(model.trunk.blocks):
        if i not in layers:
            x, _ = model.trunk.run_layer(i, x, gate, context)
            continue
        operator, thresholds = _reaching("kept", block), model.kv_thresholds()[i].values
        inputs.append((operator, block.operator_input(x, context).detach(), replace(context, layer_input=x.detach())))
        thresholds.fill_(torch.inf)
        handle = operator.register_forward_hook(lambda _, given, output: outputs.append((output, *given[2:])))
        try:
            x, _ = model.trunk.run_layer(i, x, gate, context)
        finally:
            handle.remove()
            thresholds.fill_(-torch.inf)
        refuse_broken(i, x)
    slopes = _slopes(model, x, predicted, [output for output, *_ in outputs])
    gains = []
    for (operator, source, own), (_, *tokens), slope in zip(inputs, outputs, slopes, strict=True):
        packed: PackedTokens | None = tokens[0] if tokens else None
        slope = slope if packed is None else packed.put_in(torch.zeros_like(source), slope)
        gain = operator.gain_of_being_kept(source, own, slope)
        assert gain is not None  # `_check_router` has seen to it
        gains.append(gain)
    return dict(zip(sorted(layers), gains, strict=True))


def _slopes(model: ChiarForCausalLM, x: Tensor, predicted: Tensor, outputs: list[Tensor]) -> Sequence[Tensor]:
    """∂L/∂ of these outputs alone, L the sum over all predictions: the weights keep whatever gradient they have."""
    hidden = model.trunk.norm(x).flatten(0, 1)
    loss = linear_cross_entropy(hidden, model.lm_head.weight, predicted.to(x.device).flatten(), divisor=1)
    return torch.autograd.grad(loss, outputs)


@contextmanager
def _installed(
    model: ChiarForCausalLM,
    fits: Mapping[tuple[str, int], SideFitting],
    fields: Mapping[str, Any],
    look: float | None,
    kept: float | None,
) -> Iterator[None]:
    """Put the routers into the model; if the block fails, it is as it was."""
    config, blocks = model.config, model.trunk.blocks
    before = [(block.router, block.kv_router) for block in blocks]
    said = {name: copy.deepcopy(getattr(config, name)) for name in _FIELDS}
    try:
        for (side, i), one in fits.items():
            setattr(blocks[i], "router" if side == "look" else "kv_router", one.router)
        if look is not None:
            config.router, config.attention_share, config.attention_spread = fields["router"], look, None
            config.calibration, config.entropy_thresholds = "running", None
        if kept is not None:
            config.kv_router, config.kv_share, config.kv_spread = fields["kv_router"], kept, None
        yield
    except BaseException:
        for block, (router, kv_router) in zip(blocks, before, strict=True):
            block.router, block.kv_router = router, kv_router
        for name, value in said.items():
            setattr(config, name, value)
        raise


def _calibrate(model: ChiarForCausalLM, batches: list[Batch], shares: Mapping[tuple[str, int], float]) -> None:
    """Set the thresholds of every side and layer to a share of its own."""
    by_side = [{i: share for (side, i), share in shares.items() if side == name} for name in ("look", "kept")]
    set_thresholds(model, [embed_batch(model, batch) for batch in batches], *by_side)


def _spread(config: ChiarConfig, harms: Mapping[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    """Spread the sides' shares by the harms, in the config, and say what each layer gets."""
    shares: dict[tuple[str, int], float] = {}
    for side, (field, weights) in SPREADS.items():
        if any(name == side for name, _ in harms):
            setattr(config, weights, weights_of([harms.get((side, i), 0.0) for i in range(len(config.menus))]))
            shares |= {(side, i): share for i, share in config.layer_shares(field).items()}
    return shares


def _harms(model: ChiarForCausalLM, batches: list[Batch], sides: list[tuple[str, int]]) -> dict[tuple[str, int], float]:
    """KL(full ‖ routed) in nats a prediction, with one side of one layer routed by its thresholds, all else whole."""
    trunk = model.trunk
    thresholds = {"look": model.thresholds(), "kept": model.kv_thresholds()}
    routed = {(side, i): thresholds[side][i].values.clone() for side, i in sides}
    harms, count = dict.fromkeys(sides, 0.0), 0
    with full_attention(model):
        for batch in batches:
            x, context, gate = embed_batch(model, batch)
            inputs = [x]
            for i in range(len(trunk.layers)):
                inputs.append(trunk.run_layer(i, inputs[-1], gate, context)[0])
            counted = predicted_by(batch, context.attention_mask).to(x.device) != IGNORED
            whole = trunk.norm(inputs[-1])[counted]
            count += len(whole)
            for (side, first), values in routed.items():
                thresholds[side][first].values.copy_(values)
                x = inputs[first]
                for i in range(first, len(trunk.layers)):
                    x, _ = trunk.run_layer(i, x, gate, context)
                thresholds[side][first].values.fill_(-torch.inf)
                for ours, theirs in zip(trunk.norm(x)[counted].split(CHUNK), whole.split(CHUNK), strict=True):
                    log_q, log_p = (model.lm_head(h).float().log_softmax(-1) for h in (ours, theirs))
                    harms[side, first] += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return {place: harm / max(count, 1) for place, harm in harms.items()}
