"""A forward in pieces, with a cache, is the forward in one go.

Oracle: the model without a cache. Everything that can be cached is drawn over: presets, routers, contexts, pieces,
padding, and an operator of a user's.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LENGTH, PRESETS, ROUTERS, VOCABULARY, WIDTH, Switches, build, shrunk, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, set_seed

from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM, UserError, register_operator
from chiaroscuro.layers import Context, KeptTokens, Operator, SelfAttention
from chiaroscuro.layers.registry import OPERATORS
from chiaroscuro.model.cache import CACHE, REMEMBERED

ATOL = 1e-4
TIME = 14
CONTEXTS = ["all", "routed"]


class Doubling(Operator):
    """A user's operator: per token, so it needs no cache, and says so."""

    def mix(self, x: Tensor, context: Context) -> Tensor:
        return 2 * x

    def new_cache(self) -> None:
        return None


class Attention2(SelfAttention):
    """A user's operator that keeps keys and values."""


@pytest.fixture
def operators() -> Iterator[None]:
    register_operator("doubling", Doubling)
    register_operator("attention2", Attention2)
    yield
    del OPERATORS["doubling"], OPERATORS["attention2"]


def configs() -> dict[str, ChiarConfig]:
    """Every preset that can be cached, with a causal MetaRouter where it has one, under every router and context."""
    found = {}
    for preset in PRESETS:
        for router in ROUTERS:
            causal = {"meta_router": "causal"} if shrunk(preset).meta_router != "none" else {}
            config = shrunk(preset, router=router, **causal)
            if not config.uncacheable():
                found[f"{preset} {router}"] = config
                if config.routed_layers and config.execution == "sparse":
                    found[f"{preset} {router} routed"] = shrunk(
                        preset, router=router, attention_context="routed", **causal
                    )
    return found


CONFIGS = configs()


def in_pieces(model: ChiarForCausalLM, ids: Tensor, mask: Tensor | None, cuts: list[int]) -> Tensor:
    cache, logits = ChiarCache(model.config), []
    edges = [0, *cuts, ids.shape[1]]
    for start, end in pairwise(edges):
        seen = None if mask is None else mask[:, :end]
        logits.append(model(ids[:, start:end], attention_mask=seen, cache=cache).logits)
        assert cache.get_seq_length() == end
    return torch.cat(logits, dim=1)


sides = st.integers(0, TIME) | st.just(0)


def real_between(padding: list[tuple[int, int]]) -> Tensor:
    """A mask of rows with so many tokens of padding on the left and on the right, and perhaps none between."""
    left, right = torch.tensor(padding).T[:, :, None]
    return ((torch.arange(TIME) >= left) & (torch.arange(TIME) < TIME - right)).long()


def check_pieces(model: ChiarForCausalLM, examples: int = 5) -> None:
    switches = Switches()

    @settings(max_examples=examples)
    @given(
        seed=st.integers(0, 2**31),
        cuts=st.sets(st.integers(1, TIME - 1), max_size=TIME).map(sorted),
        padding=st.none() | st.lists(st.tuples(sides, sides), min_size=2, max_size=2),
    )
    def holds(seed: int, cuts: list[int], padding: list[tuple[int, int]] | None) -> None:
        ids = tokens(seed, 2, TIME)
        mask = None if padding is None else real_between(padding)
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
    model(tokens(0), cache=(cache := ChiarCache(model.config)))
    assert [layer.keys is not None for layer in cache.layers] == [False, True, True, True]


@pytest.mark.usefixtures("operators")
def test_every_operator_of_a_layer_has_a_state_of_its_own() -> None:
    menus = [["dct", "rbf"], ["attention", "attention2"], ["rbf", "attention"], ["dct", "rbf", "attention"]]
    for context in CONTEXTS:
        model = build(shrunk("small", operators=menus, attention_context=context))
        check_pieces(model)
        cache = model(tokens(0))[CACHE]
        kept = [{name: state is not None for name, state in layer.states.items()} for layer in cache.states]
        assert not any(layer.pop("layer.router") for layer in kept)  # thresholds that stand still keep nothing
        assert kept[0] == {"dct": False, "rbf": True}
        assert kept[1] == {"attention": True, "attention2": True} and kept[2] == {"rbf": True, "attention": True}
        assert cache.layers[0].keys.shape[1] == 1 and cache.layers[1].keys is None


