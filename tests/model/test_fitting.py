"""Fitted scores: what a regression finds, on targets that are planted and on those of a model.

Oracle: scipy's rank correlation, and the model's own targets on tokens that it was not fitted on.
"""

import copy
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM, UserError, calibrate, fit
from chiaroscuro.layers import Context
from chiaroscuro.model import fitting
from chiaroscuro.model.batches import predicted_by
from chiaroscuro.model.calibration import embed_batch
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.fitting import _targets, gain_of_being_kept, gain_of_looking
from chiaroscuro.model.full_attention import full_attention
from chiaroscuro.model.score_fitting import rank_correlation, top_captured, top_recall
from chiaroscuro.model.spread import spread
from chiaroscuro.ops.attention import rotate

VOCABULARY, WIDTH, TIME = 60, 16, 96
MENUS = [["local", "attention"]] * 2


def build(seed: int = 0, **changes: Any) -> ChiarForCausalLM:
    fields: dict[str, Any] = {
        "operators": MENUS,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TIME,
        "window": 6,
        "sinks": 1,
        "attention_context": "kept",
        "router": "random",
        "kv_router": "random",
        "meta_router": "none",
    }
    torch.manual_seed(seed)
    model = ChiarForCausalLM(ChiarConfig(**fields | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.35)
    return model


def batches(seed: int, count: int = 10, rows: int = 4, time: int = TIME) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (rows, time), generator=generator) for _ in range(count)]


