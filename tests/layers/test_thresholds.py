"""The calibration's state: thresholds from a table of quantiles, and how and when it moves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers import Context, Thresholds, build_block
from chiaroscuro.layers.thresholds import (
    FORGOTTEN,
    MOMENTUM,
    QUANTILES,
    pool_tables,
    quantile_table,
    shares_to_thresholds,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(operators: int = 2, share: float = 0.25, fixed: tuple[float, ...] | None = None) -> Thresholds:
    """From a table that is recognisably not of any data: −5 to −4."""
    return Thresholds(operators, torch.linspace(-5, -4, QUANTILES), share, fixed)


def table_by_torch(scores: Tensor) -> Tensor:
    return torch.quantile(scores.double(), torch.linspace(0, 1, QUANTILES, dtype=torch.float64)).float()


def assert_quantiles_of(table: Tensor, scores: Tensor) -> None:
    """As many of the scores lie below each entry as its level says, to within a table's fineness and a few scores."""
    levels, ordered = torch.linspace(0, 1, len(table)), scores.sort().values
    off = 0.002 + 4 / len(scores)
    assert (torch.searchsorted(ordered, table - 1e-5) / len(scores) <= levels + off).all()
    assert (torch.searchsorted(ordered, table + 1e-5, right=True) / len(scores) >= levels - off).all()


thousandths = st.integers(0, 1000).map(lambda n: n / 1000)


# The table and the dial


@given(count=st.integers(1, 3000), seed=st.integers(0, 999))
def test_the_table_is_torchs_quantiles(count: int, seed: int) -> None:
    scores = draw(seed, count)
    torch.testing.assert_close(quantile_table(scores), table_by_torch(scores), rtol=1e-5, atol=1e-6)


@given(share=thousandths, operators=st.integers(2, 5), count=st.integers(2, 3000), seed=st.integers(0, 999))
def test_the_thresholds_are_quantiles(share: float, operators: int, count: int, seed: int) -> None:
    thresholds, scores = fresh(operators), draw(seed, count)
    thresholds.set_from(scores, share)
    assert thresholds.share == share and thresholds.calibrated
    values = thresholds.values
    assert values.shape == (operators - 1,) and values.dtype == torch.float32
    cuts = [(1 - share) * k / (operators - 1) for k in range(1, operators)]
    for k, (value, cut) in enumerate(zip(values.tolist(), cuts, strict=True), start=1):
        if share == 1 or (share == 0 and k == operators - 1):
            assert value == (-torch.inf if share == 1 else torch.inf)
        else:  # between the two scores around the quantile, to within the table's fineness and scores that are alike
            assert abs(int((scores <= value).sum()) - (cut * (count - 1) + 0.5)) <= 2 + count / 500


@given(share=st.floats(0, 1), operators=st.integers(2, 4), seed=st.integers(0, 999))
def test_the_shares_come_out(share: float, operators: int, seed: int) -> None:
    thresholds, scores = fresh(operators), draw(seed, 4000)
    thresholds.set_from(scores, 0.5)
    thresholds.set_share(share)
    index = (scores[:, None] > thresholds.values).sum(-1)
    got = torch.bincount(index, minlength=operators) / len(scores)
    expected = [(1 - share) / (operators - 1)] * (operators - 1) + [share]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-3)


@pytest.mark.parametrize("operators", [2, 3])
def test_none_and_all_are_exact(operators: int) -> None:
    thresholds, scores = fresh(operators), draw(0, 100)
    thresholds.set_from(scores, 0.0)
    beyond = torch.cat([scores, scores * 100])
    assert not (beyond > thresholds.values[-1]).any()
    thresholds.set_share(1.0)
    assert (beyond[:, None] > thresholds.values).all()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_impossible_share(share: float) -> None:
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        fresh().set_share(share)
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        shares_to_thresholds(torch.zeros(QUANTILES), share, 2)


def test_before_any_data_it_is_the_table_given() -> None:
    thresholds = fresh(3, 0.5)
    torch.testing.assert_close(thresholds.values, torch.tensor([-4.75, -4.5]))
    assert not thresholds.calibrated and thresholds.running


def test_fixed_thresholds() -> None:
    thresholds = fresh(3, fixed=(0.8, 0.9))
    assert not thresholds.running
    torch.testing.assert_close(thresholds.values, torch.tensor([0.8, 0.9]))


@pytest.mark.parametrize("fixed", [(0.8,), (0.8, 0.9, 1.0), (0.9, 0.8)])
def test_fixed_thresholds_that_do_not_fit(fixed: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="need 2, in rising order"):
        fresh(3, fixed=fixed)