def test_every_router_has_a_config_with_and_without_a_metarouter() -> None:
    assert {name.split()[1] for name in CONFIGS} == set(ROUTERS)
    assert {config.meta_router for config in CONFIGS.values()} == {"none", "causal"}
    assert {config.norm for config in CONFIGS.values()} == {"pre", "post"}


def test_a_layer_of_dct_alone_keeps_nothing() -> None:
    model = build(shrunk("small"))
    cache = model(tokens(0, 2, 6))[CACHE]
    assert isinstance(cache, ChiarCache)
    assert cache.layers[0].keys is None
    assert [state.lengths for state in states(cache)] == [[6, 6]] * 3
    assert [tuple(layer.keys.shape) for layer in cache.layers[1:]] == [(2, 2, 6, 16)] * 3
    assert [cache.get_seq_length(i) for i in range(4)] == [6] * 4
    total, count = cache.meta_state.last
    assert tuple(total.shape) == (2, 32)
    assert count.tolist() == [6.0, 6.0]


def test_a_model_of_dct_alone_is_cached_too() -> None:
    model = build(shrunk("small", operators=[["dct"]] * 4, meta_router="none"))
    check_pieces(model)
    cache = model(tokens(0))[CACHE]
    assert all(layer.keys is None for layer in cache.layers)


def states(cache: ChiarCache) -> list[KeptTokens]:
    """The states of the layers' attentions, of those that have one."""
    return [layer.states["attention"] for layer in cache.states if "attention" in layer.states]


# What generation does to a cache


def continued(model: ChiarForCausalLM, cache: ChiarCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, cache=cache).logits


def filled(model: ChiarForCausalLM, ids: Tensor) -> ChiarCache:
    cache = ChiarCache(model.config)
    continued(model, cache, ids)
    return cache


@pytest.mark.parametrize(
    "name",
    ["small threshold", "v2-400m soft", "v1-dct-attention hard", "small threshold routed", "v2-400m hard routed"],
)
def test_rows_are_reordered_repeated_and_selected(name: str) -> None:
    model = build(CONFIGS[name])
    prompt, more = tokens(0, 3, 6), tokens(1, 3, 4)
    order = torch.tensor([2, 0, 0])
    for change, rows in [
        (lambda cache: cache.reorder_cache(order), order),
        (lambda cache: cache.batch_select_indices(order), order),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), torch.tensor([0, 2])),
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