def state(model: ChiarForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The figures


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-5, 5)), min_size=3, max_size=40))
def test_the_rank_correlation_is_scipys(pairs: list[tuple[int, float]]) -> None:
    a, b = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    wanted = 0.0 if len({*a}) == 1 or len({*b}) == 1 else scipy.stats.spearmanr(a, b).statistic
    assert rank_correlation(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(wanted, abs=1e-9)


def test_recall_counts_the_true_top() -> None:
    target = torch.arange(10).double()
    assert top_recall(target, target, 3) == 1.0
    assert top_recall(-target, target, 3) == 0.0
    assert top_recall(torch.tensor([0.0, 0, 0, 0, 0, 9, 9, 9, 9, 1]), target, 2) in (0.0, 0.5)


def test_captured_is_the_part_of_what_the_best_choice_would_hold() -> None:
    target = torch.tensor([0.0, 0, 8, 2, 0]).double()
    assert top_captured(target, target, 2) == 1.0
    assert top_captured(torch.tensor([0.0, 0, 0, 1, 2]), target, 2) == 0.2
    assert top_captured(target, 0 * target, 2) == 1.0


# The fit


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("menu", [["attention"], ["local", "attention"]])
def test_the_gain_of_being_kept_is_how_fast_the_loss_falls(padded: bool, menu: list[str]) -> None:
    """Oracle: the loss itself, with one token of one layer seen from far a little; its weights pair by pair."""
    model = build(operators=[menu] * 2).double()
    ids, labels = batches(3, 1, 2, 24)[0], batches(4, 1, 2, 24)[0]
    labels[:, ::3] = -100
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7], mask[1, 20:] = 0, 0
    window, sinks = 6, 1
    first = mask.int().argmax(1)

    def run(layer: int, place: tuple[int, int], head: int, part: float) -> Tensor:
        """The loss where the later tokens of the row see this key a little."""
        row, j = place
        attention = model.trunk.blocks[layer].units[0].operator
        given: list[tuple[Tensor, Context]] = []

        def note(_: Any, arguments: tuple[Any, ...]) -> None:
            given.append((arguments[0], arguments[1]))

        def move(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            (mixed,) = arguments
            x, context = given[-1]
            q, k, v = (getattr(attention, f"{n}_proj")(x).unflatten(-1, (-1, 4)).transpose(1, 2) for n in "qkv")
            q, k = (rotate(y, attention._rotary(x, context)) for y in (q, k))
            moved = torch.zeros(*x.shape[:2], 4, 4).double()
            real = [i for i in range(24) if mask[row, i]]
            for i in (i for i in real if i - j >= window and j - int(first[row]) >= sinks):
                for h in (2 * head, 2 * head + 1):
                    scores = {m: float(q[row, h, i] @ k[row, head, m]) / 2 for m in real if m <= i}
                    near = {m: s for m, s in scores.items() if i - m < window or m - int(first[row]) < sinks}
                    total, nearby = (sum(math.exp(s) for s in part.values()) for part in (scores, near))
                    output = sum(math.exp(s) / nearby * v[row, head, m] for m, s in near.items())
                    moved[row, i, h] = math.exp(scores[j]) / total * (v[row, head, j] - output)
            moved = moved.flatten(2)
            return (mixed + part * (moved if mixed.ndim == 3 else moved[mask.bool()]),)

        handles = [attention.register_forward_pre_hook(note), attention.out_proj.register_forward_pre_hook(move)]
        try:
            x, context, gate = embed_batch(model, {"input_ids": ids, "attention_mask": mask})
            for i in (0, 1):
                x = model.trunk.run_layer(i, x, gate, context)[0]
        finally:
            for handle in handles:
                handle.remove()
        predicted = model.lm_head(model.trunk.norm(x))[:, :-1]
        targets = labels.masked_fill(mask == 0, -100)[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
        return torch.nn.functional.cross_entropy(predicted.flatten(0, 1), targets.flatten(), reduction="sum")

    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with evaluation_mode(model), full_attention(model):
        state = embed_batch(model, batch)
        gains = gain_of_being_kept(model, state, model.targets_of(labels, None, mask != 0), [0, 1])
        thresholds = [model.kv_thresholds()[i].values for i in (0, 1)]
        assert all(values.isneginf().all() for values in thresholds)
        for values in thresholds:
            values.fill_(torch.inf)
        with torch.no_grad():
            for layer, place, head in ((0, (0, 9), 0), (0, (1, 3), 1), (1, (0, 8), 1), (1, (1, 10), 0)):
                higher, lower = (run(layer, place, head, part) for part in (1e-4, -1e-4))
                wanted = pytest.approx(float(lower - higher) / 2e-4, rel=1e-4, abs=1e-6)
                assert float(gains[layer][(*place, head)]) == wanted
    assert (gains[0].abs() > 1e-5).any() and (gains[1].abs() > 1e-5).any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("menu", [["local", "attention"], ["dct", "conv", "attention"]])
def test_the_gain_of_looking_is_how_fast_the_loss_falls(padded: bool, menu: list[str]) -> None:
    """Oracle: the loss itself, with one token of one layer moved a little towards what it is if it looks."""
    model = build(operators=[menu] * 2, attention_context="all").double()
    ids, labels = batches(3, 1, 2, 24)[0], batches(4, 1, 2, 24)[0]
    labels[:, ::3] = -100
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7], mask[1, 20:] = 0, 0
    thresholds = [model.thresholds()[i].values for i in (0, 1)]

    def run(layer: int = 0, place: tuple[int, int] = (0, 0), part: float = 0.0) -> tuple[Tensor, Tensor]:
        """The loss, and the change of the layer's output at the place."""
        x, context, gate = embed_batch(model, {"input_ids": ids, "attention_mask": mask})
        for i in (0, 1):
            outputs = []
            for value in (-torch.inf, torch.inf):
                thresholds[i].fill_(value)
                outputs.append(model.trunk.run_layer(i, x, gate, context)[0])
            x = outputs[1].clone()
            if i == layer:
                change = (outputs[0] - outputs[1])[place]
                x[place] += part * change
        predicted = model.lm_head(model.trunk.norm(x))[:, :-1]
        targets = labels.masked_fill(mask == 0, -100)[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
        return torch.nn.functional.cross_entropy(predicted.flatten(0, 1), targets.flatten(), reduction="sum"), change

    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with evaluation_mode(model), full_attention(model):
        state, before = embed_batch(model, batch), {name: p.grad for name, p in model.named_parameters()}
        gains = gain_of_looking(model, state, model.targets_of(labels, None, mask != 0), [0, 1])
        assert all(values.isneginf().all() for values in thresholds)
    assert before == {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        for layer, place in ((0, (0, 9)), (0, (1, 15)), (1, (0, 16)), (1, (1, 2))):
            higher, lower = (run(layer, place, part)[0] for part in (1e-4, -1e-4))
            assert float(gains[layer][place][0]) == pytest.approx(float(lower - higher) / 2e-4, rel=1e-4, abs=1e-6)
    assert (gains[0].abs() > 1e-4).any() and (gains[1].abs() > 1e-4).any()


@pytest.mark.parametrize("heads", [1, 2])
def test_a_planted_score_is_found(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    """Targets that are exponentials of linear functions of the input: the fit's ranking is theirs."""
    generator = torch.Generator().manual_seed(1)
    planted = 0.4 * torch.randn(1 + heads, WIDTH, generator=generator)

    def kept(model: ChiarForCausalLM, state: Any, predicted: Tensor, layers: list[int]) -> dict[int, Tensor]:
        return planted_in(model, state, layers, lambda x: (x @ planted[1:].T + 5.0).exp().expand(-1, -1, 2))

    def look(model: ChiarForCausalLM, state: Any, predicted: Tensor, layers: list[int]) -> dict[int, Tensor]:
        return planted_in(model, state, layers, lambda x: (x @ planted[:1].T + 5.0).exp())

    def planted_in(model: ChiarForCausalLM, state: Any, layers: list[int], of: Any) -> dict[int, Tensor]:
        (x, context, gate), found = state, {}
        for i in layers:
            found[i] = of(model.trunk.blocks[i].operator_input(x, context))
            x, _ = model.trunk.run_layer(i, x, gate, context)
        return found

    monkeypatch.setattr(fitting, "gain_of_being_kept", kept)
    monkeypatch.setattr(fitting, "gain_of_looking", look)
    model = build(kv_router="random" if heads == 1 else {"fitted": {"heads": 2}})
    report = fit(model, batches(0), look=0.25, kept=0.25)
    for side in (report.look[0], report.kept[0]):
        assert side.rank_correlation > 0.9 and side.recall > 0.8 and side.captured > 0.96
    # Targets are of the whole model, and the second layer's input is what the first gives when it is routed.
    assert 0.5 < report.look[1].rank_correlation < report.look[0].rank_correlation
    block = model.model.layers[0]
    # Features of a normed token add up to 0, so a constant added to all weights of a score changes nothing.
    for router, wanted in ((block.router, planted[:1]), (block.kv_router, planted[1:])):
        centred = [w - w.mean(-1, keepdim=True) for w in (router.fitted.weight, wanted)]
        # Smaller by the penalty, and of the same direction.
        assert torch.cosine_similarity(*centred).min() > 0.9


def test_a_task_s_targets_count_and_not_its_next_words() -> None:
    """One target a row: in the last layer a token's output reaches its own prediction alone."""
    model, ids = build(), batches(0, 1, 2, 40)[0]
    targets = torch.full_like(ids, -100)
    targets[:, 30] = 7
    for batch in ({"input_ids": ids, "shift_labels": targets}, {"input_ids": ids, "labels": targets.roll(1, 1)}):
        with torch.no_grad(), full_attention(model):
            found = dict(_targets(model, batch, [("look", 0), ("look", 1)]))["look", 1]
        told = torch.zeros(ids.shape, dtype=torch.bool)
        told[found.valid] = found.values[:, 0] != 0
        assert bool(found.valid[:, 30].all()) and not told[:, torch.arange(40) != 30].any()


@pytest.mark.parametrize("hidden", [None, 16])
def test_on_a_model_it_beats_chance_on_tokens_that_it_has_not_seen(hidden: int | None) -> None:
    """A quarter of the words ask for what the whole model says, and in the last layer no others gain at all."""
    model, asks = build(), VOCABULARY // 4
    with torch.no_grad(), full_attention(model):
        data = [
            {"input_ids": ids, "shift_labels": model(ids).logits.argmax(-1).where(ids < asks, -100)}
            for ids in batches(0, 20)
        ]
    report = fit(model, data, look=0.25, kept=0.25, hidden=hidden)
    assert report.layers == [0, 1]
    for side in (report.look[1], *report.kept.values()):
        # By chance the standard deviations are 1/√n and about .43/√(n/4).
        assert side.rank_correlation > 5 / side.tokens**0.5
        assert side.recall > 0.25 + 3 * 0.43 / (side.tokens / 4) ** 0.5
        assert side.captured > side.recall
    assert report.look[1].captured > 0.5
    assert "look" in str(report) and json.dumps(report.figures(), allow_nan=False)


@pytest.mark.parametrize("hidden", [None, 8])
def test_the_shares_are_met_and_the_rest_of_the_model_stays(hidden: int | None) -> None:
    model, data = build(), batches(0)
    before = dict(model.named_parameters())
    kept = {name: parameter.clone() for name, parameter in before.items()}
    model.train()
    fit(model, data, look=0.3, kept=0.4, hidden=hidden)
    assert model.training
    model.eval()
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
    name = "fitted" if hidden is None else {"fitted": {"hidden": hidden}}
    assert (model.config.router, model.config.kv_router) == (name, name)
    assert (model.config.attention_share, model.config.kv_share) == (0.3, 0.4)
    # In the first layer tokens of one id have one score, and go the same way.
    with torch.no_grad():
        routings = model(torch.cat(data), output_routing=True, use_cache=False).routing
    for routing in routings:
        assert routing.share[1].item() == pytest.approx(0.3, abs=1 / VOCABULARY)
        assert routing.kept.float().mean().item() == pytest.approx(0.4, abs=1 / VOCABULARY)
    model.set_attention_share(0.6, kv_share=0.1)  # the dial turns


def test_thresholds_that_follow_the_row_do_so_after_the_fit() -> None:
    model = build(kv_router={"fitted": {"heads": 2}})
    model.set_history(32)
    fit(model, batches(0), look=0.3, kept=0.4)
    assert model.config.router == {"fitted": {"history": 32}}
    assert model.config.kv_router == {"fitted": {"heads": 2, "history": 32}}
    assert all(block.router.options.history == 32 for block in model.trunk.blocks)


def test_one_side_leaves_the_other_alone() -> None:
    for shares in ({"look": 0.3}, {"kept": 0.3}):
        model, data = build(), batches(0)
        calibrate(model, data, 0.5, 0.5)
        others = model.kv_thresholds() if "look" in shares else model.thresholds()
        before = {i: copy.deepcopy(thresholds.state_dict()) for i, thresholds in others.items()}
        report = fit(model, data, **shares)
        assert bool(report.look) == ("look" in shares) and bool(report.kept) == ("kept" in shares)
        others = model.kv_thresholds() if "look" in shares else model.thresholds()
        for i, thresholds in others.items():
            assert all(torch.equal(thresholds.state_dict()[name], tensor) for name, tensor in before[i].items())
        assert (model.config.router == "fitted") == ("look" in shares)
        assert (model.config.kv_router == "fitted") == ("kept" in shares)


@pytest.mark.parametrize("menu", [["conv", "attention"], ["dct", "attention"], ["dct", "local", "attention"]])
def test_other_operators_may_take_the_tokens_that_do_not_look(menu: list[str]) -> None:
    window = 6 if "local" in menu else None
    model = build(operators=[menu, ["attention"]], attention_context="all", window=window, sinks=0)
    report = fit(model, batches(0), look=0.25)
    assert report.layers == [0] and report.look[0].rank_correlation > 0


def test_padding_is_no_token() -> None:
    """Rows that are padded on either side teach the same as the rows alone."""
    data = batches(0, 10, time=60)
    bare, padded = build(), build()
    wider = []
    for n, ids in enumerate(data):
        ids, mask = (
            torch.nn.functional.pad(part, (20, 0) if n % 2 else (0, 20)) for part in (ids, torch.ones_like(ids))
        )
        wider.append({"input_ids": ids, "attention_mask": mask})
    found = [fit(bare, data, look=0.25, kept=0.25), fit(padded, wider, look=0.25, kept=0.25)]
    for i in (0, 1):
        assert found[0].look[i].tokens == found[1].look[i].tokens
        assert found[0].kept[i].tokens == found[1].kept[i].tokens
        for side in ("router", "kv_router"):
            ours, theirs = (getattr(model.model.layers[i], side).fitted.weight for model in (bare, padded))
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


# A budget


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_a_budget_is_spent_and_goes_where_the_harm_is(harms: list[float], mean: float) -> None:
    shares = spread(harms, mean)
    assert sum(shares) / len(shares) == pytest.approx(mean, rel=1e-6)
    assert all(0.25 * mean - 1e-9 <= share <= 1 for share in shares)
    ordered = [share for _, share in sorted(zip(harms, shares, strict=True))]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(ordered))


def test_a_layer_s_harm_is_that_of_routing_it_alone() -> None:
    data = batches(0)
    model, flat = build(), build()
    report = fit(model, data, budget=0.25)
    fit(flat, data, look=0.25, kept=0.25)
    held_out = torch.cat(data[8:])
    with torch.no_grad(), full_attention(flat):
        whole = flat(held_out).logits.log_softmax(-1)
    for name, sides in (("router", report.look), ("kv_router", report.kept)):
        assert sum(side.share for side in sides.values()) / 2 == pytest.approx(0.25)
        for i, side in sides.items():
            values = getattr(flat.model.layers[i], name).calibration.values.clone()
            with torch.no_grad(), full_attention(flat):
                getattr(flat.model.layers[i], name).calibration.values.copy_(values)
                routed = flat(held_out).logits.log_softmax(-1)
            harm = (whole.exp() * (whole - routed)).sum(-1)[:, :-1].mean().item()  # the last one predicts nothing
            assert side.harm == pytest.approx(harm, rel=1e-3) and harm > 0
    with torch.no_grad():
        routings = model(torch.cat(data), output_routing=True, use_cache=False).routing
    for i, routing in enumerate(routings):
        assert routing.share[1].item() == pytest.approx(report.look[i].share, abs=1 / VOCABULARY)
        assert routing.kept.float().mean().item() == pytest.approx(report.kept[i].share, abs=1 / VOCABULARY)


def test_shares_by_layer_are_saved_in_the_thresholds(tmp_path: Path) -> None:
    model, ids = build(), batches(1, 1)[0]
    fit(model, batches(0), budget=0.25)
    model.save_pretrained(tmp_path)
    assert torch.equal(ChiarForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_budget_stays_spread_when_the_dial_is_turned_and_while_the_model_trains(tmp_path: Path) -> None:
    model, data = build(), batches(0)
    report = fit(model, data, budget=0.25)
    shares = {side: [getattr(report, side)[i].share for i in (0, 1)] for side in ("look", "kept")}
    assert shares["look"][0] != pytest.approx(shares["look"][1], rel=1e-2)
    assert model.config.layer_shares("attention_share") == dict(enumerate(shares["look"]))
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path)
    loaded.train()
    for batch in data:
        loaded(batch, labels=batch).loss.backward()
        loaded.step_calibration()
    for side, layers in (("look", loaded.thresholds()), ("kept", loaded.kv_thresholds())):
        assert [layers[i].share for i in (0, 1)] == shares[side]
    loaded.set_attention_share(0.5, kv_share=1.0)
    assert sum(thresholds.share for thresholds in loaded.thresholds().values()) / 2 == pytest.approx(0.5)
    assert loaded.thresholds()[0].share != pytest.approx(0.5)
    assert all(thresholds.values.isneginf().all() for thresholds in loaded.kv_thresholds().values())
    calibrate(loaded, data, share=0.25, kv_share=0.25)
    assert [loaded.thresholds()[i].share for i in (0, 1)] == pytest.approx(shares["look"])
    flat = ChiarForCausalLM.from_pretrained(tmp_path, attention_spread=None, kv_spread=None)
    for layers, before in ((flat.thresholds(), model.thresholds()), (flat.kv_thresholds(), model.kv_thresholds())):
        assert [layers[i].share for i in (0, 1)] == [0.25, 0.25]
        assert all(layers[i].values != before[i].values for i in (0, 1))


def test_another_fit_without_a_budget_is_flat_again() -> None:
    model = build()
    fit(model, batches(0), budget=0.25)
    fit(model, batches(0), look=0.25)
    assert model.config.attention_spread is None and model.config.kv_spread is not None
    assert [model.thresholds()[i].share for i in (0, 1)] == [0.25, 0.25]


def test_a_budget_of_a_model_with_one_side() -> None:
    model = build(attention_context="all")
    report = fit(model, batches(0), budget=0.25)
    assert report.look and not report.kept and report.kept_share is None


# The model afterwards


@settings(max_examples=5)
@given(seed=st.integers(0, 99), hidden=st.sampled_from([None, 8]), chunk=st.integers(1, 9))
def test_cached_is_uncached(seed: int, hidden: int | None, chunk: int) -> None:
    model = build(seed)
    fit(model, batches(seed), look=0.25, kept=0.25, hidden=hidden)
    ids = batches(seed + 1, 1, 2, 40)[0]
    cache, parts = ChiarCache(model.config), []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for part in ids.split(chunk, 1):
            parts.append(model(part, cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hidden", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_keeps_the_scores(tmp_path: Path, hidden: int | None, dtype: torch.dtype) -> None:
    model = build()
    fit(model, batches(0), look=0.25, kept=0.25, hidden=hidden)
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert (loaded.config.router, loaded.config.kv_router) == (model.config.router, model.config.kv_router)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if "router" in name}
    assert len(wanted) == 2 * 2 * (3 + (2 if hidden is None else 4))
    for name, tensor in wanted.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    if dtype == torch.float32:
        ids = batches(1, 1)[0]
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_another_fit_takes_the_place_of_the_first() -> None:
    model, data = build(), batches(0)
    fit(model, data, look=0.25, kept=0.25, hidden=8)
    fit(model, data, look=0.25, kept=0.25)
    again = build()
    fit(again, data, look=0.25, kept=0.25)
    for name, tensor in state(again).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_a_model_with_scores_that_are_not_fitted_is_not_calibrated() -> None:
    with pytest.raises(UserError, match="not fitted yet") as error:
        calibrate(build(router="fitted"), batches(0, 1))
    assert "\n" not in str(error.value)


# Mistakes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "data", "shares", "complaint"),
    [
        ({}, batches(0), {}, "nothing to fit"),
        ({}, batches(0), {"look": 1.5}, "look=1.5: must be a share"),
        ({}, batches(0), {"kept": 0}, "kept=0: must be a share"),
        ({}, batches(0), {"kept": True}, "kept=True: must be a share"),
        ({}, batches(0), {"look": 0.2, "hidden": 0}, "hidden=0: must be a whole number from 1"),
        ({}, batches(0), {"look": 0.2, "hidden": 10**9}, "hidden=1000000000: must be a whole number from 1 to 65,536"),
        ({}, batches(0), {"look": 0.2, "spread": "yes"}, "spread='yes': must be true or false"),
        ({}, batches(0), {"look": 0.2, "budget": 0.2}, "drop look and kept"),
        ({}, batches(0), {"budget": 2}, "budget=2: must be a share"),
        ({"operators": [["attention"]], "attention_context": "all"}, batches(0), {"budget": 0.2}, "no layer chooses"),
        ({}, [], {"look": 0.2}, "0 batches to fit on"),
        ({}, batches(0, 1), {"look": 0.2}, "1 batches to fit on"),
        ({}, batches(0, 4, time=6), {"look": 0.2}, "layer 0, side look: 0 tokens with a target"),
        ({}, batches(0, 4, time=20), {"kept": 0.2}, "layer 0, side kept: 0 tokens with a target"),
        ({}, [*batches(0, 4), torch.zeros(1, 8).long()], {"look": 0.2}, "too few for a share of 0.2"),
        ({}, [{"labels": torch.zeros(1, 4)}] * 2, {"look": 0.2}, "input_ids of shape"),
        ({}, None, {"look": 0.2}, "batches=None: give a list"),
        ({}, [[1, 2, 3]] * 2, {"look": 0.2}, "every batch needs input_ids"),
        ({}, [{"input_ids": batches(0)[0], "labels": batches(0)[0][:, :4]}] * 2, {"look": 0.2}, "must be alike"),
        (
            {},
            [{"input_ids": x, "labels": x - x - 100} for x in batches(0)],
            {"look": 0.2},
            "fitted on there is nothing",
        ),
        (
            {},
            [{"input_ids": x, "shift_labels": x - (100 + x) * (i > 7)} for i, x in enumerate(batches(0))],
            {"look": 0.2},
            "held out there is nothing to predict",
        ),
        ({"operators": [["attention"]]}, batches(0), {"look": 0.2}, "no layer chooses who looks far"),
        ({"attention_context": "all"}, batches(0), {"kept": 0.2}, "no layer decides who is kept"),
        ({"router": "learned"}, batches(0), {"look": 0.2}, "scales what it routes"),
        (
            {"router": "soft", "operators": [["dct", "attention"]], "attention_context": "all"},
            batches(0),
            {"look": 0.2},
            "routes by weights",
        ),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(changes: Any, data: Any, shares: Any, complaint: str) -> None:
    model = build(**changes)
    before, said = state(model), model.config.to_dict()
    with pytest.raises(UserError, match=complaint) as error:
        fit(model, data, **shares)
    assert "\n" not in str(error.value)
    assert model.config.to_dict() == said
    assert state(model).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_model_that_is_broken_is_left_as_it_is(hidden: int | None) -> None:
    model = build()
    with torch.no_grad():
        model.model.layers[1].operators["attention"].q_proj.weight[0, 0] = torch.nan
    routers = [block.router for block in model.model.layers]
    with pytest.raises(UserError, match="layer 1 gives NaN or infinity"):
        fit(model, batches(0), look=0.2, hidden=hidden)
    assert [block.router for block in model.model.layers] == routers and model.config.router == "random"


def test_an_error_in_the_calibration_puts_the_routers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("no")

    model = build()
    before, said = state(model), model.config.to_dict()
    monkeypatch.setattr("chiaroscuro.model.fitting.calibrate_layer", fail)
    with pytest.raises(UserError, match="no"):
        fit(model, batches(0), look=0.2, kept=0.2)
    assert model.config.to_dict() == said
    assert state(model).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


# Documents


def packed(given: list[Tensor]) -> list[dict[str, Tensor]]:
    """Batches of two rows of two documents each, of batches of four documents."""
    rows = [{"input_ids": batch.reshape(2, -1), "shift_labels": batch.roll(-1, 1)} for batch in given]
    for row, batch in zip(rows, given, strict=True):
        row["shift_labels"][:, -1] = -100  # nothing after a document's end
        row["shift_labels"] = row["shift_labels"].reshape(2, -1)
        row["position_ids"] = torch.arange(batch.shape[1]).repeat(2, 2)
    return rows


def test_documents_that_share_a_row_are_calibrated_on_as_they_are_alone() -> None:
    given = batches(1, time=TIME // 2)
    thresholds = []
    for data in (given, packed(given), [row["input_ids"] for row in packed(given)]):
        model = build(1, router="threshold", kv_router="norm", embedding_norm=True)
        calibrate(model, data, share=0.3, kv_share=0.4)
        both = (*model.thresholds().values(), *model.kv_thresholds().values())
        thresholds.append(torch.cat([one.values for one in both]))
    torch.testing.assert_close(thresholds[1], thresholds[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(thresholds[2], thresholds[0], atol=1e-4)  # as one text


def test_scores_are_fitted_to_documents_that_share_a_row_as_to_each_alone() -> None:
    given = batches(2, time=TIME // 2)
    weights = []
    for data in (given, packed(given), [row["input_ids"] for row in packed(given)]):
        model = build(2)
        fit(model, data, look=0.3, kept=0.4)
        routers = [router for block in model.trunk.blocks for router in (block.router, block.kv_router)]
        weights.append(torch.cat([router.fitted.weight.flatten() for router in routers]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(weights[2], weights[0], atol=1e-2)


def test_a_side_that_nobody_has_fitted_waits_while_shares_are_spread() -> None:
    """Its scores are the same for every token, and a warning would say so of each forward."""
    model = build(kv_router="fitted")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, batches(0), look=0.25, spread=True)


def test_shares_of_numpy_are_numbers_like_any_other(unchecked: None, tmp_path: Path) -> None:
    model = build()
    report = fit(model, batches(0), look=np.float32(0.25), spread=False)
    json.dumps(report.figures())
    model.save_pretrained(tmp_path)
    assert ChiarForCausalLM.from_pretrained(tmp_path).config.attention_share == 0.25


def test_documents_by_their_bounds_are_those_by_their_positions() -> None:
    ids = batches(0, count=1, rows=1, time=60)[0]
    bounds = torch.tensor([0, 25, 60])
    places = torch.cat([torch.arange(25), torch.arange(35)])[None]
    thresholds = []
    for told in ({"cu_seq_lens_q": bounds}, {"position_ids": places}, {}):
        model = build(router="threshold")
        calibrate(model, [{"input_ids": ids, **told}], 0.3)
        thresholds.append(model.thresholds()[1].values)
    assert torch.equal(thresholds[0], thresholds[1])
    assert not torch.equal(thresholds[0], thresholds[2])


@pytest.mark.parametrize(
    ("changes", "shaped"),
    [
        ({"router": {"fitted": {"hidden": 8}}}, "router"),
        ({"kv_router": {"fitted": {"heads": 2}}}, "kv_router"),
        ({"operators": [["local", "attention"], ["conv", "local", "attention"]]}, "router"),
    ],
)
def test_a_router_of_another_shape_begins_anew(tmp_path: Path, changes: dict[str, Any], shaped: str) -> None:
    model = build(router="fitted", kv_router="fitted")
    fit(model, batches(0), look=0.25, kept=0.25, spread=False)
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, **changes)
    last = loaded.trunk.blocks[1]
    assert not getattr(last, shaped).calibration.calibrated
    other = {"router": "kv_router", "kv_router": "router"}[shaped]
    assert getattr(last, other).calibration.calibrated
    with pytest.raises(UserError, match=r"embed_tokens\.weight was saved with shape"):
        ChiarForCausalLM.from_pretrained(tmp_path, **changes, vocab_size=VOCABULARY + 1)


def test_the_first_token_of_a_document_is_not_predicted_by_the_one_before() -> None:
    ids = torch.arange(1, 13).view(2, 6)
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    targets = predicted_by({"input_ids": ids, "position_ids": places}, None)
    assert targets.tolist() == [[2, 3, -100, 5, 6, -100], [8, 9, -100, 11, 12, -100]]
    by_bounds = predicted_by({"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 3, 6])}, None)
    assert torch.equal(by_bounds, targets[:1])
    assert predicted_by({"input_ids": ids, "position_ids": torch.arange(6)[None]}, None)[0].tolist()[:5] == [
        2,
        3,
        4,
        5,
        6,
    ]
    assert predicted_by({"input_ids": ids, "labels": ids, "position_ids": places}, None)[0, 2] == 4
