"""Models in which everybody sees near and some see far: all ways of executing them agree, and nobody sees more.

The oracle is dense execution: one attention under a mask that says who sees whom.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM, UserError, check_model
from chiaroscuro.layers import build_block, row_thresholds
from chiaroscuro.layers.reach_state import Entries, ReachState
from chiaroscuro.layers.state import REMEMBERED
from chiaroscuro.model.calibration import calibrate
from chiaroscuro.ops.reach_attention import LONGEST_WINDOW

VOCABULARY = 50
MENUS: list[list[Any]] = [
    ["local", "attention"],
    ["local"],
    ["attention"],
    ["dct", "attention"],
    ["conv", "local", "attention"],
]


@pytest.fixture(autouse=True, scope="module")
def short_blocks() -> Any:
    """Thresholds that follow the row change several times in the short rows of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_thresholds, "BLOCK", 4)
        yield


def build(menus: list[list[Any]], seed: int = 0, **fields: Any) -> ChiarForCausalLM:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "router": "random",
        "kv_router": "random",
        "attention_share": 0.4,
        "kv_share": 0.4,
        "window": 4,
        "meta_router": "none",
    }
    model = ChiarForCausalLM(ChiarConfig(operators=menus, **(defaults | fields))).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


@st.composite
def models(draw: st.DrawFn) -> ChiarForCausalLM:
    context = draw(st.sampled_from(["all", "routed", "kept"]))
    fields: dict[str, Any] = {
        "attention_context": context,
        "window": draw(st.integers(1, 9)),
        "sinks": draw(st.integers(0, 3)),
        "attention_share": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "kv_share": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "norm": draw(st.sampled_from(["pre", "post"])),
        "router": draw(st.sampled_from(["random", "learned", "threshold", {"threshold": {"history": 7}}])),
    }
    heads = draw(st.sampled_from([1, fields["num_key_value_heads"]]))
    kv_routers = ["random", {"learned": {"heads": heads}}, {"learned": {"heads": heads, "history": 7}}]
    fields["kv_router"] = draw(st.sampled_from(kv_routers))
    menus = draw(st.lists(st.sampled_from(MENUS), min_size=1, max_size=2))
    if context == "kept" and ["dct", "attention"] in menus and draw(st.booleans()):
        fields |= {"window": None, "sinks": 0}
        menus = [["dct", "attention"]]
    model = build(menus, draw(st.integers(0, 99)), **fields)
    generator = torch.Generator().manual_seed(0)
    if model.thresholds() or model.kv_thresholds():
        calibrate(model, [torch.randint(VOCABULARY, (2, 16), generator=generator)])
    return model


def ids_of(rows: int, time: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


def logits_and_gradients(model: ChiarForCausalLM, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if mask is not None:
        logits = logits[mask.bool()]
    logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


@given(models(), st.integers(1, 3), st.integers(1, 17), st.integers(0, 99), st.booleans())
def test_sparse_is_dense(model: ChiarForCausalLM, rows: int, time: int, seed: int, padded: bool) -> None:
    ids = ids_of(rows, time, seed)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : time // 2] = 0
    sparse = logits_and_gradients(model, ids, mask)
    for layer in model.model.layers:
        layer.execution = "dense"
    dense = logits_and_gradients(model, ids, mask)
    model.config._attn_implementation = "eager"
    eager = logits_and_gradients(model, ids, mask)
    for name, expected in dense.items():
        torch.testing.assert_close(eager[name], expected)
        if name in sparse or expected.abs().max() > 1e-12:  # where no token went, sparse execution has no gradient
            torch.testing.assert_close(sparse[name], expected)


@given(models(), st.integers(1, 3), st.integers(2, 20), st.integers(0, 99), st.integers(1, 8), st.booleans())
def test_cached_is_uncached(model: ChiarForCausalLM, rows: int, time: int, seed: int, chunk: int, padded: bool) -> None:
    ids, mask = ids_of(rows, time, seed), torch.ones(rows, time, dtype=torch.long)
    if padded:
        mask[0, : time // 3] = 0
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache = ChiarCache(model.config)
    parts = []
    with torch.no_grad():
        for start in range(0, time, chunk):
            end = min(start + chunk, time)
            out = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end] if padded else None,
                cache=cache,
                use_cache=True,
            )
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()].detach())


