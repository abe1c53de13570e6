"""A model that is made on the meta device, as one is for loading, begins with the buffers of one made at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chiaroscuro import ChiarConfig, ChiarForCausalLM, retrofit

SIZE: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
REACH: dict[str, Any] = {
    "operators": [["local", "attention"]] * 2,
    "window": 4,
    "attention_context": "kept",
    "kv_share": 0.5,
    "router": "fitted",
    "kv_router": "fitted",
}


def ours() -> Any:
    return ChiarForCausalLM(ChiarConfig(**SIZE, **REACH))


def retrofitted() -> Any:
    model = LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=32))
    retrofit(model, window=4, kv_share=0.5)
    return model


@pytest.mark.parametrize("make", [ours, retrofitted])
def test_buffers_are_those_of_a_new_model(make: Any) -> None:
    at_once = make()
    with torch.device("meta"):
        model = type(at_once)(at_once.config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(7)
    model.init_weights()
    buffers = dict(model.named_buffers())
    new = dict(type(at_once)(at_once.config).named_buffers())
    assert any("fitted.weight" in name for name in new) and any("quantiles" in name for name in new)
    for name, buffer in new.items():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("make", [ours, retrofitted])
def test_they_keep_their_type_when_a_model_is_loaded_in_another(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, buffer in loaded.named_buffers():
        if "quantiles" in name or "fitted" in name:
            assert buffer.dtype == torch.float32, name
    assert {"calibration", "fitted"} <= loaded._keep_in_fp32_modules_strict
