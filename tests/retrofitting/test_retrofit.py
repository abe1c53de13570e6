"""`retrofit`: decoders of other libraries whose attention is routed.

Oracle: the original model, whole; or with masks written out by what the routed one decided.
"""

import copy
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)

import chiaroscuro
from chiaroscuro import UserError, calibrate, retrofit, unretrofit
from chiaroscuro.layers import FittedRouter, row_thresholds
from chiaroscuro.model.cache import CACHE
from chiaroscuro.retrofitting import without_routing
from chiaroscuro.retrofitting.inside import noting_decisions, watching
from chiaroscuro.retrofitting.routed_attention import Forward, Reach, present
from chiaroscuro.retrofitting.routed_cache import RoutedLayer
from decoders import FAMILIES, VOCABULARY, build, ids, masked, note_decisions

ALL = {"attention_share": 1.0, "kv_share": 1.0}
HALF = {"attention_share": 0.5, "kv_share": 0.5, "router": "random", "kv_router": {"norm": {"history": 9}}}


@pytest.fixture(autouse=True, scope="module")
def short_blocks() -> Any:
    """Thresholds that follow the row change several times in the short rows of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_thresholds, "BLOCK", 4)
        yield


def routed_copy(model: Any, **options: Any) -> Any:
    routed = copy.deepcopy(model)
    retrofit(routed, **{"window": 6, "sinks": 1} | options)
    note_decisions(routed)
    return routed


def score_at_random(routed: Any, seed: int) -> None:
    """Give fitted scores weights at random."""
    generator = torch.Generator().manual_seed(seed)
    for reach in routed.reaches.values():
        for router in (reach.look, reach.kept):
            if isinstance(router, FittedRouter):
                router.fitted.set_weights(torch.randn(2, 32, generator=generator), torch.zeros(2))


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# The original, when nothing is left out


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_looking_and_all_kept_it_is_the_original(family: str) -> None:
    model, tokens = build(family), ids(1)
    mask = torch.ones_like(tokens)
    mask[0, :9], mask[1, 40:] = 0, 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, 9] = -100  # else padding would predict it
    routed = routed_copy(model, **ALL)
    assert {*model.state_dict()} == {name for name in routed.state_dict() if ".chiaroscuro." not in name}
    for padding in ({}, {"attention_mask": mask}):
        outputs = [m(input_ids=tokens, labels=labels, **padding) for m in (model, routed)]
        real = mask.bool() if padding else torch.ones_like(mask).bool()
        torch.testing.assert_close(outputs[1].logits[real], outputs[0].logits[real], atol=1e-5, rtol=1e-5)
        for m, output in zip((model, routed), outputs, strict=True):
            m.zero_grad()
            output.loss.backward()
        wanted, found = gradients(model), gradients(routed)
        assert {*wanted} == {*found}
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_as_the_original(family: str) -> None:
    model, tokens = build(family), ids(2, 2, 30)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    routed = routed_copy(model, **ALL)
    for options in (
        {"attention_mask": mask},
        {"attention_mask": torch.ones_like(mask), "num_beams": 3},
        {"attention_mask": mask, "num_beams": 2},
    ):
        wanted, found = (m.generate(tokens, max_new_tokens=15, do_sample=False, **options) for m in (model, routed))
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("family", FAMILIES)
def test_unretrofit_gives_the_model_back(family: str) -> None:
    model, tokens = build(family), ids(3)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    wanted, said, cls = model(tokens).logits, model.config.to_dict(), type(model)
    retrofit(model, window=6, sinks=1, **HALF)
    assert type(model) is not cls and isinstance(model, cls)
    assert not torch.equal(model(tokens).logits, wanted)
    unretrofit(model)
    assert type(model) is cls and model.config.to_dict() == said and torch.equal(model(tokens).logits, wanted)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    retrofit(model, **ALL)  # and again
    torch.testing.assert_close(model(tokens).logits, wanted, atol=1e-5, rtol=1e-5)


def test_layers_that_are_not_named_stay_whole() -> None:
    model = build()
    routed = routed_copy(model, layers=[1], **HALF)
    assert [*routed.reaches] == [1] and type(routed.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
    assert routed.model.layers[0].self_attn.config is routed.config


# Sparse is dense


@given(
    family=st.sampled_from([*FAMILIES]),
    seed=st.integers(0, 99),
    window=st.integers(1, 20),
    sinks=st.integers(0, 5),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    heads=st.tuples(st.booleans(), st.booleans()),
    padding=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
@settings(max_examples=40)
def test_it_is_the_original_with_a_mask(
    family: str,
    seed: int,
    window: int,
    sinks: int,
    shares: tuple[float, float],
    heads: tuple[bool, bool],
    padding: tuple[int, int],
) -> None:
    """By head or for all heads alike, on either side."""
    model, tokens = build(family, seed), ids(seed, 2, 40)
    by_head = [side and family != "gpt_neox" for side in heads]
    entry: Any = {"fitted": {"heads": 2}}
    routed = routed_copy(
        model,
        window=window,
        sinks=sinks,
        attention_share=shares[0],
        kv_share=shares[1],
        router=entry if by_head[0] else "random",
        kv_router=entry if by_head[1] else "threshold",
    )
    score_at_random(routed, seed)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, : padding[0]], real[1, 40 - padding[1] :] = False, False
    given = {"attention_mask": real.long()} if not bool(real.all()) else {}
    labels = tokens.masked_fill(~real, -100)
    labels[0, padding[0]] = -100  # else padding would predict it
    given["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    found = routed(input_ids=tokens, labels=labels, **given)
    oracle = masked(model, routed, real)
    wanted = oracle(input_ids=tokens, labels=labels, **given)
    torch.testing.assert_close(found.logits[real], wanted.logits[real], atol=2e-5, rtol=1e-4)
    found.loss.backward()
    wanted.loss.backward()
    theirs = gradients(oracle)
    for name, gradient in gradients(routed).items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3)


@given(
    family=st.sampled_from([*FAMILIES]),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 9),
    padded=st.booleans(),
    heads=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=25)
@torch.no_grad()
def test_cached_is_uncached(family: str, seed: int, chunk: int, padded: bool, heads: tuple[bool, bool]) -> None:
    entry: Any = {"fitted": {"heads": 2}}
    by_head = {name: entry for name, side in zip(("router", "kv_router"), heads, strict=True) if side}
    routed = routed_copy(build(family, seed), **HALF | (by_head if family != "gpt_neox" else {}))
    score_at_random(routed, seed)
    tokens = ids(seed, 2, 40)
    mask = torch.ones_like(tokens)
    mask[0, : 7 if padded else 0] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask} if padded else {}
    wanted = routed(tokens, position_ids=position_ids, **given).logits
    cache, parts = DynamicCache(config=routed.config), []
    for start in (0, *range(20, 40, chunk)):
        end = 20 if start == 0 else min(start + chunk, 40)
        given = {"attention_mask": mask[:, :end]} if padded else {}
        parts.append(
            routed(tokens[:, start:end], position_ids=position_ids[:, start:end], **{CACHE: cache}, **given).logits
        )
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], wanted[real], atol=2e-5, rtol=1e-4)
    assert cache.get_seq_length() == 40


@torch.no_grad()
@pytest.mark.parametrize("shares", [(1.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kv_share", [0.5, 1.0])
def test_the_dial_of_who_looks_turns_within_a_cache(
    shares: tuple[float, float], chunk: int, rows: int, kv_share: float
) -> None:
    entry: Any = {"fitted": {"heads": 2}}
    # In one layer who looked earlier changes nothing but these tokens' own outputs: later ones see the same keys.
    routed = routed_copy(build(num_hidden_layers=1), router=entry, kv_router="norm", kv_share=kv_share)
    score_at_random(routed, 3)
    tokens = ids(3, rows, 40)

    def turned(share: float) -> Any:
        routed.set_attention_share(share)
        return routed

    wanted = turned(shares[1])(tokens).logits[:, 20:]
    cache = turned(shares[0])(tokens[:, :20], use_cache=True)[CACHE]
    turned(shares[1])
    parts = [routed(tokens[:, a : min(a + chunk, 40)], **{CACHE: cache}).logits for a in range(20, 40, chunk)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    model, tokens = build(), ids(4, 1, 40)
    position_ids = torch.cat([torch.arange(17), torch.arange(23)])[None]
    routed = routed_copy(model, **HALF)
    found = routed(tokens, position_ids=position_ids, use_cache=False).logits
    for part in (slice(0, 17), slice(17, 40)):
        alone = routed(tokens[:, part], position_ids=position_ids[:, part]).logits
        torch.testing.assert_close(found[:, part], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_are_told_apart_without_a_mask() -> None:
    """As with flash attention, whose mask is None where nothing is padded: only positions tell the documents apart."""
    routed, tokens = routed_copy(build(), **HALF), ids(4, 1, 40)
    position_ids = torch.cat([torch.arange(17), torch.arange(23)])[None]
    wanted = routed(tokens, position_ids=position_ids, use_cache=False).logits
    whole = routed(tokens).logits
    routed.config._attn_implementation_internal = "flash_attention_2"  # its own setter asks for the package
    found = routed(tokens, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routed(tokens, position_ids=torch.arange(40)[None]).logits, whole)


@torch.no_grad()
def test_a_batch_of_padding_alone() -> None:
    routed, tokens = routed_copy(build(), **HALF), ids(4, 2, 20)
    assert routed(tokens, attention_mask=torch.zeros_like(tokens)).logits.isfinite().all()
    mask = torch.ones_like(tokens)
    mask[:, :8] = 0
    wanted = routed.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False)
    chunked = routed.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(chunked, wanted)


@torch.no_grad()
def test_threads_do_not_meet() -> None:
    """Each forward has what its modules share, and each module what it was given, to itself."""
    routed = routed_copy(build(), **HALF)
    rows = [ids(seed, 1, 12 + seed) for seed in range(6)]
    wanted = [routed.generate(row, max_new_tokens=12, do_sample=False) for row in rows]
    with ThreadPoolExecutor(len(rows)) as pool:
        found = list(pool.map(lambda row: routed.generate(row, max_new_tokens=12, do_sample=False), rows))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Who sees what


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_sees_the_future(family: str) -> None:
    routed, tokens = routed_copy(build(family).double(), **HALF), ids(5)
    changed = tokens.clone()
    changed[:, 30:] = ids(6)[:, 30:]
    before, after = routed(tokens).logits, routed(changed).logits
    torch.testing.assert_close(after[:, :30], before[:, :30], atol=1e-12, rtol=1e-9)
    assert not torch.allclose(after[:, 30:], before[:, 30:])


@torch.no_grad()
def test_a_token_that_is_not_kept_changes_nothing_beyond_its_window() -> None:
    model = build().double()
    routed = routed_copy(model, layers=[0], attention_share=1.0, kv_share=0.5, kv_router="norm")
    attention = routed.model.layers[0].self_attn
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    positions = torch.arange(40)[None]
    table = routed.model.rotary_emb(x, positions)

    def run(x: Tensor) -> Tensor:
        return attention(x, position_embeddings=table, attention_mask=None)[0]

    before = run(x)
    kept = attention.chiaroscuro.noted[-1][1][0]
    dropped = int((~kept[5:20]).nonzero()[0]) + 5
    changed = x.clone()
    changed[0, dropped] *= 0.9  # a smaller norm: as little kept as before
    after = run(changed)
    assert torch.equal(attention.chiaroscuro.noted[-1][1][0], kept)
    torch.testing.assert_close(after[0, dropped + 6 :], before[0, dropped + 6 :], atol=1e-13, rtol=0)
    assert not torch.allclose(after[0, dropped : dropped + 6], before[0, dropped : dropped + 6])


@torch.no_grad()
def test_the_cache_holds_the_window_and_what_is_kept() -> None:
    routed, tokens = routed_copy(build(), **HALF | {"kv_router": "norm"}), ids(7, 2, 48)
    cache = routed(tokens, use_cache=True)[CACHE]
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer, RoutedLayer)
        kept = routed.reaches[i].noted[-1][1]
        kept[:, :1] = True
        beyond = int(kept[:, : 48 - 6].sum())
        assert layer.numbers_kept() == (2 * 6 + beyond) * 2 * 2 * 8
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].numbers_kept() == 0


@torch.no_grad()
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant": True}])
def test_assisted_generation_is_greedy(options: dict[str, Any]) -> None:
    routed, tokens = routed_copy(build(), **HALF), ids(8, 1, 30)
    wanted = routed.generate(tokens, max_new_tokens=20, do_sample=False)
    given = {"assistant_model": build(seed=1)} if "assistant" in options else options
    assert torch.equal(routed.generate(tokens, max_new_tokens=20, do_sample=False, **given), wanted)


@torch.no_grad()
def test_drafts_are_no_longer_than_a_cache_can_take_back() -> None:
    plain, again = build(), ids(8, 1, 90)  # the plain one knows of no such bound
    routed, assistant = routed_copy(plain, **HALF), routed_copy(build(seed=1), **HALF)
    tokens = torch.cat([again, again[:, :5]], 1)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    few = [lambda found, scores, **_: found.new_full((1,), found.shape[1] >= 99, dtype=torch.bool)]
    given = {"max_new_tokens": 100, "do_sample": False, "stopping_criteria": few}
    for model in (routed, plain):
        assistant.generation_config.num_assistant_tokens = 90
        wanted = model.generate(tokens, **given)
        for options in ({"prompt_lookup_num_tokens": 80}, {"assistant_model": assistant}):
            assert torch.equal(model.generate(tokens, **given, **options)[:, :99], wanted)


def test_what_a_forward_shares_goes_to_other_devices() -> None:
    forward = Forward(ids(1), None)
    assert forward.to("cpu") is forward
    moved = forward.to("meta")
    assert moved.input_ids is not None and moved.input_ids.is_meta and forward.to("meta") is moved


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been() -> None:
    routed, tokens = routed_copy(build(), **HALF), ids(8, 2, 40)
    wanted = routed(tokens).logits[:, 30:]
    cache = routed(tokens[:, :30], use_cache=True)[CACHE]
    routed(ids(9, 2, 7), **{CACHE: cache})
    for wrong in (7, -38):
        with pytest.raises(UserError, match=rf"crop\({wrong}\) of a cache of 37 tokens: give the number"):
            cache.crop(wrong)
    cache.crop(-7)
    assert cache.get_seq_length() == 30 and cache.layers[1].get_mask_sizes(10) == (40, 0)
    found = routed(tokens[:, 30:], **{CACHE: cache}).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_cache_are_reordered_repeated_and_selected() -> None:
    routed, tokens = routed_copy(build(), **HALF), ids(8, 3, 40)
    order = torch.tensor([2, 0, 0])
    for change, rows in [
        (lambda cache: cache.reorder_cache(order), order),
        (lambda cache: cache.batch_select_indices(order), order),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), torch.tensor([0, 2])),
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ]:
        cache = routed(tokens[:, :30], use_cache=True)[CACHE]
        change(cache)
        found = routed(tokens[rows, 30:], **{CACHE: cache}).logits
        torch.testing.assert_close(found, routed(tokens[rows]).logits[:, 30:], atol=2e-5, rtol=1e-4)


# Saving and loading


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, family: str) -> None:
    routed, tokens = routed_copy(build(family), **HALF), ids(9)
    routed.set_attention_share(0.3, kv_share=0.7)
    routed.set_history(11)
    assert routed.config.chiaroscuro["router"] == {"random": {"history": 11}}
    wanted = routed(tokens).logits
    routed.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=routed.config._attn_implementation)
    assert type(loaded) is type(routed) and loaded.config.chiaroscuro == routed.config.chiaroscuro
    assert torch.equal(loaded(tokens).logits, wanted)
    assert AutoConfig.from_pretrained(tmp_path).model_type == family
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation=routed.config._attn_implementation
    )
    assert torch.equal(again(tokens).logits, wanted)
    unretrofit(loaded)
    assert type(loaded) is type(build(family)) and loaded.config.architectures == [type(loaded).__name__]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_that_was_loaded_is_saved_and_loaded_the_same(tmp_path: Path, family: str) -> None:
    """transformers calls some weights otherwise in files, and remembers of a model that was loaded what it renamed."""
    build(family).save_pretrained(tmp_path / "plain")
    implementation = build(family).config._attn_implementation
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation=implementation)
    tokens = ids(9)
    retrofit(model, window=6, sinks=1, **HALF)
    wanted = model(tokens).logits
    model.save_pretrained(tmp_path / "routed")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", attn_implementation=implementation)
    assert torch.equal(loaded(tokens).logits, wanted)
    unretrofit(loaded)
    wanted = loaded(tokens).logits
    loaded.save_pretrained(tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation=implementation)
    assert torch.equal(back(tokens).logits, wanted)


@pytest.mark.parametrize("trust", [True, False])
def test_a_process_that_does_not_know_us(tmp_path: Path, trust: bool) -> None:
    routed = routed_copy(build(), **HALF)
    routed.save_pretrained(tmp_path)
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code={trust})\n"
        "print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, input="n\n")
    if trust:
        assert done.stdout.strip() == "RoutedLlamaForCausalLM", done.stderr
    else:  # never the model without its routing
        assert done.returncode != 0
        assert "chiar_retrofit" in done.stderr or "trust_remote_code" in done.stderr


@pytest.mark.parametrize("ours", [True, False])
def test_a_class_that_is_named_does_not_load_it_without_its_routing(tmp_path: Path, ours: bool) -> None:
    routed_copy(build(), **HALF).save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "attn_implementation")
    code = (
        "from transformers import LlamaForCausalLM\n"
        + "from chiaroscuro import retrofit\n" * ours
        + f"model = LlamaForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        + "print(model(**model.dummy_inputs).logits)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    *_, said = done.stderr.splitlines()
    assert "chiaroscuro" in said
    assert "load the folder with AutoModelForCausalLM" in said if ours else "ValueError" in said


@torch.no_grad()
def test_a_model_that_torch_saved_whole_is_loaded_elsewhere(tmp_path: Path) -> None:
    model, tokens = build(), ids(1)
    retrofit(model, window=6, sinks=1, **HALF | {"kv_router": "norm"})  # there blocks are as long as ever
    expected = model(input_ids=tokens).logits
    torch.save((model, tokens, expected), tmp_path / "model.pt")
    code = """