@given(models(), st.integers(1, 2), st.integers(4, 20), st.integers(0, 99), st.integers(1, 12), st.data())
def test_a_cropped_cache_is_one_that_never_went_further(
    model: ChiarForCausalLM, rows: int, time: int, seed: int, more: int, data: st.DataObject
) -> None:
    ids = ids_of(rows, time + more, seed)
    steps = data.draw(st.lists(st.sampled_from([1, more]), min_size=1, max_size=1))
    with torch.no_grad():
        cache = ChiarCache(model.config)
        model(input_ids=ids[:, :time], cache=cache, use_cache=True)
        for start in range(time, time + more, steps[0]):
            model(input_ids=ids[:, start : start + steps[0]].flip(1), cache=cache, use_cache=True)
        cache.crop(-(cache.tokens_seen - time))
        again = [model(input_ids=ids[:, t : t + 1], cache=cache).logits for t in range(time, time + more)]
        whole = model(input_ids=ids, use_cache=False).logits[:, time:]
    torch.testing.assert_close(torch.cat(again, 1), whole)


@given(models(), st.integers(2, 16), st.integers(0, 99), st.data())
def test_nobody_sees_the_future(model: ChiarForCausalLM, time: int, seed: int, data: st.DataObject) -> None:
    ids = ids_of(1, time, seed)
    changed, place = ids.clone(), data.draw(st.integers(1, time - 1))
    changed[:, place:] = (changed[:, place:] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (model(input_ids=x, use_cache=False).logits[:, :place] for x in (ids, changed))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("look", [0.5, 1.0])
def test_a_token_that_is_not_kept_changes_nothing_beyond_its_window(look: float) -> None:
    model = build([["local", "attention"]], attention_context="kept", kv_share=0.0, attention_share=look, window=5)
    ids = ids_of(1, 30, 0)
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (model(input_ids=x, use_cache=False).logits[0] for x in (ids, changed))
    moved = (before - after).abs().amax(-1) > 1e-9
    assert moved.nonzero()[:, 0].tolist() == [10, 11, 12, 13, 14]


def test_all_kept_and_everybody_looking_is_full_attention() -> None:
    full = build([["attention"]] * 2, window=None, attention_context="all")
    routed = build([["local", "attention"]] * 2, attention_context="kept", attention_share=1.0, kv_share=1.0)
    missing = routed.load_state_dict(full.state_dict(), strict=False).missing_keys
    assert all("router" in name for name in missing)
    ids = ids_of(2, 20, 0)
    torch.testing.assert_close(routed(input_ids=ids).logits, full(input_ids=ids).logits)


@pytest.mark.parametrize("context", ["all", "routed", "kept"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_generation_and_beams_are_those_without_a_cache(context: str, batch: int) -> None:
    model = build([["local", "attention"], ["attention"]], attention_context=context, sinks=2)
    ids = ids_of(batch, 9, 1)
    mask = torch.ones_like(ids)
    mask[-1, :3] = 0
    for options in ({}, {"num_beams": 3}):
        found = [
            model.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=cached, do_sample=False, **options)
            for cached in (True, False)
        ]
        assert found[0].equal(found[1])


def test_prompt_lookup_crops_what_was_drafted() -> None:
    model = build([["local", "attention"], ["attention"]], attention_context="kept", sinks=2)
    ids = ids_of(1, 6, 1).repeat(1, 4)
    plain = model.generate(ids, max_new_tokens=16, do_sample=False)
    assert model.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4).equal(plain)


def test_drafts_are_no_longer_than_a_cache_can_take_back() -> None:
    model = build([["local", "attention"], ["attention"]], attention_context="kept", max_position_embeddings=256)
    ids = torch.cat([ids_of(1, 90, 1), ids_of(1, 90, 1)], 1)[:, :95]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    longest = []
    forward = model.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        longest.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    model.forward = noting
    found = model.generate(ids, max_new_tokens=80, do_sample=False, prompt_lookup_num_tokens=80)
    assert torch.equal(found[:, : plain.shape[1]], plain)
    assert longest[0] - ids.shape[1] <= REMEMBERED and max(longest[1:]) <= REMEMBERED + 1


def test_documents_in_a_row_are_sequences_of_their_own() -> None:
    model = build([["local", "attention"], ["attention"]], attention_context="kept", sinks=2, router="learned")
    first, second = ids_of(1, 9, 1), ids_of(1, 7, 2)
    places = torch.cat([torch.arange(9), torch.arange(7)])[None]
    model.config.kv_router = model.config.router
    packed = model(input_ids=torch.cat([first, second], 1), position_ids=places, use_cache=False).logits
    alone = torch.cat([model(input_ids=x, use_cache=False).logits for x in (first, second)], 1)
    torch.testing.assert_close(packed, alone)


def test_the_cache_holds_the_window_the_sinks_and_the_kept() -> None:
    model = build([["local", "attention"]], attention_context="kept", sinks=2, window=4)
    ids = ids_of(1, 30, 3)
    cache = ChiarCache(model.config)
    routing = model(input_ids=ids, cache=cache, use_cache=True, output_routing=True).routing[0]
    kept = int(routing.kept[0, 2:26].sum())
    assert cache.numbers_kept() == 2 * 2 * 4 * (4 + 2 + kept)


@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_batch_without_rows(execution: str, use_cache: bool) -> None:
    model = build([["local", "attention"], ["local"]], attention_context="kept", execution=execution)
    assert model(input_ids=ids_of(2, 9, 0)[:0], use_cache=use_cache).logits.shape == (0, 9, VOCABULARY)


@pytest.mark.parametrize("sinks", [0, LONGEST_WINDOW])
def test_the_longest_window_sees_everything(sinks: int) -> None:
    """Places of three rows on one line, each as far from the next as the window is long."""
    longest = build([["local", "attention"]], attention_context="kept", window=LONGEST_WINDOW, sinks=sinks)
    whole = build([["local", "attention"]], attention_context="kept", window=64)
    ids = ids_of(3, 30, 3)
    expected = whole(input_ids=ids).logits
    torch.testing.assert_close(longest(input_ids=ids).logits, expected)
    cache = ChiarCache(longest.config)
    parts = [longest(input_ids=part, cache=cache, use_cache=True).logits for part in (ids[:, :7], ids[:, 7:])]
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    newest = longest(input_ids=ids[:, :1], cache=cache, use_cache=True).logits
    torch.testing.assert_close(newest, whole(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"menus": [["local"]], "window": None}, "'local' without a window"),
        ({"window": 0}, "window=0: must be a whole number of tokens from 1 to 2147483647"),
        ({"window": 2**31}, "window=2147483648: must be a whole number of tokens from 1 to 2147483647"),
        ({"window": 2.5}, "window=2.5"),
        ({"window": True}, "window=True"),
        ({"sinks": -1}, "sinks=-1: must be a whole number of tokens from 0 to 2147483647"),
        ({"window": None, "menus": [["attention"]], "sinks": 2}, "sinks=2 without a window"),
        ({"attention_context": "far"}, "choose one of all, routed, kept"),
        ({"kv_share": 1.5}, "kv_share=1.5: must be a number from 0 to 1"),
        ({"kv_router": "soft"}, "kv_router='soft'"),
        ({"router": "soft"}, "two of these are one module"),
        ({"router": "hard"}, "two of these are one module"),
        ({"kv_router": "nobody"}, "unknown router 'nobody'"),
        (
            {"kv_router": {"norm": {"attention_share": 0.1}}},
            "attention_share is a field of the model: set kv_share there",
        ),
        ({"router": {"norm": {"attention_share": 0.1}}}, "is a field of the model: set attention_share there"),
        ({"router": {"threshold": {"thresholds": [0.8]}}}, "is a field of the model: set entropy_thresholds there"),
        ({"router": {"threshold": {"spectrum": "reference"}}}, "is a field of the model: set spectrum there"),
        ({"menus": [[{"attention": {"attention_dropout": 2}}]]}, "attention_dropout=2: must be a number from 0"),
        ({"menus": [[{"attention": {"rope_theta": "x"}}]]}, "rope_theta='x': must be a positive number"),
        ({"router": {"learned": {"heads": 2}}}, "a token goes to one operator with all of its heads"),
        ({"kv_router": {"learned": {"heads": 3}}}, "heads=3 is neither 1 nor the number of key-value heads, 2"),
        ({"kv_router": {"random": {"heads": 2}}}, "unknown option heads=2"),
        ({"menus": [["attention", "local"]]}, "list the cheapest operator first"),
        ({"menus": [[{"local": {"window": 3}}, "attention"]]}, "give the options to 'attention'"),
    ],
)
def test_impossible_fields_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(**{"menus": [["local", "attention"]], **fields})
    assert "\n" not in str(caught.value)