def test_scores_with_a_gradient_leave_no_graph() -> None:
    thresholds, scores = fresh(), draw(0, 100).requires_grad_()
    thresholds.set_from(scores * 2, 0.5)
    thresholds.note((scores * 2)[None], None)
    thresholds.step()
    assert not any(buffer.requires_grad for buffer in thresholds.buffers())


@given(
    counts=st.lists(st.integers(1, 2000), min_size=1, max_size=5),
    apart=st.floats(0, 10),
    alike=st.booleans(),
    seed=st.integers(0, 999),
)
def test_pooled_tables_are_of_all_scores_together(counts: list[int], apart: float, alike: bool, seed: int) -> None:
    parts = [draw(seed + i, count) + i * apart for i, count in enumerate(counts)]
    if alike:  # few different scores, as of a task of few words
        parts = [part.round() for part in parts]
    pooled = pool_tables([quantile_table(part) for part in parts], [float(count) for count in counts])
    assert (pooled.diff() >= 0).all()
    assert_quantiles_of(pooled, torch.cat(parts))
    assert pooled[0] == min(part.min() for part in parts) and pooled[-1] == max(part.max() for part in parts)


# Running calibration


def test_the_first_step_replaces_and_later_ones_approach() -> None:
    thresholds, expected = fresh(), None
    for n in range(1, 15):
        scores = draw(n, 3, 100) + n
        thresholds.note(scores, None)
        thresholds.step()
        momentum = max(MOMENTUM, 1 / n)
        new = table_by_torch(scores.flatten())
        expected = new if expected is None else (1 - momentum) * expected + momentum * new
        torch.testing.assert_close(thresholds.quantiles, expected, rtol=1e-5, atol=1e-5)
        values = shares_to_thresholds(expected, 0.25, 2)
        torch.testing.assert_close(thresholds.values, values, rtol=1e-5, atol=1e-5)
        assert float(thresholds.steps) == n and not thresholds.noted


def test_the_forwards_of_a_step_count_by_their_real_tokens() -> None:
    thresholds = fresh()
    scores, real = draw(0, 2, 50), draw(1, 2, 50) > 0
    more = draw(2, 4, 200) + 3
    thresholds.note(scores, real)
    thresholds.note(more, None)
    assert thresholds.noted
    thresholds.step()
    together = torch.cat([scores[real], more.flatten()])
    assert_quantiles_of(thresholds.quantiles, together)
    assert (together > thresholds.values).float().mean() == pytest.approx(0.25, abs=0.01)