@pytest.mark.parametrize("context", CONTEXTS)
def test_crop_forgets_the_last_tokens(context: str) -> None:
    model = build(shrunk("small", meta_router="none", attention_context=context))
    ids, other = tokens(0, 2, 8), tokens(1, 2, 3)
    cache = filled(model, ids)
    assert cache.is_croppable
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    assert cache.numbers_kept() == filled(model, ids[:, :5]).numbers_kept()
    wanted = model(torch.cat([ids[:, :5], other], dim=1), use_cache=False).logits[:, 5:]
    torch.testing.assert_close(continued(model, cache, other), wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"operators": [["dct", "attention"], ["attention"]]},  # the causal MetaRouter refuses
        {"operators": [["attention"], ["conv"]], "meta_router": "none"},
        {"operators": [["attention"], ["local"]], "meta_router": "none", "window": 4},
    ],
)
def test_a_crop_that_is_refused_leaves_the_cache_as_it_was(fields: dict[str, Any]) -> None:
    """The first layer could be cropped."""
    config = ChiarConfig(
        **fields, hidden_size=16, num_attention_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256
    )
    model, ids = build(config), tokens(0, 1, 100)
    cache = ChiarCache(config)
    continued(model, cache, ids[:, :99])
    with pytest.raises(UserError, match="crop of 80 tokens"):
        cache.crop(-80)
    assert cache.get_seq_length() == 99
    wanted = model(ids, use_cache=False).logits[:, 99:]
    torch.testing.assert_close(continued(model, cache, ids[:, 99:]), wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("wrong", [3, -9, "x", None, 0.5])
def test_crop_removes_no_more_than_there_is_and_adds_nothing(wrong: int) -> None:
    cache = filled(build(shrunk("small", meta_router="none")), tokens(0, 2, 8))
    with pytest.raises(UserError, match=f"crop.*{wrong}"):
        cache.crop(wrong)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("pieces", [[8], [3, 3, 1, 1]])
def test_a_causal_metarouter_s_sums_are_cropped_too(pieces: list[int]) -> None:
    model, ids, other = build(shrunk("small")), tokens(0, 2, 8), tokens(1, 2, 3)
    cache = ChiarCache(model.config)
    for piece in ids.split(pieces, dim=1):
        continued(model, cache, piece)
    assert cache.is_croppable
    cache.crop(-3)
    wanted = model(torch.cat([ids[:, :5], other], dim=1), use_cache=False).logits[:, 5:]
    torch.testing.assert_close(continued(model, cache, other), wanted, atol=ATOL, rtol=0)
    cache.crop(-8)
    assert cache.get_seq_length() == 0 and cache.meta_state.last is None


def test_a_causal_metarouter_remembers_its_last_sums_alone() -> None:
    model = build(shrunk("small", max_position_embeddings=4 * REMEMBERED))
    cache = filled(model, tokens(0, 1, 2 * REMEMBERED))
    for token in tokens(1, 1, REMEMBERED + 10).split(1, dim=1):
        continued(model, cache, token)
    assert sum(count.shape[1] for _, count in cache.meta_state.parts) < 2 * REMEMBERED
    with pytest.raises(UserError, match=f"can go back {REMEMBERED} at most"):
        cache.crop(-2 * REMEMBERED)
    for token in tokens(2, 1, REMEMBERED // 2).split(1, dim=1):
        continued(model, cache, token)
    cache.crop(-REMEMBERED)
    assert cache.meta_state.last is not None


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_drafts_are_accepted_and_rejected_under_the_default_metarouter(options: dict[str, Any]) -> None:
    model = build(shrunk("small"))
    assistant = {"assistant_model": build(shrunk("small"), seed=1)} if "assistant_model" in options else {}
    drafted = generated(model, rows=1, max_new_tokens=24, **(options | assistant))
    assert torch.equal(drafted, generated(model, rows=1, max_new_tokens=24))


# What a layer keeps


@dataclass
class PlainLayer:
    """What `KeptTokens` is to be: a list for each row, of the places, keys and values that it keeps."""

    rows: list[list[tuple[int, Tensor, Tensor]]]
    seen: int = 0

    def extend(self, key: Tensor, value: Tensor, chosen: Tensor) -> None:
        tokens_kept = iter(zip(key, value, strict=True))
        for row, takes in zip(self.rows, chosen.tolist(), strict=True):
            row += [(self.seen + t, *next(tokens_kept)) for t, taken in enumerate(takes) if taken]
        self.seen += chosen.shape[1]

    def crop(self, tokens: int) -> None:
        self.seen -= tokens
        self.rows = [[token for token in row if token[0] < self.seen] for row in self.rows]

    def select(self, indices: list[int]) -> None:
        self.rows = [list(self.rows[i]) for i in indices]


shares = st.sampled_from([0.0, 0.3, 1.0])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(1, 40), shares),
        st.tuples(st.just("update"), st.integers(1, 40), st.none()),
        st.tuples(st.just("crop"), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.none()),
        st.tuples(st.just("select"), st.lists(st.integers(0, 99), min_size=1, max_size=4), st.none()),
    ),
    min_size=2,
    max_size=8,
)


