"""What `test_compile.py` runs in a process of its own, where no annotation is turned into a check.

Such checks hold what a compiler can't look into. Oracle: the model itself, without a compiler. Graphs are captured and
run as captured; for one layer code is generated, too.
"""

import sys
from typing import Any

import pytest
import torch
from small_models import build, shrunk, tokens
from torch import Tensor, nn

from chiaroscuro import UserError
from chiaroscuro.model.cache import CACHE

WHOLE: dict[str, dict[str, Any]] = {
    "baseline": {"operators": [["attention"]] * 2},
    "llama": {
        "operators": [["attention"]] * 2,
        "norm_type": "rms",
        "bias": False,
        "feed_forward": "swiglu",
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
    "dense": {"operators": [["dct"], ["dct", "rbf", "attention"]], "execution": "dense"},
    "soft": {"operators": [["dct"], ["dct", "attention"]], "router": "soft"},
    "near and far": {
        "operators": [["local"], ["local", "attention"]],
        "window": 4,
        "sinks": 1,
        "attention_context": "kept",
        "execution": "dense",
        "router": "norm",
        "kv_router": "norm",
    },
    "convolutions": {"operators": [["conv"], ["conv", "attention"]], "router": "soft", "short_conv": 4},
}

SPARSE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "two operators": (
        "aot_eager",
        "small",
        {"attention_context": "routed", "operators": [["dct", "attention"], ["attention"]]},
    ),
    "three operators": ("aot_eager", "v1-all-three", {"operators": [["dct", "rbf", "attention"], ["attention"]]}),
    "one layer, with code": ("inductor", "small", {"operators": [["dct", "attention"]]}),
}


def padding(time: int) -> Tensor:
    return (torch.arange(time) >= torch.tensor([[0], [3]])).long()


def without_sparse_execution_a_model_is_one_graph(name: str) -> None:
    model = build(shrunk("small", num_hidden_layers=2, **WHOLE[name]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for time in (9, 17, 30):  # a second length, and a third, which is compiled for any length
        ids = tokens(time, 2, time)
        for mask in (None, padding(time)):
            with torch.no_grad():
                found = compiled(ids, attention_mask=mask, use_cache=False).logits
                wanted = model(ids, attention_mask=mask, use_cache=False).logits
            real = slice(None) if mask is None else mask.bool()
            torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-4)


def a_training_step_is_one_graph_too(name: str) -> None:
    losses = []
    for compiles in (True, False):
        model = build(shrunk("small", num_hidden_layers=2, **WHOLE[name])).train()
        run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        loss = run(tokens(0), labels=tokens(0), use_cache=False).loss
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)


def sparse_training_is_eager_training(name: str) -> None:
    backend, preset, fields = SPARSE[name]
    model, ids = build(shrunk(preset, num_hidden_layers=len(fields["operators"]), **fields)).train(), tokens(0, 2, 20)
    assert model.config.routed_layers
    compiled = torch.compile(model, backend=backend)
    for mask in (None, padding(20)):
        results = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(ids, attention_mask=mask, labels=ids, use_cache=False)
            out.loss.backward()
            results.append((out.loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-3)


def positions_are_cached_and_documents_refused(menu: str) -> None:
    model = build(shrunk("small", num_hidden_layers=2, operators=[menu.split(), ["attention"]]))
    ids, places = tokens(0, 2, 8), torch.arange(8)[None]
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        for more in ({"use_cache": True}, {}):
            found = compiled(ids, position_ids=places, **more)
            torch.testing.assert_close(found.logits, model(ids).logits, atol=1e-5, rtol=1e-5)
            assert getattr(found, CACHE) is not None
        several, mask = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), torch.ones_like(ids)
        with pytest.raises(UserError, match="holds several documents"):
            compiled(ids, position_ids=several, use_cache=True)
        given = {"position_ids": several, "attention_mask": mask, "use_cache": False}
        torch.testing.assert_close(compiled(ids, **given).logits, model(ids, **given).logits, atol=1e-5, rtol=1e-5)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def it_is_exported_for_any_length(name: str) -> None:
    model = build(shrunk("small", num_hidden_layers=2, **WHOLE[name]))
    time = torch.export.Dim("time", min=2, max=model.config.max_position_embeddings)
    shapes = {"ids": {1: time}, "mask": {1: time}}
    with torch.no_grad():
        program = torch.export.export(Logits(model), (tokens(0, 2, 12), padding(12)), dynamic_shapes=shapes)
        for length in (5, 12, 40):
            ids, mask = tokens(length, 2, length), padding(length)
            found, wanted = program.module()(ids, mask), model(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


def a_sparse_layer_breaks_the_graph_once(menu: str) -> None:
    """Compiled alone, as a frame of its own: what stands before the break, and what stands after it."""
    layer = build(shrunk("small", operators=[menu.split()] * 2, num_hidden_layers=2, short_conv=4)).model.layers[0]
    found = torch._dynamo.explain(layer)(torch.randn(2, 12, 32))
    assert found.graph_break_count == 1
    assert "_mix_sparsely" in found.break_reasons[0].reason


if __name__ == "__main__":
    check, *cases = sys.argv[1:]
    for case in cases:
        torch._dynamo.reset()
        globals()[check](case)
