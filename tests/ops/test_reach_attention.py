"""Attention that reaches near and far: the plain form against SDPA with a mask, the fast one against the plain form.

Every drawn row has its own tokens; some attend, some are attended to, some look, some are kept; places may have gaps,
as the keys of a cache have.
"""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from chiaroscuro.ops import packed_attention, packed_attention_cuda
from chiaroscuro.ops import reach_attention as module
from chiaroscuro.ops.reach_attention import gains_of_pairs, reach_attention, reach_attention_by_rows
from largest import Largest


@dataclass
class Problem:
    """Rows, each as (places of the keys, which of them are queries), what looks, what is kept."""

    rows: list[tuple[list[int], list[bool]]]
    window: int
    sinks: int
    groups: int
    seed: int
    key_heads: int = 2

    def arguments(self) -> tuple[Tensor, ...]:
        """`query_lengths`, `key_lengths`, `query_places`, `key_places`, `looks` and `kept`."""
        queries = [[place for place, asks in zip(*row, strict=True) if asks] for row in self.rows]
        generator = torch.Generator().manual_seed(self.seed)
        lengths = torch.tensor([len(row) for row in queries]), torch.tensor([len(row) for row, _ in self.rows])
        places = (
            torch.tensor([place for row in queries for place in row], dtype=torch.long),
            torch.tensor([place for row, _ in self.rows for place in row], dtype=torch.long),
        )
        chosen = (torch.rand(len(x), generator=generator) < 0.5 for x in places)
        return *lengths, *places, *chosen

    def numbers(self) -> list[Tensor]:
        """Queries, keys, values, and a direction for the gradient."""
        _, _, queries, keys, _, _ = self.arguments()
        generator = torch.Generator().manual_seed(self.seed + 1)
        heads = self.key_heads * self.groups
        sizes = ((len(queries), heads), *[(len(keys), self.key_heads)] * 2, (len(queries), heads))
        return [torch.randn(*size, 4, generator=generator, dtype=torch.float64) for size in sizes]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    if draw(st.booleans()):  # all attend, as in a layer where each token is near or far
        n = draw(st.integers(0, 12))
        return list(range(n)), [True] * n
    places = sorted(draw(st.sets(st.integers(0, 14), max_size=10)))
    return places, [draw(st.booleans()) for _ in places]


problems = st.builds(
    Problem,
    st.lists(rows(), min_size=1, max_size=3).filter(lambda drawn: any(places for places, _ in drawn)),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.integers(1, 2),
)


@given(problems)
def test_the_plain_form_is_attention_under_a_mask(problem: Problem) -> None:
    query, key, value, _ = problem.numbers()
    arguments = problem.arguments()
    output = reach_attention_by_rows(query, key, value, *arguments, problem.window, problem.sinks)
    queries, keys, i, j, looks, kept = arguments
    row = torch.arange(len(queries))
    same = row.repeat_interleave(queries)[:, None] == row.repeat_interleave(keys)
    near = (i[:, None] - j < problem.window) | (j < problem.sinks)[None]
    mask = same & (i[:, None] >= j) & (near | looks[:, None] & kept)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)), mask, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(output, expected.nan_to_num(0.0))


@given(problems, st.sampled_from([2, 16]), st.sampled_from([3, 64]), st.sampled_from([None, 0.7, 30.0]), st.booleans())
def test_near_and_far_merged_are_the_whole(
    problem: Problem, block: int, span: int, softcap: float | None, rows_together: bool
) -> None:
    numbers, arguments = problem.numbers(), problem.arguments()
    found = []
    for attention in (reach_attention, reach_attention_by_rows):
        query, key, value, direction = (x.clone().requires_grad_() for x in numbers)
        sizes = {"block_of": lambda window: block, "SPAN": span, "SHORT": 0}
        of_rows = {"KEYS": 100, "FILLED": 100, "LONG_CHUNK": span} if rows_together else {"KEYS": 0}
        with mock.patch.multiple(module, **sizes), mock.patch.multiple(packed_attention, **of_rows):
            output = attention(query, key, value, *arguments, problem.window, problem.sinks, softcap=softcap)
            gradients = torch.autograd.grad(output, (query, key, value), direction.detach())
        found.append((output, *gradients))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)


