"""Scores that are fitted on a trained model: which tokens gain by looking far, and which will be looked at from far.

A pass with nobody looking measures who gains (`gain_of_looking`), and one with everybody looking and everybody kept who
is looked at (`Operator.received_from_far`). A regression on the operators' input learns to tell them beforehand.
"""

import copy
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers import Context, FittedRouter, Operator, RoutedBlock, Router, ScoreRouter, build_router
from chiaroscuro.layers.registry import build_kv_router, split_entry
from chiaroscuro.model.calibration import State, calibrate_layer, embed_batch, set_thresholds
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.full_attention import full_attention, lowered
from chiaroscuro.model.modeling import ChiarForCausalLM
from chiaroscuro.ops import linear_cross_entropy
from chiaroscuro.ops.linear_cross_entropy import IGNORED

RIDGE = 1e-3
"""λ, beside features of variance 1."""

HELD_OUT = 0.2
"""The part of the batches, the last ones, that nothing is fitted on."""

FEWEST_QUERIES = 16
"""What a token receives from beyond its window is a target where at least so many, and half a window, could give it."""

SMALLEST = {"look": 1e-3, "kept": 1e-12}
"""Targets are fitted as logarithms, of this at least, or of their mean if it is less: in nats, and in attention."""

SAMPLE = 8192
"""Tokens a layer that a score of two layers is fitted on; a linear one takes all."""

STEPS, BATCH, RATE, DECAY = 400, 1024, 3e-3, 1e-2
"""Of AdamW, for a score of two layers."""

CHUNK = 512
"""Tokens whose logits are held at a time."""

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


_SPREADS = {"look": ("attention_share", "attention_spread"), "kept": ("kv_share", "kv_spread")}


@dataclass(frozen=True)
class SideFit:
    """How well a layer's score foretells its target, on tokens that it was not fitted on.

    Attributes:
        rank_correlation: Spearman's, between score and target; the mean over heads.
        recall: of the tokens with the largest targets, the share that is to be routed, how many are among as many with
            the largest scores. By chance it is that share.
        captured: of what the targets of the tokens with the largest targets add up to, how much those of as many with
            the largest scores do. Few tokens may have nearly all, and the ranks of the others mean nothing.
        tokens: held out.
        fitted_tokens: that it was fitted on.
        share: of the tokens that the layer routes.
        harm: where the shares are spread, KL(full ‖ routed) in nats a prediction, with this side of this layer alone
            routed, by the mean share.

    """

    rank_correlation: float
    recall: float
    captured: float
    tokens: int
    fitted_tokens: int
    share: float
    harm: float | None = None


