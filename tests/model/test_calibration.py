"""Where thresholds stand: set from data, moved while training, or published.

Oracle: a plain loop that asks the model what it routed, one layer after the other, and numpy's percentiles.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError, calibrate
from chiaroscuro.analysis.routing_summary import measure_routing
from chiaroscuro.layers.thresholds import pool_tables
from chiaroscuro.model.calibration import paper_thresholds
from chiaroscuro.ops import null_entropy_quantiles

VOCABULARY, WIDTH, TIME = 61, 32, 24
THREE = ["dct", "rbf", "attention"]
MENUS = {
    "two": [["dct"], ["dct", "attention"], ["dct", "attention"], ["attention"]],
    "three": [["dct"], THREE, THREE, ["attention"]],
    "pairs": [["attention"], ["dct", "rbf"], ["rbf", "attention"], ["dct"]],
}


def build(menus: str = "two", seed: int = 0, **changes: Any) -> ChiarForCausalLM:
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "max_position_embeddings": TIME,
    }
    torch.manual_seed(seed)
    model = ChiarForCausalLM(ChiarConfig(**{**fields, "operators": MENUS[menus], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def batches(seed: int, count: int = 3, rows: int = 16, padded: bool = False) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (rows, TIME), generator=draw)
        mask = torch.ones_like(ids)
        if padded:
            mask = (torch.arange(TIME) < torch.randint(1, TIME + 1, (rows, 1), generator=draw)).long()
            mask[::2] = mask[::2].flip(1)  # every other row on the left
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def scores_and_indices(model: ChiarForCausalLM, data: list[dict[str, Tensor]], layer: int) -> tuple[Tensor, Tensor]:
    scores, indices = [], []
    with torch.no_grad():
        for batch in data:
            routing = model(**batch, output_routing=True, use_cache=False).routing[layer]
            real = batch["attention_mask"].bool()
            scores.append(routing.entropy[real])
            indices.append(routing.operator_index[real])
    return torch.cat(scores), torch.cat(indices)


def achieved(model: ChiarForCausalLM, data: list[dict[str, Tensor]]) -> dict[int, list[float]]:
    """The share of every operator in every routed layer, counted."""
    shares = {}
    for i in model.config.routed_layers:
        _, index = scores_and_indices(model, data, i)
        shares[i] = [(index == k).float().mean().item() for k in range(len(model.config.operators[i]))]
    return shares


def wanted_shares(operators: int, share: float) -> list[float]:
    return [(1 - share) / (operators - 1)] * (operators - 1) + [share]


# From data


@settings(max_examples=8)
@given(
    menus=st.sampled_from(sorted(MENUS)),
    share=st.floats(0.02, 0.98),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
    norm=st.sampled_from(["pre", "post"]),
)
@example(menus="three", share=0.328125, padded=True, seed=1000, norm="pre")
def test_the_share_is_reached_on_the_same_batches(menus: str, share: float, padded: bool, seed: int, norm: str) -> None:
    model, data = build(menus, seed, norm=norm, meta_router="causal"), batches(seed, padded=padded)
    returned = calibrate(model, data, share)
    assert returned == {i: model.model.layers[i].thresholds.tolist() for i in model.config.routed_layers}
    for i, shares in achieved(model, data).items():
        # Scores that are nearly equal, as of one token where rows begin, lie on one side of a threshold together.
        scores, _ = scores_and_indices(model, data, i)
        together = scores.mul(1e4).round().unique(return_counts=True)[1].max().item() / len(scores)
        assert shares == pytest.approx(wanted_shares(len(model.config.operators[i]), share), abs=max(0.005, together))


@pytest.mark.parametrize("menus", MENUS)
def test_each_layer_is_set_on_what_the_ones_before_it_produce(menus: str) -> None:
    data = batches(0, padded=True)
    model, oracle = build(menus), build(menus)
    found = calibrate(model, data, 0.25)
    at_once = {i: scores_and_indices(oracle, data, i)[0] for i in oracle.config.routed_layers}
    missed = 0.0
    for i in oracle.config.routed_layers:
        count = len(oracle.config.operators[i])
        cuts = torch.linspace(0, 0.75, count)[1:]
        scores, _ = scores_and_indices(oracle, data, i)
        values = torch.quantile(scores, cuts)
        # In the middle between two scores, and not on the quantile: the same tokens lie above.
        assert torch.equal(scores[:, None] > torch.tensor(found[i]), scores[:, None] > values)
        missed = max(missed, (torch.quantile(at_once[i], cuts) - values).abs().max().item())
        oracle.model.layers[i].thresholds.copy_(values)
    assert missed > 1e-4  # all layers at once would have been another calibration


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_tokens_of_one_score_go_the_same_way(share: float) -> None:
    """H of a bare embedding is the token's own, so no threshold can part two tokens of one id."""
    model, data = build(operators=[["dct", "attention"], ["attention"]]), batches(0)
    calibrate(model, data, share)
    ids = torch.cat([batch["input_ids"] for batch in data])
    commonest = ids.flatten().bincount().max().item() / ids.numel()
    assert abs(achieved(model, data)[0][-1] - share) <= commonest


