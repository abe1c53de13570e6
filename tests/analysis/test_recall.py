"""Recall tokens, slices of a text's loss, and accuracy by depth.

Oracles: `ends_a_far_pair` looks back token by token, and the means are counted one prediction after the other.
"""

import math
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedConfig

from chiaroscuro import UserError
from chiaroscuro.analysis.classification import evaluate_targets
from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.analysis.recall import position_bins, recall_tokens
from chiaroscuro.data import TokenBlocks
from chiaroscuro.data.tasks import PadToLongest, TokenRows

WORDS = 4


def ends_a_far_pair(row: list[int], i: int, window: int) -> bool:
    for j in range(i - 1, 0, -1):
        if (row[j - 1], row[j]) == (row[i - 1], row[i]):
            return i - j > window
    return False


class Guesser(nn.Module):
    """Scores the next word by the last one, and so is wrong as often as right."""

    device = "cpu"
    config = PreTrainedConfig(vocab_size=WORDS)

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: Tensor, shift_labels: Tensor, **others: Any) -> SimpleNamespace:
        logits = self.scores[input_ids]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits, routing=None, meta_gate=None)

    def nats(self, read: int, predicted: int) -> float:
        return -self.scores[read].log_softmax(0)[predicted].item()


class Rows(list[dict[str, Tensor]]):
    tokens = SimpleNamespace(count=1, bytes=1)


def test_a_batch_in_which_nothing_is_predicted_counts_for_nothing() -> None:
    told = {"input_ids": torch.tensor([1, 2, 3]), "shift_labels": torch.tensor([2, 3, 0])}
    blank = {"input_ids": torch.tensor([1, 2, 3]), "shift_labels": torch.full((3,), -100)}
    model: Any = Guesser()
    alone, beside = (evaluate_blocks(model, Rows(rows), batch_size=1) for rows in ([told], [blank, told, blank]))  # type: ignore[arg-type]
    assert beside.loss == alone.loss and beside.tokens == alone.tokens == 3
    with pytest.raises(UserError, match="the text has no token to predict"):
        evaluate_blocks(model, Rows([blank]), batch_size=1)  # type: ignore[arg-type]


@given(
    rows=st.integers(2, 40).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, WORDS - 1), min_size=length, max_size=length), min_size=1, max_size=3
        )
    ),
    window=st.integers(1, 12),
)
def test_a_recall_token_ends_a_pair_that_stood_far_back(rows: list[list[int]], window: int) -> None:
    found = recall_tokens(torch.tensor(rows), window).tolist()
    assert found == [[ends_a_far_pair(row, i, window) for i in range(1, len(row))] for row in rows]


def test_a_pair_that_also_stood_nearby_is_none() -> None:
    row = [1, 2, 0, 3, 0, 1, 2, 3, 1, 2]  # the pair 1 2 ends at 1, 6 and 9
    assert recall_tokens(torch.tensor([row]), 4)[0].nonzero().flatten().tolist() == [5]
    assert recall_tokens(torch.tensor([row]), 2)[0].nonzero().flatten().tolist() == [5, 8]


@given(length=st.integers(1, 5000))
def test_every_position_is_in_one_bin(length: int) -> None:
    bins = position_bins(length)
    assert [position for each in bins for position in each] == list(range(1, length + 1))
    assert all(len(each) <= max(16, each[0] - 1) for each in bins)


