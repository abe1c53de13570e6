"""The routed block: a menu of operators, a router that fills each token's plate, and the feed-forward they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chiaroscuro.layers.feed_forward import FEED_FORWARDS, FeedForwardKind
from chiaroscuro.layers.packed_tokens import AttentionContext, PackedTokens
from chiaroscuro.layers.registry import accepted, asked_names, find_operator, find_router
from chiaroscuro.layers.router import ScoreRouter
from chiaroscuro.layers.spectral_mixing import SpectralMixing
from chiaroscuro.ops import entropy_of_spectrum, has_kernel, spectral_coefficients, spectral_mix_with_entropy
from chiaroscuro.ops.spectral import Spectrum

NormPlacement = Literal["pre", "post"]
Execution = Literal["sparse", "dense"]


@dataclass(frozen=True)
class Routing:
    """What a layer did with its tokens.

    Attributes:
        operators: the layer's menu, in order of cost.
        entropy: H of the operator's input, float32; 0 at padding.
        operator_index: which operator each token got (the heaviest one, where a router weighs them); −1 at padding.
        score: what the thresholds were held against, where there are any.
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
        """Of the real tokens, how many each operator got (its mean weight, where a router weighs them)."""
        real = self.operator_index >= 0
        given = self.weights
        if given is None:
            given = nn.functional.one_hot(self.operator_index.clamp(min=0), len(self.operators))
        return (given.detach().float() * real[..., None]).sum((0, 1)) / real.sum().clamp(min=1)


