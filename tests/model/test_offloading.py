"""Models whose weights and buffers wait on the CPU or on disk, and come for each module's own forward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build, shrunk, tokens
from transformers import AutoModelForCausalLM

from chiaroscuro import ChiarForCausalLM, UserError, calibrate
from chiaroscuro.layers import Context

accelerate = pytest.importorskip("accelerate")

MODELS: dict[str, dict[str, Any]] = {
    "small": {"preset": "small"},
    "three operators": {"preset": "v1-all-three"},
    "learned": {"preset": "small", "router": "learned"},
    "permuted": {"preset": "small", "router": "permuted"},
    "hard": {"preset": "small", "router": "hard"},
    "routed context": {"preset": "small", "attention_context": "routed"},
}


def offloaded(folder: Path, way: str) -> ChiarForCausalLM:
    if way == "device_map":
        places: dict[str, Any] = dict.fromkeys(
            ("model.embed_tokens", "lm_head", "model.norm", "model.meta_router"), "cpu"
        )
        places |= {"model.layers": "disk"}
        offload = {"offload_folder": str(folder / "off"), "offload_buffers": True}
        return AutoModelForCausalLM.from_pretrained(folder, device_map=places, **offload)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if way == "cpu":
        return accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    return accelerate.disk_offload(model, str(folder / "off"), "cpu", offload_buffers=True)


@pytest.mark.usefixtures("unchecked")  # accelerate makes a new output of a dictionary
@pytest.mark.parametrize("way", ["cpu", "disk", "device_map"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_offloaded_model_computes_the_same(tmp_path: Path, kind: str, way: str) -> None:
    model, ids = build(shrunk(**MODELS[kind])), tokens(0)
    if model.thresholds():
        calibrate(model, [tokens(1, 4)], 0.4)
    model.save_pretrained(tmp_path)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    there = offloaded(tmp_path, way)
    assert there.model.layers[1].feed_forward[0].weight.is_meta
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        wanted, found = model(ids, attention_mask=mask).logits, there(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()])
    assert torch.equal(there.generate(ids, **options), model.generate(ids, **options))


def test_a_context_moves_with_its_layer() -> None:
    """A model spread over devices: what all layers of one device share stays shared."""
    context = Context(attention_mask=torch.ones(1, 3, dtype=torch.bool), position_ids=torch.arange(3)[None])
    assert context.to("cpu") is context
    there = context.to("meta")
    assert there.attention_mask.is_meta and there.position_ids.is_meta and there.input_ids is None
    there.shared["mask"] = "theirs"
    assert context.to("meta").shared is there.shared and "mask" not in context.shared


@pytest.mark.usefixtures("unchecked")
def test_thresholds_that_are_elsewhere_are_not_set(tmp_path: Path) -> None:
    build(shrunk("small")).save_pretrained(tmp_path)
    there = offloaded(tmp_path, "cpu")
    for act in (lambda: there.set_attention_share(0.5), lambda: calibrate(there, [tokens(0)], 0.5)):
        with pytest.raises(UserError, match="are offloaded") as caught:
            act()
        assert "\n" not in str(caught.value)