@given(first=shares, steps=steps, seed=st.integers(0, 2**31))
def test_rows_of_different_lengths_are_kept_in_one_buffer(
    first: float, steps: list[tuple[str, Any, Any]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer, plain = KeptTokens(), PlainLayer([[], [], []])
    for what, number, share in [("extend", 5, first), *steps]:
        if what == "extend":
            chosen = torch.rand(len(plain.rows), number, generator=generator) < share
            key, value = torch.randn(2, int(chosen.sum()), 2, 4, generator=generator)
            layer.extend(chosen, key, value)
            plain.extend(key, value, chosen)
        elif what == "update":
            if layer.ragged:
                continue
            key, value = torch.randn(2, len(plain.rows), number, 2, 4, generator=generator)
            layer.update(key.transpose(1, 2), value.transpose(1, 2))
            plain.extend(key.flatten(0, 1), value.flatten(0, 1), torch.ones(len(plain.rows), number).bool())
        elif what == "crop":
            removed = round(number * plain.seen)
            layer.crop(removed)
            plain.crop(removed)
        else:
            indices = [i % len(plain.rows) for i in number]
            layer.select(torch.tensor(indices))
            plain.select(indices)
        assert layer.seen == plain.seen
        assert layer.lengths == [len(row) for row in plain.rows]
        assert layer.empty == (not any(plain.rows))
        assert layer.numbers_kept() == 2 * sum(layer.lengths) * 2 * 4
        if layer.empty:
            continue
        (keys, values), real = layer.rectangle()
        if real is None:
            real = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
        assert real.sum(1).tolist() == layer.lengths
        for b, row in enumerate(plain.rows):
            for t, (_, wanted_key, wanted_value) in enumerate(row):
                assert torch.equal(keys[b, :, t], wanted_key)
                assert torch.equal(values[b, :, t], wanted_value)
        for packed, kind in zip(layer.packed(), (1, 2), strict=True):
            assert torch.equal(packed, torch.stack([token[kind] for row in plain.rows for token in row]))
    while plain.seen:
        removed = min(3, plain.seen)
        layer.crop(removed)
        plain.crop(removed)
        assert layer.lengths == [len(row) for row in plain.rows]


def test_rows_of_different_lengths_are_no_rectangle() -> None:
    layer = KeptTokens()
    layer.extend(torch.tensor([[True], [False]]), *torch.zeros(2, 1, 2, 4))
    with pytest.raises(UserError, match="pass one again"):
        layer.update(*torch.zeros(2, 2, 2, 1, 4))


class Written(TorchDispatchMode):
    """How many numbers operations write, and how often they make a tensor of four dimensions without filling it."""

    numbers = buffers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "zeros" in str(func):
            self.buffers += isinstance(out, Tensor) and out.ndim == 4
        elif "index_put" in str(func):  # gives back all of the buffer that it writes some places of
            self.numbers += args[2].numel()
        elif isinstance(out, Tensor) and not func.is_view:
            self.numbers += out.numel()
        return out


def appended(tokens_kept: int, way: str) -> Written:
    """One token at a time: one to every row, in a rectangle or packed, or to the first row alone."""
    layer = KeptTokens()
    rows = 1 if way == "one row" else 2
    key, value = torch.randn(2, rows, 2, 1, 4)
    chosen = torch.tensor([[True], [way == "packed"]])
    with torch.no_grad(), Written() as written:
        for _ in range(tokens_kept):
            if way == "rectangle":
                layer.update(key, value)
            else:
                layer.extend(chosen[:rows], *(x[chosen[:rows, 0], :, 0] for x in (key, value)))
    assert max(layer.lengths) == tokens_kept
    return written


@pytest.mark.parametrize("way", ["rectangle", "packed", "one row"])
def test_a_token_more_does_not_copy_those_before_it(way: str) -> None:
    short, long = appended(500, way), appended(1000, way)
    assert long.numbers < 2.5 * short.numbers
    # Of 1.25 times the size each, for keys and for values.
    assert short.buffers < long.buffers <= 2 * math.log(1000 / 16, 1.25)


# The routed context


def routed(share: float = 0.5, **changes: Any) -> ChiarForCausalLM:
    """DCT alone, two layers of routing, attention alone; without a MetaRouter, so that it can be cropped."""
    fields = {"meta_router": "none", "attention_context": "routed", "attention_share": share} | changes
    return build(shrunk("small", **fields))


def attending(model: ChiarForCausalLM, ids: Tensor, mask: Tensor | None = None) -> list[list[int]]:
    """How many tokens of each row every layer routes to attention."""
    with torch.no_grad():
        routing = model(ids, attention_mask=mask, use_cache=False, output_routing=True).routing
    return [(r.operator_index == r.operators.index("attention")).sum(1).tolist() for r in routing[1:]]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_only_routed_tokens_are_kept(share: float) -> None:
    model, ids = routed(share), tokens(0, 3, LENGTH)
    cache = filled(model, ids)
    got = attending(model, ids)
    *routed_layers, last = states(cache)
    assert cache.states[0].states == {"dct": None}
    assert [layer.lengths for layer in states(cache)] == got
    assert last.lengths == [LENGTH] * 3
    full = 2 * 3 * LENGTH * WIDTH
    for layer, counts in zip(routed_layers, got, strict=False):
        assert layer.numbers_kept() == full * sum(counts) / (3 * LENGTH)
        assert layer.ragged == (0 < share < 1)
    assert cache.numbers_kept() == 2 * WIDTH * sum(map(sum, got))
    assert [cache.get_seq_length(i) for i in range(4)] == [LENGTH] * 4
    in_all = filled(routed(share, attention_context="all"), ids)
    assert in_all.numbers_kept() == 3 * full


def test_a_padded_row_is_kept_as_the_row_alone() -> None:
    model, ids = routed(), tokens(0, 3, TIME)
    mask = real_between([(0, 0), (6, 0), (3, 5)])
    cache = ChiarCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
    for b, real in enumerate(mask.bool()):
        alone = filled(model, ids[b : b + 1, real])
        for together, single in zip(states(cache), states(alone), strict=True):
            assert [together.lengths[b]] == single.lengths
            if not single.empty:
                (kept, _), (wanted, _) = together.rectangle(), single.rectangle()
                for vectors, others in zip(kept, wanted, strict=True):
                    own = vectors[b, :, : together.lengths[b]]
                    torch.testing.assert_close(own, others[0], atol=ATOL, rtol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_buffers_have_the_type_of_what_is_kept(rows: int) -> None:
    """Under autocast, also where the first tokens are not routed, so that there was nothing yet to have a type."""
    model, ids = routed(0.2), tokens(0, rows, TIME)
    cache = ChiarCache(model.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for t in range(TIME):
            model(ids[:, t : t + 1], cache=cache)
            if t == 0:
                assert any(state.empty for state in states(cache))
    assert {state.buffers[0].dtype for state in states(cache)} == {torch.bfloat16}


@pytest.mark.parametrize("menu", [["attention"], ["dct", "attention"], ["local", "attention"], ["rbf"], ["dct", "rbf"]])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("first", [True, False], ids=["filled under autocast", "used under autocast"])
@pytest.mark.parametrize("pads", [0, 2])
def test_what_was_cached_under_autocast_is_used_outside(new: int, menu: list[str], first: bool, pads: int) -> None:
    model = routed(0.5, operators=[menu] * 2, num_hidden_layers=2, window=4 if "local" in menu else None)
    ids, cache = tokens(0, 2, TIME), ChiarCache(model.config)
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    given = [{"attention_mask": mask[:, : TIME - new]}, {"attention_mask": mask}] if pads else [{}, {}]
    with torch.no_grad():
        wanted = model(ids, use_cache=False, **given[1]).logits[:, -new:]
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            model(ids[:, :-new], cache=cache, **given[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=not first):
            found = model(ids[:, -new:], cache=cache, **given[1]).logits
    torch.testing.assert_close(found.float(), wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("menu", [["attention"], ["dct", "attention"]])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_cache_of_other_rows(context: str, rows: int, share: float, menu: list[str]) -> None:
    model = routed(share, attention_context=context, operators=[menu] * 2, num_hidden_layers=2)
    cache = filled(model, tokens(0, 3, 4))
    with pytest.raises(UserError, match=f"holds 3 rows, the input has {rows}") as error:
        continued(model, cache, tokens(0, rows, 2))
    assert "\n" not in str(error.value)


@contextmanager
def attention_calls(model: ChiarForCausalLM) -> Iterator[dict[str, int]]:
    """How many vectors go into the projections of the layers, and how often these run, and anything attends."""
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    counts = dict.fromkeys([*names, "runs", "attends"], 0)

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] += inputs[0].shape[:-1].numel()
            counts["runs"] += 1

        return hook

    def counting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(query: Tensor, *rest: Any, **named: Any) -> Tensor:
            counts["attends"] += 1
            return function(query, *rest, **named)

        return counted

    dense, packed = (import_module(f"chiaroscuro.layers.{name}") for name in ("self_attention", "attend_packed"))
    handles = [
        getattr(layer.operators["attention"], name).register_forward_pre_hook(count(name))
        for layer in model.model.layers
        for name in names
        if "attention" in layer.operators
    ]
    functions = ["attend_to_all", "prefix_attention", "prefix_attention_by_rows"]
    try:
        with (
            mock.patch.object(dense, "attend", counting(dense.attend)),
            mock.patch.multiple(packed, **{name: counting(getattr(packed, name)) for name in functions}),
        ):
            yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("context", CONTEXTS)
def test_in_decoding_a_token_that_goes_to_dct_does_no_attention(context: str, rows: int) -> None:
    model = routed(operators=[["dct"], *[["dct", "attention"]] * 3], attention_context=context)
    ids, idle = tokens(0, rows, LENGTH), 0
    cache = filled(model, ids[:, :6])
    for t in range(6, LENGTH):
        with torch.no_grad(), attention_calls(model) as counts:
            routing = model(ids[:, t : t + 1], cache=cache, output_routing=True).routing
        attended = [int((r.operator_index == 1).sum()) for r in routing[1:]]
        got = sum(attended)
        keyed = 3 * rows if context == "all" else got
        wanted = {"q_proj": got, "k_proj": keyed, "v_proj": keyed, "out_proj": got}
        assert {name: counts[name] for name in wanted} == wanted
        if context == "routed":
            assert counts["runs"] == 4 * sum(n > 0 for n in attended)
        assert counts["attends"] <= got
        assert (counts["attends"] > 0) == (got > 0)
        idle += got < 3 * rows
    assert idle > 10


def generated(model: ChiarForCausalLM, rows: int = 3, **options: Any) -> Tensor:
    """A continuation of rows of 8, 5 and 2 tokens."""
    set_seed(5)
    ids, mask = tokens(0, 3, 8), (torch.arange(8) >= torch.tensor([0, 3, 6])[:, None]).long()
    fields = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(ids[:rows], attention_mask=mask[:rows], **fields)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": 1},
        {"do_sample": True, "top_k": 0, "temperature": 1.3, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["small threshold routed", "v1-dct-attention hard routed"])
def test_generation_with_and_without_a_cache_of_routed_tokens(name: str, options: dict[str, Any]) -> None:
    model = build(CONFIGS[name])
    uncached = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    assert torch.equal(generated(model, **options), generated(model, use_cache=False, **uncached))


def test_guesses_from_the_prompt_are_cropped_from_the_routed_tokens_too() -> None:
    model = routed()
    with mock.patch.object(KeptTokens, "crop", autospec=True, side_effect=KeptTokens.crop) as crop:
        guessing = generated(model, rows=1, max_new_tokens=24, prompt_lookup_num_tokens=3)
    assert any(call.args[1] > 0 for call in crop.call_args_list)
    assert torch.equal(guessing, generated(model, rows=1, max_new_tokens=24))


# What can't be cached


UNCACHEABLE = {
    "batch": shrunk("small", meta_router="batch"),
    "sequence": shrunk("small", meta_router="sequence"),
    "rbf": shrunk("v1-three-operator", rbf_causal=False),
    "dense": ChiarConfig(
        operators=[["rbf", "attention"]],
        **{"window": 4, "attention_context": "routed", "execution": "dense", "meta_router": "none"},
        **{"hidden_size": 16, "num_attention_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32},
    ),
}


@pytest.mark.parametrize(
    ("name", "reason"), [("batch", "meta_router"), ("sequence", "meta_router"), ("rbf", "rbf"), ("dense", "dense")]
)
@pytest.mark.usefixtures("unchecked")
def test_asking_for_a_cache_where_there_can_be_none(name: str, reason: str) -> None:
    config = UNCACHEABLE[name]
    assert config.use_cache is False
    model, ids = build(config), tokens(0)
    assert getattr(model(ids), CACHE) is None
    asked = [
        lambda: ChiarCache(config),
        lambda: ChiarConfig.from_dict(config.to_dict() | {"use_cache": True}),
        lambda: model(ids, use_cache=True),
        lambda: model(ids, cache=DynamicCache()),
        lambda: model.generate(ids, max_new_tokens=2, use_cache=True),
        lambda: model.generate(ids, max_new_tokens=2, cache=DynamicCache()),
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
        (ChiarCache(shrunk("small", window=8)), "with other operators, or with other options of them"),
    ]:
        with pytest.raises(UserError, match=complaint):
            model(ids, cache=other)
    same = ChiarCache(copy.deepcopy(model.config))
    assert torch.equal(model(ids, cache=same).logits, model(ids).logits)
    with pytest.raises(UserError, match="use_cache=False"):
        model(ids, cache=filled(model, ids), use_cache=False)
    for ask in (model, model.model, lambda ids, **both: model.generate(ids, max_new_tokens=2, **both)):
        with pytest.raises(UserError, match="cache and past_key_values are one thing"):
            ask(ids, cache=filled(model, ids), past_key_values=filled(model, ids))


def test_a_cache_has_two_names() -> None:
    model, ids = build(shrunk("small")), tokens(0)
    found = {}
    for name in ("cache", "past_key_values"):
        for forward in (model, model.model):
            cache = filled(model, ids[:, :8])
            output = forward(ids[:, 8:], **{name: cache})
            assert output[CACHE] is cache and cache.get_seq_length() == ids.shape[1]
        found[name] = model(ids[:, 8:], **{name: filled(model, ids[:, :8])}).logits
    assert torch.equal(*found.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_training_keeps_no_cache_unless_asked() -> None:
    model = build(shrunk("small")).train()
    assert getattr(model(tokens(0)), CACHE) is None
    assert getattr(model(tokens(0), use_cache=True), CACHE) is not None
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="gradient checkpointing"):
        model(tokens(0), use_cache=True)


@pytest.mark.parametrize(("execution", "context"), [("sparse", "all"), ("sparse", "routed"), ("dense", "all")])
def test_a_cache_begun_with_padding_is_not_gone_on_with_without_a_mask(execution: str, context: str) -> None:
    model, ids = build(shrunk("small", execution=execution, attention_context=context)), tokens(0, 2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = ChiarCache(model.config)
    model(ids[:, :5], attention_mask=mask[:, :5], cache=cache)
    with pytest.raises(UserError, match="begun with an attention_mask: pass one again"):
        model(ids[:, 5:], cache=cache)
    model(ids[:, 5:], attention_mask=mask, cache=cache)
    # A mask that hides nothing need not be gone on with.
    cache.reset()
    model(ids[:, :5], attention_mask=torch.ones_like(ids[:, :5]), cache=cache)
    model(ids[:, 5:], cache=cache)


@pytest.mark.parametrize("execution", ["sparse", "dense"])
@torch.no_grad()
def test_a_mask_says_of_cached_tokens_what_it_said_when_they_came(execution: str) -> None:
    model, ids = build(shrunk("small", execution=execution)), tokens(0, 2, 6)
    everything, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, :3] = 0
    cache = ChiarCache(model.config)
    for before, after in ((everything, padded), (padded, everything)):
        cache.reset()
        model(ids[:, :5], attention_mask=before[:, :5], cache=cache)
        with pytest.raises(UserError, match="cached tokens for padding that were real"):
            model(ids[:, 5:], attention_mask=after, cache=cache)
        model(ids[:, 5:], attention_mask=before, cache=cache)  # it is as it was
    # Of the rows that are left, and of the tokens that are, none is padding.
    cache.batch_select_indices(torch.tensor([0]))
    assert not cache.padded and model(ids[:1, :1], cache=cache).logits.isfinite().all()
    cache.reset()
    model(ids[:, :5], attention_mask=padded.flip(1)[:, 1:], cache=cache)
    assert cache.padded
    cache.crop(-3)
    assert not cache.padded
    rest = model(ids[:, 2:], cache=cache).logits
    torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 2:], atol=ATOL, rtol=0)


# Gradients and inference mode


@pytest.mark.parametrize("context", CONTEXTS)
def test_pieces_of_one_cache_can_be_differentiated_together(context: str) -> None:
    model = build(shrunk("small", attention_context=context))
    cache, loss, ids = ChiarCache(model.config), torch.zeros(()), tokens(0, 2, TIME)
    for piece in ids.split(4, dim=1):
        loss = loss + model(piece, cache=cache).logits.square().sum()
    loss.backward()
    assert model.model.embed_tokens.weight.grad.isfinite().all()


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_cache_begun_in_inference_mode_goes_on_without(context: str) -> None:
    model = build(shrunk("small", attention_context=context))
    cache, ids = ChiarCache(model.config), tokens(0, 2, TIME)
    with torch.inference_mode():
        model(ids[:, :6], cache=cache)
    with torch.no_grad():
        rest = model(ids[:, 6:], cache=cache).logits
        torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 6:], atol=ATOL, rtol=0)


class PlainAttention(Operator):
    """A user's operator that keeps keys and values of all tokens and knows nothing of packed ones."""

    Options = SelfAttention.Options

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.inner = SelfAttention(width, **options)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        return self.inner(x, context)

    def new_cache(self) -> KeptTokens:
        return self.inner.new_cache()


@pytest.mark.parametrize("rows", [1, 3])
def test_an_operator_that_keeps_keys_sees_every_token(rows: int) -> None:
    register_operator("plain-attention", PlainAttention)
    try:
        menus = [["dct"], ["dct", "plain-attention"], ["plain-attention"]]
        model = build(shrunk("small", num_hidden_layers=3, operators=menus, attention_share=0.3))
        cache, ids = ChiarCache(model.config), tokens(0, rows, TIME)
        with torch.no_grad():
            pieces = [model(piece, cache=cache).logits for piece in ids.split(1, dim=1)]
            whole = model(ids, use_cache=False).logits
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=ATOL, rtol=0)
    finally:
        del OPERATORS["plain-attention"]


NEAR_AND_FAR: dict[str, Any] = {
    "operators": [["local", "attention"]] * 2,
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "window": 4,
    "attention_context": "kept",
    "router": "threshold",
    "kv_router": "threshold",
    "meta_router": "none",
}


@torch.no_grad()
def test_after_a_forward_that_failed_halfway_a_cache_is_refused() -> None:
    operators = [["attention"], ["dct", "attention"]]
    model = build(
        ChiarConfig(
            **NEAR_AND_FAR
            | {"operators": operators, "window": None, "router": "random"}
            | {"attention_context": "all", "kv_router": "threshold"}
        )
    )
    ids, cache = tokens(0), ChiarCache(model.config)
    model(ids[:, :6], cache=cache)
    with pytest.raises(UserError, match="draws by token id"):  # in the second layer
        model(inputs_embeds=model.get_input_embeddings()(ids[:, 6:9]), cache=cache)
    with pytest.raises(UserError, match="failed halfway"):
        model(ids[:, 6:9], cache=cache)
    cache.reset()
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (3, 4)])
@torch.no_grad()
def test_a_cache_of_other_rows_than_the_input(shape: tuple[int, int]) -> None:
    model = build(ChiarConfig(**NEAR_AND_FAR))
    cache = ChiarCache(model.config)
    model(tokens(0), cache=cache)
    with pytest.raises(UserError, match=f"the cache holds 2 rows, the input has {shape[0]}: the two must match"):
        model(tokens(1, *shape), cache=cache)
    assert torch.isfinite(model(tokens(1, 2, 2), cache=cache).logits).all()  # it is as it was