@dataclass(frozen=True)
class FitReport:
    """What `fit` did.

    Attributes:
        look: by layer, how well the score of who looks far does; empty where it was not fitted.
        kept: likewise of who is kept.
        look_share: the share of tokens that look, or None; the mean over the layers, and what recall is measured at.
        kept_share: the share of tokens that are kept, or None; likewise.

    """

    look: dict[int, SideFit]
    kept: dict[int, SideFit]
    look_share: float | None
    kept_share: float | None

    @property
    def layers(self) -> list[int]:
        """The layers with a score that was fitted."""
        return sorted({*self.look, *self.kept})

    def figures(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        layers = []
        for i in self.layers:
            sides = {"look": self.look.get(i), "kept": self.kept.get(i)}
            layers.append({"layer": i, **{name: asdict(side) for name, side in sides.items() if side is not None}})
        return {"look": self.look_share, "kept": self.kept_share, "layers": layers}

    def __str__(self) -> str:
        """A line per layer and side."""
        lines = ["layer  side  rank correlation  recall  captured  held-out tokens  share"]
        for i in self.layers:
            for name, sides in (("look", self.look), ("kept", self.kept)):
                if i in sides:
                    side = sides[i]
                    ranked = f"{side.rank_correlation:16.3f}  {side.recall:6.3f}  {side.captured:8.3f}"
                    lines.append(f"{i:5}  {name}  {ranked}  {side.tokens:15,}  {side.share:5.3f}")
        return "\n".join(lines)


@torch.no_grad()
def fit(
    model: ChiarForCausalLM,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    look: float | None = None,
    kept: float | None = None,
    hidden: int | None = None,
    spread: bool = False,
    budget: float | None = None,
) -> FitReport:
    """Fit the scores by which a trained model's tokens look far, and by which they are kept to be seen from far.

    The target of who looks is the logarithm of how much the model's loss falls by it, in nats, to first order and
    where nobody looks yet (`gain_of_looking`), of the tokens that have something beyond their window. The target of who
    is kept is the logarithm of the largest attention that any later token gives it from beyond its window, where
    everybody looks and everybody is kept. The score is a ridge regression on the operators' input, in closed form, or
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
    if budget is not None:
        if look is not None or kept is not None:
            raise UserError(f"budget={budget!r} is the mean share of both sides: drop look and kept")
        _check_share("budget", budget)
        look, kept, spread = budget, budget, True
    sides = _check(model, look, kept, both=budget is None)
    look, kept = (share if side in dict(sides) else None for side, share in (("look", look), ("kept", kept)))
    given = list(batches)
    held_out = math.ceil(len(given) * HELD_OUT)
    if len(given) < 2:
        raise UserError(f"{len(given)} batches to fit on: give two or more, of which the last are held out")
    entry: Any = "fitted" if hidden is None else {"fitted": {"hidden": hidden}}
    fields = model.config.fields() | {"router": entry, "kv_router": _with_heads(entry, model), "thresholds": None}
    fits: dict[tuple[str, int], _Fit] = {}
    for side, i in sides:
        router = _new_router(side, i, model.trunk.blocks[i], fields)
        share = look if side == "look" else kept
        assert share is not None
        quota = math.ceil(SAMPLE / (len(given) - held_out))
        fits[side, i] = _Fit(side, i, router.to(model.device), share, quota)
    with evaluation_mode(model):
        with full_attention(model):
            targets = [dict(_targets(model, batch, sides)) for batch in given]
        with _installed(model, fits, fields, look, kept):
            results = _fit_in_turn(model, given, targets, fits, len(given) - held_out)
            if spread:
                harms = _harms(model, given[len(given) - held_out :], sides)
                for place, share in _spread(model.config, harms).items():
                    results[place] = replace(results[place], share=share, harm=harms[place])
                _calibrate(model, given, {place: result.share for place, result in results.items()})
    by_side = {name: {i: result for (side, i), result in results.items() if side == name} for name in ("look", "kept")}
    return FitReport(by_side["look"], by_side["kept"], look, kept)


@dataclass(frozen=True)
class _Target:
    """Of a batch, what a score is to say the logarithm of: for which tokens, and what."""

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
    for name, share in (("look", look), ("kept", kept)):
        _check_share(name, share)
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


def _check_share(name: str, share: Any) -> None:
    if share is None or (not isinstance(share, bool) and isinstance(share, int | float) and 0 < share < 1):
        return
    raise UserError(f"{name}={share!r}: must be a share of the tokens, more than 0 and less than 1")


def _check_router(side: str, i: int, block: RoutedBlock, router: Router) -> None:
    if not isinstance(router, ScoreRouter):
        raise UserError(f"layer {i} routes by weights, and not by a score: there is nothing to fit there")
    if router.scale(torch.zeros(1, 1)) is not None:
        raise UserError(
            f"the score of layer {i} scales what it routes, and the model was trained so: fit one that was trained "
            "with another router, such as threshold or random"
        )
    if side == "kept" and type(_reaching(side, block)).received_from_far is Operator.received_from_far:
        raise UserError(f"layer {i} has the menu {block.operator_names}, none of which says who is seen from far")


def _reaching(side: str, block: RoutedBlock) -> Operator:
    """The operator whose reach the side decides about: the menu's last one, or the one that asks who is kept."""
    operators = [unit.operator for unit in block.units]
    if side == "kept":
        return next(operator for operator in operators if operator.keeps(operator.options))
    last = len(block.operator_names) - 1
    return next(unit.operator for unit in block.units if last in unit.indices)


def _with_heads(entry: Any, model: ChiarForCausalLM) -> Any:
    """The router of the key side, with as many scores a token as the present one has."""
    heads = split_entry(model.config.kv_router)[1].get("heads", 1)
    return entry if heads == 1 else {"fitted": {**split_entry(entry)[1], "heads": heads}}


def _new_router(side: str, i: int, block: RoutedBlock, fields: dict[str, Any]) -> FittedRouter:
    width = fields["hidden_size"]
    if side == "kept":
        built: Any = build_kv_router(width, fields, i)
    else:
        built = build_router(width, block.operator_names, fields["router"], fields, i)
    return built


def _targets(
    model: ChiarForCausalLM, batch: Tensor | Mapping[str, Any], sides: list[tuple[str, int]]
) -> Iterable[tuple[tuple[str, int], _Target]]:
    """Run a batch inside `full_attention`, and give the targets of each side and layer."""
    x, context, gate = state = embed_batch(model, batch)
    looking = [i for side, i in sides if side == "look"]
    gains = gain_of_looking(model, state, _predicted(batch, context), looking) if looking else {}
    for i, block in enumerate(model.trunk.blocks):
        source = block.operator_input(x, context)
        for side in (side for side, layer in sides if layer == i):
            operator = _reaching(side, block)
            values = gains[i][..., None] if side == "look" else None
            if values is None:
                values = operator.received_from_far(source, replace(context, layer_input=x))
            assert values is not None  # `_check_router` has seen to it
            valid = _with_target(side, operator, x, context)
            yield (side, i), _Target(valid, values[valid].double())
        x, _ = model.trunk.run_layer(i, x, gate, context)
        _refuse_broken(i, x)


def _fit_in_turn(
    model: ChiarForCausalLM,
    batches: list[Tensor | Mapping[str, Any]],
    targets: list[dict[tuple[str, int], _Target]],
    fits: Mapping[tuple[str, int], "_Fit"],
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
    with lowered(_unready(model, fits)):  # they let all look, and keep all
        for i, block in enumerate(model.trunk.blocks):
            own = {place: one for place, one in fits.items() if place[1] == i}
            for place, one in own.items():
                seen = torch.cat([target[place].values for target in targets[:fitting]])
                one.floor = min(SMALLEST[place[0]], float(seen.clamp(min=0).mean())) if seen.numel() else 1.0
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
    """The thresholds of routers with scores that nobody fits now, and nobody has."""
    waiting = []
    for i, block in enumerate(model.trunk.blocks):
        for side, router in (("look", block.router), ("kept", block.kv_router)):
            if isinstance(router, ScoreRouter) and (side, i) not in fits and router.unready():
                waiting.append(router.calibration.values)
    return waiting


def _refuse_broken(layer: int, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise UserError(f"layer {layer} gives NaN or infinity: the model's weights or its input hold some")


def _predicted(batch: Tensor | Mapping[str, Any], context: Context) -> Int[Tensor, "batch time"]:
    """What each token of a batch is to predict, and −100 where that is nothing."""
    fields = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    labels = fields["input_ids"] if fields.get("labels") is None else fields["labels"]
    mask = context.attention_mask
    return ChiarForCausalLM.targets_of(
        labels, fields.get("shift_labels"), None if mask is None else mask.to(labels.device)
    )


@torch.enable_grad()
def gain_of_looking(
    model: ChiarForCausalLM, state: State, predicted: Int[Tensor, "batch time"], layers: Collection[int]
) -> dict[int, Float[Tensor, "batch time"]]:
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
        _refuse_broken(i, looked)
        thresholds = model.thresholds()[i].values
        thresholds.fill_(torch.inf)
        try:
            x, _ = model.trunk.run_layer(i, x, gate, context)
        finally:
            thresholds.fill_(-torch.inf)
        _refuse_broken(i, x)
        outputs.append(x)
        changes.append(looked - x.detach())
    hidden = model.trunk.norm(x).flatten(0, 1)
    loss = linear_cross_entropy(hidden, model.lm_head.weight, predicted.to(x.device).flatten(), divisor=1)
    # Of the outputs alone: the weights keep whatever gradient they have.
    gradients = torch.autograd.grad(loss, outputs)
    gains = [-(slope * change).sum(-1) for slope, change in zip(gradients, changes, strict=True)]
    return dict(zip(sorted(layers), gains, strict=True))


def _with_target(side: str, operator: Operator, x: Tensor, context: Context) -> Bool[Tensor, "batch time"]:
    """The tokens that have something beyond the window; or those that enough others have beyond theirs."""
    window, sinks = (getattr(operator.options, name, None) or 0 for name in ("window", "sinks"))
    window = window or 1
    real = context.real(x.shape[1])
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    place = real.cumsum(1) - 1
    if side == "look":
        return real & (place >= window + sinks)
    later = real.sum(1, keepdim=True) - place - window
    return real & (place >= sinks) & (later >= max(FEWEST_QUERIES, window // 2))


class _Fit:
    """The fit of one side of one layer: sums over the tokens, then a score, then what it says of tokens held out."""

    def __init__(self, side: str, layer: int, router: FittedRouter, share: float, quota: int) -> None:
        self.name = f"layer {layer}, side {side}"
        self.router, self.share, self.quota = router, share, quota
        self.count = 0
        self.sums: list[Tensor] = []
        self.samples: list[tuple[Tensor, Tensor]] = []
        self.answers: list[tuple[Tensor, Tensor]] = []
        self.generator = torch.Generator("cpu").manual_seed(layer)
        self.floor = 1.0

    def add(self, x: Float[Tensor, "tokens width"], target: Float[Tensor, "tokens heads"], held_out: bool) -> None:
        """Learn of some tokens, or be asked about them."""
        target = target.clamp(min=max(self.floor, sys.float_info.min)).log()
        target = target if target.shape[1] == self.router.options.heads else target.mean(1, keepdim=True)
        if held_out:
            self.answers.append((self.router.fitted(x), target))
            return
        self.count += len(x)
        if self.router.options.hidden is not None:
            taken = torch.randperm(len(x), generator=self.generator)[: self.quota].to(x.device)
            self.samples.append((x[taken].float(), target[taken].float()))
        x = x.double()
        new = [x.sum(0), x.T @ x, target.sum(0), x.T @ target]
        self.sums = [old + one for old, one in zip(self.sums, new, strict=True)] if self.sums else new

    def solve(self) -> None:
        """Set the score by what was learnt."""
        width = self.router.width
        if self.count < 2 * width:
            raise UserError(
                f"{self.name}: {self.count} tokens with a target to fit {width} features on: give at least "
                f"{2 * width}, in longer sequences or more of them"
            )
        n = self.count
        mean, target_mean = self.sums[0] / n, self.sums[2] / n
        covariance = self.sums[1] / n - mean[:, None] * mean
        scale = covariance.diagonal().clamp(min=0).sqrt()
        scale = scale.where(scale > 1e-6 * scale.max(), 1.0)
        if self.router.options.hidden is None:
            left = covariance / (scale[:, None] * scale) + RIDGE * torch.eye(width).to(covariance)
            slope = torch.linalg.solve(left, (self.sums[3] / n - mean[:, None] * target_mean) / scale[:, None])
            slope = slope / scale[:, None]
            self.router.fitted.set_weights(slope.T.float(), (target_mean - mean @ slope).float())
        else:
            _fit_two_layers(self.router, self.samples, mean.float(), scale.float(), self.generator)
        self.sums, self.samples = [], []

    def result(self) -> SideFit:
        """How well the score does on the tokens held out."""
        score, target = (torch.cat(parts) for parts in zip(*self.answers, strict=True))
        top = round(self.share * len(score))
        if not 0 < top < len(score):
            raise UserError(
                f"{self.name}: {len(score)} tokens with a target are held out, too few for a share of {self.share:g}: "
                "give longer sequences, or more of them"
            )
        heads = list(zip(score.double().unbind(1), target.unbind(1), strict=True))
        return SideFit(
            sum(rank_correlation(a, b) for a, b in heads) / len(heads),
            sum(top_recall(a, b, top) for a, b in heads) / len(heads),
            sum(top_captured(a, b.exp() - self.floor, top) for a, b in heads) / len(heads),
            len(score),
            self.count,
            self.share,
        )


@torch.enable_grad()
def _fit_two_layers(
    router: FittedRouter, samples: list[tuple[Tensor, Tensor]], mean: Tensor, scale: Tensor, generator: torch.Generator
) -> None:
    """Fit w·gelu(U x + c) + b by AdamW on standardised features, and fold the standardisation into U and c."""
    x, target = (torch.cat(parts) for parts in zip(*samples, strict=True))
    x, (spread, middle) = (x - mean) / scale, torch.std_mean(target, 0)
    spread = spread.clamp(min=1e-12)
    target = (target - middle) / spread
    hidden, width = router.options.hidden, router.width
    first = (torch.randn(hidden, width, generator=generator) / math.sqrt(width)).to(x)
    second = (torch.randn(target.shape[1], hidden, generator=generator) / math.sqrt(hidden)).to(x)
    weights = [first, x.new_zeros(hidden), second, x.new_zeros(target.shape[1])]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=DECAY)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        taken = torch.randint(len(x), (BATCH,), generator=generator).to(x.device)
        predicted = F.linear(F.gelu(F.linear(x[taken], weights[0], weights[1])), weights[2], weights[3])
        optimizer.zero_grad()
        F.mse_loss(predicted, target[taken]).backward()
        optimizer.step()
    first, offset, second, last = (weight.detach() for weight in weights)
    first = first / scale
    router.fitted.set_weights(second * spread[:, None], last * spread + middle, first, offset - first @ mean)


@contextmanager
def _installed(
    model: ChiarForCausalLM,
    fits: Mapping[tuple[str, int], _Fit],
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


def _calibrate(
    model: ChiarForCausalLM, batches: list[Tensor | Mapping[str, Any]], shares: Mapping[tuple[str, int], float]
) -> None:
    """Set the thresholds of every side and layer to a share of its own."""
    by_side = [{i: share for (side, i), share in shares.items() if side == name} for name in ("look", "kept")]
    set_thresholds(model, [embed_batch(model, batch) for batch in batches], *by_side)


def _spread(config: ChiarConfig, harms: Mapping[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    """Spread the sides' shares by the roots of the harms, in the config, and say what each layer gets.

    The root is what minimises Σ hᵢ / ρᵢ under Σ ρᵢ: a harm that falls as one over the share.
    """
    shares: dict[tuple[str, int], float] = {}
    for side, (field, weights) in _SPREADS.items():
        own = {i: math.sqrt(max(harm, 0.0)) for (name, i), harm in harms.items() if name == side}
        if own:
            setattr(config, weights, [own.get(i, 0.0) for i in range(len(config.menus))])
            shares |= {(side, i): share for i, share in config.layer_shares(field).items()}
    return shares


def _harms(
    model: ChiarForCausalLM, batches: list[Tensor | Mapping[str, Any]], sides: list[tuple[str, int]]
) -> dict[tuple[str, int], float]:
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
            counted = _predicted(batch, context).to(x.device) != IGNORED
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


def rank_correlation(a: Float[Tensor, " tokens"], b: Float[Tensor, " tokens"]) -> float:
    """Spearman's rank correlation; 0 where one of the two is the same for all tokens. Ties share their mean rank."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1).prod()
    return float(ranks[0] @ ranks[1] / norms) if norms > 0 else 0.0


def _ranks(values: Tensor) -> Float[Tensor, " tokens"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def top_recall(score: Float[Tensor, " tokens"], target: Float[Tensor, " tokens"], top: int) -> float:
    """Of the `top` tokens with the largest targets, the share that is among the `top` with the largest scores."""
    found = torch.isin(score.topk(top).indices, target.topk(top).indices)
    return float(found.double().mean())


def top_captured(score: Float[Tensor, " tokens"], target: Float[Tensor, " tokens"], top: int) -> float:
    """What the targets of the `top` tokens with the largest scores add up to, as a part of the most that it can be."""
    best = float(target.topk(top).values.sum())
    return float(target[score.topk(top).indices].sum()) / best if best > 0 else 1.0