import sys, torch
model, tokens, expected = torch.load(sys.argv[1], weights_only=False)
assert type(model).__name__ == "RoutedLlamaForCausalLM" and model.config.chiaroscuro["window"] == 6
torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
from chiaroscuro import unretrofit
unretrofit(model)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_class_of_the_user_s_is_loaded_as_the_library_s_and_the_class_itself_loads(tmp_path: Path) -> None:
    model = build()
    model.__class__ = type("TunedForCausalLM", (type(model),), {})
    routed, tokens = routed_copy(model, **ALL), ids(1)
    wanted = routed(tokens).logits
    routed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["RoutedTunedForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, wanted)
    again.save_pretrained(tmp_path / "again")
    loaded = type(again).from_pretrained(tmp_path / "again")
    assert torch.equal(loaded(tokens).logits, wanted) and loaded.config.model_type == "llama"
    unretrofit(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    said = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert said["model_type"] == "llama" and not {"auto_map", "base_model_type", "chiaroscuro"} & {*said}


def test_half_precision_keeps_the_thresholds(tmp_path: Path) -> None:
    routed = routed_copy(build(), **HALF)
    values = routed.reaches[0].kept.calibration.values.clone()
    half = copy.deepcopy(routed).bfloat16()
    assert torch.equal(half.reaches[0].kept.calibration.values, values)
    assert half(ids(1)).logits.dtype == torch.bfloat16
    routed.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.reaches[0].kept.calibration.values, values)


# What stands around it


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    routed, tokens = routed_copy(build(), **HALF).train(), ids(10)
    routed(input_ids=tokens, labels=tokens).loss.backward()
    wanted = {name: gradient.clone() for name, gradient in gradients(routed).items()}
    routed.zero_grad()
    routed.gradient_checkpointing_enable()
    loss = routed(input_ids=tokens, labels=tokens).loss
    routed(input_ids=ids(11, 2, 20))  # of other tokens, whose draws are others, before the layers run again
    loss.backward()
    for name, gradient in gradients(routed).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    """What is rotated comes in float32, values in bfloat16: as SDPA, routed attention takes all in bfloat16."""
    model, tokens = build(family), ids(1)
    routed = routed_copy(model, **ALL)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = (m(input_ids=tokens, labels=tokens) for m in (model, routed))
        half = routed_copy(model, **HALF)
        half(input_ids=tokens, labels=tokens).loss.backward()
        cached = half.generate(tokens, max_new_tokens=3, do_sample=False)
    assert found.logits.dtype == wanted.logits.dtype
    torch.testing.assert_close(found.logits, wanted.logits, atol=0.1, rtol=0.1)
    assert cached.shape[1] == tokens.shape[1] + 3 and all(g.isfinite().all() for g in gradients(half).values())


def test_lora_trains_it(tmp_path: Path) -> None:
    import peft

    routed, tokens = routed_copy(build(), **HALF), ids(11)
    lora = peft.get_peft_model(routed, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = lora(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    lora.save_pretrained(tmp_path)
    usual = peft.get_peft_model(routed_copy(build(), **HALF), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert usual.peft_config["default"].target_modules == {"q_proj", "v_proj"}  # of the model's own type
    with torch.no_grad():
        wanted = lora(input_ids=tokens).logits
        loaded = peft.PeftModel.from_pretrained(routed_copy(build(), **HALF), tmp_path)
        torch.testing.assert_close(loaded(input_ids=tokens).logits, wanted)


def test_the_trainer_of_transformers_trains_and_saves_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    routed, tokens = routed_copy(build(), **HALF), ids(12, 8, 24)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=routed, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, routed.eval()(tokens).logits)


def test_its_layers_are_compiled() -> None:
    routed, tokens = routed_copy(build(), **HALF), ids(13)
    with torch.no_grad():
        wanted = routed(tokens).logits
        for layer in routed.model.layers:
            layer.compile()
        torch.testing.assert_close(routed(tokens).logits, wanted, atol=1e-5, rtol=1e-5)


# Mistakes


def encoder() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    )


def bert() -> Any:
    from transformers import BertConfig, BertLMHeadModel

    return BertLMHeadModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    )


def encoder_decoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=9, decoder_start_token_id=0)
    )


