"""Routers: which operator gets which token.

A router sees a token's vector and its spectral entropy, and answers with a `Decision`: the operator's index for every
token, or a weight for every operator. Most routers are a score per token and thresholds on it (`ScoreRouter`); only the
score differs between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import NoOptions, Work, is_number, make_options
from chiaroscuro.layers.row_thresholds import RowScores, follow_documents
from chiaroscuro.layers.state import OperatorState
from chiaroscuro.layers.thresholds import QUANTILES, Thresholds, refuse_impossible_share
from chiaroscuro.ops import null_entropy_quantiles
from chiaroscuro.ops.spectral import Spectrum

KEY_SIDE = ("dropped", "kept")
"""What a router of the key side chooses between."""


@dataclass(frozen=True)
class Decision:
    """What a router decided about a layer's tokens.

    Attributes:
        operator_index: which operator of the menu each token goes to, from 0. On the key side 0 for a token that is
            dropped and 1 for one that is kept, for all key-value heads or for each; in a retrofitted model likewise 1
            for one that looks far.
        score: what the thresholds were compared with, where there are any.
        scale: what the last operator's output is multiplied by, where the router scales it.
        weights: a weight for each operator, where every operator runs on every token and the outputs are averaged.

    """

    operator_index: Int[Tensor, "batch time *heads"]
    score: Float[Tensor, "batch time *heads"] | None = None
    scale: Float[Tensor, "batch time *heads"] | None = None
    weights: Float[Tensor, "batch time operators"] | None = None


class Router(nn.Module):
    """Decides which operator gets which token.

    A subclass sets `Options` and the class attributes and writes `forward`; `register_router` gives it a name.

    Args:
        width: d, the features of a token.
        operators: the menu, names in order of cost.
        layer: the number of the layer, for a router that draws by it.
        options: fields of the subclass's `Options`; in a model those not given take the values of the configuration's
            fields of the same names, if there are any, and else their defaults.

    Raises:
        UserError: an unknown or impossible option.

    """

    Options: ClassVar[type] = NoOptions
    """A dataclass of the router's options."""
    one_operator_per_token: ClassVar[bool] = True
    """False for a router that gives weights in inference too: then execution is dense, and sparse is refused."""
    trains_densely: ClassVar[bool] = False
    """Whether training needs every operator's output for every token, though inference does not."""
    reads_entropy: ClassVar[bool] = True
    """Whether it reads H(x), which is computed for it alone."""
    differentiates_entropy: ClassVar[bool] = False
    """Whether a gradient goes through the entropy."""

    def __init__(self, width: int, operators: Sequence[str], layer: int = 0, **options: Any) -> None:
        super().__init__()
        self.width = width
        self.operator_names = tuple(operators)
        self.layer = layer
        self.options: Any = make_options(type(self), options)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        entropy: Float[Tensor, "batch time"],
        context: Context | None = None,
    ) -> Decision:
        """Decide.

        Args:
            x: the operators' input.
            entropy: H(x); zeros for a router that does not read it.
            context: what else is known about the tokens.

        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise parameters and buffers that are the router's own; those of `nn.Linear` need no word here."""

    def new_cache(self) -> OperatorState | None:
        """A new state for the context's `state`: what it must know of earlier tokens; None for nothing."""
        return None

    @classmethod
    def count(cls, width: int, operators: int, options: Any, work: Work) -> int | float:
        """Operations per token, beside the entropy's transform: those of the router's own products and transforms.

        Args:
            width: d.
            operators: K, how many it chooses from.
            options: its own.
            work: what a pass does.

        """
        return 0.0


@dataclass(frozen=True)
class ScoreOptions:
    """Options of a router by a score.

    Attributes:
        attention_share: ρ, the share of tokens that calibration sends to the menu's last operator.
        thresholds: K − 1 fixed thresholds for K operators, instead of calibrated ones.
        spectrum: the spectrum of the entropy.
        history: how many tokens of their row thresholds follow, see `row_thresholds`; None for thresholds that stand
            still.

    """

    attention_share: float = 0.25
    thresholds: tuple[float, ...] | None = None
    spectrum: Spectrum = "orthonormal"
    history: int | None = None

    def __post_init__(self) -> None:
        refuse_impossible_share("attention_share", self.attention_share)
        given = self.thresholds
        if given is not None and not (isinstance(given, list | tuple) and all(map(is_number, given))):
            raise UserError(f"thresholds={given!r}: give a list of numbers, or nothing to calibrate them")
        history = self.history
        if history is not None and (isinstance(history, bool) or not isinstance(history, int) or history < 1):
            raise UserError(f"history={history!r}: must be a positive whole number, or left out")
        if history is not None and history >= 2**31:
            raise UserError(f"history={history}: must be less than 2³¹ tokens")
        if history is not None and given is not None:
            fixed = ", ".join(f"{value:g}" for value in given)
            raise UserError(
                f"history={history}, and thresholds that are fixed at {fixed}: these can't follow the row; set a share "
                "or calibrate first, or leave history out"
            )