@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=4),
    st.integers(1, 9),
    st.integers(0, 3),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    st.integers(0, 2),
    st.sampled_from([None, 5.0]),
    st.integers(0, 1000),
)
def test_numbers_that_are_none_stay_in_their_row(
    lengths: list[int], window: int, sinks: int, none: float, which: int, softcap: float | None, seed: int
) -> None:
    problem = Problem([(list(range(n)), [True] * n) for n in lengths], window, sinks, 2, seed)
    *numbers, direction = problem.numbers()
    row = seed % len(lengths)
    others = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) != row
    found = []
    with mock.patch.multiple(module, block_of=lambda window: 16, SHORT=0):
        for value in (0.5, none):
            inputs = [x.clone() for x in numbers]
            inputs[which][~others] = value
            inputs = [x.requires_grad_() for x in inputs]
            output = reach_attention(*inputs, *problem.arguments(), window, sinks, softcap=softcap)
            found.append([x[others] for x in (output, *torch.autograd.grad(output, inputs, direction))])
    for with_none, without in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(with_none, without)


@given(
    rows=st.integers(1, 3),
    time=st.integers(1, 20),
    window=st.integers(1, 24),
    sinks=st.integers(0, 3),
    groups=st.integers(1, 2),
    block=st.sampled_from([3, 128]),
    seed=st.integers(0, 1000),
)
def test_short_rows_that_are_alike_are_the_whole(
    rows: int, time: int, window: int, sinks: int, groups: int, block: int, seed: int
) -> None:
    problem = Problem([(list(range(time)), [True] * time)] * rows, window, sinks, groups, seed)
    found = []
    for attention in (reach_attention, reach_attention_by_rows):
        query, key, value, direction = (x.clone().requires_grad_() for x in problem.numbers())
        with (
            mock.patch.object(module, "SHORT_BLOCK", block),
            mock.patch.object(module, "_parts", side_effect=AssertionError),  # so short rows need no parts
        ):
            output = attention(query, key, value, *problem.arguments(), window, sinks)
        found.append((output, *torch.autograd.grad(output, (query, key, value), direction.detach())))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)


