"""The base class of operators: everything that the rest of the library asks of one.

An operator mixes the tokens of a layer. It owns its options, its dense and its packed form, its state in the cache, its
count of operations, and its initialisation. Nothing outside its file asks for its name or its class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro.errors import UserError, suggest
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.layers.state import OperatorState


@dataclass(frozen=True)
class NoOptions:
    """The options of an operator or a router that has none."""


@dataclass(frozen=True)
class Work:
    """One sequence for an operator to work on, for counting. Numbers may be means over sequences.

    Attributes:
        length: T, the new tokens of the sequence.
        tokens: how many of them the operator runs on.
        routed: whether the layer sends the others elsewhere, so that they are not computed here.
        past: cached tokens before them.
        training: whether to count forward and backward, and not the forward alone.
        causal: whether a token is paired with those before it alone, as kernels have it that skip the rest.
        dense: whether the operator runs on all tokens because execution is dense, though a router chooses some.
        spectrum_at_hand: whether the router has computed DCT(x) already.
        last: of `tokens`, how many are routed to it by the last of its names, where that can be fewer: a menu may have
            it under several, and dense execution runs it on all; else None.
        kept: the share of all tokens that the key side's router keeps.
        rows: how many such sequences are computed at once: a transform of few vectors goes another way.

    """

    length: int | float
    tokens: int | float
    routed: bool = False
    past: int | float = 0
    training: bool = False
    causal: bool = True
    dense: bool = False
    spectrum_at_hand: bool = False
    last: int | float | None = None
    kept: int | float = 1.0
    rows: int = 1

    def mean_beyond(self, window: int) -> float:
        """The mean over the new tokens of how many of those up to and with it lie beyond its nearest `window`."""

        def triangle(n: int | float) -> int | float:
            return n * (n + 1) / 2 if n > 0 else 0

        return (triangle(self.past + self.length - window) - triangle(self.past - window)) / self.length

    def pairs(self, keys: int | float, past: int | float, causal: bool = True) -> int | float:
        """Pairs of the operator's tokens with `keys` of the new tokens and with `past` earlier ones."""
        if self.length == 1:  # alone it sees itself, however few tokens a sequence sends here on average
            return self.tokens * (past + 1)
        return self.tokens * (past + (min((keys + 1) / 2, keys) if causal and self.causal else keys))

    @property
    def product(self) -> int:
        """How often a matrix product is computed: its backward is two more."""
        return 3 if self.training else 1

    @property
    def transform(self) -> int:
        """How often a fixed linear map is computed: its backward is one more."""
        return 2 if self.training else 1


@dataclass(frozen=True)
class Count:
    """What some work costs.

    Attributes:
        operations: floating-point operations by what they are for, such as `{"attention scores": …}`.
        numbers_kept: numbers in the operator's state afterwards, for this one sequence.
        published: multiply-adds by the formula of the author's code, which counts attention alone.

    """

    operations: Mapping[str, int | float] = field(default_factory=dict)
    numbers_kept: int | float = 0
    published: int | float = 0