def alibi() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=9))


def learned_positions() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, n_positions=32))


def sinks() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=9,
            num_local_experts=2,
            num_experts_per_tok=1,
            pad_token_id=0,
            layer_types=["full_attention", "full_attention"],
        )
    )


def latent() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=9,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            qk_nope_head_dim=8,
            first_k_dense_replace=1,
            n_routed_experts=2,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=1,
            pad_token_id=0,
        )
    )


def own_windows() -> Any:
    return build("mistral", sliding_window=16)


def quantised() -> Any:
    model = build()
    model.is_quantized = True
    return model


def quantised_by_torch() -> Any:
    return torch.ao.quantization.quantize_dynamic(build(), {torch.nn.Linear}, dtype=torch.qint8)


def on_meta() -> Any:
    with torch.device("meta"):
        return type(build())(build().config)


def both_ways() -> Any:
    model = build()
    model.config.is_causal = False
    return model


def twice() -> Any:
    model = build()
    retrofit(model, **ALL)
    return model


@pytest.mark.parametrize(
    ("make", "options", "complaint"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, "takes a causal language model of transformers, not a Linear"),
        (encoder, {}, "predicts no next token"),
        (bert, {}, "BertLMHeadModel sees the future: a retrofit needs a causal decoder"),
        (encoder_decoder, {}, "an encoder and a decoder"),
        (alibi, {}, "attention modules of the kind"),
        (learned_positions, {}, "rotary|predicts no next token|attention modules of the kind"),
        (sinks, {}, "learned attention sinks"),
        (latent, {}, "latent keys and values"),
        (own_windows, {}, "every layer of this MistralForCausalLM has a window or chunks of its own"),
        (quantised, {}, "is quantised: load it without"),
        (quantised_by_torch, {}, "hold no weights, as after quantisation by torch"),
        (on_meta, {}, "on the meta device, without weights: load them first"),
        (both_ways, {}, "sees the future: a retrofit needs a causal decoder"),
        (twice, {}, "retrofitted already"),
        (build, {"window": 0}, "window=0: must be a whole number of tokens from 1 to 2147483647"),
        (build, {"window": 2**70}, "window=1180591620717411303424: must be a whole number of tokens from 1 to"),
        (build, {"window": 1.5}, "window=1.5"),
        (build, {"sinks": -1}, "sinks=-1: must be a whole number of tokens from 0 to 2147483647"),
        (build, {"kv_share": 1.5}, "kv_share=1.5: must be a number from 0 to 1"),
        (build, {"attention_share": "all"}, "attention_share='all'"),
        (build, {"kv_share": float("nan")}, "kv_share=nan"),
        (build, {"layers": [3]}, "layers=.3.: the model has the layers 0 to 2"),
        (build, {"layers": [0, 0]}, "name at least one, and each once"),
        (build, {"layers": itertools.count()}, r"layers=\[0, 1, 2, …\]: the model has 3 layers; name each once"),
        (build, {"layers": []}, "name at least one"),
        (build, {"layers": "all"}, "layers='all': give the numbers of layers"),
        (lambda: build("gemma3_text"), {"layers": [0]}, "layer 0 has a window or chunks of its own"),
        (build, {"kv_router": "best"}, "unknown router 'best'"),
        (build, {"router": {"fitted": {"thresholds": [0.0]}}}, "thresholds is a field of the model"),
        (build, {"kv_router": {"norm": {"history": 0}}}, "history=0: must be a positive whole number"),
        (build, {"kv_router": {"fitted": {"heads": 3}}}, "the model has 2 key-value heads"),
        (build, {"router": {"fitted": {"heads": 4}}}, "the model has 2 key-value heads"),
        (build, {"router": "soft"}, "needs a router by a score"),
        (build, {"router": {"random": {"router_seed": "a"}}}, "router_seed='a': must be a whole number"),
        (build, {"kv_router": "learned"}, "scales what it routes"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(make: Any, options: dict[str, Any], complaint: str) -> None:
    model = make()
    before = [model.state_dict().keys(), type(model)]
    said = model.config.to_dict() if hasattr(model, "config") else None
    with pytest.raises(UserError, match=complaint) as error:
        retrofit(model, **options)
    assert "\n" not in str(error.value)
    assert [model.state_dict().keys(), type(model)] == before
    assert said is None or model.config.to_dict() == said


def test_unretrofit_needs_a_retrofitted_model() -> None:
    with pytest.raises(UserError, match="takes a model that was retrofitted"):
        unretrofit(build())


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda m: m(ids(1)), "not fitted yet.*run chiaroscuro fit"),
        (lambda m: m.set_attention_share(), "no share to set"),
        (lambda m: m.set_history(0), "history=0: must be a positive whole number"),
        (lambda m: m.set_attention_share(2), "attention_share=2: must be a number"),
        (lambda m: m.set_attention_share(kv_share=True), "kv_share=True: must be a number"),
    ],
)
def test_a_mistake_with_a_retrofitted_model(call: Any, complaint: str) -> None:
    routed = routed_copy(build(), attention_share=0.5)
    with pytest.raises(UserError, match=complaint):
        call(routed)


