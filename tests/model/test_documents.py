"""Several documents in one row, told by positions that restart, don't see each other. Oracle: each document alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Switches, build, shrunk, tokens
from torch import Tensor
from transformers import DataCollatorWithFlattening

from chiaroscuro import ChiarCache, UserError
from chiaroscuro.model.cache import CACHE
from chiaroscuro.model.modeling import segments_of

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
MENUS = [["dct"], ["dct", "attention"], ["dct", "rbf", "attention"], ["attention"]]


def flattened(sizes: list[int], seed: int) -> dict[str, Tensor]:
    documents = [tokens(seed + i, 1, size)[0].tolist() for i, size in enumerate(sizes)]
    batch = DataCollatorWithFlattening()([{"input_ids": ids} for ids in documents])
    return {name: batch[name] for name in ("input_ids", "position_ids", "labels")}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", ["all", "routed"])
@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("router", ["threshold", "learned"])
def test_documents_are_as_alone(router: str, execution: str, context: str, training: bool) -> None:
    fields = {"operators": MENUS, "execution": execution, "attention_context": context, "router": router}
    model = build(shrunk("small", use_cache=False, attention_share=0.4, **fields)).train(training)
    switches = Switches()

    @settings(max_examples=8)
    @given(sizes=lengths, seed=st.integers(0, 2**31))
    def holds(sizes: list[int], seed: int) -> None:
        batch = flattened(sizes, seed)
        grads: list[Any] = []
        with switches.watch(model) as distances:
            model.zero_grad()
            together = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
            together.square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
            model.zero_grad()
            alone = torch.cat([model(part).logits for part in batch["input_ids"].split(sizes, 1)], 1)
            alone.square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        if switches.clear(distances):
            torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(*grads, atol=2e-3, rtol=2e-3)

    holds()
    switches.report()


def test_the_collator_s_batch_has_the_documents_loss() -> None:
    model, sizes = build(shrunk("small", use_cache=False)), [7, 1, 12, 4]
    batch = flattened(sizes, 0)
    parts = batch["input_ids"].split(sizes, 1)
    total = sum(model(part, labels=part).loss * (part.shape[1] - 1) for part in parts if part.shape[1] > 1)
    torch.testing.assert_close(model(**batch).loss, total / (sum(sizes) - len(sizes)))


def test_a_document_s_end_changes_nothing_in_the_next() -> None:
    model, batch = build(shrunk("small", use_cache=False)), flattened([8, 8], 1)
    changed = batch["input_ids"].clone()
    changed[:, :8] = (changed[:, :8] + 1) % 20
    a, b = (model(ids, position_ids=batch["position_ids"]).logits[:, 8:] for ids in (batch["input_ids"], changed))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_positions_that_only_rise_are_one_document() -> None:
    model, ids = build(shrunk("small")), tokens(0, 2, 8)
    with torch.no_grad():
        counted = model(ids, position_ids=torch.arange(8).expand(2, -1)).logits
    torch.testing.assert_close(counted, model(ids).logits)


@pytest.mark.parametrize("gap", [1, 3])
def test_padding_between_documents_hides_no_restart(gap: int) -> None:
    model, ids = build(shrunk("small", use_cache=False)), tokens(0, 2, 8 + gap)
    places = torch.cat([torch.arange(4), torch.zeros(gap, dtype=torch.long), torch.arange(4)])[None]
    mask = torch.ones_like(ids)
    mask[0, 4 : 4 + gap] = 0
    with torch.no_grad():
        together = model(ids[:1], attention_mask=mask[:1], position_ids=places).logits
        alone = torch.cat([model(part).logits for part in (ids[:1, :4], ids[:1, 4 + gap :])], 1)
    torch.testing.assert_close(together[mask[:1].bool()], alone[0], atol=1e-5, rtol=1e-5)
    # Padding before, behind and amid one document, whose positions go on, makes no second one.
    places = torch.tensor([[0, 0, 1, 1, 2, 3, 0]])
    assert segments_of(places, torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()) is None


@pytest.mark.usefixtures("unchecked")
def test_document_lengths_are_a_tensor() -> None:
    with pytest.raises(UserError, match=r"cu_seq_lens_q=\[0, 4\]: give a tensor"):
        build(shrunk("small"))(tokens(0, 1, 4), cu_seq_lens_q=[0, 4])


@pytest.mark.usefixtures("unchecked")
def test_what_can_not_keep_documents_apart_says_so() -> None:
    batch = flattened([4, 4], 0)
    ids, positions = batch["input_ids"], batch["position_ids"]
    model = build(shrunk("small"))
    with pytest.raises(UserError, match="holds several documents, which a cache can't continue"):
        model(ids, position_ids=positions, cache=ChiarCache(model.config))
    assert getattr(model(ids, position_ids=positions), CACHE) is None  # nobody asked for a cache
    for mask in (None, torch.ones(1, 16)):
        begun = getattr(model(ids, use_cache=True, attention_mask=None if mask is None else mask[:, :8]), CACHE)
        with pytest.raises(UserError, match="holds several documents, which a cache can't continue"):
            model(ids, position_ids=positions + 8 - 8 * (positions < 2), cache=begun, attention_mask=mask)
    pooled = build(shrunk("small", meta_router="sequence"))
    with pytest.raises(UserError, match="meta_router='sequence' pools over rows"):
        pooled(ids, position_ids=positions)