class Operator(nn.Module):
    """Mixes the tokens of a layer: x (B, T, d) → (B, T, d).

    A subclass sets `Options` and the class attributes, and writes `mix`; then, for what it wants to be good at,
    `mix_packed`, `new_cache`, `count` and `reset_parameters`. `register_operator` gives it a name for menus.

    Args:
        width: d, the features of a token.
        options: fields of the subclass's `Options`. In a model, an option that a menu does not set takes the value of
            the configuration's field of the same name, if there is one, and else its default.

    Raises:
        UserError: an unknown option, or one that is impossible for this width.

    """

    Options: ClassVar[type] = NoOptions
    """A dataclass of the operator's options."""
    cost: ClassVar[int | float | None] = None
    """Its place in a menu, which lists operators by rising cost (dct 0, conv 0.5, rbf 1, local 1.5, attention 2); one
    of None may stand anywhere."""
    reads_spectrum: ClassVar[bool] = False
    """Whether it works on DCT(x), so that it can share the router's transform."""
    part_of: ClassVar["type[Operator] | None"] = None
    """The operator that runs this one's tokens with its own, by one set of parameters, where a menu has both."""
    separates_documents: ClassVar[bool] = False
    """Whether it honours `context.segments`. True for an operator that looks at one token at a time."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.width = width
        self.options: Any = make_options(type(self), options)
        self.check(width, self.options)

    @classmethod
    def check(cls, width: int, options: Any) -> None:
        """Raise a UserError if these options are impossible for this width; `Options` checks what it can alone."""

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        context: Context | None = None,
        tokens: PackedTokens | None = None,
    ) -> Tensor:
        """`mix`, or with `tokens` `mix_packed`. A subclass overrides these two, not this one.

        Args:
            x: the tokens of the layer; with a cache, the new ones.
            context: what else is known about them.
            tokens: run on these alone.

        Returns:
            (B, T, d), or with `tokens` theirs alone, (N, d).

        """
        context = Context() if context is None else context
        return self.mix(x, context) if tokens is None else self.mix_packed(x, tokens, context)

    def mix(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """The dense form: the output of every token. The oracle that the packed form is held to."""
        raise NotImplementedError

    def mix_packed(
        self, x: Float[Tensor, "batch time width"], tokens: PackedTokens, context: Context
    ) -> Float[Tensor, "tokens width"]:
        """The output of some tokens. Unless overridden all are computed, and these are taken: nothing is saved."""
        return tokens.take(self.mix(x, context))

    def gain_of_being_kept(
        self,
        x: Float[Tensor, "batch time width"],
        context: Context,
        slope: Float[Tensor, "batch time width"],
    ) -> Float[Tensor, "batch time key_heads"] | None:
        """What the loss gains by a token that is seen from far, which a fitted score of who is kept is to foretell.

        None for an operator that does not tell near from far. Arguments and values as of
        `SelfAttention.gain_of_being_kept`.
        """
        return None

    def new_cache(self) -> OperatorState | None:
        """A new state for `context.state`, or None for an operator that looks at one token at a time.

        An operator that doesn't override this can't be cached, and neither can a model that has it on a menu.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no state")

    @classmethod
    def uncacheable(cls, options: Any) -> str:
        """Why an operator with these options can't be cached; empty if it can."""
        return "" if cls.new_cache is not Operator.new_cache else "has no new_cache(), so it can't be cached"

    @classmethod
    def count(cls, width: int, options: Any, work: Work) -> Count:
        """What some work costs.

        Raises:
            UserError: the operator does not count its operations.

        """
        raise UserError(f"{cls.__name__} has no count of operations: write its count()")

    def reset_parameters(self) -> None:
        """Initialise parameters and buffers that are the operator's own; those of `nn.Linear` need no word here."""

    @classmethod
    def keeps(cls, options: Any) -> bool:
        """Whether it reads `context.kept`, so that the block needs a router of the key side."""
        return False

    @classmethod
    def key_heads(cls, width: int, options: Any) -> int:
        """Its heads of keys, for each of which a router of the key side may choose by itself."""
        return 1

    @property
    def spectral_weight(self) -> Float[Tensor, " width"] | None:
        """The filter that it applies to DCT(x), if that is what it does: a kernel then filters with the entropy."""
        return None

    @classmethod
    def packs(cls) -> bool:
        """Whether it has a packed form of its own."""
        return cls.mix_packed is not Operator.mix_packed


def hosts(classes: Mapping[str, type[Operator]]) -> dict[str, str]:
    """By which operator of a menu each one's tokens are run: its own name, or that of the one that it is part of."""
    found = {}
    for name, cls in classes.items():
        hosting = [other for other, theirs in classes.items() if cls.part_of is theirs]
        found[name] = hosting[0] if hosting else name
    return found


def is_number(value: Any) -> bool:
    """Whether an option is a number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether an option is a whole number, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def make_options(cls: Any, given: Mapping[str, Any]) -> Any:
    """The `Options` of an operator's or a router's class from values by name.

    Raises:
        UserError: a name that is no option, or a value that the options refuse.

    """
    known = {option.name for option in fields(cls.Options)}
    for name, value in given.items():
        if name not in known:
            hint = suggest(name, known) if known else "it has no options"
            raise UserError(f"unknown option {name}={value!r} of {cls.__name__}: {hint}")
    try:
        return cls.Options(**given)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"options of {cls.__name__}: {error}") from None


def with_defaults(cls: Any, given: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name: those that a menu gives, and the model's own fields for the rest that bear their names."""
    known = [option.name for option in fields(cls.Options)]
    return {**{name: model[name] for name in known if name in model}, **given}