@torch.no_grad()
def test_a_crop_takes_from_each_row_what_that_one_got() -> None:
    """Rows of as many real tokens, of which one has padding at the end and the other at the beginning."""
    model = build(ChiarConfig(**NEAR_AND_FAR | {"router": "random", "kv_router": "random"}))
    ids, mask, following = tokens(0, 2, 12), torch.ones(2, 12).long(), tokens(1, 2, 4)
    mask[0, -1] = mask[1, 0] = 0
    cache = ChiarCache(model.config)
    model(ids, attention_mask=mask, cache=cache)
    cache.crop(-1)
    real = torch.cat([mask[:, :11], torch.ones_like(following)], 1)
    found = model(following, attention_mask=real, cache=cache).logits
    wanted = model(torch.cat([ids[:, :11], following], 1), attention_mask=real, use_cache=False).logits[:, 11:]
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=0)


@torch.no_grad()
def test_of_a_cache_no_row_may_be_kept() -> None:
    cache = ChiarCache(ChiarConfig(**NEAR_AND_FAR))
    build(ChiarConfig(**NEAR_AND_FAR))(tokens(0, 2, 12), cache=cache)
    cache.batch_select_indices(torch.zeros(2, dtype=torch.bool))
    assert cache.rows == 0 and cache.numbers_kept() == 0


