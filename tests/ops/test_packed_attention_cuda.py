"""Packed attention by a GPU's kernels against the plain form, as far as a CPU goes: masks, and who is asked for what.

Flex attention's formula runs on a CPU, its kernel too (forward only), flash attention's doesn't. The last tests need a
GPU.
"""

import shutil
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_packed_attention import LONG, Packed, problems, results, seeds
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from chiaroscuro.ops import packed_attention_cuda, prefix_attention
from chiaroscuro.ops.packed_attention import prefix_attention_by_rows
from largest import Largest

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

causal_rows = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(
    lambda lengths: Packed([(n, list(range(1, n + 1))) for n in lengths])
)


def mask_by_loops(packed: Packed) -> Tensor:
    """Queries × keys: true where the query sees the key."""
    mask = torch.zeros(sum(len(seen) for _, seen in packed.rows), sum(n for n, _ in packed.rows), dtype=torch.bool)
    i = start = 0
    for n, seen in packed.rows:
        for m in seen:
            mask[i, start : start + m] = True
            i += 1
        start += n
    return mask


def flash_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """`varlen_attn` by its documentation, where the window is the causal one and queries are keys."""
    lengths = query_ends.diff()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query_ends is key_ends and query_ends.dtype == torch.int32 and query_ends[0] == 0
    assert longest_query == longest_key == int(lengths.max()) and window_size == (-1, 0)
    visible = torch.cat([torch.arange(1, n + 1) for n in lengths.tolist()])
    return prefix_attention_by_rows(query, key, value, lengths, lengths, visible, scale=scale)


def on_a_cpu(*inputs: Tensor, capability: tuple[int, int] = (9, 0), **options: Any) -> tuple[Tensor, str]:
    """The function with kernels that a CPU has, and which of the two it asked."""
    with (
        mock.patch.object(packed_attention_cuda, "_compiled_flex_attention", mock.Mock(wraps=flex_attention)) as flex,
        mock.patch.object(packed_attention_cuda, "varlen_attn", mock.Mock(wraps=flash_by_rows)) as flash,
        mock.patch.object(packed_attention_cuda, "_capability", lambda x: capability),
    ):
        output = packed_attention_cuda.prefix_attention(*inputs, **options)
    return output, "flex" * flex.call_count + "flash" * flash.call_count


# The mask


def mask_of(packed: Packed) -> Any:
    """Its mask for flex attention, from where the keys of each query start and end."""
    query_lengths, key_lengths, visible = packed.lengths()
    start = (key_lengths.cumsum(0) - key_lengths).repeat_interleave(query_lengths)
    return packed_attention_cuda.span_mask(start, start + visible, int(key_lengths.sum()))


@given(packed=problems, block=st.sampled_from([1, 2, 4, 128]))
def test_the_mask_is_the_prefixes_and_its_blocks_are_the_mask_s(packed: Packed, block: int) -> None:
    with mock.patch.object(packed_attention_cuda, "BLOCK", block):
        mask = mask_of(packed)
    wanted = torch.zeros(mask.shape[-2:], dtype=torch.bool)
    exact = mask_by_loops(packed)
    wanted[: exact.shape[0], : exact.shape[1]] = exact
    query, key = torch.meshgrid(*(torch.arange(n) for n in wanted.shape), indexing="ij")
    none = torch.zeros_like(query)
    assert torch.equal(mask.mask_mod(none, none, query, key), wanted)

    tiles = wanted.unfold(0, block, block).unfold(1, block, block).flatten(2)
    for counts, which, expected in (
        (mask.kv_num_blocks, mask.kv_indices, tiles.any(-1) & ~tiles.all(-1)),
        (mask.full_kv_num_blocks, mask.full_kv_indices, tiles.all(-1)),
    ):
        found = [row[:n].tolist() for row, n in zip(which[0, 0], counts[0, 0], strict=True)]
        assert found == [row.nonzero().flatten().tolist() for row in expected]


def test_the_mask_takes_no_memory_of_queries_times_keys() -> None:
    packed = Packed([(20_000, list(range(1, 20_001, 4)))])
    with Largest() as largest:
        mask_of(packed)
    assert largest.numbers <= 20_000


# The kernels' arguments


