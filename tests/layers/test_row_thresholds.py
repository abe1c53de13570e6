"""Thresholds that follow the row. Oracle: what they are by definition, one token after the other."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro import UserError
from chiaroscuro.layers import Context, NormRouter, row_thresholds
from chiaroscuro.layers.row_thresholds import PRIOR, RowScores

BLOCK, SAMPLE = 4, 8
STANDING = torch.tensor([-0.3, 0.4])
LEVELS = torch.tensor([0.375, 0.75])


@pytest.fixture(autouse=True, scope="module")
def short_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_thresholds, "BLOCK", BLOCK)
        patch.setattr(row_thresholds, "SAMPLE", SAMPLE)
        yield


def counted(tokens: int, most: int) -> list[int]:
    """How far back the tokens stand that count."""
    if tokens <= most:
        return [*range(1, tokens + 1)]
    return [1 + (k * 65536 + k * 40503 % 65536) * tokens // (most * 65536) for k in range(most)]


def by_definition(scores: Tensor, history: int) -> Tensor:
    """The thresholds of each token of one row (time, heads)."""
    found = []
    for place in range(len(scores)):
        start = place // BLOCK * BLOCK
        tokens = min(start, history)
        before = scores[[start - back for back in counted(tokens, min(history, SAMPLE))]].numpy()
        quantiles = np.quantile(before.ravel(), LEVELS.numpy()) if tokens else np.zeros(2)
        found.append((PRIOR * STANDING.numpy() + tokens * quantiles) / (PRIOR + tokens))
    return torch.tensor(np.array(found).reshape(-1, 2), dtype=torch.float32)


def drawn(rows: int, time: int, heads: int, seed: int) -> Tensor:
    return torch.randn(rows, time, heads, generator=torch.Generator().manual_seed(seed))


def masks(rows: int, time: int, seed: int) -> Tensor:
    return torch.rand(rows, time, generator=torch.Generator().manual_seed(seed)) < 0.7


SIZES: dict[str, Any] = {
    "rows": st.integers(1, 3),
    "time": st.integers(1, 40),
    "heads": st.integers(1, 3),
    "history": st.integers(1, 30),
    "seed": st.integers(0, 99),
}


@given(padded=st.booleans(), data=st.data(), **SIZES)
def test_they_are_as_defined_whole_or_in_pieces(
    rows: int, time: int, heads: int, history: int, seed: int, padded: bool, data: st.DataObject
) -> None:
    scores = drawn(rows, time, heads, seed)
    real = masks(rows, time, seed) if padded else None
    cuts = sorted(data.draw(st.sets(st.integers(1, time), max_size=time)) | {0, time})
    held, parts = RowScores(), []
    for start, end in pairwise(cuts):
        part = None if real is None else real[:, start:end]
        parts.append(held.follow(scores[:, start:end], part, history, STANDING, LEVELS, start))
    found = torch.cat(parts, 1)
    for row in range(rows):
        chosen = slice(None) if real is None else real[row]
        torch.testing.assert_close(found[row][chosen], by_definition(scores[row][chosen], history))


@given(more=st.integers(1, 12), padded=st.booleans(), again=st.booleans(), **SIZES)
def test_what_was_cropped_never_was(
    rows: int, time: int, heads: int, history: int, seed: int, more: int, padded: bool, again: bool
) -> None:
    scores, other = drawn(rows, time + more, heads, seed), drawn(rows, more, heads, seed + 100)
    real = masks(rows, time + more, seed) if padded else torch.ones(rows, time + more).bool()
    held = RowScores()
    held.follow(scores[:, :time], real[:, :time] if padded else None, history, STANDING, LEVELS)
    for _ in range(1 + again):
        for token in range(more):
            held.follow(other[:, token, None], None, history, STANDING, LEVELS, time + token)
        held.crop(more)
    found = [held.follow(scores[:, time:], real[:, time:] if padded else None, history, STANDING, LEVELS, time)]
    for row in range(rows):
        wanted = by_definition(scores[row][real[row]], history)[int(real[row, :time].sum()) :]
        torch.testing.assert_close(found[0][row][real[row, time:]], wanted)


@given(padded=st.booleans(), chosen=st.lists(st.integers(0, 2), min_size=1, max_size=4), **SIZES)
def test_selected_rows_go_on(
    rows: int, time: int, heads: int, history: int, seed: int, padded: bool, chosen: list[int]
) -> None:
    index = torch.tensor(chosen).remainder(rows)
    scores = drawn(rows, time + 9, heads, seed)
    real = masks(rows, time, seed) if padded else torch.ones(rows, time).bool()
    held = RowScores()
    held.select(index)  # of nothing yet
    held.follow(scores[:, :time], real if padded else None, history, STANDING, LEVELS)
    held.follow(scores[:, time, None], None, history, STANDING, LEVELS, time)
    held.select(index)
    rest = scores[index, time + 1 :]
    found = torch.cat(
        [held.follow(rest[:, t, None], None, history, STANDING, LEVELS, time + 1 + t) for t in range(8)], 1
    )
    for row, old in enumerate(index.tolist()):
        whole = torch.cat([scores[old, :time][real[old]], scores[old, time:]])
        torch.testing.assert_close(found[row], by_definition(whole, history)[-8:])


def test_infinite_thresholds_stay() -> None:
    standing = torch.tensor([-torch.inf, torch.inf])
    found = RowScores().follow(drawn(2, 30, 1, 0), None, 8, standing, torch.tensor([0.0, 1.0]))
    assert torch.equal(found, standing.expand(2, 30, 2))


def test_tokens_that_were_not_scored_end_the_history() -> None:
    scores, held = drawn(1, 20, 1, 0), RowScores()
    held.follow(scores[:, :10], None, 8, STANDING, LEVELS)
    found = held.follow(scores[:, 10:], None, 8, STANDING, LEVELS, 15)  # five came in between
    torch.testing.assert_close(found[0], by_definition(scores[0, 10:], 8))


def test_another_history_begins_anew() -> None:
    scores, held = drawn(1, 20, 1, 0), RowScores()
    held.follow(scores[:, :10], None, 8, STANDING, LEVELS)
    found = held.follow(scores[:, 10:], None, 5, STANDING, LEVELS, 10)
    torch.testing.assert_close(found[0], by_definition(scores[0, 10:], 5))


def test_what_it_holds_is_bounded_and_counted() -> None:
    held = RowScores()
    assert held.numbers_kept() == 0
    held.follow(drawn(2, 500, 3, 0), None, 8, STANDING, LEVELS)
    assert held.numbers_kept() == 2 * (8 + BLOCK + row_thresholds.REMEMBERED) * 3
    held.follow(drawn(2, 1, 3, 0), None, 8, STANDING, LEVELS, 500)
    assert held.numbers_kept() == 2 * (8 + BLOCK + row_thresholds.REMEMBERED + 1) * 3


def test_it_refuses_other_rows_and_too_large_a_crop() -> None:
    held = RowScores()
    held.follow(drawn(2, 10, 1, 0), None, 8, STANDING, LEVELS)
    with pytest.raises(UserError, match="holds 2 rows, the input has 3"):
        held.follow(drawn(3, 1, 1, 0), None, 8, STANDING, LEVELS, 10)
    held.follow(drawn(2, 90, 1, 0), None, 8, STANDING, LEVELS, 10)
    with pytest.raises(UserError, match="crop of 65 tokens, but a router remembers the scores of 64"):
        held.crop(65)
    with pytest.raises(UserError, match="the cache holds 100 tokens, and past=0"):
        held.follow(drawn(2, 1, 1, 0), None, 8, STANDING, LEVELS)


def test_crops_one_after_the_other_count_the_columns_that_are_left() -> None:
    scores, held = drawn(2, 60, 1, 0), RowScores()
    real = torch.ones(2, 60).bool()
    real[0, 40:48:2] = real[1, 41:49:3] = False
    held.follow(scores[:, :50], real[:, :50], 8, STANDING, LEVELS)
    held.crop(3)
    held.crop(5)
    found = held.follow(scores[:, 42:], real[:, 42:], 8, STANDING, LEVELS, 42)
    for row in range(2):
        wanted = by_definition(scores[row][real[row]], 8)[int(real[row, :42].sum()) :]
        torch.testing.assert_close(found[row][real[row, 42:]], wanted)


def test_a_crop_to_before_the_first_score_leaves_nothing() -> None:
    scores, held = drawn(1, 200, 1, 0), RowScores()
    held.follow(scores[:, :100], None, 8, STANDING, LEVELS, 30)  # the first 30 were not scored
    held.crop(120)
    assert held.numbers_kept() == 0
    found = held.follow(scores[:, 100:], None, 8, STANDING, LEVELS, 10)
    torch.testing.assert_close(found[0], by_definition(scores[0, 100:], 8))


@pytest.mark.parametrize("period", [2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize("history", [128, 2048, 2**31 - 1])
def test_the_share_is_met_on_the_text_of_the_calibration_whatever_its_period(
    period: int, history: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_thresholds, "BLOCK", 64)
    monkeypatch.setattr(row_thresholds, "SAMPLE", 512)
    scores = 0.5 * drawn(2, 8192, 1, 0)
    scores[:, ::period] -= 2
    standing = scores.flatten().quantile(0.75)[None]
    found = RowScores().follow(scores, None, history, standing, torch.tensor([0.75]))
    assert float((scores > found)[:, 4096:].float().mean()) == pytest.approx(0.25, abs=0.03)


# In a router


def router(share: float = 0.25, **options: Any) -> NormRouter:
    made = NormRouter(16, ("local", "attention"), attention_share=share, **options)
    made.calibration.set_from(made(torch.randn(4, 400, 16), torch.zeros(4, 400)).score.flatten(), share)
    return made


def test_the_share_is_held_on_another_text() -> None:
    torch.manual_seed(0)
    x = 0.8 * torch.randn(1, 4000, 16)  # all norms are smaller than those of the calibration
    shares = [
        float(router(**options)(x, torch.zeros(1, 4000)).operator_index[:, 2000:].float().mean())
        for options in ({}, {"history": 2048})
    ]
    assert shares[0] < 0.05 and 0.18 < shares[1] < 0.25


def test_it_says_the_thresholds_of_each_token() -> None:
    torch.manual_seed(0)
    following, x = router(history=16), torch.randn(2, 30, 16)
    decision = following(x, torch.zeros(2, 30))
    thresholds = following.thresholds_of(decision.score, Context())[..., 0]
    assert torch.equal(decision.operator_index, (decision.score > thresholds).long())
    assert torch.equal(thresholds[:, :BLOCK], following.calibration.values.expand(2, BLOCK))
    assert not torch.equal(thresholds, following.calibration.values.expand(2, 30))
    standing = router()
    assert torch.equal(standing.thresholds_of(decision.score, Context()), standing.calibration.values.expand(2, 30, 1))


def test_documents_are_rows_of_their_own() -> None:
    torch.manual_seed(0)
    following, x = router(history=16), torch.randn(2, 30, 16)
    segments = (torch.arange(30) >= torch.tensor([[11], [23]])).long()
    real = torch.ones(2, 30).bool()
    real[1, 27:] = False
    found = following(x, torch.zeros(2, 30), Context(segments=segments, attention_mask=real)).operator_index
    for row, start, end in ((0, 0, 11), (0, 11, 30), (1, 0, 23), (1, 23, 27)):
        alone = following(x[row, None, start:end], torch.zeros(1, end - start)).operator_index
        assert torch.equal(found[row, start:end], alone[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"history": 0}, "history=0: must be a positive whole number"),
        ({"history": True}, "history=True: must be a positive whole number"),
        ({"history": 2**31}, "history=2147483648: must be less than 2³¹ tokens"),
        ({"history": 9, "thresholds": (0.5,)}, "thresholds that are fixed at 0.5: these can't follow the row"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        NormRouter(16, ("local", "attention"), **options)