class RoutedBlock(nn.Module):
    """One layer: operator sub-layer, then feed-forward sub-layer, each with its norm and its residual.

    `norm="post"`: y = LN(x + op(x)), each operator with a norm of its own, as the paper's code has it.
    `norm="pre"`: y = x + op(LN(x)), one norm for all; router, entropy and filter all see LN(x).

    A menu of one operator has no router. Where each token gets one operator, execution is `"sparse"`: an operator runs
    on its own tokens alone (at padding the operator sub-layer then adds nothing). `"dense"` runs every operator on
    every token and then takes each token's own: the plain form that sparse execution is held to, and what a router
    by weights needs.

    Args:
        width: d, the features of a token.
        operators: the menu, names in order of cost.
        heads: attention heads.
        feed_forward: `"gelu"`, or `"swiglu"`, Llama's.
        hidden: the feed-forward's width; unless given 4d, of swiglu 8/3 d.
        norm: `"pre"` or `"post"`.
        router: the router's name.
        attention_share: ρ, the share of tokens for the menu's last operator, for routers by a score.
        thresholds: fixed thresholds, for routers by a score; else they stand where white noise has ρ until `calibrate`
            sets them from data. (A block in a `ChiarModel` follows the model's own calibration.)
        spectrum: of the entropy.
        dropout: on the sub-layers' outputs and inside the feed-forward.
        attention_dropout: on the attention probabilities.
        rope_theta: the base of the rotary angles.
        execution: `"sparse"` or `"dense"`; a router that gives weights is executed densely under both.
        attention_context: what a routed token attends to, `"all"` tokens or the `"routed"` ones.
        rbf_causal: whether the rbf operator masks the future.
        layer: the layer's number, for a router that draws by it.
        router_seed: of what a router draws.

    Raises:
        UserError: an unknown operator or router.
        ValueError: an unknown norm placement, feed-forward or execution, a menu that is empty or names an operator
            twice, or what the operators and the router refuse.

    """

    def __init__(
        self,
        width: int,
        operators: Sequence[str] = ("dct", "attention"),
        *,
        heads: int = 1,
        feed_forward: FeedForwardKind = "gelu",
        hidden: int | None = None,
        norm: NormPlacement = "pre",
        router: str = "threshold",
        attention_share: float = 0.25,
        thresholds: tuple[float, ...] | None = None,
        spectrum: Spectrum = "orthonormal",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        rope_theta: float = 10000.0,
        execution: Execution = "sparse",
        attention_context: AttentionContext = "all",
        rbf_causal: bool = True,
        layer: int = 0,
        router_seed: int = 0,
    ) -> None:
        super().__init__()
        if execution not in get_args(Execution):
            raise ValueError(f"execution={execution!r}: choose 'sparse' or 'dense'")
        if norm not in get_args(NormPlacement):
            raise ValueError(f"norm={norm!r}: choose 'pre' or 'post'")
        if feed_forward not in FEED_FORWARDS:
            raise ValueError(f"feed_forward={feed_forward!r}: choose {' or '.join(map(repr, FEED_FORWARDS))}")
        if not operators or len(set(operators)) < len(operators):
            raise ValueError(f"operators={operators!r}: a menu names at least one operator, and none twice")
        self.operator_names = tuple(operators)
        self.norm_placement = norm
        self.spectrum = spectrum
        self.execution = execution
        sizes = {
            "width": width,
            "heads": heads,
            "dropout": attention_dropout,
            "rope_theta": rope_theta,
            "attention_context": attention_context,
            "causal": rbf_causal,
        }
        self.operators = nn.ModuleDict()
        for name in self.operator_names:
            cls = find_operator(name)
            self.operators[name] = cls(**accepted(cls, sizes))
        # Read from the signatures once: they don't change, and reading them is slow.
        self._asks_for = {name: asked_names(op.forward) for name, op in self.operators.items()}
        self._asks_sparsely = {
            name: asked_names(cast(Any, op).sparse_forward)
            for name, op in self.operators.items()
            if execution == "sparse" and hasattr(op, "sparse_forward")
        }
        self.router: nn.Module | None = None
        if len(self.operator_names) > 1:
            cls = find_router(router)
            offered = {
                "width": width,
                "operators": self.operator_names,
                "attention_share": attention_share,
                "thresholds": thresholds,
                "spectrum": spectrum,
                "layer": layer,
                "router_seed": router_seed,
            }
            self.router = cls(**accepted(cls, offered))
            self._asks_router = asked_names(cls.score) if issubclass(cls, ScoreRouter) else frozenset()
        normed = self.operator_names if norm == "post" else ("input",)
        self.operator_norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in normed})
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FEED_FORWARDS[feed_forward](width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    @property
    def thresholds(self) -> Float[Tensor, " thresholds"] | None:
        """The thresholds that this layer routes by; None where nothing is routed by a score."""
        return self.router.calibration.values if isinstance(self.router, ScoreRouter) else None

    def asks_for(self, name: str) -> bool:
        """Whether any operator of the menu asks for this part of the context, in the form in which it will run."""
        return any(name in asked for asked in (self._asks_for | self._asks_sparsely).values())

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch keys"] | None = None,
        output_routing: bool = False,
        **context: Any,
    ) -> tuple[Float[Tensor, "batch time width"], Routing | None]:
        """Run the layer.

        Args:
            x: the tokens; with a cache, the new ones.
            attention_mask: true for real tokens; with a cache, over the cached ones too.
            output_routing: also say what a layer of one operator did, at the price of its entropy.
            context: what operators may ask for beside these: `position_ids`, `mask`, `rotary`, `cache`,
                `implementation`; and routers by a score: `position_ids`, `input_ids`.

        Returns:
            The tokens after this layer, and the routing: None where there was nothing to route and none was asked for.

        """
        real = None if attention_mask is None else attention_mask[:, -x.shape[1] :].bool()
        context["attention_mask"] = attention_mask
        source = self.operator_norms["input"](x) if self.norm_placement == "pre" else x
        routes = self.router is not None or output_routing
        entropy = self._spectra(source, routes, context)
        routing = self._route(source, entropy, real, context) if routes and entropy is not None else None
        if self._runs_sparsely(routing, context):
            alone = x.shape[:2] == (1, 1) and attention_mask is None and not torch.is_grad_enabled()
            mix = self._mix_one_token if alone else self._mix_sparsely
            x = mix(x, source, routing, context)
        else:
            x = self._mix_densely(x, source, routing, context)
        if self.norm_placement == "pre":
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), routing
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x))), routing

    def route(
        self,
        x: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
        **context: Any,
    ) -> Routing:
        """The routing alone, without running an operator: what a calibration needs. Arguments as of `forward`."""
        source = self.operator_norms["input"](x) if self.norm_placement == "pre" else x
        real = None if attention_mask is None else attention_mask.bool()
        return self._route(source, self._entropy(spectral_coefficients(source)), real, context)

    @torch.no_grad()
    def calibrate(
        self,
        x: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch time"] | None = None,
        share: float | None = None,
        **context: Any,
    ) -> None:
        """Set the thresholds from data: of these real tokens, the share ρ goes to the menu's last operator.

        Args:
            x: tokens such as the block will see; what it was trained on, or is about to be.
            attention_mask: True for real tokens.
            share: ρ from 0 to 1; the one that the block has, unless given.
            context: as of `forward`.

        Raises:
            ValueError: the block does not route by a score, its thresholds are fixed, there is no real token, or the
                share is impossible.

        """
        if not isinstance(self.router, ScoreRouter) or not self.router.calibration.running:
            raise ValueError(f"menu {self.operator_names}: no thresholds to set, for it has no score or fixed ones")
        score = self.route(x, attention_mask, **context).score
        assert score is not None
        real = score.flatten() if attention_mask is None else score[attention_mask.bool()]
        if not len(real):
            raise ValueError("no real token to calibrate from: give tokens, or an attention_mask that leaves some")
        thresholds = self.router.calibration
        thresholds.set_from(real, thresholds.share if share is None else share)

    def _spectra(self, source: Tensor, routes: bool, context: dict[str, Any]) -> Tensor | None:
        """The entropy, where it is wanted, and into the context what the operators ask for of the same transform."""
        asking = [self.operators[name] for name, asked in self._asks_for.items() if "coefficients" in asked]
        if len(asking) == 1 and isinstance(asking[0], SpectralMixing) and has_kernel(source):
            # One kernel gives both. To filter a token that goes elsewhere costs it less than to read x again.
            context["mixed"], entropy = spectral_mix_with_entropy(source, asking[0].weight, self.spectrum)
            return entropy.detach() if self._chooses else entropy
        if not routes and not asking:
            return None
        context["coefficients"] = spectral_coefficients(source)
        return self._entropy(context["coefficients"]) if routes else None

    def _entropy(self, coefficients: Tensor) -> Tensor:
        return entropy_of_spectrum(coefficients.detach() if self._chooses else coefficients, self.spectrum)

    @property
    def _chooses(self) -> bool:
        """Whether thresholds choose: without a gradient, so that the entropy needs no graph either."""
        return self.router is None or isinstance(self.router, ScoreRouter)

    def _route(self, source: Tensor, entropy: Tensor, real: Tensor | None, context: dict[str, Any]) -> Routing:
        entropy = entropy.float()
        score = scale = weights = None
        if self.router is None:
            index = torch.zeros(source.shape[:2], dtype=torch.long, device=source.device)
        elif isinstance(self.router, ScoreRouter):
            score = self.router.score(source, entropy, **_asked(self._asks_router, context))
            scale = self.router.scale(score)
            index = self.router.decide(score)
        else:
            answer = self.router(source, entropy)
            weights = answer if answer.is_floating_point() else None
            index = answer.argmax(-1) if answer.is_floating_point() else answer
        if real is not None:
            entropy = entropy.masked_fill(~real, 0.0)
            index = index.masked_fill(~real, -1)
        return Routing(self.operator_names, entropy.detach(), index, score, scale, weights)

    def _runs_sparsely(self, routing: Routing | None, context: dict[str, Any]) -> bool:
        if self.execution == "dense":
            return False
        if self.router is not None:
            return routing is not None and routing.weights is None
        # One operator for all tokens has nothing to leave out, but padding.
        return context["attention_mask"] is not None and bool(self._asks_sparsely)

    def _mix_sparsely(self, x: Tensor, source: Tensor, routing: Routing | None, context: dict[str, Any]) -> Tensor:
        """The operator sub-layer, each operator on its own tokens."""
        mixed = x
        for k, name in enumerate(self.operator_names):
            tokens = PackedTokens.of(self._tokens_of(k, x, routing, context))
            needless = name not in self._asks_sparsely and "cache" not in self._asks_for[name]
            if len(tokens) == 0 and needless and not torch.is_grad_enabled():
                continue
            output = self._run_on(tokens, name, source, context)
            scale = self._scale_of(name, routing)
            output = self.dropout(output if scale is None else output * tokens.take(scale)[:, None].to(output.dtype))
            if self.norm_placement == "post":
                mixed = tokens.put_in(mixed, self.operator_norms[name](tokens.take(x) + output))
            else:
                mixed = tokens.add_to(mixed, output)
        return mixed

    def _mix_one_token(self, x: Tensor, source: Tensor, routing: Routing | None, context: dict[str, Any]) -> Tensor:
        """What `_mix_sparsely` does with a token that is decoded alone: there is nothing to pack."""
        chosen = 0 if routing is None else int(routing.operator_index)
        for k, name in enumerate(self.operator_names):
            if k != chosen and "cache" in self._asks_sparsely.get(name, self._asks_for[name]):
                # It may keep keys of all tokens, and counts those that go by.
                none = PackedTokens.of(torch.zeros_like(x[..., 0], dtype=torch.bool))
                self._run_on(none, name, source, context)
        return self._mix_in(self.operator_names[chosen], x, source, routing, context)

    def _tokens_of(self, k: int, x: Tensor, routing: Routing | None, context: dict[str, Any]) -> Tensor:
        """Which tokens the k-th operator got; a single operator gets the real ones."""
        if self.router is not None and routing is not None:
            return routing.operator_index == k
        mask = context["attention_mask"]
        return torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask[:, -x.shape[1] :].bool()

    def _run_on(self, tokens: PackedTokens, name: str, source: Tensor, context: dict[str, Any]) -> Tensor:
        """An operator's outputs for some tokens, packed."""
        operator = self.operators[name]
        if name in self._asks_sparsely:
            return cast(Any, operator).sparse_forward(source, tokens, **_asked(self._asks_sparsely[name], context))
        return tokens.take(operator(source, **_asked(self._asks_for[name], context)))

    def _scale_of(self, name: str, routing: Routing | None) -> Tensor | None:
        """What an operator's output is multiplied by: the last one's by what the router says, if it says so."""
        return None if routing is None or name != self.operator_names[-1] else routing.scale

    def _mix_densely(self, x: Tensor, source: Tensor, routing: Routing | None, context: dict[str, Any]) -> Tensor:
        """The operator sub-layer, every operator on every token, then each token its own."""
        outputs = []
        for k, name in enumerate(self.operators):
            if self.router is not None and routing is not None:
                context["routed"] = routing.operator_index == k
            outputs.append(self._mix_in(name, x, source, routing, context))
        if routing is None or len(outputs) == 1:
            return outputs[0]
        if routing.weights is not None:
            weighted = zip(routing.weights.unbind(-1), outputs, strict=True)
            return torch.stack([weight[..., None] * output for weight, output in weighted]).sum(0)
        mixed = outputs[0]
        for k, output in enumerate(outputs[1:], start=1):
            mixed = torch.where((routing.operator_index == k)[..., None], output, mixed)
        return mixed

    def _mix_in(self, name: str, x: Tensor, source: Tensor, routing: Routing | None, context: dict[str, Any]) -> Tensor:
        """One operator on every token, with its residual."""
        output = self.operators[name](source, **_asked(self._asks_for[name], context))
        scale = self._scale_of(name, routing)
        mixed = x + self.dropout(output if scale is None else output * scale[..., None].to(output.dtype))
        return self.operator_norms[name](mixed) if self.norm_placement == "post" else mixed


def _asked(names: frozenset[str], context: dict[str, Any]) -> dict[str, Any]:
    """Of the context, what was asked for by name."""
    return {name: value for name, value in context.items() if name in names}