@torch.no_grad()
def test_a_score_that_was_not_fitted_never_decides() -> None:
    routed = routed_copy(build(), attention_share=0.5)
    with without_routing(routed):
        routed(ids(1))
    with pytest.raises(UserError, match="not fitted yet"):
        routed(ids(1))
    whole = routed_copy(build(), **ALL)
    whole(ids(1))
    whole.set_attention_share(kv_share=0.5)
    with pytest.raises(UserError, match="not fitted yet"):
        whole(ids(1))


@torch.no_grad()
def test_thresholds_that_no_data_set_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="those of white noise, so its share is a guess"):
        routed_copy(build(), attention_share=1.0, kv_share=0.5, kv_router="norm")(ids(1))


def test_a_model_of_the_same_config_stays_as_it_is(tmp_path: Path) -> None:
    config = build().config
    ours, theirs = (type(build())(config) for _ in range(2))
    assert ours.config is theirs.config
    retrofit(ours, **ALL)
    assert not hasattr(theirs.config, "chiaroscuro") and ours.model.config is ours.config
    theirs.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(theirs)
    with pytest.raises(UserError, match="unknown router"):
        retrofit(theirs, router="best")
    assert ours.config.chiaroscuro["layers"] == [0, 1, 2]


@torch.no_grad()
def test_the_trunk_alone_knows_its_ids() -> None:
    routed = routed_copy(build(), attention_share=1.0, kv_share=0.5, kv_router="random")
    routed(ids(1))
    wanted = routed.model(ids(2, 2, 30)).last_hidden_state
    assert torch.equal(
        routed_copy(build(), attention_share=1.0, kv_share=0.5, kv_router="random").model(ids(2, 2, 30))[0], wanted
    )


