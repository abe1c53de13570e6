"""The routed block: a menu of operators, a router that gives each token to one of them, and a feed-forward."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers.context import Context, Spectra
from chiaroscuro.layers.norms import NormType, make_norm
from chiaroscuro.layers.operator import Operator
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.layers.router import Decision, Router, ScoreRouter
from chiaroscuro.layers.short_convolution import ShortConvolution
from chiaroscuro.layers.thresholds import refuse_impossible_share
from chiaroscuro.ops.spectral import Spectrum

NormPlacement = Literal["pre", "post"]
Execution = Literal["sparse", "dense"]


@dataclass(frozen=True)
class Routing:
    """What a layer did with its tokens.

    Attributes:
        operators: the layer's menu, in order of cost.
        entropy: H of the operator's input, float32; 0 at padding. None where no router reads it and no report was asked
            for.
        operator_index: which operator each token got (the one of the largest weight, where a router weighs them); −1 at
            padding.
        score: what the thresholds were compared with, where there are any.
        scale: what the last operator's output was multiplied by, where the router scales it.
        weights: the operators' weights, where the router gives weights.
        kept: which tokens the key side keeps, to be seen from beyond the window, for all key-value heads or for each;
            None where nothing decides it.
        kept_score: what the key side's threshold was compared with.

    """

    operators: tuple[str, ...]
    entropy: Float[Tensor, "batch time"] | None
    operator_index: Int[Tensor, "batch time"]
    score: Float[Tensor, "batch time"] | None = None
    scale: Float[Tensor, "batch time"] | None = None
    weights: Float[Tensor, "batch time operators"] | None = None
    kept: Bool[Tensor, "batch time *heads"] | None = None
    kept_score: Float[Tensor, "batch time *heads"] | None = None

    @property
    def share(self) -> Float[Tensor, " operators"]:
        """The share of the real tokens that each operator got (its mean weight, where a router weighs them)."""
        real = self.operator_index >= 0
        given = self.weights
        if given is None:
            given = nn.functional.one_hot(self.operator_index.clamp(min=0), len(self.operators))
        return (given.detach().float() * real[..., None]).sum((0, 1)) / real.sum().clamp(min=1)


@dataclass(frozen=True)
class _Unit:
    """A module of the menu, the name that it is kept under, and which of the menu's operators it is."""

    name: str
    operator: Operator
    indices: tuple[int, ...]


