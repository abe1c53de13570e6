"""Routers by a token's size, and by a score that is fitted: a plain product is the oracle."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro import UserError
from chiaroscuro.layers import Context, FittedRouter, NormRouter, build_block

MENU = ("dct", "attention")
WIDTH = 16
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(seed: int, heads: int = 1, hidden: int | None = None) -> FittedRouter:
    router = FittedRouter(WIDTH, MENU, heads=heads, hidden=hidden)
    score = router.fitted
    if hidden is None:
        score.set_weights(draw(seed, heads, WIDTH), draw(seed + 1, heads))
    else:
        first = draw(seed + 2, hidden, WIDTH), draw(seed + 3, hidden)
        score.set_weights(draw(seed, heads, hidden), draw(seed + 1, heads), *first)
    return router


# By the norm


@given(seed=seeds)
def test_the_norm_is_of_what_no_norm_has_touched(seed: int) -> None:
    block = build_block(WIDTH, MENU, {"num_attention_heads": 2, "router": "norm"})
    x = 3 * draw(seed, 2, 5, WIDTH)
    torch.testing.assert_close(block.route(x).score, x.square().sum(-1).sqrt())
    alone = NormRouter(WIDTH, MENU).score(x, torch.zeros(2, 5), Context())
    torch.testing.assert_close(alone, x.square().sum(-1).sqrt())


@pytest.mark.parametrize("width", [16, 256])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_uncalibrated_the_norm_sends_the_share_of_white_noise(width: int, share: float) -> None:
    router = NormRouter(width, MENU, attention_share=share)
    x = draw(0, 1, 20_000, width)
    assert router(x, torch.zeros(1, 20_000)).operator_index.float().mean().item() == pytest.approx(share, abs=0.015)


# Fitted


@given(seed=seeds, heads=st.integers(1, 3), hidden=st.sampled_from([None, 5]))
def test_the_score_is_the_product_with_its_weights(seed: int, heads: int, hidden: int | None) -> None:
    router, x = fitted(seed, heads, hidden), draw(seed + 9, 2, 5, WIDTH)
    last = x if hidden is None else torch.nn.functional.gelu(x @ router.fitted.hidden_weight.T + draw(seed + 3, hidden))
    wanted = last @ router.fitted.weight.T + router.fitted.bias
    found = router.score(x, torch.zeros(2, 5), Context())
    torch.testing.assert_close(found, wanted[..., 0] if heads == 1 else wanted)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("hidden", [None, 5])
def test_no_optimizer_sees_the_weights_and_they_are_saved_in_float32(hidden: int | None) -> None:
    router = fitted(0, hidden=hidden)
    assert not list(router.parameters())
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    assert len(before) == 3 + (2 if hidden is None else 4)
    router.bfloat16()
    for name, tensor in router.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
    other = FittedRouter(WIDTH, MENU, hidden=hidden)
    other.load_state_dict(before)
    x = draw(1, 2, 5, WIDTH)
    assert torch.equal(other(x, torch.zeros(2, 5)).score, router(x, torch.zeros(2, 5)).score)


def test_autocast_does_not_round_the_score() -> None:
    router, x = fitted(0), draw(1, 2, 5, WIDTH)
    wanted = router.score(x, torch.zeros(2, 5), Context())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.score(x, torch.zeros(2, 5), Context()), wanted)


def test_a_score_that_was_never_fitted_is_said_to_be_none() -> None:
    router, x = FittedRouter(WIDTH, MENU), draw(0, 1, 4, WIDTH)
    with pytest.warns(UserWarning, match=r"'fitted' was not fitted yet.*run chiaroscuro fit") as said:
        router(x, torch.zeros(1, 4))
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(0)(x, torch.zeros(1, 4))
        whole = FittedRouter(WIDTH, MENU, attention_share=1.0)  # no score is asked
        assert bool((whole(x, torch.zeros(1, 4)).operator_index == 1).all())


def test_forgetting_the_fit() -> None:
    router = fitted(0, hidden=3)
    assert router.unready() == ""
    router.reset_parameters()
    assert router.unready() and not any(buffer.any() for buffer in router.fitted.buffers())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("hidden", [0, -1, 2.5, True, "wide"])
def test_an_impossible_width(hidden: object) -> None:
    with pytest.raises(UserError, match=r"hidden=.*: must be a whole number from 1"):
        FittedRouter(WIDTH, MENU, hidden=hidden)