@torch.no_grad()
def test_a_mask_that_is_changed_in_place_is_read_anew() -> None:
    routed, tokens = routed_copy(build(), **HALF), ids(1, 2, 20)
    mask = torch.ones(2, 1, 20, 20).tril().bool()
    routed(tokens, attention_mask=mask)
    mask[0, :, :, :4] = False
    found = routed(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found, routed(tokens, attention_mask=mask.clone()).logits)


def test_a_model_that_is_spread_over_devices_is_refused() -> None:
    from accelerate import cpu_offload, dispatch_model

    offloaded = cpu_offload(build(), execution_device="cpu")
    for model in (dispatch_model(build(), {"": "cpu"}, force_hooks=True), offloaded):
        with pytest.raises(UserError, match="spread over devices, or offloaded"):
            retrofit(model)


@torch.no_grad()
def test_caches_that_can_not_be_routed() -> None:
    model = build()
    routed, tokens = routed_copy(model, **HALF), ids(1)
    begun = model(tokens, use_cache=True)[CACHE]
    other = routed_copy(model, window=7, **HALF)(tokens, use_cache=True)[CACHE]
    for cache, complaint in (
        (StaticCache(config=model.config, max_cache_len=64), "can't use a StaticLayer"),
        (begun, "this cache was begun without routing"),
        (other, "begun with window=7, sinks=1, and layer 0 has window=6, sinks=1"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "can't use a EncoderDecoderCache"),
    ):
        with pytest.raises(UserError, match=complaint):
            routed(tokens, **{CACHE: cache})
    with pytest.raises(UserError, match="begun by a routed model, and this one is not"):
        model(tokens[:, :1], **{CACHE: routed(tokens, use_cache=True)[CACHE]})


