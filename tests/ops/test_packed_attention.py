"""Packed attention: the plain form against loops over single numbers, the tiles against the plain form.

Every drawn row has its own number of queries and keys, and every tile size is drawn too, so that small problems have
the tiles of large ones: squares, whole parts, masked parts and both merged.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro.ops import packed_attention, prefix_attention
from chiaroscuro.ops.packed_attention import prefix_attention_by_rows
from largest import Largest


@dataclass
class Packed:
    """Rows of queries, as (number of keys, how many each query sees)."""

    rows: list[tuple[int, list[int]]]

    def lengths(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments `query_lengths`, `key_lengths` and `visible`."""
        queries = torch.tensor([len(seen) for _, seen in self.rows], dtype=torch.long)
        keys = torch.tensor([keys for keys, _ in self.rows], dtype=torch.long)
        return queries, keys, torch.tensor([n for _, seen in self.rows for n in seen], dtype=torch.long)

    def numbers(self, seed: int, heads: int = 2, width: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Queries, keys, values, and a direction for the gradient."""
        queries, keys, _ = self.lengths()
        sizes = (int(queries.sum()), int(keys.sum()), int(keys.sum()), int(queries.sum()))
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(n, heads, width, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]

    def tiles(self, chunk: int) -> list[Any]:
        with mock.patch.multiple(packed_attention, CHUNK=chunk, LONG_CHUNK=chunk):
            return list(packed_attention._tiles(*(x.tolist() for x in self.lengths())))


def attention_by_loops(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """One query and one head at a time, from the first key of its row to the last that it sees."""
    output = torch.zeros_like(query)
    i = start = 0
    for keys, seen in packed.rows:
        for n in seen:
            for h in range(query.shape[1]):
                scores = [(query[i, h] @ key[start + j, h]) / query.shape[-1] ** 0.5 for j in range(n)]
                weights = torch.stack(scores).exp()
                weights = weights / weights.sum()
                output[i, h] = sum(w * value[start + j, h] for j, w in enumerate(weights))
            i += 1
        start += keys
    return output


@st.composite
def row(draw: st.DrawFn) -> tuple[int, list[int]]:
    kind = draw(st.sampled_from(["causal", "positions", "cached", "all", "rising", "no queries"]))
    keys = draw(st.integers(1, 9))
    if kind == "no queries":
        return draw(st.integers(0, 4)), []
    if kind == "causal":
        return keys, list(range(1, keys + 1))
    if kind == "cached":
        return keys, list(range(draw(st.integers(1, keys)), keys + 1))
    if kind == "all":
        return keys, [keys] * draw(st.integers(1, 9))
    unique = kind == "positions"
    return keys, sorted(draw(st.lists(st.integers(1, keys), min_size=1, max_size=9, unique=unique)))


problems = st.lists(row(), min_size=1, max_size=4).map(Packed)
chunks = st.sampled_from([1, 2, 3, 5, 128])
seeds = st.integers(0, 2**31)


def results(function: Any, numbers: list[Tensor], packed: Packed, **options: Any) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    # Not cloned, which would change how some of them lie in memory.
    *inputs, direction = (x.detach() for x in numbers)
    output = function(*(x.requires_grad_() for x in inputs), *packed.lengths(), **options)
    output.backward(direction)
    return [output.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)]


# The plain form


@given(packed=problems, seed=seeds)
def test_row_by_row_is_the_formula(packed: Packed, seed: int) -> None:
    query, key, value, _ = packed.numbers(seed)
    found = prefix_attention_by_rows(query, key, value, *packed.lengths())
    torch.testing.assert_close(found, attention_by_loops(query, key, value, packed))


@given(packed=problems, seed=seeds, scale=st.sampled_from([None, 1.0, 0.3]))
def test_row_by_row_is_pytorch_s_attention_with_a_mask(packed: Packed, seed: int, scale: float | None) -> None:
    query, key, value, _ = packed.numbers(seed)
    found = prefix_attention_by_rows(query, key, value, *packed.lengths(), scale=scale)
    queries, keys = (lengths.tolist() for lengths in packed.lengths()[:2])
    parts = zip(query.split(queries), key.split(keys), value.split(keys), packed.rows, strict=True)
    wanted = []
    for q, k, v, (n, seen) in parts:
        mask = torch.arange(n) < torch.tensor(seen, dtype=torch.long)[:, None]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        if seen:
            wanted.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[0].transpose(0, 1))
    torch.testing.assert_close(found, torch.cat([query[:0], *wanted]))


# The tiles


@given(packed=problems, seed=seeds, chunk=chunks, scale=st.sampled_from([None, 1.0]))
def test_tiles_equal_the_plain_form_with_their_gradients(
    packed: Packed, seed: int, chunk: int, scale: float | None
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        numbers = packed.numbers(seed, dtype=dtype)
        with mock.patch.multiple(packed_attention, CHUNK=chunk, LONG_CHUNK=chunk + 2, LONG=6):
            found = results(prefix_attention, numbers, packed, scale=scale)
        wanted = results(prefix_attention_by_rows, numbers, packed, scale=scale)
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(packed=problems, seed=seeds, chunk=chunks)
def test_half_precision_is_near(dtype: torch.dtype, packed: Packed, seed: int, chunk: int) -> None:
    numbers = packed.numbers(seed, dtype=dtype)
    with mock.patch.object(packed_attention, "CHUNK", chunk):
        found = results(prefix_attention, numbers, packed)
    wanted = results(prefix_attention_by_rows, [x.double() for x in numbers], packed)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, atol=0.1, rtol=0.05)


LONG = Packed([(40, list(range(1, 41))), (40, list(range(2, 41, 3))), (7, [7] * 9), (30, list(range(24, 31))), (5, [])])


def test_the_tiles_are_of_every_kind() -> None:
    """Else the property above would compare one branch with itself."""
    kinds = Counter()
    for tile in LONG.tiles(4):
        whole, masked = tile.shared > tile.start, tile.end > tile.shared
        kinds["square" if tile.square else (whole, masked)] += 1
    assert set(kinds) == {"square", (False, True), (True, False), (True, True)}
    assert min(kinds.values()) >= 1 and kinds[True, True] >= 3


@pytest.mark.parametrize("chunk", [1, 4, 7, 128])
def test_gradients_by_differences(chunk: int) -> None:
    inputs = [x.requires_grad_() for x in LONG.numbers(0, heads=1, width=2)[:3]]
    with mock.patch.object(packed_attention, "CHUNK", chunk):
        assert torch.autograd.gradcheck(lambda *x: prefix_attention(*x, *LONG.lengths()), inputs, fast_mode=True)


@pytest.mark.parametrize("chunk", [2, 128])
def test_the_tiles_at_the_size_of_a_layer(chunk: int) -> None:
    """The kernel works in blocks of 32 and more keys, which the small problems above don't fill."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for share in (0.25, 0.5, 1.0):
        seen = (torch.nonzero(torch.rand(400, generator=generator) < share).flatten() + 1).tolist()
        rows += [(400, seen), (len(seen), list(range(1, len(seen) + 1)))]
    packed = Packed(rows)
    numbers = packed.numbers(1, heads=2, width=16, dtype=torch.float32)
    with mock.patch.object(packed_attention, "CHUNK", chunk):
        found = results(prefix_attention, numbers, packed)
    exact = results(prefix_attention_by_rows, [x.double() for x in numbers], packed)
    torch.testing.assert_close([x.double() for x in found], exact, atol=1e-5, rtol=1e-5)


def test_what_does_not_rise_by_one_is_no_causal_square() -> None:
    """As many queries as keys, the first sees one and the last all, but not those between: 1, 1, 3."""
    packed = Packed([(3, [1, 1, 3]), (4, [1, 3, 3, 4])])
    numbers = packed.numbers(0)
    torch.testing.assert_close(
        results(prefix_attention, numbers, packed), results(prefix_attention_by_rows, numbers, packed)
    )


def test_numbers_that_lie_in_memory_in_another_order() -> None:
    *inputs, direction = LONG.numbers(0)
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (*inputs, direction)]
    assert turned[0].stride(-1) != 1
    spread = direction[:1, :1, :1].expand_as(direction)
    for strange in ([*turned[:3], direction], [*inputs, turned[3]], [*inputs, spread]):
        plain = [x.contiguous() for x in strange]
        # `results` clones, and clones keep the order.
        torch.testing.assert_close(
            results(prefix_attention, strange, LONG), results(prefix_attention_by_rows, plain, LONG)
        )