@given(data=st.data(), length=st.integers(1, 40), window=st.integers(1, 8), batch=st.integers(1, 5))
def test_the_slices_are_the_text_divided(data: st.DataObject, length: int, window: int, batch: int) -> None:
    stride = data.draw(st.integers(1, length))
    words = data.draw(st.lists(st.integers(0, WORDS - 1), min_size=length + 1, max_size=160))
    text: Any = SimpleNamespace(name="words", count=len(words), bytes=len(words), tokens=np.array(words, np.uint16))
    model: Any = Guesser()
    seen = evaluate_blocks(model, TokenBlocks(text, length, stride), batch_size=batch, window=window)
    recall: list[float] = []
    rest: list[float] = []
    at: dict[int, list[float]] = {}
    for start in range(0, len(words) - length, stride):
        row = words[start : start + length + 1]
        for position in range(1, length + 1):
            if start == 0 or position > length - stride:
                nats = model.nats(row[position - 1], row[position])
                (recall if ends_a_far_pair(row, position, window) else rest).append(nats)
                at.setdefault(position, []).append(nats)
    assert seen.slices is not None
    for found, wanted in ((seen.slices.recall, recall), (seen.slices.rest, rest)):
        assert found.tokens == len(wanted)
        assert found.loss == (pytest.approx(sum(wanted) / len(wanted), rel=1e-5) if wanted else None)
        assert found.perplexity == (None if found.loss is None else pytest.approx(math.exp(found.loss)))
    for first, last, found in seen.slices.positions:
        inside = [nats for position in range(first, last + 1) for nats in at.get(position, [])]
        assert found.tokens == len(inside) and found.loss == pytest.approx(sum(inside) / len(inside), rel=1e-5)
    assert sum(found.tokens for _, _, found in seen.slices.positions) == seen.tokens == len(recall) + len(rest)
    figures = seen.figures()
    assert (figures["window"], figures["recall"]["tokens"]) == (window, len(recall))


def test_without_a_window_there_are_no_slices() -> None:
    text: Any = SimpleNamespace(name="words", count=9, bytes=9, tokens=np.zeros(9, np.uint16))
    seen = evaluate_blocks(Guesser(), TokenBlocks(text, 4))  # type: ignore[arg-type]
    assert seen.slices is None and "recall" not in seen.figures()


@st.composite
def rows_with_depths(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """Rows of (word, target, depth); a target is −100 where there is none, and one position has one."""
    position = st.tuples(st.integers(0, WORDS - 1), st.integers(-1, WORDS - 1), st.integers(0, 2))
    rows = draw(st.lists(st.lists(position, min_size=1, max_size=8), min_size=1, max_size=6))
    rows[0][0] = (0, 1, 0)
    return [[(word, target if target >= 0 else -100, depth) for word, target, depth in row] for row in rows]


@given(rows=rows_with_depths(), batch=st.integers(1, 4), deep=st.booleans())
def test_accuracy_is_counted_by_target_answer_and_depth(
    rows: list[list[tuple[int, int, int]]], batch: int, deep: bool
) -> None:
    columns = {
        "input_ids": [[word for word, _, _ in row] for row in rows],
        "targets": [[target for _, target, _ in row] for row in rows],
        "depths": [[depth if target >= 0 else -100 for _, target, depth in row] for row in rows],
    }
    names = ("near", "far", "farther") if deep else ()
    model: Any = Guesser()
    tables = TokenRows("rows", "made up", datasets.Dataset.from_dict(columns), 8, names)
    seen = evaluate_targets(model, tables, PadToLongest(), batch_size=batch)
    answers: list[tuple[int, list[bool]]] = []
    hits: list[tuple[int, bool]] = []
    for row in rows:
        before = -100
        for word, target, depth in row:
            if target >= 0:
                hit = int(model.scores[word].argmax()) == target
                hits.append((depth, hit))
                if before < 0:
                    answers.append((depth, []))
                answers[-1][1].append(hit)
            before = target
    assert (seen.predictions, seen.answers) == (len(hits), len(answers))
    assert seen.accuracy == pytest.approx(sum(hit for _, hit in hits) / len(hits))
    assert seen.answer_accuracy == pytest.approx(sum(all(parts) for _, parts in answers) / len(answers))
    expected = {}
    for depth, name in enumerate(names):
        own = [hit for at, hit in hits if at == depth]
        whole = [all(parts) for at, parts in answers if at == depth]
        if whole:
            expected[name] = (sum(own) / len(own), len(own), sum(whole) / len(whole), len(whole))
    found = {one.depth: (one.accuracy, one.predictions, one.answer_accuracy, one.answers) for one in seen.depths}
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        assert found[name] == pytest.approx(wanted)
    assert ("depths" in seen.figures()) == bool(expected)
