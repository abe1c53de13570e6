"""The author's checkpoints, imported, against what the author's public code computes with them (`../shared/vectors`).

A filter w there is 2w here, so its gradient is half as large.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from chiaroscuro import ChiarForCausalLM
from chiaroscuro.convert import load_reference_checkpoint

ROUTED = ["chiar-threshold", "chiar-soft"]
ATOL = 1e-4


def load(folder: Path, name: str) -> tuple[ChiarForCausalLM, dict[str, Any]]:
    model = load_reference_checkpoint(folder / "vectors" / f"{name}.checkpoint.pt")
    assert isinstance(model, ChiarForCausalLM)
    return model, torch.load(folder / "vectors" / f"{name}.expected.pt", weights_only=True)


@pytest.mark.parametrize(("name", "layers"), [("baseline", 4), ("chiar-threshold", 5), ("chiar-soft", 4)])
def test_the_file_s_shapes_and_names_say_what_the_model_is(shared: Path, name: str, layers: int) -> None:
    config = load(shared, name)[0].config
    assert (config.vocab_size, config.hidden_size, config.num_attention_heads) == (97, 64, 4)
    assert (config.num_hidden_layers, config.intermediate_size, config.max_position_embeddings) == (layers, 256, 48)
    assert config.rope_theta == 10000.0
    baseline = name == "baseline"
    routed = [["dct"], *[["dct", "attention"]] * (layers - 2), ["attention"]]
    assert config.operators == ([["attention"]] * layers if baseline else routed)
    assert config.meta_router == ("none" if baseline else "batch")
    assert config.router == ("soft" if name == "chiar-soft" else "threshold")
    assert (config.calibration == "fixed") == (name == "chiar-threshold")


@pytest.mark.parametrize("name", ["baseline", *ROUTED])
def test_logits(shared: Path, name: str) -> None:
    model, expected = load(shared, name)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ROUTED)
def test_loss_routing_and_gate(shared: Path, name: str) -> None:
    model, expected = load(shared, name)
    with torch.no_grad():
        out = model(expected["input_ids"], labels=expected["input_ids"], output_routing=True)
    routed = [routing for routing in out.routing if len(routing.operators) > 1]
    entropy = torch.stack([routing.entropy for routing in routed])
    index = torch.stack([routing.operator_index for routing in routed])
    torch.testing.assert_close(out.loss, torch.as_tensor(expected["loss"]), atol=ATOL, rtol=0)
    torch.testing.assert_close(entropy, expected["spectral_entropy"], atol=ATOL, rtol=0)
    assert torch.equal(index, expected["operator_index"])
    assert set(index.unique().tolist()) == {0, 1}
    gate = torch.as_tensor(expected["meta_gate"]).reshape(1, 1)
    torch.testing.assert_close(out.meta_gate, gate, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ROUTED)
def test_gradients(shared: Path, name: str) -> None:
    model, expected = load(shared, name)
    model(expected["input_ids"], labels=expected["input_ids"]).loss.backward()
    ours = {
        "grad_token_emb": model.model.embed_tokens.weight.grad,
        "grad_layer1_w": 2 * model.model.layers[1].operators["dct"].weight.grad,
        "grad_meta_router": model.model.meta_router.weight.grad,
    }
    for key, gradient in ours.items():
        theirs = expected[key].reshape(gradient.shape)
        # The MetaRouter's gradient is smaller than 1e-4 as a whole: a plain tolerance would pass zeros.
        atol = min(ATOL, 1e-3 * theirs.abs().max().item())
        torch.testing.assert_close(gradient, theirs, atol=atol, rtol=0, msg=key)
