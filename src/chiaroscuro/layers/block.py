"""The routed block: a menu of operators, a router that gives each token to one of them, and a feed-forward."""

import copy
import warnings
from collections.abc import Mapping
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
from chiaroscuro.ops.spectral import Spectrum

NormPlacement = Literal["pre", "post"]
Execution = Literal["sparse", "dense"]


@dataclass(frozen=True)
class Routing:
    """What a layer did with its tokens.

    Attributes:
        operators: the layer's menu, in order of cost.
        entropy: H of the operator's input, float32; 0 at padding.
        operator_index: which operator each token got (the one of the largest weight, where a router weighs them); −1 at
            padding.
        score: what the thresholds were compared with, where there are any.
        scale: what the last operator's output was multiplied by, where the router scales it.
        weights: the operators' weights, where the router gives weights.

    """

    operators: tuple[str, ...]
    entropy: Float[Tensor, "batch time"]
    operator_index: Int[Tensor, "batch time"]
    score: Float[Tensor, "batch time"] | None = None
    scale: Float[Tensor, "batch time"] | None = None
    weights: Float[Tensor, "batch time operators"] | None = None

    @property
    def share(self) -> Float[Tensor, " operators"]:
        """The share of the real tokens that each operator got (its mean weight, where a router weighs them)."""
        real = self.operator_index >= 0
        given = self.weights
        if given is None:
            given = nn.functional.one_hot(self.operator_index.clamp(min=0), len(self.operators))
        return (given.detach().float() * real[..., None]).sum((0, 1)) / real.sum().clamp(min=1)


