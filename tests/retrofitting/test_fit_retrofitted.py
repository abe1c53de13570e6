"""`fit` for retrofitted models.

Oracle: the loss itself, with one token moved a little towards what it is if it looks.
"""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from chiaroscuro import UserError, fit, retrofit
from chiaroscuro.model.cache import CACHE
from chiaroscuro.retrofitting.calibration import WholeBatch, decoder_layers
from chiaroscuro.retrofitting.fitting import _Fitting, _given, _noting_outputs
from chiaroscuro.retrofitting.inside import noting_decisions
from chiaroscuro.retrofitting.routed_attention import Reach
from chiaroscuro.retrofitting.whole import without_routing
from decoders import FAMILIES, VOCABULARY, build, ids


def routed(family: str = "llama", **options: Any) -> Any:
    model = build(family)
    retrofit(model, **{"window": 6, "sinks": 1, "attention_share": 0.5, "kv_share": 0.25} | options)
    return model


def batches(seed: int = 0, count: int = 8, rows: int = 4, time: int = 64) -> list[Tensor]:
    return [ids(100 * seed + i, rows, time) for i in range(count)]


def answers(model: Any, given: list[Tensor]) -> list[Mapping[str, Tensor]]:
    """Batches in which a quarter of the tokens ask for what the whole model says: they gain by looking."""
    whole = copy.deepcopy(model)
    whole.set_attention_share(1.0, kv_share=1.0)
    with torch.no_grad():
        return [
            {"input_ids": batch, "shift_labels": whole(batch).logits.argmax(-1).where(batch < VOCABULARY // 4, -100)}
            for batch in given
        ]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_gain_of_looking_is_how_fast_the_loss_falls(family: str) -> None:
    model = routed(family).double()
    tokens, labels = ids(1, 2, 24), ids(2, 2, 24)
    mask = torch.ones_like(tokens)
    mask[0, : 0 if family == "gemma2" else 5] = 0  # its eager attention gives NaN for padding in float64
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    fitting = _Fitting(model, [batch, batch], {"look": 0.5, "kept": 0.5}, None)
    with without_routing(model), torch.no_grad():
        batch_whole = WholeBatch(model, decoder_layers(model), batch)
        gains = fitting.gains(batch_whole)
    assert all(value is None for reach in model.reaches.values() for value in reach.whole.values())
    layer = max(model.reaches)
    reach: Reach = model.reaches[layer]
    for side in gains:  # what a row looks at is what a column is seen by
        assert gains[side][layer].shape[:2] == (2, 24)
    torch.testing.assert_close(gains["look"][layer].sum(1), gains["kept"][layer].sum(1))

    group = model.config.num_attention_heads // gains["look"][layer].shape[-1]

    def loss(place: tuple[int, int], head: int, part: float) -> float:
        """With a key-value head of this place looking a little, in the last layer of the model where nobody does."""
        queries = slice(group * head, group * (head + 1))
        attend = reach.attend

        def moved(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
            near = attend(query, key, value, *rest)
            reach.whole = {"look": True, "kept": True}
            far = attend(query, key, value, *rest)
            reach.whole = {"look": False, "kept": False}
            near[place][queries] += part * (far - near)[place][queries]
            return near

        object.__setattr__(reach, "attend", moved)
        for one in model.reaches.values():
            one.whole = {"look": False, "kept": False}
        try:
            logits = model(tokens, attention_mask=mask, use_cache=False).logits
        finally:
            object.__delattr__(reach, "attend")
            for one in model.reaches.values():
                one.whole = {"look": None, "kept": None}
        targets = F.pad(labels.masked_fill(mask == 0, -100)[:, 1:], (0, 1), value=-100)
        return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))

    with torch.no_grad():
        for place in ((0, 16), (1, 9), (1, 20)):
            for head in (0, 1):
                wanted = (loss(place, head, -1e-2) - loss(place, head, 1e-2)) / 2e-2  # norms are float32 there
                assert float(gains["look"][layer][place][head]) == pytest.approx(wanted, rel=2e-3, abs=1e-5)
    assert (gains["look"][layer].abs() > 1e-5).any()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("hidden", [None, 8])
def test_it_beats_chance_meets_the_shares_and_leaves_the_weights(heads: int, hidden: int | None) -> None:
    model = routed(router={"fitted": {"heads": heads}}, kv_router={"fitted": {"heads": heads}})
    before = {name: weight.clone() for name, weight in model.state_dict().items() if ".chiaroscuro." not in name}
    data = answers(model, batches(0, 16))
    report = fit(model, data, hidden=hidden, spread=False)
    assert report.layers == [0, 1, 2] and (report.look_share, report.kept_share) == (0.5, 0.25)
    assert json.dumps(report.figures(), allow_nan=False) and "kept" in str(report)
    assert report.look[2].captured > (0.8 if heads == 1 else 0.7)  # in the last layer no others gain; by chance a half
    correlations = [side.rank_correlation for side in report.kept.values()]
    assert sum(correlations) / 3 > 3 / (3 * report.kept[0].tokens) ** 0.5
    for name, weight in before.items():
        assert torch.equal(model.state_dict()[name], weight)
    with torch.no_grad(), noting_decisions(model) as decided:
        for batch in data:
            model(batch["input_ids"])
    for each in decided.values():
        looks, kept = (torch.cat([one[side].float() for one in each]) for side in (0, 1))
        assert float(looks.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(kept.mean()) == pytest.approx(0.25, abs=0.02)
        assert looks.ndim == kept.ndim == (3 if heads > 1 else 2)


def test_shares_by_layer_are_saved_and_the_dial_turns_them(tmp_path: Path) -> None:
    model = routed(attention_share=1.0)
    report = fit(model, answers(model, batches()))
    shares = {i: side.share for i, side in report.kept.items()}
    assert not report.look and sum(shares.values()) / 3 == pytest.approx(0.25, abs=1e-6)
    assert len(set(shares.values())) == 3 and all(side.harm is not None for side in report.kept.values())
    order = sorted(shares, key=lambda i: shares[i])
    assert order == sorted(shares, key=lambda i: report.kept[i].harm or 0.0)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids(5)).logits, model(ids(5)).logits)
    for one in (model, loaded):
        one.set_attention_share(kv_share=0.5)
        halves = [one.reaches[i].kept.calibration.share for i in range(3)]
        assert sum(halves) / 3 == pytest.approx(0.5, abs=1e-6)
        assert sorted(range(3), key=lambda i: halves[i]) == order


