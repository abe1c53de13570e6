"""Operators and routers from outside the package, and what may not be registered."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiaroscuro import ChiarConfig
from chiaroscuro.errors import UserError
from chiaroscuro.layers import (
    Context,
    Decision,
    Operator,
    PackedTokens,
    RoutedBlock,
    Router,
    ScoreRouter,
    SelfAttention,
    Work,
    build_block,
    find_operator,
    find_router,
    register_operator,
    register_router,
)
from chiaroscuro.layers.registry import OPERATORS, ROUTERS
from chiaroscuro.ops import dct

pytestmark = pytest.mark.usefixtures("registries_as_before")


class Doubling(Operator):
    """Looks at one token at a time."""

    def mix(self, x: Tensor, context: Context) -> Tensor:
        return 2 * x


class Shifting(Operator):
    """Has a parameter and an option, and reads the padding and the coefficients."""

    @dataclass(frozen=True)
    class Options:
        by: float = 1.0

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.shift = nn.Parameter(torch.full((width,), self.options.by))

    def mix(self, x: Tensor, context: Context) -> Tensor:
        torch.testing.assert_close(context.spectra.coefficients, dct(x))
        self.saw = context.attention_mask
        return x + self.shift


class EveryOther(Router):
    """A router that gives indices."""

    def forward(self, x: Tensor, entropy: Tensor, context: Context | None = None) -> Decision:
        return Decision((torch.arange(x.shape[1]) % 2).expand(x.shape[0], -1))


class Halves(Router):
    """A router that gives weights."""

    one_operator_per_token = False

    def forward(self, x: Tensor, entropy: Tensor, context: Context | None = None) -> Decision:
        count = len(self.operator_names)
        weights = x.new_full((*x.shape[:2], count), 1 / count)
        return Decision(weights.argmax(-1), weights=weights)


class ByFirstFeature(ScoreRouter):
    def score(self, x: Tensor, entropy: Tensor, context: Context) -> Tensor:
        return x[..., 0]


def without_feed_forward(block: RoutedBlock) -> RoutedBlock:
    nn.init.zeros_(block.feed_forward[3].weight)
    nn.init.zeros_(block.feed_forward[3].bias)
    return block


def noise() -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def test_operators_and_an_index_router_from_outside() -> None:
    register_operator("doubling", Doubling)
    register_operator("shifting", Shifting)
    register_router("every-other", EveryOther)
    block = without_feed_forward(build_block(8, ("doubling", "shifting"), {"router": "every-other"}))
    x = noise()
    source = block.operator_norms["input"](x)
    y, routing = block(x)
    assert routing.operators == ("doubling", "shifting")
    torch.testing.assert_close(routing.share, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(y[:, ::2], (x + 2 * source)[:, ::2])
    torch.testing.assert_close(y[:, 1::2], (x + source + 1)[:, 1::2])
    assert block.thresholds is None and routing.score is None and routing.weights is None


def test_an_operator_alone_gets_what_it_asks_for() -> None:
    register_operator("shifting", Shifting)
    block = without_feed_forward(build_block(8, ("shifting",)))
    real = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    x = noise()
    y, routing = block(x, Context(attention_mask=real))
    assert routing is None and block.operators["shifting"].saw is real
    torch.testing.assert_close(y, x + block.operator_norms["input"](x) + 1)


def test_a_router_of_weights_from_outside() -> None:
    register_operator("doubling", Doubling)
    register_router("halves", Halves)
    block = without_feed_forward(build_block(8, ("dct", "doubling"), {"router": "halves"}))
    x = noise()
    y, routing = block(x)
    torch.testing.assert_close(y, x + 1.5 * block.operator_norms["input"](x))
    torch.testing.assert_close(routing.share, torch.tensor([0.5, 0.5]))


def test_a_score_from_outside_is_calibrated_like_entropy() -> None:
    register_router("first", ByFirstFeature)
    block = build_block(8, ("dct", "attention"), {"router": "first", "attention_share": 0.5})
    x = noise()
    _, before = block(x)
    torch.testing.assert_close(before.score, block.operator_norms["input"](x)[..., 0])
    block.router.calibration.note(before.score, None)
    block.router.calibration.step()
    _, after = block(x)
    torch.testing.assert_close(after.share, torch.tensor([0.5, 0.5]))
    assert torch.equal(after.operator_index, (after.score > block.thresholds).long())


@pytest.mark.parametrize(
    ("register", "find", "cls", "other"),
    [
        (register_operator, find_operator, Doubling, Shifting),
        (register_router, find_router, EveryOther, Halves),
    ],
)
def test_names(register: Any, find: Any, cls: Any, other: Any) -> None:
    register("mine", cls)
    register("mine", cls)  # a cell of a notebook that runs twice
    assert find("mine") is cls
    with pytest.raises(UserError, match=f"'mine' is taken by {cls.__name__}: choose another name"):
        register("mine", other)
    with pytest.raises(UserError, match="did you mean 'mine'"):
        find("mime")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("register", "cls", "base"), [(register_operator, Doubling, "Operator"), (register_router, Halves, "Router")]
)
def test_what_is_no_name_and_what_is_no_operator_or_router(register: Any, cls: Any, base: str) -> None:
    for name in ("", None, 3, "a.b", "a b", "mine\n", "keys"):
        with pytest.raises(UserError, match="give letters, digits, - and _"):
            register(name, cls)
    for wrong in (nn.Linear, dict, len, Doubling(4) if base == "Operator" else Halves(4, ("dct", "attention"))):
        with pytest.raises(UserError, match=rf"is not a subclass of chiaroscuro\.layers\.{base}"):
            register("mine", wrong)
    assert "mine" not in OPERATORS and "mine" not in ROUTERS


class Unwritten(Operator):
    def forward(self, x: Any, context: Any = None, tokens: Any = None) -> Any:
        return x


class Undecided(Router):
    """Has no forward()."""


class Unscored(ScoreRouter):
    """Has no score()."""


class NoDataclass(Doubling):
    Options = dict  # type: ignore[assignment]


class NeverADataclass(EveryOther):
    Options = None  # type: ignore[assignment]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("register", "cls", "complaint"),
    [
        (register_operator, Operator, r"Operator has no mix\(\) of its own: write it"),
        (register_operator, Unwritten, r"Unwritten has no mix\(\) of its own: write it"),
        (register_operator, NoDataclass, r"NoDataclass\.Options is no dataclass: make it one"),
        (register_router, Router, r"Router has no forward\(\) of its own: write it"),
        (register_router, Undecided, r"Undecided has no forward\(\) of its own: write it"),
        (register_router, ScoreRouter, r"ScoreRouter has no score\(\) of its own: write it"),
        (register_router, Unscored, r"Unscored has no score\(\) of its own: write it"),
        (register_router, NeverADataclass, r"NeverADataclass\.Options is no dataclass: make it one"),
    ],
)
def test_what_lacks_something_is_not_registered(register: Any, cls: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=f"'mine': {complaint}"):
        register("mine", cls)
    assert "mine" not in OPERATORS and "mine" not in ROUTERS


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("cost", ["cheap", float("nan"), float("inf"), True, [1]])
def test_a_cost_is_a_number(cost: Any) -> None:
    priced = type("Priced", (Doubling,), {"cost": cost})
    with pytest.raises(UserError, match=r"'mine': Priced\.cost=.*: give a finite number, or None"):
        register_operator("mine", priced)


def test_a_router_by_a_score_may_decide_otherwise() -> None:
    class Fixed(ScoreRouter):
        def forward(self, x: Tensor, entropy: Tensor, context: Context | None = None) -> Decision:
            return Decision(torch.zeros(x.shape[:2], dtype=torch.long))

    register_router("fixed", Fixed)
    assert find_router("fixed") is Fixed


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", [{"by": object()}, {"by": {1.0}}, {"by": torch.ones(1)}, {("a", "b"): 1}])
def test_options_that_config_json_can_not_hold(options: Any) -> None:
    register_operator("shifting", Shifting)
    for fields in ({"operators": [[{"shifting": options}]]}, {"router": {"norm": options}}):
        with pytest.raises(UserError, match="to be saved as JSON"):
            ChiarConfig(hidden_size=8, num_attention_heads=2, vocab_size=16, **fields)


def test_an_operator_says_what_it_lacks() -> None:
    operator = Doubling(4)
    with pytest.raises(NotImplementedError, match="Doubling keeps no state"):
        operator.new_cache()
    assert "has no new_cache" in Doubling.uncacheable(operator.options)
    with pytest.raises(UserError, match=r"Doubling has no count of operations: write its count\(\)"):
        Doubling.count(4, operator.options, Work(8, 8))
    with pytest.raises(UserError, match="unknown option by=2 of Doubling: it has no options"):
        Doubling(4, by=2)
    assert Shifting(4, by=3.0).shift.tolist() == [3.0] * 4


def test_what_is_built_in_is_taken() -> None:
    with pytest.raises(UserError, match="'attention' is taken by SelfAttention"):
        register_operator("attention", Doubling)
    with pytest.raises(UserError, match="'soft' is taken by SoftRouter"):
        register_router("soft", EveryOther)
    assert find_operator("attention") is SelfAttention


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown operator 'fft': known are attention, .*dct, .*rbf"):
        build_block(8, ("fft",))
    with pytest.raises(UserError, match="unknown router 'softt': did you mean 'soft'"):
        build_block(8, ("dct", "attention"), {"router": "softt"})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("menu", [["odd"], ["odd", "attention"]])
@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize(
    "output", [lambda x: x[..., :1], lambda x: x[:1], lambda x: x[0], lambda x: x.mean(), lambda x: None]
)
def test_an_output_of_another_shape_is_never_broadcast(menu: list[str], execution: str, output: Any) -> None:
    class Odd(Operator):
        cost = 0

        def mix(self, x: Any, context: Context) -> Any:
            return output(x)

        def mix_packed(self, x: Any, tokens: PackedTokens, context: Context) -> Any:
            return output(tokens.take(x))

    register_operator("odd", Odd)
    block = build_block(8, menu, {"num_attention_heads": 2, "execution": execution, "router": "norm"})
    with pytest.raises(UserError, match=r"operator 'odd' gave an output of (shape|type).*a vector for each token"):
        block(noise())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("width", "fields", "complaint"),
    [
        (0, {}, "a width of 0: must be a positive whole number"),
        (8, {"norm_epsilon": "x"}, "norm_epsilon='x': must be a positive number"),
        (8, {"norm_epsilon": 0}, "norm_epsilon=0: must be a positive number"),
        (8, {"bias": "no"}, "bias='no': must be true or false"),
    ],
)
def test_a_block_that_cannot_be_built_is_one_line(width: int, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build_block(width, ("dct",), fields)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("decision", "complaint"),
    [
        (lambda x: None, "decided by NoneType"),
        (lambda x: Decision(torch.zeros(x.shape[:2])), "decided by torch.float32 of shape"),
        (lambda x: Decision(torch.zeros(x.shape[0], dtype=torch.long)), "decided by torch.int64 of shape"),
        (
            lambda x: Decision(torch.full(x.shape[:2], 7)),
            "chose operators from 7 to 7 of a menu of 2, which are 0 to 1",
        ),
        (lambda x: Decision(torch.full(x.shape[:2], -1)), "chose operators from -1 to -1 of a menu of 2"),
    ],
)
def test_a_router_sends_no_token_nowhere(decision: Any, complaint: str) -> None:
    class Astray(Router):
        def forward(self, x: Any, entropy: Any, context: Context | None = None) -> Any:
            return decision(x)

    register_router("astray", Astray)
    for execution in ("sparse", "dense"):
        fields = {"num_attention_heads": 2, "router": "astray", "execution": execution}
        with pytest.raises(UserError, match=f"Astray {complaint}"):
            build_block(8, ["dct", "attention"], fields)(noise())