class RoutedBlock(nn.Module):
    """One layer: an operator sub-layer, then a feed-forward sub-layer, each with its norm and its residual.

    `norm="post"`: y = N(x + op(x)), each operator with a norm of its own, as the paper's code has it.
    `norm="pre"`: y = x + op(N(x)), one norm for all; router, entropy and filter all see N(x).

    Where each token gets one operator, execution is `"sparse"`: an operator runs on its own tokens alone (at padding
    the operator sub-layer then adds nothing). `"dense"` runs every operator on every token and then takes each token's
    own: the plain form that sparse execution is held to, and what a router by weights needs.

    Args:
        width: d, the features of a token.
        operators: the menu: operators by name, in order of cost. Where one module has several names, it runs the tokens
            of all of them together, and `context.choice` tells it which token came by which.
        router: decides between several operators; None for a menu of one.
        feed_forward: the position-wise sub-layer that all tokens go through.
        kv_router: decides which tokens are kept, for an operator that asks (`Operator.keeps`); else None.
        norm: `"pre"` or `"post"`.
        norm_type: `"layer"` or `"rms"`.
        norm_epsilon: what a norm adds to the variance; its usual value unless given.
        spectrum: of the entropy.
        dropout: on the sub-layers' outputs, in training.
        execution: `"sparse"` or `"dense"`; a router that gives weights is executed densely under both.
        short_conv: what the operators' input goes through first, such as `NeighbourMixing`; router, entropy and
            operators all see its output.

    Raises:
        UserError: an unknown norm placement, norm type or execution, an empty menu, several operators without a
            router or a router for one, or a kv_router where no operator asks for it, or none where one does.

    """

    follows_data = False
    """Whether somebody calls `step_calibration` for it, as a model's trainer does."""

    def __init__(
        self,
        width: int,
        operators: Mapping[str, Operator],
        router: Router | None,
        feed_forward: nn.Module,
        *,
        kv_router: ScoreRouter | None = None,
        norm: NormPlacement = "pre",
        norm_type: NormType = "layer",
        norm_epsilon: float | None = None,
        spectrum: Spectrum = "orthonormal",
        dropout: float = 0.0,
        execution: Execution = "sparse",
        short_conv: ShortConvolution | None = None,
    ) -> None:
        super().__init__()
        if execution not in get_args(Execution):
            raise UserError(f"execution={execution!r}: choose one of {', '.join(get_args(Execution))}")
        if norm not in get_args(NormPlacement):
            raise UserError(f"norm={norm!r}: choose one of {', '.join(get_args(NormPlacement))}")
        if not operators or (router is None) != (len(operators) == 1):
            raise UserError(
                f"a menu of {len(operators)} operators with router={router}: a block has at least one operator, and a "
                "router exactly where it has several"
            )
        if (kv_router is None) == any(operator.keeps(operator.options) for operator in operators.values()):
            raise UserError(
                f"menu {tuple(operators)} with kv_router={kv_router}: give one where an operator has "
                "attention_context='kept', and only there"
            )
        weighs = router is not None and (router.trains_densely or not router.one_operator_per_token)
        if weighs and len(set(map(id, operators.values()))) < len(operators):
            raise UserError(
                f"menu {tuple(operators)} with {type(router).__name__}: some of these are one module with one output, "
                "which can't be weighed against itself: take a router by a score, or leave one of them out"
            )
        if spectrum not in get_args(Spectrum):
            raise UserError(f"spectrum={spectrum!r}: choose one of {', '.join(get_args(Spectrum))}")
        self.operator_names = tuple(operators)
        self.norm_placement = norm
        self.spectrum = spectrum
        self.execution = execution
        # A module of several names is kept under the last of them.
        last = {operator: name for name, operator in operators.items()}
        self._indices = {
            name: tuple(k for k, other in enumerate(operators.values()) if other is operator)
            for operator, name in last.items()
        }
        if torn := [name for name, own in self._indices.items() if own[-1] - own[0] != len(own) - 1]:
            raise UserError(
                f"menu {tuple(operators)}: the operators that are one module with {torn[0]!r} must stand side by side"
            )
        self.operators = nn.ModuleDict({name: operator for operator, name in last.items()})
        self.router = router
        self.kv_router = kv_router
        normed = tuple(self.operators) if norm == "post" else ("input",)
        self.short_conv = short_conv
        self.operator_norms = nn.ModuleDict({name: make_norm(norm_type, width, norm_epsilon) for name in normed})
        self.feed_forward_norm = make_norm(norm_type, width, norm_epsilon)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    @property
    def menu(self) -> list[tuple[str, Operator]]:
        """The modules with their names, as what they are."""
        return [(name, cast(Operator, operator)) for name, operator in self.operators.items()]

    @property
    def units(self) -> list[_Unit]:
        """The modules, with the places on the menu that are theirs."""
        return [_Unit(name, operator, self._indices[name]) for name, operator in self.menu]

    @property
    def thresholds(self) -> Float[Tensor, " thresholds"] | None:
        """The thresholds that this layer routes by; None where nothing is routed by a score."""
        return self.router.calibration.values if isinstance(self.router, ScoreRouter) else None

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        context: Context | None = None,
        output_routing: bool = False,
    ) -> tuple[Float[Tensor, "batch time width"], Routing | None]:
        """Run the layer.

        Args:
            x: the tokens; with a cache, the new ones.
            context: what else is known about them: padding, positions, documents, a cache.
            output_routing: also report what a layer of one operator did, at the price of its entropy.

        Returns:
            The tokens after this layer, and the routing: None where there was nothing to route and none was asked for.

        Raises:
            UserError: the context has several documents in a row, and an operator can't keep them apart.

        """
        context = Context() if context is None else context
        if context.segments is not None:
            self._refuse_documents()
        source = self.operator_input(x, context)
        context = replace(context, spectra=self._spectra(source), layer_input=x)
        routing = self._route(source, context, output_routing) if self._decides or output_routing else None
        if self._runs_sparsely(routing, context):
            x = self._mix_sparsely(x, source, routing, context)
        else:
            x = self._mix_densely(x, source, routing, context)
        if self.norm_placement == "pre":
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), routing
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x))), routing

    def route(self, x: Float[Tensor, "batch time width"], context: Context | None = None) -> Routing:
        """The routing alone, without running an operator: what a calibration needs. Arguments as of `forward`.

        A cache is read, and not advanced.
        """
        context = Context() if context is None else context
        context = replace(context, cache=copy.deepcopy(context.cache))
        source = self.operator_input(x, context)
        return self._route(source, replace(context, spectra=self._spectra(source), layer_input=x), report=True)

    @torch.no_grad()
    def calibrate(
        self,
        x: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
        share: float | None = None,
        context: Context | None = None,
        kv_share: float | None = None,
    ) -> None:
        """Set the thresholds from data: the share ρ of these real tokens goes to the menu's last operator.

        Where the key side has a router, its threshold is set too, so that `kv_share` of them are kept. A block that is
        used alone calibrates only here: in a `ChiarModel`, `step_calibration` follows the data.

        Args:
            x: tokens such as the block will see; what it was trained on, or is about to be.
            attention_mask: True for real tokens; that of the context, unless given.
            share: ρ from 0 to 1; the one that the block has, unless given.
            context: what else is known about the tokens.
            kv_share: the share that is kept, from 0 to 1; the one that the block has, unless given.

        Raises:
            UserError: there are no thresholds to set, as where the block routes by no score or by fixed thresholds;
                there is no real token, a share is impossible, or a score is not finite. Nothing is set then.

        """
        context = context or Context()
        if attention_mask is not None:
            context = replace(context, attention_mask=attention_mask)
        routing = self.route(x, context)
        seen = []
        for name, asked, router, score in (
            ("share", share, self.router, routing.score),
            ("kv_share", kv_share, self.kv_router, routing.kept_score),
        ):
            if score is None or not isinstance(router, ScoreRouter) or not router.calibration.running:
                if asked is not None or (name == "share" and self.kv_router is None):
                    raise UserError(
                        f"menu {self.operator_names}: no thresholds to set for {name}, for there is no score or fixed "
                        "ones"
                    )
                continue
            asked = router.calibration.share if asked is None else asked
            refuse_impossible_share(name, asked)
            chosen = context.real(x.shape[1])
            real = score if chosen is None else score[chosen]
            if not real.numel():
                raise UserError("no real token to calibrate from: give tokens, or an attention_mask that leaves some")
            router.calibration.refuse_broken(real)
            seen.append((router.calibration, real.flatten(), asked))
        for thresholds, real, asked in seen:
            thresholds.set_from(real, asked)

    def operator_input(
        self, x: Float[Tensor, "batch time width"], context: Context | None = None
    ) -> Float[Tensor, "batch time width"]:
        """What router and operators see of the layer's input: its norm, or with post-norm the input itself.

        Where the layer has a short convolution, its output for these. A cache is advanced by it.
        """
        source = self.operator_norms["input"](x) if self.norm_placement == "pre" else x
        if self.short_conv is None:
            return source
        return self.short_conv(source, self._with_state(context or Context(), "input.short_conv", self.short_conv))

    @staticmethod
    def _with_state(context: Context, name: str, part: ShortConvolution | Router) -> Context:
        """With the state of a part that is no operator: its name has a dot in it, as no operator's has."""
        state = None if context.cache is None else context.cache.of(name, part)
        return context if state is context.state else replace(context, state=state)

    def _spectra(self, source: Tensor) -> Spectra:
        weights = [operator.spectral_weight for _, operator in self.menu]
        filters = [weight for weight in weights if weight is not None]
        return Spectra(
            source,
            self.spectrum,
            differentiable=self.router is not None and self.router.differentiates_entropy,
            filter=filters[0] if len(filters) == 1 else None,
        )

    def _refuse_documents(self) -> None:
        for name, operator in self.menu:
            if not operator.separates_documents:
                raise UserError(
                    f"position_ids restart within a row, so it holds several documents, and operator {name!r} does not "
                    "keep them apart: give one document per row, padded"
                )

    @property
    def _decides(self) -> bool:
        return self.router is not None or self.kv_router is not None

    def _route(self, source: Tensor, context: Context, report: bool) -> Routing:
        assert context.spectra is not None
        routers = [router for router in (self.router, self.kv_router) if router is not None]
        reported = report or any(router.reads_entropy for router in routers)
        if reported:
            entropy = context.spectra.entropy().float()
        else:
            if "no entropy" not in context.shared:
                context.shared["no entropy"] = torch.zeros(source.shape[:2], dtype=torch.float32, device=source.device)
            entropy = context.shared["no entropy"]
        if self.router is None:
            decision = Decision(torch.zeros(source.shape[:2], dtype=torch.long, device=source.device))
        else:
            decision = self.router(source, entropy, self._with_state(context, "layer.router", self.router))
            self._check_decision(decision, source)
        kept = None
        if self.kv_router is not None:
            kept = self.kv_router(source, entropy, self._with_state(context, "layer.kv_router", self.kv_router))
        index, real = decision.operator_index, context.real(source.shape[1])
        if real is not None:
            entropy = entropy.masked_fill(~real, 0.0)
            index = index.masked_fill(~real, -1)
        return Routing(
            self.operator_names,
            entropy.detach() if reported else None,
            index,
            decision.score,
            decision.scale,
            decision.weights,
            None if kept is None else kept.operator_index.bool(),
            None if kept is None else kept.score,
        )

    def _check_decision(self, decision: Any, source: Tensor) -> None:
        """Raise a UserError where a router gives what would send tokens nowhere."""
        name, index = type(self.router).__name__, getattr(decision, "operator_index", None)
        if not isinstance(index, Tensor) or index.shape != source.shape[:2] or index.is_floating_point():
            given = type(decision).__name__ if index is None else f"{index.dtype} of shape {tuple(index.shape)}"
            raise UserError(
                f"{name} decided by {given}: need a Decision with one whole number for each of the "
                f"{tuple(source.shape[:2])} tokens, its operator_index"
            )
        # Thresholds can't leave the menu. On a GPU, to look would be to wait.
        if isinstance(self.router, ScoreRouter) or index.device.type != "cpu" or torch.compiler.is_compiling():
            return
        operators = len(self.operator_names)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < operators:
            raise UserError(
                f"{name} chose operators from {int(index.min())} to {int(index.max())} of a menu of {operators}, which "
                f"are 0 to {operators - 1}"
            )

    def _runs_sparsely(self, routing: Routing | None, context: Context) -> bool:
        if self.execution == "dense":
            return False
        if self.router is not None:
            return routing is not None and routing.weights is None
        # One operator for all tokens has nothing to leave out but padding, which a compiler would rather compute too.
        padded = context.attention_mask is not None or context.segments is not None
        return padded and any(operator.packs() for _, operator in self.menu) and not torch.compiler.is_compiling()

    # Not `torch.compiler.disable`, which imports the compiler here.
    @torch._disable_dynamo  # which tokens go where is data: one graph break, and not one for each operator
    def _mix_sparsely(self, x: Tensor, source: Tensor, routing: Routing | None, context: Context) -> Tensor:
        """The operator sub-layer, each operator on its own tokens."""
        if self.training and not self.follows_data:
            self._warn_if_uncalibrated()
        if x.shape[:2] == (1, 1) and context.attention_mask is None and not torch.is_grad_enabled():
            return self._mix_one_token(x, source, routing, context)
        mixed = x
        for unit in self.units:
            tokens = self._tokens_of(unit, x, routing, context)
            own = self._context_of(unit, routing, context)
            if len(tokens) == 0 and own.state is None and not torch.is_grad_enabled():
                continue
            output = unit.operator(source, own, tokens)
            _check_output(unit, output, (len(tokens), x.shape[-1]))
            scale = self._scale_of(unit, routing)
            output = self.dropout(output if scale is None else output * tokens.take(scale)[:, None].to(output.dtype))
            if self.norm_placement == "post":
                mixed = tokens.put_in(mixed, self.operator_norms[unit.name](tokens.take(x) + output))
            else:
                mixed = tokens.add_to(mixed, output)
        return mixed

    def _warn_if_uncalibrated(self) -> None:
        """Say once that a block alone routes by the thresholds of white noise until somebody calibrates it."""
        router = self.router
        calibration = router.calibration if isinstance(router, ScoreRouter) and not router.null_is_exact else None
        if calibration is not None and calibration.running and not calibration.calibrated:
            warnings.warn(
                "this block routes by the thresholds of white noise: call block.calibrate(x) with tokens such as it "
                "will see, and again when they have changed in training",
                stacklevel=4,
            )
        self.follows_data = True

    def _mix_one_token(self, x: Tensor, source: Tensor, routing: Routing | None, context: Context) -> Tensor:
        """What `_mix_sparsely` does with a token that is decoded alone: there is nothing to pack."""
        chosen = 0 if routing is None else int(routing.operator_index)
        for unit in self.units:
            own = self._context_of(unit, routing, context)
            if chosen in unit.indices:
                mixed = self._mix_in(unit, x, source, routing, own)
            elif own.state is not None:  # it may keep something of every token, and counts those that pass by
                unit.operator(source, own, PackedTokens.none_of(x))
        return mixed

    def _tokens_of(self, unit: _Unit, x: Tensor, routing: Routing | None, context: Context) -> PackedTokens:
        """Which tokens a unit got; a single one gets the real ones."""
        if self.router is not None and routing is not None:
            return PackedTokens.of(_goes_to(routing.operator_index, unit), context.segments)
        return PackedTokens.real_of(x, context.real(x.shape[1]), context.segments)

    def _context_of(
        self, unit: _Unit, routing: Routing | None, context: Context, routed: Tensor | None = None
    ) -> Context:
        """The context of one unit: with its own state, and which token came by which of its names."""
        state = None if context.cache is None else context.cache.of(unit.name, unit.operator)
        choice = None
        if len(unit.indices) > 1 and routing is not None:
            choice = routing.operator_index - unit.indices[0] if unit.indices[0] else routing.operator_index
        kept = scale = None
        if self.kv_router is not None and routing is not None:
            assert routing.kept_score is not None
            kept, scale = routing.kept, self.kv_router.scale(routing.kept_score)
        if state is None and choice is None and routed is None and kept is None:
            return context
        return replace(context, state=state, choice=choice, routed=routed, kept=kept, kept_scale=scale)

    def _scale_of(self, unit: _Unit, routing: Routing | None) -> Tensor | None:
        """What a unit's outputs are multiplied by: those of the menu's last operator by what the router says."""
        last = len(self.operator_names) - 1
        if routing is None or routing.scale is None or last not in unit.indices:
            return None
        return routing.scale if len(unit.indices) == 1 else routing.scale.where(routing.operator_index == last, 1.0)

    def _mix_densely(self, x: Tensor, source: Tensor, routing: Routing | None, context: Context) -> Tensor:
        """The operator sub-layer, every operator on every token, then each token its own."""
        outputs = []
        for unit in self.units:
            routed = None
            if self.router is not None and routing is not None and self.router.one_operator_per_token:
                routed = _goes_to(routing.operator_index, unit)
            own = self._context_of(unit, routing, context, routed)
            outputs.append(self._mix_in(unit, x, source, routing, own))
        if routing is None or len(outputs) == 1:
            return outputs[0]
        if routing.weights is not None:
            weighted = zip(routing.weights.unbind(-1), outputs, strict=True)
            return torch.stack([weight[..., None] * output for weight, output in weighted]).sum(0)
        mixed = outputs[0]
        for unit, output in zip(self.units[1:], outputs[1:], strict=True):
            mixed = torch.where(_goes_to(routing.operator_index, unit)[..., None], output, mixed)
        return mixed

    def _mix_in(self, unit: _Unit, x: Tensor, source: Tensor, routing: Routing | None, context: Context) -> Tensor:
        """One unit on every token, with its residual."""
        output: Any = unit.operator(source, context)
        _check_output(unit, output, x.shape)
        scale = self._scale_of(unit, routing)
        mixed = x + self.dropout(output if scale is None else output * scale[..., None].to(output.dtype))
        return self.operator_norms[unit.name](mixed) if self.norm_placement == "post" else mixed


def _check_output(unit: _Unit, output: Any, shape: Sequence[int]) -> None:
    """Raise a UserError where an operator's output would be broadcast over the tokens."""
    if getattr(output, "shape", None) != shape:
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise UserError(
            f"operator {unit.name!r} gave an output of {given}: need {tuple(shape)}, a vector for each token"
        )


def _goes_to(operator_index: Int[Tensor, "batch time"], unit: _Unit) -> Bool[Tensor, "batch time"]:
    """Which tokens go to a unit, by any of its names."""
    chosen = operator_index == unit.indices[0]
    for k in unit.indices[1:]:
        chosen = chosen | (operator_index == k)
    return chosen