@torch.no_grad()
def test_padding_is_no_token() -> None:
    data = answers(routed(), batches(1))
    padded = [
        {
            "input_ids": F.pad(batch["input_ids"], (0, 9)),
            "attention_mask": F.pad(torch.ones_like(batch["input_ids"]), (0, 9)),
            "shift_labels": F.pad(batch["shift_labels"], (0, 9), value=7),
        }
        for batch in data
    ]
    first, second = routed(), routed()
    fit(first, data, spread=False)
    fit(second, padded, spread=False)
    for i in range(3):
        for side in ("look", "kept"):
            ours, theirs = (m.reaches[i].routers[side].fitted.weight for m in (first, second))
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("router", ["fitted", {"fitted": {"heads": 2}}, {"fitted": {"heads": 2, "history": 20}}])
def test_fitted_and_cached_is_fitted(router: Any) -> None:
    model = routed(router=router, kv_router={"fitted": {"heads": 2}})
    fit(model, answers(model, batches()))
    tokens = ids(3, 2, 50)
    wanted = model(tokens).logits
    cache = DynamicCache(config=model.config)
    parts = [model(tokens[:, a:b], **{CACHE: cache}).logits for a, b in [(0, 30), *((i, i + 1) for i in range(30, 50))]]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=1e-3)