def test_each_key_value_head_of_an_operator_keeps_by_its_own_score() -> None:
    """An operator on a menu may have other heads than the model."""
    fields = {"vocab_size": 37, "hidden_size": 16, "num_attention_heads": 4, "window": 3, "meta_router": "none"}
    kept = {"attention_context": "kept", "operators": [[{"attention": {"num_key_value_heads": 2}}]]}
    with pytest.raises(UserError, match=r"operators\[0\].*heads=4 is neither 1 nor the number of key-value heads, 2"):
        ChiarConfig(**fields, **kept, kv_router={"learned": {"heads": 4}})
    model = ChiarForCausalLM(ChiarConfig(**fields, **kept, kv_router={"learned": {"heads": 2}}))
    check_model(model)
    with pytest.raises(UserError, match="heads=3 is neither 1 nor the number of key-value heads, 4"):
        build_block(16, ["attention"], {**fields, "attention_context": "kept", "kv_router": {"learned": {"heads": 3}}})


def test_both_dials_turn() -> None:
    model = build([["local", "attention"]], attention_context="kept")
    model.set_attention_share(0.7, kv_share=0.1)
    assert (model.config.attention_share, model.config.kv_share) == (0.7, 0.1)
    assert float(model.kv_thresholds()[0].values) > 0.85
    model.set_attention_share(kv_share=1.0)
    assert model.config.attention_share == 0.7
    assert float(model.kv_thresholds()[0].values) == -torch.inf
    with pytest.raises(UserError, match="no layer decides who is kept"):
        build([["local", "attention"]], attention_context="all").set_attention_share(kv_share=0.5)
    with pytest.raises(UserError, match="no share to set"):
        model.set_attention_share()