@given(packed=problems, seed=seeds, chunk=chunks)
def test_no_query_depends_on_keys_that_it_does_not_see(packed: Packed, seed: int, chunk: int) -> None:
    query, key, value, _ = packed.numbers(seed)
    queries, keys, visible = packed.lengths()
    first_key = (keys.cumsum(0) - keys).repeat_interleave(queries)
    hidden_from = first_key + visible
    with mock.patch.object(packed_attention, "CHUNK", chunk):
        whole = prefix_attention(query, key, value, queries, keys, visible)
        for i in range(0, len(query), 3):
            other = torch.arange(len(key)) >= hidden_from[i]
            other |= torch.arange(len(key)) < first_key[i]
            k, v = (torch.where(other[:, None, None], -3 * x + 1, x) for x in (key, value))
            again = prefix_attention(query, k, v, queries, keys, visible)
            torch.testing.assert_close(again[i], whole[i], atol=1e-12, rtol=1e-12)


@given(seed=seeds, order=st.permutations(range(len(LONG.rows))))
def test_rows_know_nothing_of_each_other(seed: int, order: list[int]) -> None:
    query, key, value, _ = LONG.numbers(seed)
    queries, keys, _ = LONG.lengths()
    shuffled = Packed([LONG.rows[i] for i in order])
    parts = [x.split(n.tolist()) for x, n in ((query, queries), (key, keys), (value, keys))]
    moved = [torch.cat([part[i] for i in order]) for part in parts]
    whole = prefix_attention(query, key, value, *LONG.lengths()).split(queries.tolist())
    torch.testing.assert_close(prefix_attention(*moved, *shuffled.lengths()), torch.cat([whole[i] for i in order]))


