"""Operators and routers from outside the package, and what may not be registered."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers import (
    RoutedBlock,
    ScoreRouter,
    SelfAttention,
    find_operator,
    find_router,
    register_operator,
    register_router,
)
from chiaroscuro.layers.registry import OPERATORS, ROUTERS
from chiaroscuro.ops import dct


@pytest.fixture(autouse=True)
def registries_as_before() -> Iterator[None]:
    kept = dict(OPERATORS), dict(ROUTERS)
    yield
    for registry, before in zip((OPERATORS, ROUTERS), kept, strict=True):
        registry.clear()
        registry.update(before)


class Doubling(nn.Module):
    """Asks for nothing but the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Shifting(nn.Module):
    """Asks for a size, the padding and the coefficients, without defaults."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, attention_mask: Tensor | None, coefficients: Tensor) -> Tensor:
        torch.testing.assert_close(coefficients, dct(x))
        self.saw = attention_mask
        return x + self.shift


class EveryOther(nn.Module):
    """A router that gives indices and asks for nothing."""

    def forward(self, x: Tensor, entropy: Tensor) -> Tensor:
        return (torch.arange(x.shape[1]) % 2).expand(x.shape[0], -1)


class Halves(nn.Module):
    """A router that gives weights and asks for the menu."""

    def __init__(self, operators: tuple[str, ...]) -> None:
        super().__init__()
        self.count = len(operators)

    def forward(self, x: Tensor, entropy: Tensor) -> Tensor:
        return x.new_full((*x.shape[:2], self.count), 1 / self.count)


class ByFirstFeature(ScoreRouter):
    def score(self, x: Tensor, entropy: Tensor) -> Tensor:
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
    block = without_feed_forward(RoutedBlock(8, ("doubling", "shifting"), router="every-other"))
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
    block = without_feed_forward(RoutedBlock(8, ("shifting",)))
    real = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    x = noise()
    y, routing = block(x, real)
    assert routing is None and block.operators["shifting"].saw is real
    torch.testing.assert_close(y, x + block.operator_norms["input"](x) + 1)


def test_a_router_of_weights_from_outside() -> None:
    register_operator("doubling", Doubling)
    register_router("halves", Halves)
    block = without_feed_forward(RoutedBlock(8, ("dct", "doubling"), router="halves"))
    x = noise()
    y, routing = block(x)
    torch.testing.assert_close(y, x + 1.5 * block.operator_norms["input"](x))
    torch.testing.assert_close(routing.share, torch.tensor([0.5, 0.5]))


def test_a_score_from_outside_is_calibrated_like_entropy() -> None:
    register_router("first", ByFirstFeature)
    block = RoutedBlock(8, ("dct", "attention"), router="first", attention_share=0.5)
    x = noise()
    _, before = block(x)
    torch.testing.assert_close(before.score, block.operator_norms["input"](x)[..., 0])
    block.router.calibration.note(before.score, None)
    block.router.calibration.step()
    _, after = block(x)
    torch.testing.assert_close(after.share, torch.tensor([0.5, 0.5]))
    assert torch.equal(after.operator_index, (after.score > block.thresholds).long())


@pytest.mark.parametrize(("register", "find"), [(register_operator, find_operator), (register_router, find_router)])
def test_names(register: object, find: object) -> None:
    register("mine", Doubling)
    register("mine", Doubling)  # a cell of a notebook that runs twice
    assert find("mine") is Doubling
    with pytest.raises(UserError, match="'mine' is taken by Doubling: choose another name"):
        register("mine", EveryOther)
    with pytest.raises(UserError, match="did you mean 'mine'"):
        find("mime")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("register", [register_operator, register_router])
def test_what_is_no_name_and_what_is_no_module(register: object) -> None:
    for name in ("", None, 3, "a.b", "keys"):
        with pytest.raises(UserError, match="give a string without dots"):
            register(name, Doubling)
    for cls in (Doubling(), dict, len):
        with pytest.raises(UserError, match=r"is not a subclass of torch\.nn\.Module"):
            register("mine", cls)
    assert "mine" not in OPERATORS and "mine" not in ROUTERS


def test_what_is_built_in_is_taken() -> None:
    with pytest.raises(UserError, match="'attention' is taken by SelfAttention"):
        register_operator("attention", Doubling)
    with pytest.raises(UserError, match="'soft' is taken by SoftRouter"):
        register_router("soft", EveryOther)
    assert find_operator("attention") is SelfAttention


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown operator 'fft': known are attention, dct, rbf"):
        RoutedBlock(8, ("fft",))
    with pytest.raises(UserError, match="unknown router 'softt': did you mean 'soft'"):
        RoutedBlock(8, router="softt")