def test_a_step_without_scores_moves_nothing() -> None:
    thresholds = fresh()
    before = copy.deepcopy(thresholds.state_dict())
    thresholds.note(draw(0, 2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert not thresholds.noted
    thresholds.step()
    torch.testing.assert_close(thresholds.state_dict(), before)


@pytest.mark.parametrize("here", [0, 60])
def test_processes_move_together(here: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has noted 200 scores, of other tokens: what comes back from the network holds both."""
    elsewhere = 3 + draw(7, 200)
    theirs = torch.cat([table_by_torch(elsewhere), torch.tensor([200.0])])

    def gather(found: list[torch.Tensor], mine: torch.Tensor) -> None:
        found[0].copy_(theirs)
        found[1].copy_(mine)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    thresholds, scores = fresh(), draw(8, 1, 60)[:, :here]
    thresholds.note(scores, None)
    thresholds.step()
    assert_quantiles_of(thresholds.quantiles, torch.cat([elsewhere, scores.flatten()]))


@pytest.mark.parametrize("training", [True, False])
def test_no_forward_moves_them(training: bool) -> None:
    block = build_block(16, ("dct", "rbf", "attention"), {"num_attention_heads": 2}).train(training)
    before = copy.deepcopy(block.router.state_dict())
    for seed in range(3):
        y, routing = block(draw(seed, 2, 5, 16))
        y.sum().backward()
        block.router.calibration.note(routing.score, None)
    torch.testing.assert_close(block.router.state_dict(), before, rtol=0, atol=0)
    block.router.calibration.step()
    assert not torch.equal(block.router.calibration.values, before["calibration.values"])


# Travelling with the weights


@pytest.mark.parametrize(
    "cast",
    [nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")],
)
def test_no_cast_rounds_them(cast: Callable[[nn.Module], nn.Module]) -> None:
    block = build_block(16, ("dct", "attention"), {"num_attention_heads": 2})
    block.router.calibration.set_from(draw(0, 500), 0.3)
    before = {name: buffer.clone() for name, buffer in block.router.calibration.named_buffers()}
    cast(block)
    after = dict(block.router.calibration.named_buffers())
    assert set(after) == {"values", "quantiles", "steps"}
    assert all(buffer.dtype == torch.float32 for buffer in after.values())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert block.thresholds is after["values"]


def test_they_follow_to_another_device() -> None:
    thresholds = fresh().to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in thresholds.buffers()} == {"meta"}


def test_state_dict_and_deepcopy() -> None:
    thresholds = fresh(3)
    thresholds.set_from(draw(0, 500), 0.3)
    loaded = fresh(3, 0.9)
    loaded.load_state_dict(thresholds.state_dict())
    for twin in (loaded, copy.deepcopy(thresholds)):
        torch.testing.assert_close(twin.state_dict(), thresholds.state_dict(), rtol=0, atol=0)
        assert twin.calibrated
        twin.set_share(0.6)
        assert not torch.equal(twin.values, thresholds.values)
    thresholds.set_share(0.6)
    assert torch.equal(loaded.values, thresholds.values)
    thresholds.note(draw(1, 1, 10), None)
    twin = copy.deepcopy(thresholds)
    twin.step()
    assert thresholds.noted and not twin.noted


# Where nobody steps


def test_thresholds_that_never_follow_are_spoken_of_once() -> None:
    thresholds = Thresholds(2, quantile_table(torch.rand(50)), 0.25)
    with pytest.warns(UserWarning, match="step_calibration") as warned:
        for _ in range(2 * FORGOTTEN):
            thresholds.note(torch.rand(1, 3), None)
    assert len(warned) == 1


def test_those_who_step_hear_nothing(recwarn: pytest.WarningsRecorder) -> None:
    thresholds = Thresholds(2, quantile_table(torch.rand(50)), 0.25)
    for forward in range(2 * FORGOTTEN):
        thresholds.note(torch.rand(1, 3), None)
        if forward % (FORGOTTEN - 1) == 0:
            thresholds.step()
    assert not recwarn.list


# A block alone


@given(share=st.floats(0, 1), seed=st.integers(0, 2**31), router=st.sampled_from(["threshold", "permuted", "learned"]))
def test_a_block_alone_is_calibrated_on_its_real_tokens(share: float, seed: int, router: str) -> None:
    torch.manual_seed(seed)
    block = build_block(16, ("dct", "attention"), {"num_attention_heads": 2, "router": router}).eval()
    x = 3 + torch.randn(4, 100, 16).cumsum(-1)
    real = torch.rand(4, 100) < 0.7
    block.calibrate(x, real, share=share)
    _, routing = block(x, Context(attention_mask=real))
    assert float((routing.operator_index[real] == 1).float().mean()) == pytest.approx(share, abs=2.1 / int(real.sum()))


KEEPING = {"num_attention_heads": 2, "window": 3, "attention_context": "kept"}


@given(share=st.floats(0, 1), kv_share=st.floats(0, 1), seed=st.integers(0, 2**31), heads=st.sampled_from([1, 2]))
def test_a_block_alone_is_calibrated_on_both_sides(share: float, kv_share: float, seed: int, heads: int) -> None:
    torch.manual_seed(seed)
    kv_router = {"norm": {}} if heads == 1 else {"learned": {"heads": 2}}
    block = build_block(16, ("local", "attention"), {**KEEPING, "kv_router": kv_router}).eval()
    x = 3 + torch.randn(4, 100, 16).cumsum(-1)
    real = torch.rand(4, 100) < 0.7
    block.calibrate(x, real, share=share, kv_share=kv_share)
    routing = block.route(x, Context(attention_mask=real))
    few = 2.1 / int(real.sum())  # two tokens, with room for rounding
    assert float((routing.operator_index[real] == 1).float().mean()) == pytest.approx(share, abs=few)
    assert float(routing.kept[real].float().mean()) == pytest.approx(kv_share, abs=few)
    alone = build_block(16, ("attention",), KEEPING).eval()  # all look, and the key side decides
    alone.calibrate(x, real, kv_share=kv_share)
    kept = alone.route(x, Context(attention_mask=real)).kept
    assert float(kept[real].float().mean()) == pytest.approx(kv_share, abs=few)


@pytest.mark.parametrize("kv_share", [0.5, 1.5, -0.1, float("nan")])
def test_a_block_whose_key_side_cannot_be_calibrated_stays_as_it_is(kv_share: float) -> None:
    keeping = build_block(16, ("local", "attention"), KEEPING)
    block = build_block(16, ("local", "attention"), {"num_attention_heads": 2, "window": 3})
    if kv_share == 0.5:
        with pytest.raises(UserError, match="no thresholds to set for kv_share"):
            block.calibrate(torch.randn(2, 5, 16), kv_share=kv_share)
        with torch.no_grad():
            keeping.operator_norms["input"].weight.fill_(torch.nan)
        message = "scores are not finite"
    else:
        message = "kv_share=.*from 0 to 1"
    before = copy.deepcopy(keeping.state_dict())
    with pytest.raises(UserError, match=message):
        keeping.calibrate(torch.randn(2, 5, 16), share=0.3, kv_share=kv_share)
    for name, tensor in keeping.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "share", "mask", "message"),
    [
        ({"operators": ["attention"]}, 0.5, None, "no thresholds to set"),
        ({"router": "soft"}, 0.5, None, "no thresholds to set"),
        ({"thresholds": (0.8,)}, 0.5, None, "fixed ones"),
        ({}, 0.5, torch.zeros(2, 5, dtype=torch.bool), "no real token"),
        ({}, 1.5, None, "from 0 to 1"),
    ],
)
def test_a_block_that_cannot_be_calibrated_stays_as_it_is(
    options: dict[str, Any], share: float, mask: Tensor | None, message: str
) -> None:
    menu = options.get("operators", ["dct", "attention"])
    block = build_block(16, menu, {"num_attention_heads": 2, **options})
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=message):
        block.calibrate(torch.randn(2, 5, 16), mask, share=share)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_a_block_alone_says_once_that_it_is_not_calibrated() -> None:
    block = build_block(16, ("dct", "attention"), {"num_attention_heads": 2})
    with pytest.warns(UserWarning, match=r"white noise: call block\.calibrate") as warned:
        for seed in range(3):
            block(draw(seed, 2, 5, 16))
    assert len(warned) == 1


@pytest.mark.parametrize("quiet", ["calibrated", "fixed", "evaluation"])
def test_a_block_that_needs_no_calibration_says_nothing(quiet: str, recwarn: pytest.WarningsRecorder) -> None:
    fixed = {"thresholds": (0.8,)} if quiet == "fixed" else {}
    block = build_block(16, ("dct", "attention"), {"num_attention_heads": 2, **fixed}).train(quiet != "evaluation")
    if quiet == "calibrated":
        block.calibrate(draw(0, 2, 50, 16))
    block(draw(1, 2, 5, 16))
    assert not recwarn.list


# Scores that are alike


@given(seed=st.integers(0, 999), share=st.floats(0.05, 0.95))
def test_no_score_lies_on_a_threshold_that_was_set_from_it(seed: int, share: float) -> None:
    thresholds, scores = fresh(3), draw(seed, 201)  # so few that quantiles fall on scores
    thresholds.set_from(scores, share)
    ordered = scores.sort().values
    for threshold in thresholds.values:
        above = int((ordered <= threshold).sum())
        assert ordered[above - 1] < threshold < ordered[above]
        assert float(threshold) == pytest.approx(float(ordered[above - 1] + ordered[above]) / 2, abs=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5])
def test_a_threshold_keeps_off_many_tokens_of_one_score(share: float) -> None:
    """A word that is 30% of a text has one score but for rounding: all of its copies go the same way."""
    word = 0.5 + 1e-7 * draw(0, 3000)
    scores = torch.cat([draw(1, 3500) - 3, word, draw(2, 3500) + 4])
    for thresholds in (fresh(), fresh()):
        thresholds.set_from(scores, share)
        taken = word > thresholds.values
        assert bool(taken.all()) or not bool(taken.any())
        noisy = word.bfloat16().float()
        assert torch.equal(noisy > thresholds.values, taken)
        thresholds.set_share(share)
        assert torch.equal(word > thresholds.values, taken)


def test_scores_that_are_not_finite_set_nothing() -> None:
    thresholds, scores = fresh(), draw(0, 100)
    before = copy.deepcopy(thresholds.state_dict())
    scores[3] = torch.nan
    with pytest.raises(UserError, match="1 of 100 scores are not finite"):
        thresholds.set_from(scores, 0.5)
    torch.testing.assert_close(thresholds.state_dict(), before)
    thresholds.note(scores[None], None)
    thresholds.step()
    assert thresholds.quantiles.isfinite().all() and thresholds.values.isfinite().all()


def test_a_block_alone_takes_the_mask_of_its_context() -> None:
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
    x[:, 25:] *= 100
    mask = torch.arange(50) < 25
    blocks = [build_block(16, ("dct", "attention"), {"num_attention_heads": 2, "router": "norm"}) for _ in range(2)]
    blocks[0].calibrate(x, mask.expand(2, -1))
    blocks[1].calibrate(x, context=Context(attention_mask=mask.expand(2, -1)))
    torch.testing.assert_close(blocks[0].thresholds, blocks[1].thresholds, atol=0, rtol=0)


def test_a_share_that_cannot_be_leaves_the_one_before(unchecked: None) -> None:
    thresholds = Thresholds(2, torch.linspace(0, 1, QUANTILES), 0.25)
    before = thresholds.values.clone()
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        thresholds.set_share(2)
    assert thresholds.share == 0.25 and torch.equal(thresholds.values, before)