@given(
    st.integers(0, 99),
    st.integers(1, 5),
    st.integers(1, 2),
    st.sampled_from([None, 0.7]),
    st.sampled_from([1, 100, 2**22]),
)
def test_gains_of_pairs_are_what_looking_changes(
    seed: int, window: int, groups: int, softcap: float | None, at_once: int
) -> None:
    """Oracle: the outputs with and without what is far, and each pair by itself."""
    generator = torch.Generator().manual_seed(seed)
    time, heads = 9, 2 * groups
    query, slope = (torch.randn(heads, time, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(2, time, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    i, j = torch.arange(time)[:, None], torch.arange(time)
    near, far = (i >= j) & (i - j < window), (i >= j) & (i - j >= window)
    with mock.patch.object(module, "PAIRS", at_once):
        look, kept = gains_of_pairs(query, key, value, slope, near, far, softcap)
    repeated = [x.repeat_interleave(groups, 0) for x in (key, value)]
    scores = query @ repeated[0].transpose(-1, -2) / 2
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    whole, nearby = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ repeated[1] for seen in (near | far, near))
    by_head = -(slope * (whole - nearby)).sum(-1).unflatten(0, (2, groups)).sum(1)
    torch.testing.assert_close(look, by_head, atol=1e-12, rtol=1e-10)
    weights = scores.masked_fill(~(near | far), -torch.inf).softmax(-1)
    wanted = torch.zeros(2, time, dtype=torch.float64)
    for head in range(heads):
        for a, b in far.nonzero().tolist():
            change = weights[head, a, b] * (repeated[1][head, b] - nearby[head, a])
            wanted[head // groups, b] -= slope[head, a] @ change
    torch.testing.assert_close(kept, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(problems)
def test_a_gpus_spans_merged_are_the_whole(problem: Problem) -> None:
    query, key, value, _ = problem.numbers()
    arguments = problem.arguments()
    if len(query) == 0:
        return
    near, far = module.near_and_far(*arguments, problem.window, problem.sinks)
    with mock.patch.object(packed_attention_cuda, "_compiled_flex_attention", flex_attention):
        found = packed_attention_cuda.reach_attention(query, key, value, near, far)
    plain = reach_attention_by_rows(query, key, value, *arguments, problem.window, problem.sinks)
    torch.testing.assert_close(found, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_near_and_far_are_the_whole(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([300, 700])
    places = torch.cat([torch.arange(300), torch.arange(700)])
    looks, kept = torch.rand(2, 1000, generator=generator) < 0.3
    query, key, value = torch.randn(3, 1000, 4, 64, generator=generator, dtype=torch.float64)
    expected = reach_attention_by_rows(query, key, value, lengths, lengths, places, places, looks, kept, 64, 4)
    arguments = (x.cuda() for x in (lengths, lengths, places, places, looks, kept))
    found = reach_attention(*(x.to("cuda", dtype) for x in (query, key, value)), *arguments, 64, 4)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(found.cpu().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capped_scores_are_whole_under_autocast(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(40, 2, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    rows, places = torch.tensor([40]), torch.arange(40)
    looks, kept = (torch.rand(40, generator=generator) < 0.5 for _ in range(2))

    def results() -> list[torch.Tensor]:
        mixed = reach_attention(query, key, value, rows, rows, places, places, looks, kept, 4, 1, softcap=2.0)
        return [mixed, *torch.autograd.grad(mixed.float().square().sum(), (query, key, value))]

    wanted = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("time", "sinks"), [(300, 4), (600, 4), (600, 100)])
def test_under_autocast_full_precision_stays(time: int, sinks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(time, 2, 8, generator=generator).requires_grad_() for _ in range(3))
    rows, places = torch.tensor([time]), torch.arange(time)
    looks, kept = (torch.rand(time, generator=generator) < 0.5 for _ in range(2))
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            mixed = reach_attention(query, key, value, rows, rows, places, places, looks, kept, 16, sinks)
            found.append([mixed, *torch.autograd.grad(mixed.square().sum(), (query, key, value))])
    for half, full in zip(*found, strict=True):
        assert torch.equal(half, full)


@pytest.mark.parametrize("sinks", [4, 64, 1024])
def test_no_tensor_is_of_queries_times_keys(sinks: int) -> None:
    """Nor of queries × sinks, where there are many."""
    time = 1024
    query, key, value = (torch.randn(time, 2, 4).requires_grad_() for _ in range(3))
    rows, places = torch.tensor([time]), torch.arange(time)
    looks, kept = torch.rand(2, time) < 0.25
    with Largest() as largest:
        reach_attention(query, key, value, rows, rows, places, places, looks, kept, 64, sinks).sum().backward()
    assert largest.numbers <= time * 192


def test_rows_of_many_queries_and_few_keys_go_together() -> None:
    """In tiles of all of them, of unlike lengths too; and no tensor is of queries × keys."""
    time, rows = 1024, 3
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(rows * time, heads, 4, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    lengths, places = torch.full((rows,), time), torch.arange(time).repeat(rows)
    looks, kept = (torch.rand(rows * time, generator=generator) < share for share in (0.9, 0.25))
    arguments = (lengths, lengths, places, places, looks, kept, 64, 4)
    found = []
    with Largest() as largest, mock.patch.object(packed_attention, "PrefixPart", side_effect=AssertionError):
        output = reach_attention(*numbers, *arguments)
        found.append([output, *torch.autograd.grad(output.square().sum(), numbers)])
    assert largest.numbers <= rows * time * 192
    output = reach_attention_by_rows(*numbers, *arguments)
    found.append([output, *torch.autograd.grad(output.square().sum(), numbers)])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