def test_thresholds_can_follow_the_row_from_now_on(tmp_path: Path) -> None:
    model = build([["local", "attention"]], attention_context="kept", router="threshold")
    ids = ids_of(2, 40, 0)
    calibrate(model, [ids_of(4, 40, 1)])
    standing = model(ids, use_cache=False, output_routing=True).routing[0]
    model.set_history(9)
    assert (model.config.router, model.config.kv_router) == ({"threshold": {"history": 9}}, {"random": {"history": 9}})
    following = model(ids, use_cache=False, output_routing=True).routing[0]
    assert not torch.equal(following.operator_index, standing.operator_index)
    assert torch.equal(following.operator_index[:, :4], standing.operator_index[:, :4])  # the first block's stand
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path).eval()
    again = loaded(ids, use_cache=False, output_routing=True).routing[0]
    assert torch.equal(again.operator_index, following.operator_index) and torch.equal(again.kept, following.kept)
    other = ChiarForCausalLM.from_pretrained(tmp_path, router={"threshold": {"history": 5}}).eval()
    assert torch.equal(other.thresholds()[0].values, model.thresholds()[0].values)  # and no calibration is lost
    assert other.trunk.blocks[0].router.options.history == 5
    cache = ChiarCache(model.config)
    with torch.no_grad():
        parts = [model(part, cache=cache, use_cache=True).logits for part in ids[:, :20].split([9, 1, 10], 1)]
        model.set_history(7)  # in the middle: from here on
        model(ids[:, 20:], cache=cache, use_cache=True)
    assert torch.cat(parts, 1).isfinite().all() and cache.states[0].states["layer.router"].history == 7
    model.set_history(9)
    for wrong, said in ((0, "history=0: must be a positive"), (-3, "history=-3"), (True, "history=True")):
        with pytest.raises(UserError, match=said):
            model.set_history(wrong)
        assert model.trunk.blocks[0].router.options.history == 9
    model.set_history(None)
    assert (model.config.router, model.config.kv_router) == ("threshold", "random")
    assert torch.equal(model(ids, use_cache=False, output_routing=True).routing[0].kept, standing.kept)
    fixed = build([["local", "attention"]], router="threshold", calibration="fixed", entropy_thresholds=[0.8, 0.9])
    with pytest.raises(UserError, match=r"fixed at 0\.85: these can't follow the row"):
        fixed.set_history(9)
    fixed.set_attention_share(0.5)  # they run again
    fixed.set_history(9)
    assert fixed.config.router == {"threshold": {"history": 9}}
    with pytest.raises(UserError, match="no layer routes by thresholds"):
        build([["attention"]], attention_context="all").set_history(9)