def test_batches_may_be_tensors_and_a_generator() -> None:
    data = batches(0)
    ids = [batch["input_ids"] for batch in data]
    found = [calibrate(build(), given, 0.3) for given in (data, ids, (batch for batch in ids), [torch.cat(ids)])]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for i, values in other.items():
            assert values == pytest.approx(found[0][i], abs=1e-6)


def test_the_share_is_the_config_s_unless_given_and_is_kept() -> None:
    model, data = build(attention_share=0.4), batches(0)
    calibrate(model, data)
    assert all(shares[-1] == pytest.approx(0.4, abs=0.005) for shares in achieved(model, data).values())
    calibrate(model, data, 0.1)
    assert model.config.attention_share == 0.1
    assert all(thresholds.share == 0.1 for thresholds in model.thresholds().values())


@pytest.mark.parametrize("menus", MENUS)
def test_the_dial_turns_a_calibrated_model(menus: str) -> None:
    model, data = build(menus), batches(0, count=6)
    calibrate(model, data, 0.25)
    for share in (0.1, 0.5, 0.9, 0.25):
        model.set_attention_share(share)
        # A table is of the tokens at the calibrated share: further off, later layers see other inputs.
        first, *later = achieved(model, data).values()
        assert first == pytest.approx(wanted_shares(len(first), share), abs=0.005)
        for shares in later:
            assert shares[-1] == pytest.approx(share, abs=0.15)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("share", [0, 1, 0.0, 1.0])
@pytest.mark.parametrize("menus", MENUS)
def test_none_and_all_are_exact(menus: str, share: float) -> None:
    dialled, calibrated, data = build(menus), build(menus), batches(0)
    calibrate(dialled, data)
    dialled.set_attention_share(share)
    calibrate(calibrated, data, share)
    for model in (dialled, calibrated):
        for seen in (data, batches(99)):
            assert all(shares[-1] == share for shares in achieved(model, seen).values())


def test_calibrating_leaves_the_rest_of_the_model_alone() -> None:
    model, data = build().train(), batches(0)
    before = {name: p.clone() for name, p in model.state_dict().items() if "calibration" not in name}
    calibrate(model, data)
    assert model.training
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not any(thresholds.noted for thresholds in model.thresholds().values())
    assert all(p.requires_grad for p in model.parameters())


def test_calibrating_ignores_dropout() -> None:
    data = batches(0)
    dropping = build(hidden_dropout=0.5).train()
    assert calibrate(dropping, data) == calibrate(build(), data)


def test_a_calibrated_model_trains_on_from_there() -> None:
    model, data = build(), batches(0)
    calibrate(model, data)
    before = model.model.layers[1].thresholds.clone()
    model.train()(**batches(1)[0])
    model.step_calibration()
    moved = (model.model.layers[1].thresholds - before).abs().item()
    assert 0 < moved < 0.02


@pytest.mark.parametrize(
    ("changes", "data", "share", "complaint"),
    [
        ({}, [], 0.2, "no batches"),
        (
            {},
            [{"input_ids": torch.zeros(1, 4).long(), "attention_mask": torch.zeros(1, 4).long()}],
            0.2,
            "padding",
        ),
        ({}, [{"labels": torch.zeros(1, 4).long()}], 0.2, "input_ids"),
        *(
            ({}, [{"input_ids": torch.zeros(1, 4).long(), name: torch.ones(1, 4)}], 0.2, f"{name}: .*attention_mask")
            for name in ("attention_masks", "attn_mask")
        ),
        ({}, torch.zeros(3, 4).long(), 0.2, "input_ids"),
        ({}, [torch.zeros(1, TIME + 1).long()], 0.2, f"max_position_embeddings={TIME}"),
        ({}, [torch.full((1, 4), VOCABULARY)], 0.2, f"vocab_size={VOCABULARY}"),
        ({}, batches(0), 1.5, "1.5"),
        ({}, batches(0), float("nan"), "nan"),
        ({}, batches(0), True, "True"),
        ({"operators": [["attention"]] * 2}, batches(0), 0.2, "no layer routes"),
        ({"router": "soft"}, batches(0), 0.2, "no layer routes.*router='soft'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_calibrations(changes: Mapping[str, Any], data: Any, share: float, complaint: str) -> None:
    model = build(**changes).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=complaint) as error:
        calibrate(model, data, share)
    assert "\n" not in str(error.value)
    assert model.training
    assert model.config.attention_share == 0.25
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "a lot", True])
def test_impossible_shares(share: Any) -> None:
    with pytest.raises(UserError, match="must be a number from 0 to 1"):
        build().set_attention_share(share)


