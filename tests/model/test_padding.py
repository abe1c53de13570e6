"""Padding, on either side and whatever stands in it, changes nothing for the real tokens.

Oracle: every row alone, without padding.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LEAKY, PRESETS, ROUTERS, VOCABULARY, Switches, build, padded, shrunk, tokens
from torch import Tensor

from chiaroscuro import ChiarForCausalLM
from chiaroscuro.model import ChiarCausalLMOutput

ATOL = 1e-5
lengths = st.lists(st.integers(1, 10), min_size=1, max_size=3)


def forward(model: ChiarForCausalLM, ids: Tensor, mask: Tensor | None = None) -> ChiarCausalLMOutput:
    with torch.no_grad():
        return model(ids, attention_mask=mask, labels=ids, output_routing=True, use_cache=False)


def rows_of(seed: int, sizes: list[int]) -> list[Tensor]:
    return [tokens(seed + i, 1, size)[0] for i, size in enumerate(sizes)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_padded_batch_equals_its_rows(preset: str, router: str, side: str) -> None:
    own = shrunk(preset).meta_router
    # A gate over the batch mixes rows of different lengths by design; its padding has its own test below.
    # In float64: a batch and a single row add up in another order, which a deep float32 model can show.
    model = build(shrunk(preset, router=router, meta_router="sequence" if own == "batch" else own)).double()
    switches = Switches()

    @settings(max_examples=4)
    @given(seed=st.integers(0, 2**31), sizes=lengths, extra=st.integers(0, 3))
    def holds(seed: int, sizes: list[int], extra: int) -> None:
        rows = rows_of(seed, sizes)
        ids, mask = padded(rows, side, extra, seed + 99)
        with switches.watch(model) as distances:
            together, alone = forward(model, ids, mask), [forward(model, row[None]) for row in rows]
        if not switches.clear(distances):
            return
        real = mask.bool()
        for i, single in enumerate(alone):
            here = real[i]
            torch.testing.assert_close(together.logits[i, here], single.logits[0], atol=ATOL, rtol=0)
            for ours, wanted in zip(together.routing, single.routing, strict=True):
                torch.testing.assert_close(ours.entropy[i, here], wanted.entropy[0], atol=ATOL, rtol=0)
                assert torch.equal(ours.operator_index[i, here], wanted.operator_index[0])
            if together.meta_gate is not None:
                gate = together.meta_gate[i]
                ours_gate = gate[here] if len(gate) > 1 else gate
                torch.testing.assert_close(ours_gate, single.meta_gate[0], atol=ATOL, rtol=0)
        for layer, ours in enumerate(together.routing):
            assert (ours.operator_index[~real] == -1).all()
            assert (ours.entropy[~real] == 0).all()
            counted = sum(s.routing[layer].share * len(r) for s, r in zip(alone, rows, strict=True)) / real.sum()
            torch.testing.assert_close(ours.share, counted, atol=ATOL, rtol=0)
        pairs = [F.cross_entropy(s.logits[0, :-1], r[1:], reduction="sum") for s, r in zip(alone, rows, strict=True)]
        predicted = sum(len(row) - 1 for row in rows)
        if predicted:
            wanted = (torch.stack(pairs).sum() / predicted).to(together.loss.dtype)
            torch.testing.assert_close(together.loss, wanted, atol=ATOL, rtol=1e-5)

    holds()
    switches.report()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", [*LEAKY, "causal"])
def test_padding_is_pooled_into_no_gate(pooling: str, side: str) -> None:
    model = build(shrunk("v2-400m", router="soft", meta_router=pooling))
    rows = rows_of(0, [6, 6])
    ids, mask = padded(rows, side, 3, 1)
    plain, with_padding = forward(model, torch.stack(rows)), forward(model, ids, mask)
    real = mask.bool()
    gate = with_padding.meta_gate
    if pooling == "causal":
        gate = gate[real].view(2, 6)
    torch.testing.assert_close(gate, plain.meta_gate, atol=ATOL, rtol=0)
    torch.testing.assert_close(with_padding.logits[real].view(2, 6, -1), plain.logits, atol=ATOL, rtol=0)
    torch.testing.assert_close(with_padding.loss, plain.loss, atol=ATOL, rtol=0)


@pytest.mark.parametrize("preset", ["small", "v1-all-three"])
def test_a_row_of_padding_alone_is_finite(preset: str) -> None:
    model = build(shrunk(preset))
    ids = tokens(0, 2, 8)
    out = forward(model, ids, torch.tensor([[1] * 8, [0] * 8]))
    assert out.logits.isfinite().all()
    torch.testing.assert_close(out.loss, forward(model, ids[:1]).loss, atol=ATOL, rtol=0)


def test_shifted_labels_at_padding_are_not_counted() -> None:
    model = build(shrunk("small"))
    rows = rows_of(0, [5, 8])
    ids, mask = padded(rows, "left", 0, 1)
    targets = torch.randint(0, VOCABULARY, ids.shape)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, shift_labels=targets)
    real = mask.bool()
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[real], targets[real]), atol=ATOL, rtol=0)