@pytest.mark.parametrize("window", [None, 2, 6])
@pytest.mark.parametrize(
    "steps",
    [[20, -18, 5], [20, -10, 5], [20, 1, 1, 3, 1, 1, 4, 2], [40, 8, -4, 8, -4, 8, -4, 5], [30, -1, -2, 3, -3, 6]],
)
def test_pieces_and_crops_of_any_length_are_the_whole(window: int | None, steps: list[int]) -> None:
    menus = [(["dct", "attention"], 0)] if window is None else [(["dct", "attention"], 0), (["local", "attention"], 2)]
    for (menu, sinks), seed in itertools.product(menus, range(4)):
        model = build([menu] * 2, seed, window=window, attention_context="kept", sinks=sinks, router_seed=seed)
        ids, cache = ids_of(1, 64, seed), ChiarCache(model.config)
        with torch.no_grad():
            for step in steps:
                if step < 0:
                    cache.crop(step)
                    continue
                seen = cache.tokens_seen
                # Other tokens than the last time, so that what a crop leaves behind shows.
                ids[:, seen : seen + step] = (ids[:, seen : seen + step] + 7) % VOCABULARY
                logits = model(input_ids=ids[:, seen : seen + step], cache=cache).logits
            whole = model(input_ids=ids[:, : cache.tokens_seen], use_cache=False).logits
        torch.testing.assert_close(logits, whole[:, -logits.shape[1] :])


def test_more_than_is_remembered_is_not_cropped() -> None:
    model = build([["local", "attention"]], attention_context="kept", max_position_embeddings=256)
    cache = ChiarCache(model.config)
    with torch.no_grad():
        model(input_ids=ids_of(1, 130, 0), cache=cache)
    cache.crop(-60)
    with pytest.raises(UserError, match="crop of 60 tokens"):
        cache.crop(-60)