def test_a_dial_that_is_connected_to_nothing() -> None:
    for changes in ({"operators": [["attention"]] * 2}, {"router": "hard"}):
        with pytest.raises(UserError, match="no layer routes"):
            build(**changes).set_attention_share(0.5)


# While training


@pytest.mark.parametrize("fixed", [False, True])
def test_a_calibration_that_fails_leaves_the_model_as_it_was(fixed: bool) -> None:
    model = build(calibration="fixed", entropy_thresholds=[0.4, 0.4]) if fixed else build()
    with torch.no_grad():
        for name, parameter in model.trunk.blocks[0].named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter[0, 0] = torch.nan
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(UserError, match="not finite"):
        calibrate(model, [torch.arange(TIME)[None] % VOCABULARY], share=0.6)
    assert model.config.to_dict() == config
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert all(one.running != fixed for one in model.thresholds().values())


@pytest.mark.parametrize("menus", MENUS)
def test_before_any_data_the_thresholds_are_the_null_s(menus: str) -> None:
    model = build(menus, attention_share=0.3)
    for i in model.config.routed_layers:
        cuts = torch.linspace(0, 0.7, len(model.config.operators[i]))[1:].tolist()
        wanted = null_entropy_quantiles(WIDTH, cuts)
        torch.testing.assert_close(model.model.layers[i].thresholds, wanted, atol=1e-5, rtol=0)


def test_no_forward_moves_a_threshold_and_a_step_does() -> None:
    model, data = build(), batches(0)
    before = [model.model.layers[i].thresholds.clone() for i in (1, 2)]
    for training in (False, True):
        model.train(training)
        for batch in data:
            model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(torch.equal(model.model.layers[i].thresholds, b) for i, b in zip((1, 2), before, strict=True))
        assert all(t.noted == training for t in model.thresholds().values())
    model.step_calibration()
    assert all((model.model.layers[i].thresholds - b).abs() > 1e-4 for i, b in zip((1, 2), before, strict=True))
    after = [model.model.layers[i].thresholds.clone() for i in (1, 2)]
    model.step_calibration()  # nothing was noted since
    assert all(torch.equal(model.model.layers[i].thresholds, a) for i, a in zip((1, 2), after, strict=True))


def test_the_first_step_takes_the_batch_s_own_quantiles() -> None:
    model, (batch,) = build("three"), batches(0, count=1, padded=True)
    scores, _ = scores_and_indices(model, [batch], 1)
    model.train()(**batch)
    model.step_calibration()
    wanted = torch.quantile(scores, torch.tensor([0.375, 0.75]))
    torch.testing.assert_close(model.model.layers[1].thresholds, wanted, atol=1e-5, rtol=0)


def test_forwards_of_one_step_count_by_their_tokens() -> None:
    few, many = batches(0, count=1, rows=2)[0], batches(1, count=1, rows=20)[0]
    model = build().train()
    model(**few), model(**many)
    model.step_calibration()
    alone = []
    for batch in (few, many):
        fresh = build().train()
        fresh(**batch)
        fresh.step_calibration()
        alone.append(fresh.thresholds()[1].quantiles)
    torch.testing.assert_close(model.thresholds()[1].quantiles, pool_tables(alone, [2.0, 20.0]))


@pytest.mark.parametrize("menus", MENUS)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_running_calibration_reaches_the_share(menus: str, share: float) -> None:
    model = build(menus, attention_share=share).train()
    with torch.no_grad():
        for step in range(25):
            model(**batches(step, count=1, rows=32, padded=True)[0])
            model.step_calibration()
    fresh = batches(1000, count=12, rows=32)
    for i, shares in achieved(model.eval(), fresh).items():
        assert shares == pytest.approx(wanted_shares(len(model.config.operators[i]), share), abs=0.03)


def test_the_share_can_be_changed_while_training() -> None:
    model = build(attention_share=0.5).train()
    for step in range(4):
        if step == 2:
            model.set_attention_share(0.1)
        model(**batches(step, count=1)[0])
        model.step_calibration()
    assert achieved(model.eval(), batches(9, count=6))[1][-1] == pytest.approx(0.1, abs=0.05)


def test_each_part_has_the_mode_that_it_had() -> None:
    model = build().train()
    model.trunk.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    calibrate(model, batches(1))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_fixed_thresholds_never_move() -> None:
    model = build("three", calibration="fixed", entropy_thresholds=[0.7, 0.8])
    wanted = torch.tensor([0.7, 0.8])
    assert torch.equal(model.model.layers[1].thresholds, wanted)
    for batch in batches(0):
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        model.step_calibration()
    assert torch.equal(model.model.layers[1].thresholds, wanted)
    assert not any(thresholds.noted for thresholds in model.thresholds().values())


