"""Causal attention against loops over queries, PyTorch's own and Hugging Face's rotary positions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from chiaroscuro.ops import attend, causal_mask, rotary_frequencies, rotary_table, rotate
from chiaroscuro.ops.attention import attend_to_all

IMPLEMENTATIONS = ("sdpa", "eager")


def attention_by_loops(query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
    """One query, one head, one row at a time. A padded query's output is left 0."""
    batch, heads, queries, width = query.shape
    past = key.shape[2] - queries
    output = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                if real[b, past + t]:
                    seen = [s for s in range(past + t + 1) if real[b, s]]
                    scores = torch.stack([query[b, h, t] @ key[b, h, s] / math.sqrt(width) for s in seen])
                    weights = scores.exp() / scores.exp().sum()
                    output[b, h, t] = sum(w * value[b, h, s] for w, s in zip(weights, seen, strict=True))
    return output


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padding(batch: int, keys: int, seed: int) -> Tensor:
    """Rows padded on the left, on the right, on both sides or not at all; at least one token is real."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.zeros(batch, keys, dtype=torch.bool)
    for row in real:
        first = int(torch.randint(0, keys, (), generator=generator))
        last = int(torch.randint(first, keys, (), generator=generator))
        row[first : last + 1] = True
    return real


sizes = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 6), st.integers(0, 4))


@given(size=sizes, padded=st.booleans(), implementation=st.sampled_from(IMPLEMENTATIONS), seed=st.integers(0, 999))
def test_attention_is_the_formula(
    size: tuple[int, int, int, int], padded: bool, implementation: str, seed: int
) -> None:
    batch, heads, queries, past = size
    query, key, value = (draw(seed + i, batch, heads, queries + (i > 0) * past, 4) for i in range(3))
    everything = torch.ones(batch, queries + past, dtype=torch.bool)
    real = padding(batch, queries + past, seed) if padded else everything
    mask = causal_mask(real, queries) if padded else None
    output = attend(query, key, value, mask, implementation=implementation)
    assert output.isfinite().all()
    read = real[:, None, past:, None]
    torch.testing.assert_close(output * read, attention_by_loops(query, key, value, real))


@given(size=sizes, padded=st.booleans(), seed=st.integers(0, 999))
def test_eager_is_sdpa_with_its_gradients(size: tuple[int, int, int, int], padded: bool, seed: int) -> None:
    batch, heads, queries, past = size
    mask = causal_mask(padding(batch, queries + past, seed), queries) if padded else None
    direction = draw(seed + 9, batch, heads, queries, 4)
    results = []
    for implementation in IMPLEMENTATIONS:
        inputs = [draw(seed + i, batch, heads, queries + (i > 0) * past, 4).requires_grad_() for i in range(3)]
        output = attend(*inputs, mask, implementation=implementation)
        (output * direction).sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)
        results.append([output, *(x.grad for x in inputs)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_without_a_mask_it_is_pytorchs_causal_attention() -> None:
    query, key, value = (draw(i, 2, 3, 7, 8, dtype=torch.float32) for i in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    for implementation in IMPLEMENTATIONS:
        torch.testing.assert_close(attend(query, key, value, implementation=implementation), expected)
        all_real = causal_mask(torch.ones(2, 7, dtype=torch.bool), 7)
        torch.testing.assert_close(attend(query, key, value, all_real, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("new", [1, 2, 5])
def test_the_last_queries_alone_are_the_end_of_all(new: int, implementation: str) -> None:
    query, key, value = (draw(i, 2, 3, 7, 8) for i in range(3))
    whole = attend(query, key, value, implementation=implementation)
    part = attend(query[:, :, -new:], key, value, implementation=implementation)
    torch.testing.assert_close(part, whole[:, :, -new:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_has_no_influence(implementation: str) -> None:
    query, key, value = (draw(i, 2, 2, 6, 4) for i in range(3))
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    mask = causal_mask(real, 6)
    before = attend(query, key, value, mask, implementation=implementation)
    hidden = ~real[:, None, :, None]
    after = attend(query, key + 50 * hidden, value - 1e6 * hidden, mask, implementation=implementation)
    torch.testing.assert_close(before * ~hidden, after * ~hidden)


def test_the_mask_by_definition() -> None:
    real = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    for queries in (1, 2, 4):
        mask = causal_mask(real, queries)
        assert mask.shape == (2, 1, queries, 4)
        for b in range(2):
            for i in range(queries):
                t = 4 - queries + i
                expected = [(s <= t and bool(real[b, s])) or s == t for s in range(4)]
                assert mask[b, 0, i].tolist() == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_keeps_the_mean(implementation: str) -> None:
    query, key, value = (draw(i, 1, 1, 5, 4, dtype=torch.float32) for i in range(3))
    torch.manual_seed(0)
    several = [attend(query, key, value, dropout=0.3, implementation=implementation) for _ in range(3000)]
    draws = torch.stack(several)
    assert draws.std(0).max() > 0.1
    expected = attend(query, key, value, implementation=implementation)
    torch.testing.assert_close(draws.mean(0), expected, rtol=0, atol=0.1)


def test_eager_in_half_precision_has_a_float32_softmax() -> None:
    query, key, value = (draw(i, 1, 1, 512, 8, dtype=torch.bfloat16) for i in range(3))
    output = attend(query, key, value, implementation="eager")
    assert output.dtype == torch.bfloat16
    exact = attend(query.double(), key.double(), value.double(), implementation="eager")
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=0.03)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_implementation() -> None:
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="choose one of sdpa, eager"):
        attend(x, x, x, implementation="flash")  # type: ignore[arg-type]


# Rotary positions


@given(shift=st.integers(0, 3000), seed=st.integers(0, 999), theta=st.sampled_from([10.0, 10000.0]))
def test_scores_depend_on_distance_alone(shift: int, seed: int, theta: float) -> None:
    query, key = draw(seed, 1, 2, 6, 8), draw(seed + 1, 1, 2, 6, 8)
    positions = torch.tensor([[0, 1, 2, 5, 9, 40]])
    scores = []
    for ids in (positions, positions + shift):
        table = rotary_table(ids, rotary_frequencies(8, theta))
        scores.append(rotate(query, table) @ rotate(key, table).mT)
    # The angles are float32: at position 3000 they are good to 1e-4.
    torch.testing.assert_close(*scores, rtol=0, atol=5e-3)


def test_another_distance_gives_another_score() -> None:
    query, key = draw(0, 1, 1, 1, 8), draw(1, 1, 1, 1, 8)
    # Position 0 turns nothing, so the key stays as it is.
    by_distance = [
        float((rotate(query, rotary_table(torch.tensor([[t]]), rotary_frequencies(8))) * key).sum()) for t in range(6)
    ]
    assert len({round(score, 6) for score in by_distance}) == 6


@given(seed=st.integers(0, 999))
def test_rotation_keeps_lengths_and_position_0_turns_nothing(seed: int) -> None:
    x, ids = draw(seed, 2, 3, 5, 6), torch.arange(5).expand(2, -1) * 7
    turned = rotate(x, rotary_table(ids, rotary_frequencies(6)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-5)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_positions_are_llamas(theta: float) -> None:
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    ids = torch.tensor([[0, 1, 2, 3, 400], [5, 6, 7, 8, 9]])
    query, key = (draw(i, 2, 4, 5, 8, dtype=torch.float32) for i in range(2))
    table = rotary_table(ids, rotary_frequencies(8, theta))
    theirs = LlamaRotaryEmbedding(config)(query, ids)
    torch.testing.assert_close(table, theirs)
    ours = rotate(query, table), rotate(key, table)
    torch.testing.assert_close(ours, apply_rotary_pos_emb(query, key, *theirs))


def test_the_angles_stay_float32_in_a_bfloat16_model() -> None:
    table = rotary_table(torch.tensor([[300, 301]]), rotary_frequencies(8))
    assert table[0].dtype == torch.float32 and not torch.equal(table[0][0, 0], table[0][0, 1])
    assert rotate(draw(0, 1, 1, 2, 8, dtype=torch.bfloat16), table).dtype == torch.bfloat16


def test_an_odd_head() -> None:
    with pytest.raises(ValueError, match="head width 5 is odd"):
        rotary_frequencies(5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 2])
def test_grouped_queries_under_a_mask_of_their_own(queries: int, implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 8, generator=generator)
    mask = torch.rand(2, 4, queries, 5, generator=generator) < 0.6
    mask[..., 0] = True
    repeated = (x.repeat_interleave(2, dim=1) for x in (key, value))
    wanted = F.scaled_dot_product_attention(query, *repeated, mask)
    torch.testing.assert_close(attend(query, key, value, mask, implementation=implementation), wanted)


def test_an_unknown_implementation_where_all_is_seen(unchecked: None) -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="'flash': choose one of"):
        attend_to_all(x, x, x, implementation="flash")
