"""The controls of a retrofit: what they keep, and that they cost what they should."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byte_tokenizer import byte_tokenizer
from chiaroscuro import fit, retrofit
from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.data.needles import Haystack
from chiaroscuro.ops.reach_attention import reach_mask
from chiaroscuro.retrofitting.inside import watching
from chiaroscuro.studies.controls import compare_controls, compare_lookers, learn_gates, published_marks, whole_layers
from chiaroscuro.studies.retrofitting import predicted_prefill, reached_pairs
from decoders import FAMILIES, build

WINDOW, SINKS = 16, 2


@pytest.fixture
def model() -> Any:
    return build(vocab_size=len(byte_tokenizer()), max_position_embeddings=512).eval()


@pytest.mark.parametrize(("window", "sinks", "heads"), [(1, 0, 1), (7, 3, 2), (16, 2, 3), (90, 5, 1)])
@pytest.mark.parametrize("look_by_head", [True, False])
def test_pairs_are_those_of_the_mask(window: int, sinks: int, heads: int, look_by_head: bool) -> None:
    draw = torch.Generator().manual_seed(window)
    looks = torch.rand(*((64, heads) if look_by_head else (64,)), generator=draw) < 0.4
    kept = torch.rand(64, heads, generator=draw) < 0.4
    i = torch.arange(64)
    looking = looks if look_by_head else looks[:, None].expand(64, heads)
    masks = [reach_mask(i, i, looking[:, head], kept[:, head], window, sinks) for head in range(heads)]
    assert reached_pairs(looks, kept, window, sinks) == pytest.approx(sum(float(m.sum()) for m in masks) / heads)


class Text:
    """Rows of tokens, as blocks."""

    tokens = SimpleNamespace(count=600, bytes=600)

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        ids = torch.randint(3, vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(0))
        self.rows = [{"input_ids": r[:-1], "labels": r[:-1], "shift_labels": r[1:]} for r in ids]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


def test_marks_are_what_their_names_say(model: Any) -> None:
    ids = torch.randint(3, 90, (1, 60))
    attention = build(vocab_size=len(byte_tokenizer()), max_position_embeddings=512).eval()
    attention.load_state_dict(model.state_dict())
    attention.set_attn_implementation("eager")
    weights = attention(ids, output_attentions=True).attentions
    assert len(weights) == 3
    retrofit(model, window=WINDOW, sinks=SINKS, kv_share=0.5, kv_router="random")
    marks = published_marks(model, ids)
    for i, whole in enumerate(weights):
        far = torch.ones(60, 60, dtype=torch.bool).tril(-WINDOW)
        far[:, :SINKS] = False
        expected = (whole[0] * far).sum(1).unflatten(0, (2, -1)).sum(1)  # by key-value head, over its queries
        torch.testing.assert_close(marks["received attention"][i][0].T, expected, atol=1e-4, rtol=1e-4)
    assert marks["H"][0].shape == marks["key norm"][0].shape == (1, 60, 2)
    assert bool((marks["H"][0] <= math.log(model.config.hidden_size)).all()) and bool((marks["H"][0] > 0).all())
    assert bool((marks["key norm"][0] < 0).all())


def test_everything_kept_is_no_control_and_all_have_a_figure(model: Any) -> None:
    routed = build(vocab_size=len(byte_tokenizer()), max_position_embeddings=512).eval()
    routed.load_state_dict(model.state_dict())
    retrofit(routed, window=WINDOW, sinks=SINKS, kv_share=0.34, kv_router="random")
    found = compare_controls(model, routed, Text(2, 300, 90), Haystack(byte_tokenizer()))
    assert set(found) == {
        *("window alone", "random", "H", "key norm", "received attention", "whole heads", "whole layers")
    }
    assert all(math.isfinite(value) and value > 1 for value in found.values())
    assert len({round(value, 6) for value in found.values()}) == len(found)  # each keeps others


def test_others_that_look_are_as_many_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = build(vocab_size=len(byte_tokenizer()), max_position_embeddings=512).eval()
    entry = {"fitted": {"heads": 2}}
    retrofit(routed, window=WINDOW, sinks=SINKS, attention_share=0.5, kv_share=0.34, router=entry, kv_router=entry)
    fit(routed, [torch.randint(3, 90, (2, 300), generator=torch.Generator().manual_seed(i)) for i in range(4)])
    before = {name: tensor.clone() for name, tensor in routed.state_dict().items()}
    seen: list[Any] = []

    def evaluate(control: Any, blocks: Any, batch_size: int) -> Any:
        for i, reach in control.reaches.items():
            assert torch.equal(reach.kept.calibration.values, routed.reaches[i].kept.calibration.values)
        with watching(control) as shares:
            found = evaluate_blocks(control, blocks, batch_size=batch_size)
        seen.append(shares)
        return found

    monkeypatch.setattr("chiaroscuro.studies.controls.evaluate_blocks", evaluate)
    found = compare_lookers(routed, Text(2, 300, 90))
    assert set(found) == {"random", "H"} and found["random"] != found["H"]
    kept = routed.layer_shares("kept")
    for shares in seen:
        for i, share in routed.layer_shares("look").items():
            assert shares.look[i] == pytest.approx(share, abs=0.05)  # of a random token's word, in the first layer
            assert shares.kept[i] == pytest.approx(kept[i], abs=0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in routed.state_dict().items())
    assert routed.config.chiaroscuro["router"] == entry


def test_gates_learn_what_the_window_alone_cannot_give(model: Any) -> None:
    """A gate stays open where the far part matters and closes where it does not."""
    with torch.no_grad():  # heads of the second layer give nothing: nothing is lost by closing them
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    retrofit(model, window=WINDOW, sinks=SINKS, kv_share=0.5, kv_router="random")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates = learn_gates(model, Haystack(byte_tokenizer()), steps=12, length=400)
    assert all(gate.shape == (2,) and bool(((gate >= 0) & (gate <= 1)).all()) for gate in gates.values())
    assert bool((gates[1] < 0.5).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(reach.probe is None for reach in model.reaches.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_of_a_model_in_half_precision(model: Any, dtype: torch.dtype) -> None:
    retrofit(model.to(dtype), window=WINDOW, sinks=SINKS, kv_share=0.5, kv_router="random")
    gates = learn_gates(model, Haystack(byte_tokenizer()), steps=2, length=400)
    assert all(bool(((gate >= 0) & (gate <= 1)).all()) and bool((gate < 1).any()) for gate in gates.values())


def test_prefill_is_predicted_by_products_and_pairs(model: Any) -> None:
    ids = torch.randint(3, 90, (1, 200))
    retrofit(model, window=WINDOW, sinks=SINKS, kv_share=1.0, attention_share=1.0)
    assert predicted_prefill(model, ids) == 1
    retrofitted = build(vocab_size=len(byte_tokenizer()), max_position_embeddings=512).eval()
    retrofit(retrofitted, window=WINDOW, sinks=SINKS, kv_share=0.0, attention_share=1.0)
    width = retrofitted.config.hidden_size
    layer = 2 * (2 * width * width + 2 * width * width // 2 + 3 * width * 48)
    products = 3 * 200 * layer + 2 * width * len(byte_tokenizer())
    whole, near = 200 * 201 / 2, sum(min(i + 1, WINDOW) + min(max(i + 1 - WINDOW, 0), SINKS) for i in range(200))
    expected = (products + 3 * 4 * width * whole) / (products + 3 * 4 * width * near)
    assert predicted_prefill(retrofitted, ids) == pytest.approx(expected)
    for family in FAMILIES:  # whatever their attention modules are made of
        decoder = build(family)
        retrofit(decoder, window=WINDOW, sinks=SINKS, kv_share=0.0, attention_share=1.0)
        part, layers = len(decoder.reaches) / 3, [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
        head = decoder.get_output_embeddings()
        products = sum(2 * m.weight.numel() * (1 if m is head else 200) for m in layers)
        mean = part * near + (1 - part) * whole
        expected = (products + 3 * 4 * 32 * whole) / (products + 3 * 4 * 32 * mean)
        assert predicted_prefill(decoder, ids % 50) == pytest.approx(expected)


@given(st.integers(1, 40), st.floats(0, 1))
def test_whole_layers_keep_the_share_at_least(count: int, share: float) -> None:
    layers = list(range(3, 3 + count))
    whole = whole_layers(layers, share)
    assert sorted({*whole} & {*layers}) == whole
    assert share * count <= len(whole) <= share * count + 1
    gaps = [b - a for a, b in pairwise([2, *whole])]
    assert not whole or max(gaps) - min(gaps) <= 1