class RoutedBlock(nn.Module):
    """One layer: an operator sub-layer, then a feed-forward sub-layer, each with its norm and its residual.

    `norm="post"`: y = N(x + op(x)), each operator with a norm of its own, as the paper's code has it.
    `norm="pre"`: y = x + op(N(x)), one norm for all; router, entropy and filter all see N(x).

    Where each token gets one operator, execution is `"sparse"`: an operator runs on its own tokens alone (at padding
    the operator sub-layer then adds nothing). `"dense"` runs every operator on every token and then takes each token's
    own: the plain form that sparse execution is held to, and what a router by weights needs.

    Args:
        width: d, the features of a token.
        operators: the menu: operators by name, in order of cost.
        router: decides between several operators; None for a menu of one.
        feed_forward: the position-wise sub-layer that all tokens go through.
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
            router, or a router for one.

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
        self.operator_names = tuple(operators)
        self.norm_placement = norm
        self.spectrum = spectrum
        self.execution = execution
        self.operators = nn.ModuleDict(dict(operators))
        self.router = router
        normed = self.operator_names if norm == "post" else ("input",)
        self.short_conv = short_conv
        self.operator_norms = nn.ModuleDict({name: make_norm(norm_type, width, norm_epsilon) for name in normed})
        self.feed_forward_norm = make_norm(norm_type, width, norm_epsilon)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    @property
    def menu(self) -> list[tuple[str, Operator]]:
        """The operators with their names, as what they are."""
        return [(name, cast(Operator, operator)) for name, operator in self.operators.items()]

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
        context = replace(context, spectra=self._spectra(source))
        routing = self._route(source, context) if self.router is not None or output_routing else None
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
        source = self.operator_input(x, replace(context, cache=copy.deepcopy(context.cache)))
        return self._route(source, replace(context, spectra=self._spectra(source)))

    @torch.no_grad()
    def calibrate(
        self,
        x: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
        share: float | None = None,
        context: Context | None = None,
    ) -> None:
        """Set the thresholds from data: of these real tokens, the share ρ goes to the menu's last operator.

        A block that is used alone calibrates only here: in a `ChiarModel`, `step_calibration` follows the data.

        Args:
            x: tokens such as the block will see; what it was trained on, or is about to be.
            attention_mask: True for real tokens.
            share: ρ from 0 to 1; the one that the block has, unless given.
            context: what else is known about the tokens.

        Raises:
            UserError: the block does not route by a score, its thresholds are fixed, there is no real token, the share
                is impossible, or a score is not finite.

        """
        if not isinstance(self.router, ScoreRouter) or not self.router.calibration.running:
            raise UserError(f"menu {self.operator_names}: no thresholds to set, for it has no score or fixed ones")
        context = replace(context or Context(), attention_mask=attention_mask)
        score = self.route(x, context).score
        assert score is not None
        real = score.flatten() if attention_mask is None else score[attention_mask]
        if not len(real):
            raise UserError("no real token to calibrate from: give tokens, or an attention_mask that leaves some")
        thresholds = self.router.calibration
        thresholds.set_from(real, thresholds.share if share is None else share)

    def operator_input(
        self, x: Float[Tensor, "batch time width"], context: Context | None = None
    ) -> Float[Tensor, "batch time width"]:
        """What router and operators see of the layer's input: its norm, or with post-norm the input itself.

        Where the layer has a short convolution, its output for these. A cache is advanced by it.
        """
        source = self.operator_norms["input"](x) if self.norm_placement == "pre" else x
        if self.short_conv is None:
            return source
        # No operator's name has a dot in it.
        return self.short_conv(source, self._context_of("input.short_conv", self.short_conv, context or Context()))

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

    def _route(self, source: Tensor, context: Context) -> Routing:
        assert context.spectra is not None
        entropy = context.spectra.entropy().float()
        if self.router is None:
            decision = Decision(torch.zeros(source.shape[:2], dtype=torch.long, device=source.device))
        else:
            decision = self.router(source, entropy, context)
        index, real = decision.operator_index, context.real(source.shape[1])
        if real is not None:
            entropy = entropy.masked_fill(~real, 0.0)
            index = index.masked_fill(~real, -1)
        return Routing(self.operator_names, entropy.detach(), index, decision.score, decision.scale, decision.weights)

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
        for k, (name, operator) in enumerate(self.menu):
            tokens = self._tokens_of(k, x, routing, context)
            own = self._context_of(name, operator, context)
            if len(tokens) == 0 and own.state is None and not torch.is_grad_enabled():
                continue
            output = operator(source, own, tokens)
            scale = self._scale_of(name, routing)
            output = self.dropout(output if scale is None else output * tokens.take(scale)[:, None].to(output.dtype))
            if self.norm_placement == "post":
                mixed = tokens.put_in(mixed, self.operator_norms[name](tokens.take(x) + output))
            else:
                mixed = tokens.add_to(mixed, output)
        return mixed

    def _warn_if_uncalibrated(self) -> None:
        """Say once that a block alone routes by the thresholds of white noise until somebody calibrates it."""
        router = self.router
        if isinstance(router, ScoreRouter) and router.calibration.running and not router.calibration.calibrated:
            warnings.warn(
                "this block routes by the thresholds of white noise: call block.calibrate(x) with tokens such as it "
                "will see, and again when they have changed in training",
                stacklevel=4,
            )
        self.follows_data = True

    def _mix_one_token(self, x: Tensor, source: Tensor, routing: Routing | None, context: Context) -> Tensor:
        """What `_mix_sparsely` does with a token that is decoded alone: there is nothing to pack."""
        chosen = 0 if routing is None else int(routing.operator_index)
        for k, (name, operator) in enumerate(self.menu):
            own = self._context_of(name, operator, context)
            if k == chosen:
                mixed = self._mix_in(name, operator, x, source, routing, own)
            elif own.state is not None:  # it may keep something of every token, and counts those that pass by
                operator(source, own, PackedTokens.none_of(x))
        return mixed

    def _tokens_of(self, k: int, x: Tensor, routing: Routing | None, context: Context) -> PackedTokens:
        """Which tokens the k-th operator got; a single operator gets the real ones."""
        if self.router is not None and routing is not None:
            return PackedTokens.of(routing.operator_index == k, context.segments)
        real = context.real(x.shape[1])
        return PackedTokens.all_of(x, context.segments) if real is None else PackedTokens.of(real, context.segments)

    def _context_of(self, name: str, operator: Operator, context: Context, routed: Tensor | None = None) -> Context:
        """The context of one operator: with its own state."""
        state = None if context.cache is None else context.cache.of(name, operator)
        return context if state is None and routed is None else replace(context, state=state, routed=routed)

    def _scale_of(self, name: str, routing: Routing | None) -> Tensor | None:
        """What an operator's output is multiplied by: the last one's by what the router says, if it says so."""
        return None if routing is None or name != self.operator_names[-1] else routing.scale

    def _mix_densely(self, x: Tensor, source: Tensor, routing: Routing | None, context: Context) -> Tensor:
        """The operator sub-layer, every operator on every token, then each token its own."""
        outputs = []
        for k, (name, operator) in enumerate(self.menu):
            routed = routing.operator_index == k if self.router is not None and routing is not None else None
            own = self._context_of(name, operator, context, routed)
            outputs.append(self._mix_in(name, operator, x, source, routing, own))
        if routing is None or len(outputs) == 1:
            return outputs[0]
        if routing.weights is not None:
            weighted = zip(routing.weights.unbind(-1), outputs, strict=True)
            return torch.stack([weight[..., None] * output for weight, output in weighted]).sum(0)
        mixed = outputs[0]
        for k, output in enumerate(outputs[1:], start=1):
            mixed = torch.where((routing.operator_index == k)[..., None], output, mixed)
        return mixed

    def _mix_in(
        self, name: str, operator: Operator, x: Tensor, source: Tensor, routing: Routing | None, context: Context
    ) -> Tensor:
        """One operator on every token, with its residual."""
        output: Any = operator(source, context)
        scale = self._scale_of(name, routing)
        mixed = x + self.dropout(output if scale is None else output * scale[..., None].to(output.dtype))
        return self.operator_norms[name](mixed) if self.norm_placement == "post" else mixed
