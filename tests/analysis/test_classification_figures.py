"""Accuracy and its interval: counted by hand, and held against what scipy says."""

import math
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn

from chiaroscuro.analysis.classification import evaluate_rows, wilson_interval
from chiaroscuro.data.tasks import LabelledRows, PadToLongest
from chiaroscuro.errors import UserError
from chiaroscuro.layers.block import Routing

ROUTING = Routing(("dct", "attention"), torch.zeros(2, 1), torch.tensor([[0], [1]]), score=torch.zeros(2, 1))


class Teller(nn.Module):
    """Says the label that a row's last token names, with a certainty of its own."""

    device = "cpu"

    def __init__(self, certainty: float = 2.0) -> None:
        super().__init__()
        self.certainty = certainty
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **others: Any) -> SimpleNamespace:
        self.calls.append(others | {"training": self.training})
        told = input_ids[torch.arange(len(input_ids)), attention_mask.sum(1) - 1]
        logits = self.certainty * nn.functional.one_hot(told, 3).float()
        return SimpleNamespace(
            loss=nn.functional.cross_entropy(logits, labels), logits=logits, routing=[ROUTING, None], meta_gate=None
        )


def rows_of(told: list[int], labels: list[int]) -> LabelledRows:
    ids = [[0] * (i % 4) + [word] for i, word in enumerate(told)]
    return LabelledRows("rows", "made up", datasets.Dataset.from_dict({"input_ids": ids, "label": labels}), 9)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20), batch=st.integers(1, 7)
)
def test_the_means_are_over_rows(pairs: list[tuple[int, int]], batch: int) -> None:
    model, counted = Teller().train(), []
    seen = evaluate_rows(
        model, rows_of(*map(list, zip(*pairs, strict=True))), PadToLongest(), batch_size=batch, progress=counted.append
    )
    right = sum(told == label for told, label in pairs)
    total = math.log(math.exp(2) + 2)
    assert seen.accuracy == right / len(pairs)
    assert seen.loss == pytest.approx(total - 2 * right / len(pairs), rel=1e-5)
    assert seen.rows == sum(counted) == len(pairs)
    assert model.training and not any(call["training"] for call in model.calls)
    assert seen.routings == [] and seen.figures()["accuracy_interval"] == list(seen.interval)


@given(total=st.integers(1, 3000), data=st.data())
def test_wilson_s_interval_is_scipy_s(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    wanted = binomtest(correct, total).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(correct, total)
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert 0 <= low <= correct / total + 1e-12 and correct / total - 1e-12 <= high <= 1


def test_what_the_model_is_asked() -> None:
    model = Teller()
    seen = evaluate_rows(model, rows_of([0, 1], [0, 0]), PadToLongest(), output_routing=True, inputs={"task": "x"})
    assert model.calls == [{"task": "x", "output_routing": True, "training": False}]
    ((routing, gate),) = seen.routings
    assert gate is None and routing[1] is None and torch.equal(routing[0].operator_index, ROUTING.operator_index)
    assert routing[0].score is None  # of a whole text they would be held for nobody


def test_weights_that_are_no_numbers() -> None:
    with pytest.raises(UserError, match="the loss is nan"):
        evaluate_rows(Teller(math.nan), rows_of([0], [0]), PadToLongest())


def test_without_rows_there_is_nothing_to_measure() -> None:
    with pytest.raises(UserError, match="there is nothing to predict"):
        evaluate_rows(Teller(), rows_of([], []), PadToLongest())
