"""A forward in pieces, with a cache, is the forward in one go.

Oracle: the model without a cache. Everything that can be cached is drawn over: presets, routers, pieces, left
padding, and an operator of a user's.
"""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PRESETS, ROUTERS, Switches, build, shrunk, tokens
from torch import Tensor, nn
from transformers import DynamicCache

from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM, UserError, register_operator
from chiaroscuro.layers import SelfAttention
from chiaroscuro.layers.registry import OPERATORS

ATOL = 1e-4
TIME = 14


class Doubling(nn.Module):
    """A user's operator: per token, so it needs no cache, and says so."""

    cacheable = True

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Attention2(SelfAttention):
    """A user's operator that keeps keys and values."""


@pytest.fixture
def operators() -> Iterator[None]:
    register_operator("doubling", Doubling)
    register_operator("attention2", Attention2)
    yield
    del OPERATORS["doubling"], OPERATORS["attention2"]


def configs() -> dict[str, ChiarConfig]:
    """Every preset that can be cached, with a causal MetaRouter where it has one, under every router."""
    found = {}
    for preset in PRESETS:
        for router in ROUTERS:
            causal = {"meta_router": "causal"} if shrunk(preset).meta_router != "none" else {}
            config = shrunk(preset, router=router, **causal)
            if not config.uncacheable():
                found[f"{preset} {router}"] = config
    return found


CONFIGS = configs()


def in_pieces(model: ChiarForCausalLM, ids: Tensor, mask: Tensor | None, cuts: list[int]) -> Tensor:
    cache, logits = ChiarCache(model.config), []
    edges = [0, *cuts, ids.shape[1]]
    for start, end in pairwise(edges):
        seen = None if mask is None else mask[:, :end]
        logits.append(model(ids[:, start:end], attention_mask=seen, past_key_values=cache).logits)
        assert cache.get_seq_length() == end
    return torch.cat(logits, dim=1)


def check_pieces(model: ChiarForCausalLM, examples: int = 5) -> None:
    switches = Switches()

    @settings(max_examples=examples)
    @given(
        seed=st.integers(0, 2**31),
        cuts=st.sets(st.integers(1, TIME - 1), max_size=TIME).map(sorted),
        padding=st.lists(st.integers(0, TIME - 2), min_size=2, max_size=2),
    )
    def holds(seed: int, cuts: list[int], padding: list[int]) -> None:
        ids = tokens(seed, 2, TIME)
        mask = (torch.arange(TIME) >= torch.tensor(padding)[:, None]).long() if any(padding) else None
        with torch.no_grad(), switches.watch(model) as distances:
            whole = model(ids, attention_mask=mask, use_cache=False).logits
            pieces = in_pieces(model, ids, mask, cuts)
        if switches.clear(distances):
            real = slice(None) if mask is None else mask.bool()
            torch.testing.assert_close(pieces[real], whole[real], atol=ATOL, rtol=0)

    holds()
    switches.report()


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_equal_the_whole(name: str) -> None:
    check_pieces(build(CONFIGS[name]))


@pytest.mark.usefixtures("operators")
def test_pieces_equal_the_whole_with_operators_of_a_user() -> None:
    menus = [["doubling"], ["dct", "doubling", "attention"], ["dct", "attention2"], ["attention"]]
    model = build(shrunk("small", operators=menus))
    assert model.config.use_cache
    check_pieces(model)
    model(tokens(0), past_key_values=(cache := ChiarCache(model.config)))
    assert [layer.keys is not None for layer in cache.layers] == [False, True, True, True]


@pytest.mark.usefixtures("operators")
def test_two_operators_that_keep_keys_share_no_layer_s_cache() -> None:
    menus = [["dct"], ["attention", "attention2"]]
    with pytest.raises(UserError, match=r"use_cache=True with operators\[1\].*two"):
        shrunk("small", operators=menus, num_hidden_layers=2, use_cache=True)
    assert shrunk("small", operators=menus, num_hidden_layers=2).use_cache is False


def test_every_router_has_a_config_with_and_without_a_metarouter() -> None:
    assert {name.split()[1] for name in CONFIGS} == set(ROUTERS)
    assert {config.meta_router for config in CONFIGS.values()} == {"none", "causal"}
    assert {config.norm for config in CONFIGS.values()} == {"pre", "post"}


def test_a_layer_of_dct_alone_keeps_nothing() -> None:
    model = build(shrunk("small"))
    cache = model(tokens(0, 2, 6)).past_key_values
    assert isinstance(cache, ChiarCache)
    assert cache.layers[0].keys is None
    assert [layer.lengths for layer in cache.layers[1:]] == [[6, 6]] * 3
    assert [[tuple(k.shape) for k, _ in layer.rows()] for layer in cache.layers[1:]] == [[(2, 6, 16)] * 2] * 3
    assert [cache.get_seq_length(i) for i in range(4)] == [6] * 4
    total, count = cache.meta_state
    assert tuple(total.shape) == (2, 32)
    assert count.tolist() == [6.0, 6.0]