def test_continuous_batching_is_refused() -> None:
    routed, tokens = routed_copy(build(), **ALL), ids(1, 1, 12)
    with pytest.raises(UserError, match="can't do continuous batching"):
        routed.generate(tokens, cache_implementation="paged", max_new_tokens=4, do_sample=False)
    with pytest.raises(UserError, match="can't do continuous batching"):
        routed.generate_batch([tokens[0].tolist()])

    class Pages:
        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return torch.cat([key, key], 2), torch.cat([value, value], 2)

    x = torch.zeros(1, 3, 32)
    with pytest.raises(UserError, match=r"gives back earlier keys, .* pass a DynamicCache"):
        routed.model.layers[0].self_attn(x, routed.model.rotary_emb(x, torch.arange(3)[None]), None, Pages())


@torch.no_grad()
def test_a_cache_that_only_the_first_layers_could_crop_is_not_gone_on_with() -> None:
    """transformers crops layer after layer, and the first one, which is not routed, can always be cropped."""
    routed, tokens = routed_copy(build(), layers=[1, 2], **HALF), ids(1, 1, 100)
    cache = routed(tokens, use_cache=True)[CACHE]
    with pytest.raises(UserError, match="the last 64 alone are remembered"):
        cache.crop(-80)
    with pytest.raises(UserError, match="layer 1 of this cache holds 100 tokens and the first one 20"):
        routed(tokens[:, :1], **{CACHE: cache})
    cache = routed(tokens, use_cache=True)[CACHE]
    cache.crop(-100)
    found = routed(tokens[:, :9], **{CACHE: cache}).logits
    torch.testing.assert_close(found, routed(tokens[:, :9]).logits)