def test_a_model_that_is_fitted_again_forgets_the_first_fit() -> None:
    first, second = routed(), routed()
    data = answers(first, batches())
    fit(first, answers(first, batches(3)), look=0.3, kept=0.3)
    for model in (first, second):
        fit(model, data, look=0.5, kept=0.25, spread=False)
    assert first.config.chiaroscuro == second.config.chiaroscuro
    for name, weight in second.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("options", "data", "complaint"),
    [
        ({"look": 1.0}, batches(), "look=1.0: must be a share of the tokens"),
        ({"kept": 0}, batches(), "kept=0: must be"),
        ({"kept": float("nan")}, batches(), "kept=nan"),
        ({"budget": 0.25, "kept": 0.25}, batches(), "drop look and kept"),
        ({"budget": 1.5}, batches(), "budget=1.5: must be a share"),
        ({}, batches()[:1], "1 batches to fit on: give two or more"),
        ({}, [], "0 batches to fit on"),
        ({}, [torch.zeros(4), torch.zeros(4)], "every batch needs input_ids"),
        ({}, [{"labels": ids(1)}] * 2, "every batch needs input_ids"),
        ({}, [ids(1) + VOCABULARY] * 2, "input_ids with a token outside the vocabulary, vocab_size=61"),
        ({}, [{"input_ids": ids(1), "labels": ids(1) + VOCABULARY}] * 2, "labels with a token outside the vocabulary"),
        ({}, [{"input_ids": ids(1), "position_ids": torch.arange(5)[None]}] * 2, r"position_ids of shape \(1, 5\)"),
        ({}, [{"input_ids": ids(1), "attention_mask": ids(1).tolist()}] * 2, "attention_mask of a batch is a list"),
        ({}, None, "batches=None: give a list"),
        ({}, [[1, 2, 3]] * 2, "every batch needs input_ids"),
        ({}, [ids(1)[:0]] * 2, "every batch needs input_ids"),
        ({}, [{"input_ids": ids(1), "labels": ids(1)[:, :4]}] * 2, "labels of shape .*: must be alike"),
        ({}, [{"input_ids": ids(1), "attention_mask": torch.ones(1, 4)}] * 2, "attention_mask of shape"),
        ({}, [{"input_ids": ids(1), "attention_mask": torch.zeros_like(ids(1))}] * 2, "nothing to predict"),
        ({}, [ids(1), {"input_ids": ids(1), "labels": torch.full_like(ids(1), -100)}], "that are held out there is"),
        ({}, [ids(1, 1, 20)] * 2, "tokens with a target to fit 32 features on"),
        ({"kept": 0.001}, batches(0, 3, 2, 40), "are held out, too few for a share of 0.001"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(options: dict[str, Any], data: Any, complaint: str) -> None:
    model = routed()
    said = copy.deepcopy(model.config.chiaroscuro)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=complaint) as error:
        fit(model, data, **options)
    assert "\n" not in str(error.value) and model.config.chiaroscuro == said
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(reach.whole == {"look": None, "kept": None} for reach in model.reaches.values())


def test_a_side_that_is_not_named_takes_its_own_share_and_another_router_stays() -> None:
    both = routed()
    assert fit(both, answers(both, batches()), look=0.3, spread=False).kept_share == 0.25
    one = routed(kv_router="random")
    report = fit(one, answers(one, batches()), spread=False)
    assert not report.kept and report.look_share == 0.5 and one.config.chiaroscuro["kv_router"] == "random"
    two = routed(kv_router={"fitted": {"hidden": 4}}, attention_share=1.0)
    fit(two, answers(two, batches()), spread=False)
    assert two.reaches[0].kept.options.hidden == 4


@torch.inference_mode()
def test_in_inference_mode_there_are_no_gradients() -> None:
    with pytest.raises(UserError, match=r"call it outside torch.inference_mode\(\)"):
        fit(routed(), batches())


def test_nothing_to_fit() -> None:
    with pytest.raises(UserError, match="all look and all are kept"):
        fit(routed(attention_share=1.0, kv_share=1.0), batches())


def test_a_broken_model_is_left_as_it_is() -> None:
    model = routed()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = math.nan
    with pytest.raises(UserError, match=r"the loss is nan|gives NaN"):
        fit(model, batches())
    assert all(reach.probe is None for reach in model.reaches.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_that_begins_later_is_the_same(family: str) -> None:
    """The harm of a layer is measured without those before it, which give what they gave."""
    model, tokens = build(family), ids(1)
    retrofit(model, window=6, sinks=1, kv_share=0.5, kv_router="random")
    layers = decoder_layers(model)
    with torch.no_grad(), without_routing(model), _noting_outputs(layers) as outputs:
        whole = model(input_ids=tokens).logits
        for i, reach in model.reaches.items():
            with reach.as_whole(look=True, kept=None):
                expected = model(input_ids=tokens).logits
                with _given(layers[:i], outputs):
                    torch.testing.assert_close(model(input_ids=tokens).logits, expected)
            assert not torch.equal(whole, expected)
    assert not any("forward" in vars(layer) for layer in layers)
    layers[0].forward = hooked = layers[0].forward  # as accelerate does with its hooks
    with _given(layers, outputs):
        assert layers[0].forward is not hooked
    assert vars(layers[0])["forward"] is hooked


def test_documents_that_share_a_row_are_fitted_to_as_they_are_alone() -> None:
    given = batches(3, rows=4, time=32)
    packed = [
        {
            "input_ids": batch.reshape(2, -1),
            "shift_labels": F.pad(batch[:, 1:], (0, 1), value=-100).reshape(2, -1),
            "position_ids": torch.arange(32).repeat(2, 2),
        }
        for batch in given
    ]
    weights = []
    for data in (given, packed, [batch["input_ids"] for batch in packed]):
        model = routed()
        fit(model, data, spread=False)
        routers = [router for reach in model.reaches.values() for router in reach.routers.values()]
        weights.append(torch.cat([router.fitted.weight.flatten() for router in routers]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(weights[2], weights[0], atol=1e-2)


def test_ids_of_32_bits() -> None:
    first, second = (routed(router="fitted", kv_router="fitted") for _ in range(2))
    given = batches()
    fit(first, given, kept=0.25, spread=False)
    fit(second, [each.int() for each in given], kept=0.25, spread=False)
    for one, other in zip(first.reaches.values(), second.reaches.values(), strict=True):
        assert torch.equal(one.kept.fitted.weight, other.kept.fitted.weight)