def test_nothing_at_all() -> None:
    nothing = Packed([(0, []), (0, [])])
    assert [x.shape for x in results(prefix_attention, nothing.numbers(0), nothing)] == [(0, 2, 4)] * 4
    no_rows = Packed([])
    for way in (prefix_attention, prefix_attention_by_rows):
        assert way(*no_rows.numbers(0)[:3], *no_rows.lengths(), dropout=0.1).shape == (0, 2, 4)


# Dropout


def test_without_dropout_nothing_is_random_and_with_it_the_plain_form_answers() -> None:
    query, key, value, _ = LONG.numbers(0)
    runs = []
    for dropout in (0.0, 0.0, 0.4, 0.4):
        torch.manual_seed(len(runs) // 3)
        runs.append(prefix_attention(query, key, value, *LONG.lengths(), dropout=dropout))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[2], runs[3]) and not torch.equal(runs[1], runs[2])
    torch.manual_seed(0)
    again = prefix_attention_by_rows(query, key, value, *LONG.lengths(), dropout=0.4)
    assert torch.equal(runs[2], again)


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    # With the identity as values a query's output is its weights.
    packed = Packed([(8, [8] * 2000)])
    query, key, _, _ = packed.numbers(0, heads=1, width=8)
    torch.manual_seed(0)
    query, value = query[:1].expand_as(query).contiguous(), torch.eye(8, dtype=torch.float64)[:, None]
    kept = prefix_attention(query, key, value, *packed.lengths(), dropout=0.3)
    plain = prefix_attention(query, key, value, *packed.lengths())
    assert float((kept == 0).double().mean()) == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(kept.mean(0), plain.mean(0), rtol=0.1, atol=0)
    alive = kept[kept > 0] / plain[kept > 0]
    torch.testing.assert_close(alive, torch.full_like(alive, 1 / 0.7))


# What it costs