@pytest.mark.parametrize("router", ["norm", {"fitted": {"heads": 2}}])
@torch.no_grad()
def test_a_mask_that_changes_what_is_cached_is_refused(router: Any) -> None:
    """Keys that a mask hides later were attended to, or kept, before."""
    routed, tokens = routed_copy(build(), **HALF | {"kv_router": router}), ids(1)
    score_at_random(routed, 0)
    whole, padded = torch.ones_like(tokens), torch.ones_like(tokens)
    padded[0, :9] = 0
    for first, then in ((whole, padded), (padded, whole)):
        for new in (1, 3):
            cache = routed(tokens[:, :-new], attention_mask=first[:, :-new], use_cache=True)[CACHE]
            with pytest.raises(UserError, match="cached tokens for padding that were real"):
                routed(tokens[:, -new:], attention_mask=then, **{CACHE: cache})
            cache = routed(tokens[:, :-new], attention_mask=first[:, :-new], use_cache=True)[CACHE]
            found = routed(tokens[:, -new:], attention_mask=first, **{CACHE: cache}).logits
            wanted = routed(tokens, attention_mask=first).logits[:, -new:]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_values_of_another_width_are_refused() -> None:
    model = build()
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(32, 24, bias=False)
    with pytest.raises(UserError, match=r"layer 1 .* with values of another width than keys: not supported"):
        retrofit(model)