def test_a_model_of_dct_alone_is_cached_too() -> None:
    model = build(shrunk("small", operators=[["dct"]] * 4, meta_router="none"))
    check_pieces(model)
    cache = model(tokens(0)).past_key_values
    assert all(layer.keys is None for layer in cache.layers)


# What generation does to a cache


def continued(model: ChiarForCausalLM, cache: ChiarCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def filled(model: ChiarForCausalLM, ids: Tensor) -> ChiarCache:
    cache = ChiarCache(model.config)
    continued(model, cache, ids)
    return cache


@pytest.mark.parametrize("name", ["small threshold", "v2-400m soft", "v1-dct-attention hard"])
def test_rows_are_reordered_repeated_and_selected(name: str) -> None:
    model = build(CONFIGS[name])
    prompt, more = tokens(0, 3, 6), tokens(1, 3, 4)
    order = torch.tensor([2, 0, 0])
    for change, rows in [
        (lambda cache: cache.reorder_cache(order), order),
        (lambda cache: cache.batch_select_indices(order), order),
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ]:
        cache = filled(model, prompt)
        change(cache)
        new = more[torch.arange(len(rows)) % 3]
        wanted = model(torch.cat([prompt[rows], new], dim=1), use_cache=False).logits[:, 6:]
        torch.testing.assert_close(continued(model, cache, new), wanted, atol=ATOL, rtol=0)


def test_reset_forgets_everything() -> None:
    model = build(shrunk("small"))
    cache = filled(model, tokens(0, 3, 6))
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(1, 2, 5)
    wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(continued(model, cache, ids), wanted, atol=ATOL, rtol=0)


def test_crop_forgets_the_last_tokens() -> None:
    model = build(shrunk("small", meta_router="none"))
    ids, other = tokens(0, 2, 8), tokens(1, 2, 3)
    cache = filled(model, ids)
    assert cache.is_croppable
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    wanted = model(torch.cat([ids[:, :5], other], dim=1), use_cache=False).logits[:, 5:]
    torch.testing.assert_close(continued(model, cache, other), wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("wrong", [3, -9])
def test_crop_removes_no_more_than_there_is_and_adds_nothing(wrong: int) -> None:
    cache = filled(build(shrunk("small", meta_router="none")), tokens(0, 2, 8))
    with pytest.raises(UserError, match=f"crop.*{wrong}"):
        cache.crop(wrong)
    assert cache.get_seq_length() == 8


def test_a_causal_metarouter_s_sum_can_not_be_cropped() -> None:
    cache = filled(build(shrunk("small")), tokens(0, 2, 8))
    assert not cache.is_croppable
    with pytest.raises(UserError, match="causal MetaRouter and can't be cropped"):
        cache.crop(-1)


# What can't be cached


UNCACHEABLE = {
    "batch": shrunk("small", meta_router="batch"),
    "sequence": shrunk("small", meta_router="sequence"),
    "rbf": shrunk("v1-three-operator"),
}


@pytest.mark.parametrize(("name", "reason"), [("batch", "meta_router"), ("sequence", "meta_router"), ("rbf", "rbf")])
@pytest.mark.usefixtures("unchecked")
def test_asking_for_a_cache_where_there_can_be_none(name: str, reason: str) -> None:
    config = UNCACHEABLE[name]
    assert config.use_cache is False
    model, ids = build(config), tokens(0)
    assert model(ids).past_key_values is None
    asked = [
        lambda: ChiarCache(config),
        lambda: ChiarConfig.from_dict(config.to_dict() | {"use_cache": True}),
        lambda: model(ids, use_cache=True),
        lambda: model(ids, past_key_values=DynamicCache()),
        lambda: model.generate(ids, max_new_tokens=2, use_cache=True),
        lambda: model.generate(ids, max_new_tokens=2, past_key_values=DynamicCache()),
        lambda: model.generate(ids, max_new_tokens=2, cache_implementation="dynamic"),
    ]
    for ask in asked:
        with pytest.raises(UserError, match=reason) as error:
            ask()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="static"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


@pytest.mark.usefixtures("unchecked")
def test_caches_that_are_not_this_model_s() -> None:
    model, ids = build(shrunk("small")), tokens(0)
    for other, complaint in [
        (DynamicCache(), "DynamicCache"),
        (ChiarCache(shrunk("small", num_hidden_layers=3)), "3 layers"),
        (filled(model, tokens(0, 3, 4)), "3 rows"),
    ]:
        with pytest.raises(UserError, match=complaint):
            model(ids, past_key_values=other)
    with pytest.raises(UserError, match="use_cache=False"):
        model(ids, past_key_values=filled(model, ids), use_cache=False)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_training_keeps_no_cache_unless_asked() -> None:
    model = build(shrunk("small")).train()
    assert model(tokens(0)).past_key_values is None
    assert model(tokens(0), use_cache=True).past_key_values is not None
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="gradient checkpointing"):
        model(tokens(0), use_cache=True)
