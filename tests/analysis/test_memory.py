"""Peak memory of a prefill: it counts the weights, and grows with the row."""

import sys
from pathlib import Path

import pytest
import torch

from chiaroscuro import ChiarConfig, ChiarForCausalLM, plugins, retrofit
from chiaroscuro.analysis.memory import prefill_memory
from chiaroscuro.app.measuring import _decodes
from chiaroscuro.layers.registry import OPERATORS
from decoders import build

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


def test_weights_and_what_the_row_needs_are_counted() -> None:
    model = build(vocab_size=150_000, hidden_size=64, max_position_embeddings=8192)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    short, long = (prefill_memory(model, length) for length in (64, 8192))
    assert short is not None and long is not None
    assert weights < short < 6 * weights
    assert long - short > 8192 * 64 * 4 * 3  # keys and values of three layers, half as wide, and a layer's input


def test_a_retrofitted_model_is_measured_as_it_is() -> None:
    model = build(max_position_embeddings=512)
    retrofit(model, window=16, sinks=2, kv_share=0.5, kv_router="random")
    assert (prefill_memory(model, 200) or 0) > 0


MODULE = """
import torch
from chiaroscuro import register_operator
from chiaroscuro.layers import Operator, OperatorState

class Seen(OperatorState):
    def select(self, rows):
        pass

class Doubling(Operator):
    cost = 0

    def new_cache(self):
        return Seen()

    def mix(self, x, context):
        return 2 * x

register_operator("doubling-from-a-module", Doubling)
"""


def test_operators_of_a_module_that_was_imported_are_known_to_the_process_that_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doubling_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_named", [])
    plugins.import_modules(["doubling_module"])
    try:
        config = ChiarConfig(
            operators=[["doubling-from-a-module", "attention"]],
            vocab_size=20,
            hidden_size=16,
            num_attention_heads=2,
            max_position_embeddings=64,
            meta_router="none",
        )
        model = ChiarForCausalLM(config).eval()
        assert (prefill_memory(model, 40) or 0) > 0
        assert not _decodes(model, torch.zeros(1, 2, dtype=torch.long))  # its state can't be cropped
    finally:
        del OPERATORS["doubling-from-a-module"], sys.modules["doubling_module"]
