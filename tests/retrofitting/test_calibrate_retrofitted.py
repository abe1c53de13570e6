"""`calibrate` for retrofitted models.

Oracle: what a plain forward then decides, counted.
"""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro import UserError, calibrate, fit, retrofit, unretrofit
from chiaroscuro.retrofitting.inside import watching
from decoders import VOCABULARY, build, ids

LAYERS = [0.06, 4e-3, 4e-3]
"""How near a share comes, by layer: in the first one all tokens of a word have one score, of twenty words."""


def routed(family: str = "llama", **options: Any) -> Any:
    model = build(family)
    retrofit(model, **{"window": 6, "sinks": 1, "attention_share": 0.5, "kv_share": 0.25} | options)
    return model


@cache
def fitted_once(heads: int) -> Any:
    entry = {"fitted": {"heads": heads}}
    model = routed(router=entry, kv_router=entry)
    fit(model, [ids(i, 4, 64) for i in range(8)])
    return model


def fitted(heads: int = 1) -> Any:
    return copy.deepcopy(fitted_once(heads))


def other_text(seed: int = 9, count: int = 6) -> list[Tensor]:
    """Tokens of a third of the vocabulary, unlike those that a model was fitted on."""
    return [ids(100 * seed + i, 4, 64) % (VOCABULARY // 3) for i in range(count)]


def shares(model: Any, batches: list[Any]) -> dict[str, dict[int, float]]:
    with watching(model) as seen, torch.no_grad():
        for batch in batches:
            model(**({"input_ids": batch} if isinstance(batch, Tensor) else batch), use_cache=False)
    return {"look": seen.look, "kept": seen.kept}


@pytest.mark.parametrize("heads", [1, 2])
def test_it_meets_the_shares_of_each_layer_and_leaves_the_scores(heads: int) -> None:
    model = fitted(heads)
    scores = {name: t.clone() for name, t in model.state_dict().items() if "calibration" not in name}
    batches = other_text()
    off = shares(model, batches)
    thresholds = calibrate(model, batches)
    assert sorted(thresholds) == [0, 1, 2] and all(len(values) == 1 for values in thresholds.values())
    on = shares(model, batches)
    for side, mean in (("look", 0.5), ("kept", 0.25)):
        wanted = model.layer_shares(side)
        assert sum(wanted.values()) / 3 == pytest.approx(mean, abs=1e-6)
        for i, share in wanted.items():
            assert on[side][i] == pytest.approx(share, abs=LAYERS[i])
    assert max(abs(off[side][i] - model.layer_shares(side)[i]) for side in off for i in off[side]) > 0.02
    for name, tensor in scores.items():
        assert torch.equal(model.state_dict()[name], tensor)


@settings(deadline=None, max_examples=12)
@given(share=st.sampled_from([0, 0.1, 0.3, 0.9, 1]), kv_share=st.sampled_from([None, 0.0, 0.4, 1.0]))
def test_it_sets_other_shares_and_the_dial_goes_on_from_there(share: float, kv_share: float | None) -> None:
    model = fitted()
    batches = other_text()
    calibrate(model, batches, share, kv_share)
    said = model.config.chiaroscuro
    assert said["attention_share"] == share and said["kv_share"] == (0.25 if kv_share is None else kv_share)
    found = shares(model, batches)
    for side in found:
        for i, wanted in model.layer_shares(side).items():
            assert found[side][i] == pytest.approx(wanted, abs=LAYERS[i])
    model.set_attention_share(0.5)
    assert sum(shares(model, batches)["look"].values()) / 3 == pytest.approx(0.5, abs=0.1)


@pytest.mark.filterwarnings("error")  # that thresholds are a guess
@pytest.mark.parametrize("router", ["threshold", "norm", "random"])
def test_routers_of_other_kinds_are_calibrated_too(router: str) -> None:
    model = routed(router=router, kv_router=router)
    batches = other_text()
    calibrate(model, batches, 0.3, 0.2)
    found = shares(model, batches)
    for side, wanted in (("look", 0.3), ("kept", 0.2)):
        for i, share in found[side].items():
            assert share == pytest.approx(wanted, abs=0.03 if router == "random" else LAYERS[i])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padding_is_not_counted(family: str) -> None:
    model = routed(family, router="norm", kv_router="norm")
    batches: list[Any] = other_text()
    mask = torch.ones(4, 96, dtype=torch.long)
    mask[:, :32] = 0
    padded = [
        {"input_ids": torch.cat([torch.zeros_like(batch[:, :32]), batch], 1), "attention_mask": mask}
        for batch in batches
    ]
    alone = copy.deepcopy(model)
    wanted = calibrate(alone, batches, 0.4, 0.4)
    found = calibrate(model, padded, 0.4, 0.4)
    for i, values in wanted.items():
        assert found[i] == pytest.approx(values, rel=1e-3)


def test_documents_of_a_row_are_calibrated_on_each_by_itself() -> None:
    model = routed(router="norm", kv_router="norm")
    batches = other_text()
    places = torch.cat([torch.arange(20), torch.arange(44)])[None]
    packed = [{"input_ids": batch, "position_ids": places} for batch in batches]
    found, wanted = calibrate(model, packed, 0.3, 0.2), calibrate(copy.deepcopy(model), batches, 0.3, 0.2)
    assert found[2] != wanted[2]
    counted = shares(model, packed)
    for side, share in (("look", 0.3), ("kept", 0.2)):
        assert all(counted[side][i] == pytest.approx(share, abs=LAYERS[i]) for i in counted[side])


def test_a_side_that_was_never_fitted_stays_as_it_is() -> None:
    model = routed(attention_share=1.0)
    fit(model, [ids(i, 4, 64) for i in range(8)], kept=0.25)
    batches = other_text()
    calibrate(model, batches)
    found = shares(model, batches)
    assert set(found["look"].values()) == {1.0} and model.config.chiaroscuro["attention_share"] == 1.0
    with pytest.raises(UserError, match="was not fitted yet"):
        calibrate(model, batches, 0.5)


def test_a_mistake_leaves_the_model_as_it_was() -> None:
    model = fitted()
    batches = other_text()
    before = copy.deepcopy((model.state_dict(), model.config.chiaroscuro))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "no batches"),
        ([{"input_ids": batches[0], "attention_mask": torch.zeros_like(batches[0])}], {}, "padding alone"),
        ([batches[0] + VOCABULARY], {}, "outside the vocabulary"),
        (batches, {"share": 1.5}, r"share=1\.5: must be a number from 0 to 1"),
        (batches, {"kv_share": True}, "kv_share=True"),
        (torch.zeros(3), {}, "input_ids of shape"),
        ([{"input_ids": batches[0], "attention_mask": torch.ones(4, 63)}], {}, r"attention_mask of shape \(4, 63\)"),
        ([{"input_ids": batches[0], "position_ids": torch.ones(1, 63)}], {}, r"position_ids of shape \(1, 63\)"),
    ]
    for given_batches, options, message in wrong:
        with pytest.raises(UserError, match=message):
            calibrate(model, given_batches, **options)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    kept = copy.deepcopy((broken.state_dict(), broken.config.chiaroscuro))
    with pytest.raises(UserError, match="NaN or infinity"):
        calibrate(broken, batches, 0.1, 0.1)
    for now, then in ((model, before), (broken, kept)):
        assert now.config.chiaroscuro == then[1]
        for name, tensor in now.state_dict().items():
            torch.testing.assert_close(tensor, then[0][name], rtol=0, atol=0, equal_nan=True)
        assert all(not reach.watchers for reach in now.reaches.values())
    guessed = routed(router="norm", kv_router="norm")
    with torch.no_grad():
        guessed.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        calibrate(guessed, batches)
    with pytest.warns(UserWarning, match="so its share is a guess"):
        shares(guessed, batches[:1])
    unfitted = routed()
    with pytest.raises(UserError, match="was not fitted yet"):
        calibrate(unfitted, batches)
    unretrofit(unfitted)
    with pytest.raises(
        UserError,
        match=r"calibrate takes a CHIAR-Former, or as chiaroscuro\.calibrate a retrofitted model, not a Llama",
    ):
        calibrate(unfitted, batches)