def check_seed(seed: Any) -> None:
    """Raise a UserError if this is no `router_seed`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"router_seed={seed!r}: must be a whole number from 0 to 2³² − 1")


@dataclass(frozen=True)
class SeededOptions(ScoreOptions):
    """Options of a router by a score that draws something.

    Attributes:
        router_seed: of the draw.

    """

    router_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.router_seed)


@dataclass(frozen=True)
class HeadOptions(ScoreOptions):
    """Options of a router by a score that can give several: `heads`, one for each key-value head.

    They are for the key side, and in a retrofitted model for either.
    """

    heads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 1:
            raise UserError(f"heads={self.heads!r}: must be a positive whole number")


class ScoreRouter(Router):
    """A score per token against K − 1 thresholds: operator k for a token whose score lies above k of them.

    A subclass says what the score is and, where it is not H, how it is distributed before any data were seen. The
    choice has no gradient. A score that is to be learned gets one through `scale`.
    """

    Options = ScoreOptions
    scores_entropy: ClassVar[bool] = True
    """Whether the score is a spectral entropy, so that fixed entropy thresholds apply to it."""
    scores_its_own_entropy: ClassVar[bool] = False
    """Whether it is H(x) itself, so that entropies and thresholds can be drawn on one axis."""
    null_is_exact: ClassVar[bool] = False
    """Whether data can't be distributed otherwise than `null_quantiles`, so that these thresholds hold uncalibrated."""

    def __init__(self, width: int, operators: Sequence[str], layer: int = 0, **options: Any) -> None:
        super().__init__(width, operators, layer, **options)
        # The type is named because a model may be made under a default of bfloat16, which would round the table.
        probabilities = torch.linspace(0, 1, QUANTILES, dtype=torch.float64, device="cpu").tolist()
        null = self.null_quantiles(probabilities)
        self.calibration = Thresholds(
            len(self.operator_names), null, self.options.attention_share, self.options.thresholds
        )

    def null_quantiles(self, probabilities: Sequence[float]) -> Float[Tensor, " probabilities"]:
        """Quantiles of the score over white noise, from which an uncalibrated layer starts: here those of H."""
        return null_entropy_quantiles(self.width, probabilities, self.options.spectrum)

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"], context: Context
    ) -> Float[Tensor, "batch time *heads"]:
        """The number that is compared with the thresholds, or one for each key-value head (see `HeadOptions`)."""
        raise NotImplementedError

    def unready(self) -> str:
        """Why the score means nothing yet, in one line that says what to do; empty where it means something."""
        return ""

    def scale(self, score: Float[Tensor, "batch time *heads"]) -> Float[Tensor, "batch time *heads"] | None:
        """What the last operator's output is multiplied by: None for nothing, or a function of the score."""
        return None

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        entropy: Float[Tensor, "batch time"],
        context: Context | None = None,
    ) -> Decision:
        """Score every token, and count the thresholds that it lies above."""
        context = Context() if context is None else context
        score = self.score(x, entropy, context)
        if self.options.history is None:
            return Decision(self.calibration(score), score=score, scale=self.scale(score))
        thresholds = self.thresholds_of(score, context)
        own = thresholds if score.ndim == 2 else thresholds[:, :, None]
        return Decision((score[..., None] > own).sum(-1), score=score, scale=self.scale(score))

    def new_cache(self) -> RowScores | None:
        """The scores of each row, where its thresholds follow them."""
        return None if self.options.history is None else RowScores()

    def with_history(self, history: int | None) -> ScoreOptions:
        """Its options with another history. Thresholds that were fixed once, and are no longer, are left out.

        Raises:
            UserError: see `ScoreOptions`.

        """
        fixed = None if self.calibration.running else self.options.thresholds
        return replace(self.options, history=history, thresholds=fixed)

    @torch._disable_dynamo  # how much of a history there is, is data
    @torch.no_grad()
    def thresholds_of(
        self, score: Float[Tensor, "batch time *heads"], context: Context
    ) -> Float[Tensor, "batch time thresholds"]:
        """What each token's score is compared with. A document's thresholds follow its own tokens alone."""
        standing, history = self.calibration.values, self.options.history
        if history is None:
            return standing.expand(*score.shape[:2], -1)
        levels = self.calibration.levels
        scores = score if score.ndim == 3 else score[..., None]
        real = context.real(scores.shape[1])
        if context.segments is not None:
            return follow_documents(scores, real, context.segments, history, standing, levels)
        rows: RowScores = RowScores() if context.state is None else context.state
        return rows.follow(scores, real, history, standing, levels, context.past)


class ThresholdRouter(ScoreRouter):
    """The paper's default: the score is the spectral entropy H itself."""

    scores_its_own_entropy = True

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"], context: Context
    ) -> Float[Tensor, "batch time"]:
        """H."""
        return entropy


def pick_thresholds(costs: Sequence[int | float | None], low: float, high: float) -> tuple[float, ...]:
    """The paper's rule for its two thresholds: which of them splits a menu of operators of these costs.

    Three operators: both. Of its three operators, the two cheaper ones (dct and rbf) are split at the low one, the two
    costlier ones (rbf and attention) at the high one. Any other pair is split at their mean.

    Raises:
        UserError: a menu of more than three operators, for which two thresholds do not suffice.

    Source: the paper, v1 and v2, routing.

    """
    if len(costs) > 3:
        raise UserError(f"two thresholds split at most three operators, the menu has {len(costs)}")
    if len(costs) == 3:
        return low, high
    return {(0, 1): (low,), (1, 2): (high,)}.get(tuple(costs), ((low + high) / 2,))  # type: ignore[arg-type]