@given(packed=problems, seed=seeds, scale=st.sampled_from([None, 0.3]), width=st.sampled_from([4, 16, 24]))
def test_flex_attention_is_asked_for_the_plain_form(packed: Packed, seed: int, scale: float | None, width: int) -> None:
    query, key, value, _ = packed.numbers(seed, width=width, dtype=torch.float32)
    found, asked = on_a_cpu(query, key, value, *packed.lengths(), scale=scale)
    assert asked == ("flex" if len(query) else "")
    wanted = prefix_attention_by_rows(query, key, value, *packed.lengths(), scale=scale)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@given(packed=causal_rows, seed=seeds, scale=st.sampled_from([None, 0.3]), heads=st.sampled_from([2, 1]))
def test_flash_attention_is_asked_for_causal_rows(packed: Packed, seed: int, scale: float | None, heads: int) -> None:
    query, key, value, _ = packed.numbers(seed, width=8, dtype=torch.bfloat16)
    key, value = key[:, :heads], value[:, :heads]
    found, asked = on_a_cpu(query, key, value, *packed.lengths(), scale=scale)
    assert asked == ("flash" if len(query) else "")
    assert torch.equal(found, prefix_attention_by_rows(query, key, value, *packed.lengths(), scale=scale))


@pytest.mark.parametrize(
    ("packed", "width", "dtype"),
    [
        (Packed([(4, [1, 2, 3, 4])]), 8, torch.float32),
        (Packed([(4, [1, 2, 3, 4])]), 12, torch.bfloat16),
        (Packed([(4, [1, 2, 3, 4])]), 264, torch.bfloat16),
        (Packed([(4, [1, 2, 3, 4]), (3, [1, 2])]), 8, torch.bfloat16),
        (Packed([(4, [1, 2, 2, 4])]), 8, torch.bfloat16),
        (Packed([(3, [1, 2]), (2, [1, 2, 3])]), 8, torch.bfloat16),
    ],
    ids=["float32", "odd heads", "wide heads", "more keys", "a step left out", "row by row"],
)
def test_flash_attention_is_not_asked_for_what_it_cannot(packed: Packed, width: int, dtype: torch.dtype) -> None:
    query, key, value, _ = packed.numbers(0, width=width, dtype=dtype)
    assert on_a_cpu(query, key, value, *packed.lengths())[1] == "flex"


def test_flash_attention_is_not_asked_for_on_older_gpus() -> None:
    packed = Packed([(4, [1, 2, 3, 4])])
    query, key, value, _ = packed.numbers(0, width=8, dtype=torch.bfloat16)
    for capability, kernel in (((7, 5), "flex"), ((8, 0), "flash")):
        assert on_a_cpu(query, key, value, *packed.lengths(), capability=capability)[1] == kernel


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler, g++")
@torch.no_grad()
def test_the_compiled_kernel_follows_the_blocks_and_serves_other_rows() -> None:
    """Blocks of every kind: seen by none, by some and by all of a block of queries."""
    for time in (300, 295):
        generator = torch.Generator().manual_seed(time)
        chosen = torch.rand(4, time, generator=generator) < torch.tensor([[0.3], [0.5], [1.0], [0.01]])
        packed = Packed([(time, (row.nonzero().flatten() + 1).tolist()) for row in chosen])
        query, key, value, _ = packed.numbers(time, width=16, dtype=torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=time < 300):
            found = packed_attention_cuda.prefix_attention(query, key, value, *packed.lengths())
        wanted = prefix_attention_by_rows(query, key, value, *packed.lengths())
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("packed", [LONG, Packed([(n, list(range(1, n + 1))) for n in (300, 0, 17)])])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("width", [8, 64])
def test_a_gpu_s_kernels_equal_the_plain_form_with_their_gradients(
    packed: Packed, dtype: torch.dtype, tolerance: float, width: int
) -> None:
    numbers = packed.numbers(0, width=width, dtype=dtype)
    wanted = results(prefix_attention_by_rows, [x.double() for x in numbers], packed)
    with mock.patch.object(Packed, "lengths", lambda self, plain=Packed.lengths: tuple(x.cuda() for x in plain(self))):
        found = results(prefix_attention, [x.cuda() for x in numbers], packed)
    torch.testing.assert_close([x.double().cpu() for x in found], wanted, atol=tolerance, rtol=tolerance)
