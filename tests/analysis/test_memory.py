"""Peak memory of a prefill: it counts the weights, and grows with the row."""

from pathlib import Path

import pytest

from chiaroscuro import retrofit
from chiaroscuro.analysis.memory import prefill_memory
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