def test_models_without_thresholds_step_over_it() -> None:
    for changes in ({"router": "soft"}, {"operators": [["attention"]] * 2}):
        model = build(**changes).train()
        model(**batches(0)[0])
        model.step_calibration()


def test_saved_midway_it_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def steps(model: ChiarForCausalLM, numbers: range) -> ChiarForCausalLM:
        model.train()
        with torch.no_grad():
            for number in numbers:
                model(**batches(number, count=1)[0])
                model.step_calibration()
        return model

    straight = steps(build(attention_share=0.3), range(6))
    steps(build(attention_share=0.3), range(3)).save_pretrained(tmp_path)
    resumed = steps(AutoModelForCausalLM.from_pretrained(tmp_path), range(3, 6))
    for i, thresholds in straight.thresholds().items():
        assert torch.equal(resumed.thresholds()[i].values, thresholds.values)
        assert torch.equal(resumed.thresholds()[i].quantiles, thresholds.quantiles)
        assert resumed.thresholds()[i].steps == thresholds.steps == 6


# As published


def entropy_by_hand(rows: np.ndarray) -> np.ndarray:
    power = scipy.fft.dct(rows.astype(np.float64), norm="ortho", axis=-1) ** 2
    p = power / (power.sum(-1, keepdims=True) + 1e-8)
    return -(p * np.log(p + 1e-8)).sum(-1) / np.log(rows.shape[-1])


def test_the_paper_s_thresholds_are_percentiles_over_embedding_rows() -> None:
    model = build(operators=[["attention"]] * 2)
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 400, 200)
    rows = [draw.integers(0, VOCABULARY, size).tolist() for size in sizes]
    embeddings = model.model.embed_tokens.weight.detach().numpy()
    taken = [token for row in rows for token in row[:256]]
    # What the cuts leave out, after each row and after all of them, would drag the percentiles down.
    lowest = int(entropy_by_hand(embeddings).argmin())
    rows = [row + [lowest] * (600 - len(row)) if len(row) > 256 else row for row in rows] + [[lowest] * 600] * 30
    wanted = np.percentile(entropy_by_hand(embeddings[taken]), [33, 67])
    found = paper_thresholds(model, iter(rows))
    assert found == pytest.approx(tuple(wanted), abs=1e-6)
    config = model.config.to_dict() | {"calibration": "fixed", "entropy_thresholds": list(found)}
    routed = ChiarConfig.from_dict(config | {"operators": MENUS["three"], "num_hidden_layers": 4, "use_cache": None})
    values = ChiarForCausalLM(routed).model.layers[1].thresholds
    torch.testing.assert_close(values, torch.tensor(found))


def test_other_percentiles_and_lengths() -> None:
    model = build(operators=[["attention"]] * 2)
    rows = [[3, 5, 7, 9, 11, 13], [2, 4]]
    embeddings = model.model.embed_tokens.weight.detach().numpy()
    wanted = np.percentile(entropy_by_hand(embeddings[[3, 5, 7, 9, 2, 4]]), [10, 80])
    assert paper_thresholds(model, rows, (10, 80), max_length=4) == pytest.approx(tuple(wanted), abs=1e-6)


def test_no_rows() -> None:
    with pytest.raises(UserError, match="no tokens"):
        paper_thresholds(build(), [[], []])
    with pytest.raises(UserError, match=f"vocab_size={VOCABULARY}"):
        paper_thresholds(build(), [[VOCABULARY]])


def test_two_unlike_forwards_of_a_step_are_routed_as_one() -> None:
    """As a text and a task are: of their quantiles' mean the share of all tokens would be another."""
    model = build("two", attention_share=0.1).train()
    plain, tilted = torch.randn(2, 30, 8, model.config.hidden_size)
    tilted = tilted + 3 * torch.randn(30, 8, 1)  # most of its energy in one coefficient: a lower entropy
    with torch.no_grad():
        for _ in range(60):
            model(inputs_embeds=plain)
            model(inputs_embeds=tilted)
            model.step_calibration()
        both = torch.cat([plain, tilted])
        routing = model.eval()(inputs_embeds=both, output_routing=True).routing[1]
    assert float(routing.share[-1]) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_what_a_model_in_training_mode_generates_is_not_noted(execution: str) -> None:
    model = build("two", execution=execution).train()
    ids = torch.randint(5, 30, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    made = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 9)
    assert not any(thresholds.noted for thresholds in model.thresholds().values())


def test_to_measure_the_routing_of_a_model_in_training_changes_nothing() -> None:
    model = build("two", hidden_dropout=0.3).train()
    batch = torch.randint(5, 30, (2, 6))
    assert measure_routing(model, [batch]) == measure_routing(model, [batch])
    assert model.training and not any(thresholds.noted for thresholds in model.thresholds().values())
