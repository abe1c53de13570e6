"""Shares over training, and what is left of a menu: against numpy's and scipy's own words for the same."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from chiaroscuro.analysis.collapse import trace_collapse, utilisation
from chiaroscuro.analysis.gates import trace_gates
from chiaroscuro.errors import UserError

MENU = ["dct", "rbf", "attention"]


def shares(looks: int, operators: int = 3) -> st.SearchStrategy[np.ndarray]:
    positive = hnp.arrays(np.float64, (looks, operators), elements=st.floats(0.001, 1))
    return positive.map(lambda a: a / a.sum(-1, keepdims=True))


def records(*layers: tuple[list[str], np.ndarray]) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "step": 10 * look,
            "layers": [
                {"layer": number, "operators": menu, "share": share[look].tolist()}
                for number, (menu, share) in enumerate(layers, start=1)
            ],
        }
        for look in range(len(layers[0][1]))
        for kind in ("train", "validation")
    ]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5).filter(lambda x: sum(x) > 0.01))
def test_utilisation_is_the_normalised_entropy(parts: list[float]) -> None:
    share = np.array(parts) / sum(parts)
    assert utilisation(share.tolist()) == pytest.approx(stats.entropy(share, base=len(share)), abs=1e-12)
    assert -1e-12 <= utilisation(share.tolist()) <= 1 + 1e-12


@given(shares(30), st.floats(0.001, 0.9))
def test_what_survives_has_the_floor_or_more_over_the_last_tenth(share: np.ndarray, floor: float) -> None:
    trace = trace_collapse(records((["dct"], np.ones((30, 1))), (MENU, share)), floor)
    (layer,) = trace.layers
    assert layer.layer == 2
    assert layer.final_share == pytest.approx(share[27:].mean(0).tolist())
    assert layer.surviving == tuple(name for name, part in zip(MENU, layer.final_share, strict=True) if part >= floor)
    assert set(trace.collapsed) == set(MENU) - set(layer.surviving)
    assert trace.steps == [10 * look for look in range(30)]
    assert np.allclose(trace.share, share) and np.allclose(layer.share, share)


@given(shares(5), shares(5, 2))
def test_over_all_layers_shares_are_of_all_their_tokens(three: np.ndarray, two: np.ndarray) -> None:
    trace = trace_collapse(records((MENU, three), (["dct", "attention"], two)))
    assert trace.operators == tuple(MENU)
    assert np.allclose(np.sum(trace.share, axis=1), 1)
    expected = [(three[:, 0] + two[:, 0]) / 2, three[:, 1] / 2, (three[:, 2] + two[:, 1]) / 2]
    assert np.allclose(np.transpose(trace.share), expected)


def test_an_operator_that_lives_on_one_menu_has_not_collapsed() -> None:
    gone, alive = np.array([[0.5, 0.0, 0.5]]), np.array([[0.4, 0.2, 0.4]])
    assert trace_collapse(records((MENU, gone), (MENU, alive))).collapsed == ()
    assert trace_collapse(records((MENU, gone), (MENU, gone))).collapsed == ("rbf",)


@pytest.mark.parametrize(
    "looks",
    [[], [{"kind": "train", "step": 1, "loss": 2.0}], records((["attention"], np.ones((3, 1))))],
    ids=["nothing", "llama", "attention alone"],
)
def test_a_run_without_a_choice_is_one_line(looks: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="no layer of this run has a choice"):
        trace_collapse(looks)


@pytest.mark.parametrize(
    "record", [{"kind": "train"}, {"kind": "train", "step": None}, 5, None, {"kind": "train", "step": "x"}]
)
def test_a_record_without_a_step_is_damaged(record: Any) -> None:
    for trace in (trace_collapse, trace_gates):
        with pytest.raises(UserError, match="a record is damaged, for it has no step"):
            trace([record])


@pytest.mark.parametrize("tasks", [None, 5, {"sums": 5}])
def test_a_record_whose_tasks_are_none_is_damaged(tasks: Any) -> None:
    with pytest.raises(UserError, match="the record of step 3 is damaged"):
        trace_gates([{"step": 1}, {"kind": "train", "step": 3, "gate": 0.5, "tasks": tasks}])
