"""Routers by score and by weights, and the paper's rule for its two thresholds."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro.layers import Context, HardRouter, ScoreRouter, SoftRouter, ThresholdRouter, pick_thresholds
from chiaroscuro.ops import null_entropy_quantiles

MENUS = {2: ("dct", "attention"), 3: ("dct", "rbf", "attention")}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twins(operators: int, width: int = 6) -> tuple[SoftRouter, HardRouter]:
    soft, hard = SoftRouter(width, MENUS[operators]), HardRouter(width, MENUS[operators])
    hard.load_state_dict(soft.state_dict())
    return soft, hard


@pytest.mark.parametrize(
    ("menu", "expected"),
    [
        ((0, 2), (0.86,)),
        ((0, 1, 2), (0.855, 0.865)),
        ((0, 1), (0.855,)),
        ((1, 2), (0.865,)),
        ((0, None), (0.86,)),
    ],
)
def test_the_papers_thresholds(menu: tuple[float | None, ...], expected: tuple[float, ...]) -> None:
    assert pick_thresholds(menu, 0.855, 0.865) == pytest.approx(expected)


def test_two_thresholds_for_four_operators() -> None:
    with pytest.raises(ValueError, match="at most three operators, the menu has 4"):
        pick_thresholds((0, 1, 2, 3), 0.8, 0.9)


# By score


@given(operators=st.sampled_from([2, 3]), seed=st.integers(0, 999))
def test_the_index_counts_the_thresholds_below(operators: int, seed: int) -> None:
    fixed = (0.4, 0.6)[: operators - 1]
    router = ThresholdRouter(6, MENUS[operators], thresholds=fixed)
    entropy = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed))
    expected = torch.tensor([[sum(h > t for t in fixed) for h in row] for row in entropy.tolist()])
    x = draw(seed, 2, 5, 6)
    decision = router(x, entropy)
    assert torch.equal(decision.operator_index, expected) and torch.equal(decision.score, entropy)
    assert decision.scale is None and decision.weights is None


def test_at_the_threshold_the_cheap_operator_takes_it() -> None:
    """dct if H ≤ τ, attention if H > τ."""
    router = ThresholdRouter(6, MENUS[2], thresholds=(0.5,))
    entropy = torch.tensor([[0.5, torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))]])
    assert router(draw(0, 1, 2, 6), entropy).operator_index.tolist() == [[0, 1]]


@pytest.mark.parametrize("spectrum", ["orthonormal", "reference"])
def test_uncalibrated_it_stands_at_the_nulls_quantile(spectrum: str) -> None:
    router = ThresholdRouter(64, MENUS[3], attention_share=0.2, spectrum=spectrum)
    expected = null_entropy_quantiles(64, [0.4, 0.8], spectrum)
    torch.testing.assert_close(router.calibration.values, expected, rtol=0, atol=1e-5)


def test_a_score_is_all_that_a_subclass_need_say() -> None:
    class ByLength(ScoreRouter):
        def score(self, x: Tensor, entropy: Tensor, context: Context) -> Tensor:
            return x.norm(dim=-1)

    router = ByLength(6, MENUS[2], thresholds=(2.0,))
    x = torch.tensor([[[1.0] + [0.0] * 5, [3.0] + [0.0] * 5]])
    assert router(x, torch.zeros(1, 2)).operator_index.tolist() == [[0, 1]]
    with pytest.raises(NotImplementedError):
        ScoreRouter(6, MENUS[2])(x, torch.zeros(1, 2))


# By weights


@given(operators=st.sampled_from([2, 3]), seed=st.integers(0, 999))
def test_soft_weights(operators: int, seed: int) -> None:
    soft, _ = twins(operators)
    x, entropy = draw(seed, 2, 5, 6), draw(seed + 1, 2, 5)
    logits = x @ soft.proj.weight[:, :6].T + entropy[..., None] * soft.proj.weight[:, 6] + soft.proj.bias
    torch.testing.assert_close(soft(x, entropy).weights, logits.softmax(-1))


@given(operators=st.sampled_from([2, 3]), seed=st.integers(0, 999))
def test_hard_is_one_hot_forward_and_soft_backward(operators: int, seed: int) -> None:
    soft, hard = twins(operators)
    direction = draw(seed + 2, 2, 5, operators)
    gradients = []
    for router in (soft, hard):
        x, entropy = draw(seed, 2, 5, 6).requires_grad_(), draw(seed + 1, 2, 5).requires_grad_()
        weights = router.train()(x, entropy).weights
        (weights * direction).sum().backward()
        gradients.append([x.grad, entropy.grad, *(p.grad for p in router.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(g.abs().max() > 0 for g in gradients[1])
    choice = soft(x, entropy).operator_index
    assert torch.equal(weights, F.one_hot(choice, operators).float())
    decided = hard.eval()(x, entropy)
    assert torch.equal(decided.operator_index, choice) and decided.weights is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hard_weights_are_whole_in_half_precision(dtype: torch.dtype) -> None:
    _, hard = twins(3)
    weights = hard.to(dtype)(draw(0, 4, 50, 6).to(dtype), draw(1, 4, 50)).weights
    assert weights.dtype == dtype and set(weights.unique().tolist()) == {0.0, 1.0}
