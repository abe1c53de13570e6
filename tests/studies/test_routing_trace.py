"""A text in a retrofitted model, as `chiaroscuro route` shows it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from chiaroscuro import UserError, retrofit
from chiaroscuro.ops import spectral_entropy
from chiaroscuro.retrofitting.inside import noting_decisions
from chiaroscuro.studies.routing_trace import trace_text
from chiaroscuro.studies.workspace import Workspace
from decoders import build

TEXT = "The spectral dark of a window, seen from far away, and seen again."
NO_ENDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def saved(folder: Path, **fields: Any) -> Workspace:
    """A small Llama of 3 layers, of which the first stays whole."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = build(vocab_size=len(tokenizer), max_position_embeddings=128, **NO_ENDS)
    retrofit(model, window=6, sinks=1, layers=[1, 2], **fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Workspace(str(folder), device="cpu")


def test_each_layer_says_who_looks_and_who_is_kept(tmp_path: Path) -> None:
    workspace = saved(tmp_path, attention_share=0.5, kv_share=0.5, router="threshold", kv_router="random")
    trace = trace_text(workspace, TEXT)
    assert "".join(trace.tokens) == TEXT
    assert [layer.operators for layer in trace.layers] == [("attention",), *[("local", "attention")] * 2]
    assert trace.layers[0].kept is None
    model: Any = workspace.model
    ids = torch.tensor([workspace.tokenizer(TEXT).input_ids])
    with noting_decisions(model) as decided, torch.no_grad():
        model(ids)
        first = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))[0]
    torch.testing.assert_close(torch.tensor(trace.layers[0].entropy), spectral_entropy(first))
    for i, ((looks, kept),) in decided.items():
        layer = trace.layers[i]
        assert layer.operator_index == tuple(looks[0].int().tolist())
        assert layer.kept == tuple(kept[0].float().tolist())
        assert 0 < layer.share[1] < 1
        assert sum(layer.share) == pytest.approx(1)
        assert layer.counts[1] == int(looks.sum())


def test_where_everybody_looks_there_is_no_choice(tmp_path: Path) -> None:
    trace = trace_text(saved(tmp_path, attention_share=1.0, kv_share=0.5, kv_router="random"), TEXT)
    assert trace.routed_layers == ()
    kept = trace.layers[1].kept
    assert kept is not None
    assert 0 < sum(kept) < len(kept)


def test_heads_that_choose_for_themselves(tmp_path: Path) -> None:
    """A token has attention where any head looks."""
    workspace = saved(tmp_path, attention_share=0.5, kv_share=1.0, router={"fitted": {"heads": 2}})
    model: Any = workspace.model
    for i in (1, 2):
        model.reaches[i].look.fitted.set_weights(torch.randn(2, 32), torch.zeros(2))
    trace = trace_text(workspace, TEXT)
    layer = trace.layers[1]
    some = layer.counts[1] / len(trace.tokens)
    assert 0 < some < 1 and layer.share[1] == pytest.approx(some)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    workspace = saved(tmp_path, attention_share=0.5, kv_share=1.0, router="threshold")
    with torch.no_grad():
        workspace.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the entropy in layer 1 is not a number"):
        trace_text(workspace, TEXT)


def test_a_model_that_routes_nothing(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    build(vocab_size=len(tokenizer), **NO_ENDS).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="route needs a CHIAR-Former"):
        trace_text(Workspace(str(tmp_path)), TEXT)
