"""The MetaRouter: its three means against loops over the real tokens, and who reads what."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers import MetaRouter

POOLINGS = ("causal", "sequence", "batch")


def gate_by_loops(router: MetaRouter, x: Tensor, real: Tensor) -> Tensor:
    """The gate of every token, (B, T), from means over lists of real tokens."""
    batch, time, width = x.shape
    gates = torch.zeros(batch, time)
    for b in range(batch):
        for t in range(time):
            if router.pooling == "causal":
                pooled = [x[b, s] for s in range(t + 1) if real[b, s]]
            elif router.pooling == "sequence":
                pooled = [x[b, s] for s in range(time) if real[b, s]]
            else:
                pooled = [x[a, s] for a in range(batch) for s in range(time) if real[a, s]]
            mean = sum(pooled) / len(pooled) if pooled else torch.zeros(width)
            gates[b, t] = torch.sigmoid(router.weight[0] @ mean + router.bias[0])
    return gates


def trained(pooling: str, width: int = 5) -> MetaRouter:
    router = MetaRouter(width, pooling)
    with torch.no_grad():
        router.weight.copy_(torch.randn(1, width, generator=torch.Generator().manual_seed(9)))
    return router


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    pooling=st.sampled_from(POOLINGS),
    batch=st.integers(1, 3),
    time=st.integers(1, 6),
    padded=st.booleans(),
    seed=st.integers(0, 999),
)
@torch.no_grad()
def test_the_mean_is_over_real_tokens(pooling: str, batch: int, time: int, padded: bool, seed: int) -> None:
    router, x = trained(pooling), draw(seed, batch, time, 5)
    # Holes, rows of padding alone, anything goes.
    real = draw(seed + 1, batch, time) > 0 if padded else torch.ones(batch, time, dtype=torch.bool)
    gate, _ = router(x, real if padded else None)
    assert gate.shape == {"causal": (batch, time), "sequence": (batch, 1), "batch": (1, 1)}[pooling]
    torch.testing.assert_close(gate.expand(batch, time), gate_by_loops(router, x, real))
    hidden = torch.where(real[..., None], x, torch.full_like(x, 1e6))
    assert torch.equal(router(hidden, real)[0], gate) or not padded


@pytest.mark.parametrize("pooling", POOLINGS)
def test_it_starts_at_the_papers_gate(pooling: str) -> None:
    gate, _ = MetaRouter(5, pooling)(draw(0, 2, 3, 5))
    torch.testing.assert_close(gate, torch.full_like(gate, 0.8808), rtol=0, atol=1e-4)


@given(time=st.integers(1, 8), cuts=st.sets(st.integers(1, 7)), padded=st.booleans(), seed=st.integers(0, 999))
@torch.no_grad()
def test_continued_it_is_as_in_one_go(time: int, cuts: set[int], padded: bool, seed: int) -> None:
    router, x = trained("causal"), draw(seed, 2, time, 5)
    real = draw(seed + 1, 2, time) > 0 if padded else None
    whole, whole_state = router(x, real)
    edges = [0, *sorted(c for c in cuts if c < time), time]
    state, gates = None, []
    for start, end in pairwise(edges):
        past = None if state is None else (state[0][:, -1], state[1][:, -1])
        gate, state = router(x[:, start:end], None if real is None else real[:, start:end], past)
        gates.append(gate)
    torch.testing.assert_close(torch.cat(gates, 1), whole)
    torch.testing.assert_close((state[0][:, -1], state[1][:, -1]), (whole_state[0][:, -1], whole_state[1][:, -1]))


@torch.no_grad()
def test_who_reads_the_future_and_who_reads_other_rows() -> None:
    x = draw(0, 2, 6, 5)
    later, other = x.clone(), x.clone()
    later[:, 4:] += 1
    other[1] += 1
    reads_future = {p: bool((trained(p)(x)[0] != trained(p)(later)[0])[:1, :4].any()) for p in POOLINGS}
    reads_others = {p: bool((trained(p)(x)[0] != trained(p)(other)[0])[:1].any()) for p in POOLINGS}
    assert reads_future == {"causal": False, "sequence": True, "batch": True}
    assert reads_others == {"causal": False, "sequence": False, "batch": True}


def test_it_learns() -> None:
    router = trained("causal")
    router(draw(0, 2, 3, 5))[0].sum().backward()
    assert router.weight.grad.abs().min() > 0 and router.bias.grad.abs().min() > 0


@torch.no_grad()
def test_a_long_prefix_in_bfloat16_keeps_counting() -> None:
    router = trained("causal").bfloat16()
    x = torch.ones(1, 2000, 5, dtype=torch.bfloat16)
    gate, (sums, counts) = router(x)
    total, count = sums[:, -1], counts[:, -1]
    assert gate.dtype == torch.bfloat16 and (gate == gate[0, 0]).all()
    assert float(count) == 2000 and torch.equal(total, torch.full((1, 5), 2000.0))


def test_an_unknown_pooling(unchecked: None) -> None:
    with pytest.raises(ValueError, match="choose one of 'batch', 'sequence', 'causal'"):
        MetaRouter(5, "mean")  # type: ignore[arg-type]


def test_documents_in_one_row_are_pooled_apart() -> None:
    router, x = trained("causal"), draw(0, 1, 9, 5)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    gate, _ = router(x, segments=segments)
    alone = [router(part)[0] for part in (x[:, :3], x[:, 3:5], x[:, 5:])]
    torch.testing.assert_close(gate, torch.cat(alone, 1))


@pytest.mark.parametrize("pooling", ["batch", "sequence"])
def test_pooling_over_rows_refuses_documents(pooling: str) -> None:
    with pytest.raises(UserError, match="position_ids restart within one"):
        MetaRouter(5, pooling)(draw(0, 1, 4, 5), segments=torch.tensor([[0, 0, 1, 1]]))