@torch.no_grad()
def test_masks_that_can_not_be_honoured() -> None:
    routed, tokens = routed_copy(build(), **HALF), ids(1, 1, 20)
    holes = torch.ones(1, 1, 20, 20).tril().bool()
    holes[0, 0, 15, 4] = False
    with pytest.raises(UserError, match="hides tokens in another way"):
        routed(tokens, attention_mask=holes)
    bias = torch.zeros(1, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(routed(tokens, attention_mask=bias).logits, routed(tokens).logits)
    for number in (0.5, -2.0):
        bias[0, 0, 15, 4] = number
        with pytest.raises(UserError, match="adds a bias to some scores"):
            routed(tokens, attention_mask=bias.clone())
    both, one = ids(1, 2, 20), torch.ones(1, 1, 20, 20).tril().bool()
    torch.testing.assert_close(routed(both, attention_mask=one).logits, routed(both).logits)  # one for all rows
    with pytest.raises(UserError, match="an attention_mask of 2 rows for a batch of 3"):
        routed(ids(1, 3, 20), attention_mask=one.repeat(2, 1, 1, 1))
    other = torch.ones(1, 1, 20, 20).tril().bool().flip(-1)  # as many keys as a causal mask has, and other ones
    with pytest.raises(UserError, match="hides tokens in another way"):
        routed(tokens, attention_mask=other)
    cache = routed(tokens[:, :10], use_cache=True)[CACHE]
    with pytest.raises(UserError, match="hides tokens in another way"):
        routed(tokens[:, 10:], attention_mask=holes[:, :, 10:], **{CACHE: cache})
    with pytest.raises(UserError, match="drop is_causal=False"):
        routed(tokens, is_causal=False)
    with pytest.raises(UserError, match="output_attentions"):
        routed(tokens, output_attentions=True)
    routed.config._attn_implementation = "eager"
    routed.config.output_attentions = True
    with pytest.raises(UserError, match="output_attentions"):
        routed(tokens)


def test_numbers_of_numpy_are_numbers() -> None:
    model = build()
    retrofit(model, **HALF | {"window": np.int64(6), "kv_share": np.float32(0.5), "layers": np.arange(2)})
    said = model.config.chiaroscuro
    assert (said["window"], said["layers"], said["kv_share"]) == (6, [0, 1], 0.5)
    assert {type(said["window"]), type(said["layers"][0])} == {int} and type(said["kv_share"]) is float


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"window": 0}, "window=0: must be a whole number"),
        ({"kv_share": 3}, "kv_share=3: must be a number from 0 to 1"),
        ({"kv_share": 10**400}, "kv_share=10+: must be a number from 0 to 1"),
        ({"layers": [9]}, "layers=.9.: give a list of layers; the model has 0 to 2"),
        ({"layers": [True]}, "layers=.True.: give a list of layers"),
        ({"layers": [1, 1]}, "layers=.1, 1.: name each once, in order"),
        ({"kv_spread": [1.0]}, "kv_spread=.1.0.: give a weight, 0 or more, for each of the 3 routed layers"),
        ({"sinks": None}, "chiaroscuro in the configuration lacks sinks"),
    ],
)
def test_a_config_that_was_edited_by_hand(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    routed_copy(build(), **HALF).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    said = content["chiaroscuro"] | changes
    content["chiaroscuro"] = {name: value for name, value in said.items() if name != "sinks" or value is not None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=complaint):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_names_are_there() -> None:
    assert chiaroscuro.retrofit is retrofit and callable(chiaroscuro.fit)
    assert AutoModelForSequenceClassification  # the Auto classes were imported before
    assert VOCABULARY


@pytest.mark.parametrize("first", ["from chiaroscuro import fit", "import chiaroscuro.retrofitting.in_place", "pass"])
def test_the_name_is_the_function_whatever_was_imported_before(first: str) -> None:
    code = f"{first}\nfrom chiaroscuro import retrofit\nfrom chiaroscuro.retrofitting import retrofit as same\n"
    code += "assert retrofit is same and callable(retrofit)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@torch.no_grad()
def test_chance_does_not_depend_on_padding() -> None:
    """Without `position_ids` transformers counts columns; who is chosen by chance counts real tokens."""
    routed = routed_copy(build("llama"), attention_share=0.5, kv_share=0.5, router="random", kv_router="random")
    tokens = ids(1)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    together = routed(tokens, attention_mask=mask).logits[0, 6:]
    torch.testing.assert_close(together, routed(tokens[:1, 6:]).logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pads", [0, 6])
def test_chance_is_the_same_with_a_cache_where_a_model_tells_its_attention_no_positions(pads: int) -> None:
    """Such as Llama 4, whose attention is given rotations alone."""
    routed = routed_copy(build("llama"), attention_share=0.5, kv_share=0.5, router="random", kv_router="random")
    for module in routed.modules():
        if isinstance(getattr(module, "chiaroscuro", None), Reach):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
            )
    tokens = ids(1)
    mask = torch.ones_like(tokens)
    mask[0, :pads] = 0
    whole = routed(tokens, attention_mask=mask).logits
    cache, pieces = None, []
    for begin, end in itertools.pairwise((0, 20, 21, 22, tokens.shape[1])):
        out = routed(tokens[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[:, pads:], whole[:, pads:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["nemotron", "stablelm"])
def test_layers_that_hand_nothing_down_to_their_attention(family: str) -> None:
    routed = routed_copy(build(family), **HALF | {"kv_router": "random"})
    tokens = ids(1)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    whole = routed(tokens, attention_mask=mask).logits
    torch.testing.assert_close(whole[0, 6:], routed(tokens[:1, 6:]).logits[0], atol=1e-4, rtol=1e-4)
    cache = routed(tokens[:, :20], attention_mask=mask[:, :20], use_cache=True)[CACHE]
    rest = routed(tokens[:, 20:], attention_mask=mask, **{CACHE: cache}).logits
    torch.testing.assert_close(rest, whole[:, 20:], atol=1e-4, rtol=1e-4)
    calibrate(routed, [tokens])  # which runs the layers by themselves
    assert present.get() is None
    unretrofit(routed)
    routed(tokens)
    assert present.get() is None


@torch.no_grad()
def test_shares_are_those_of_real_tokens() -> None:
    routed = routed_copy(build("llama"), **HALF)
    tokens = ids(1)
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    with watching(routed) as shares, noting_decisions(routed) as decided:
        routed(tokens, attention_mask=mask)
    for i, ((looks, kept),) in decided.items():
        assert shares.look[i] == pytest.approx(float(looks[mask.bool()].float().mean()))
        assert shares.kept[i] == pytest.approx(float(kept[mask.bool()].float().mean()))


@torch.no_grad()
def test_documents_by_a_mask_are_not_cached() -> None:
    routed = routed_copy(build("llama"), **ALL)
    tokens = ids(1)[:1, :8]
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).tril().bool()[None, None]
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    alone = routed(tokens, attention_mask=blocks, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(alone[:, 3:], routed(tokens[:, 3:]).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="a cache can't continue: pass use_cache=False"):
        routed(tokens, attention_mask=blocks, position_ids=places)


@torch.no_grad()
def test_a_cache_that_is_not_of_this_model_or_this_batch() -> None:
    routed = routed_copy(build("llama"), **HALF)
    cache = DynamicCache(config=routed.config)
    routed(ids(1), **{CACHE: cache})
    with pytest.raises(UserError, match=f"the cache holds {len(ids(1))} rows, the input has 1"):
        routed(ids(1)[:1, :3], **{CACHE: cache})
    short = DynamicCache(config=build("llama", num_hidden_layers=1).config)
    with pytest.raises(UserError, match="a cache of 1 layers, and layer 1 is routed"):
        routed(ids(1), **{CACHE: short})


def test_a_plain_model_is_not_fitted() -> None:
    with pytest.raises(UserError, match=r"or a retrofitted model, not a LlamaForCausalLM: retrofit\(model, …\) routes"):
        chiaroscuro.fit(build("llama"), [ids(1)] * 3, kept=0.5)