@pytest.mark.parametrize("fields", [{}, {"operators": [["attention"]] * 2, "window": None, "attention_context": "all"}])
@torch.no_grad()
def test_it_matters_not_how_a_kernel_lays_out_its_output(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As memory-efficient attention does, which a GPU takes in float32: heads beside each other for each query."""
    model = build(ChiarConfig(**NEAR_AND_FAR | {"num_attention_heads": 4, "num_key_value_heads": 2} | fields))
    ids = tokens(0, 2, TIME)
    wanted = torch.cat([model(ids[:, :8]).logits, model(ids).logits[:, 8:]], 1)
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *given, **more: plain(*given, **more).transpose(1, 2).contiguous().transpose(1, 2),
    )
    cache = ChiarCache(model.config)
    found = [model(piece, cache=cache).logits for piece in ids.split([8, *[1] * (TIME - 8)], 1)]
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=ATOL, rtol=0)


@torch.no_grad()
def test_labels_that_are_refused_change_nothing() -> None:
    model = build(ChiarConfig(**NEAR_AND_FAR))
    cache = ChiarCache(model.config)
    model(tokens(0), cache=cache)
    wrong = torch.full((2, 1), VOCABULARY)
    with pytest.raises(UserError, match="neither a token id"):
        model(tokens(1, 2, 1), cache=cache, labels=wrong)
    assert cache.tokens_seen == 12
    model.train()
    with pytest.raises(UserError, match="neither a token id"):
        model(tokens(0), labels=wrong.expand(-1, 12))
    assert not any(thresholds.noted for thresholds in model.thresholds().values())