def test_a_short_prompt_takes_no_room_for_a_whole_window() -> None:
    model = build([["local", "attention"]], attention_context="kept", window=10**6)
    ids, cache = ids_of(2, 40, 0), ChiarCache(model.config)
    with torch.no_grad():
        parts = [model(input_ids=part, cache=cache).logits for part in ids.split([5, *[1] * 35], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(input_ids=ids, use_cache=False).logits.detach())
    [state] = cache.states[0].kept()
    assert state.vectors[0].shape[3] < 100


def test_a_head_that_keeps_few_tokens_takes_no_room_for_those_of_another() -> None:
    time, window, heads, more = 400, 8, 2, 100
    key = torch.arange(2.0 * (time + more)).view(2, -1, 1, 1).expand(2, -1, 1, 4)  # of one that keeps all, and one none

    def filled(time: int) -> ReachState:
        state, row = ReachState(window, sinks=0), torch.arange(2).repeat_interleave(time)
        vectors = key[:, :time].flatten(0, 1)
        entries = Entries(vectors, -vectors, row, torch.arange(time).repeat(2), row == 0)
        state.extend(entries, torch.ones(2, time, dtype=torch.bool), heads)
        return state

    state = filled(time)
    for i in range(time, time + more):
        state.extend_by_one(key[:, i], -key[:, i], torch.tensor([True, False]))
    numbers = state.numbers_kept()
    assert numbers == 2 * 4 * (time + more + window)
    assert sum(vectors.numel() for vectors in state.vectors) <= 17 / 16 * numbers + 2 * heads * 2 * 4 * 16
    state.crop(more // 2)
    held, wanted = (vars(one.entries()) for one in (state, filled(time + more // 2)))
    torch.testing.assert_close(held, wanted)


@pytest.mark.parametrize("look", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_decoding_a_batch_is_the_whole_whoever_looks_and_is_kept(look: float, kept: float) -> None:
    shares: dict[str, Any] = {"attention_share": look, "kv_share": kept}
    model = build([["local", "attention"]] * 2, attention_context="kept", sinks=2, **shares)
    ids, cache = ids_of(5, 30, 0), ChiarCache(model.config)
    with torch.no_grad():
        parts = [model(input_ids=part, cache=cache).logits for part in ids.split([3, *[1] * 27], 1)]
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_dense_execution_caches_what_it_routes() -> None:
    model = build([["dct", "attention"]] * 2, attention_context="routed", execution="dense")
    ids, cache = ids_of(2, 20, 0), ChiarCache(model.config)
    with torch.no_grad():
        parts = [model(input_ids=part, cache=cache).logits for part in ids.split([12, 1, 7], 1)]
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_soft_router_beside_a_window_weighs_what_full_attention_says_of_every_token() -> None:
    fields: dict[str, Any] = {"router": "soft", "execution": "dense", "use_cache": True}
    model, full = (build([["dct", "attention"]] * 2, window=window, **fields) for window in (4, None))
    full.load_state_dict(model.state_dict())
    ids, cache = ids_of(2, 20, 0), ChiarCache(model.config)
    with torch.no_grad():
        parts = [model(input_ids=part, cache=cache).logits for part in ids.split([12, 1, 7], 1)]
        expected = full(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_a_cache_goes_in_and_out_of_inference_mode() -> None:
    model = build([["local", "attention"]], attention_context="kept")
    ids, cache = ids_of(1, 20, 0), ChiarCache(model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :10], cache=cache)
    with torch.inference_mode():
        model(input_ids=ids[:, 10:15], cache=cache)
        model(input_ids=ids[:, 15:16], cache=cache)
    with torch.no_grad():
        logits = [model(input_ids=ids[:, t : t + 1], cache=cache).logits for t in range(16, 20)]
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole[:, 16:])


def test_another_router_of_one_side_leaves_the_other_calibrated(tmp_path: Any) -> None:
    model = build([["local", "attention"]], attention_context="kept").float()
    calibrate(model, [ids_of(2, 20, 0)])
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, kv_router="norm")
    assert loaded.thresholds()[0].calibrated and not loaded.kv_thresholds()[0].calibrated
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, router="norm")
    assert loaded.kv_thresholds()[0].calibrated and not loaded.thresholds()[0].calibrated