def routed_at_random(batch: int, time: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(batch, time, generator=torch.Generator().manual_seed(seed)) < share


def problem(chosen: Tensor, context: str) -> Packed:
    """What a layer that routed the chosen tokens asks for."""
    rows = []
    for r in chosen:
        seen = (r.nonzero().flatten() + 1).tolist()
        rows.append((len(r), seen) if context == "all" else (len(seen), list(range(1, len(seen) + 1))))
    return Packed(rows)


@pytest.mark.parametrize("context", ["all", "routed"])
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("long", [False, True])
def test_no_tensor_is_of_queries_times_keys(
    context: str, share: float, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "LONG", 128 if long else 2048)
    found = {}
    for time in (768, 1536):
        packed = problem(routed_at_random(2, time, share), context)
        numbers = packed.numbers(0, heads=2, width=4, dtype=torch.float32)
        with Largest() as largest:
            results(prefix_attention, numbers, packed)
        found[time] = largest.numbers
    tile = (packed_attention.LONG_CHUNK if long else packed_attention.CHUNK) * 1536
    assert found[1536] <= max(tile, 2 * 1536 * 2 * 4)
    assert found[1536] <= 2.2 * found[768]  # random rows differ by some tokens
    assert found[1536] < 1536 * 1536 * share / (2 if long else 4)


def test_the_plain_form_is_found_out() -> None:
    """That the measure above sees a matrix of scores where there is one."""
    packed = problem(routed_at_random(1, 512, 1.0), "routed")
    with Largest() as largest:
        results(prefix_attention_by_rows, packed.numbers(0, heads=2), packed)
    assert largest.numbers >= 2 * 512 * 512


def pairs(packed: Packed, chunk: int) -> tuple[int, int]:
    """Queries × keys that the tiles go through, and that are needed."""
    through = 0
    for tile in packed.tiles(chunk):
        queries = tile.queries.stop - tile.queries.start
        through += queries * (queries + 1) // 2 if tile.square else queries * (tile.end - tile.start)
    return through, sum(sum(seen) for _, seen in packed.rows)


def test_routed_tokens_among_themselves_waste_nothing() -> None:
    packed = problem(routed_at_random(8, 1024, 0.25), "routed")
    through, needed = pairs(packed, packed_attention.CHUNK)
    assert through == needed
    assert [tile.square for tile in packed.tiles(packed_attention.CHUNK)] == [True] * 8


@pytest.mark.parametrize(("time", "at_most"), [(1024, 0.25), (4096, 0.19), (8192, 0.1)])
def test_what_tiles_waste_where_all_are_seen(time: int, at_most: float) -> None:
    """The masked half of each tile's last part: shorter rows have fewer tiles, and so a larger one in proportion."""
    chunk = packed_attention.CHUNK if time < packed_attention.LONG else packed_attention.LONG_CHUNK
    through, needed = pairs(problem(routed_at_random(8192 // time, time, 0.25), "all"), chunk)
    assert 0 < through / needed - 1 < at_most
    assert pairs(problem(routed_at_random(8192 // time, time, 0.25), "all"), chunk=1)[0] == needed


# Grouped heads


@given(packed=problems, chunk=chunks, seed=seeds, groups=st.sampled_from([2, 3]), plain=st.booleans())
def test_grouped_heads_are_repeated_keys(packed: Packed, chunk: int, seed: int, groups: int, plain: bool) -> None:
    function = prefix_attention_by_rows if plain else prefix_attention
    query, _, _, direction = packed.numbers(seed, heads=2 * groups)
    _, key, value, _ = packed.numbers(seed, heads=2)
    repeated = [x.repeat_interleave(groups, dim=1) for x in (key, value)]
    with mock.patch.object(packed_attention, "CHUNK", chunk):
        found = results(function, [query, key, value, direction], packed)
        wanted = results(function, [query, *repeated, direction], packed)
    # What a key gets is what all its copies would have got.
    wanted[2:] = [x.unflatten(1, (2, groups)).sum(2) for x in wanted[2:]]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("length", [256, 512])
def test_grouped_heads_repeat_no_key(length: int) -> None:
    packed = Packed([(length, list(range(1, length + 1)))])
    query, _, _, direction = packed.numbers(0, heads=8, dtype=torch.float32)
    _, key, value, _ = packed.numbers(0, heads=1, dtype=torch.float32)
    with Largest() as largest:
        results(prefix_attention, [query, key, value, direction], packed)
    assert largest.numbers <= 8 * 4 * length  # the queries: 8 heads of 4 features


def test_there_is_no_second_derivative_and_it_says_so() -> None:
    query, key, value, slope = (x.requires_grad_() for x in Packed([(3, [1, 2, 3])]).numbers(0))
    lengths = torch.tensor([3])
    output = prefix_attention(query, key, value, lengths, lengths, torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph"):
        torch.autograd.grad(output, query, slope, create_graph=True)
    torch.autograd.grad(output, query, slope)


@pytest.mark.parametrize(("queries", "keys", "complaint"), [(2, 3, "query_lengths are 2"), (3, 4, "key_lengths are 4")])
def test_lengths_of_other_queries_or_keys_are_refused(queries: int, keys: int, complaint: str) -> None:
    query, key, value, _ = Packed([(3, [1, 2, 3])]).numbers(0)
    with pytest.raises(ValueError, match=f"{complaint} in all, and there are 3"):
        prefix_attention(query, key, value, torch.tensor([queries]), torch.tensor([keys]), torch.tensor([1, 2, 3]))
