"""The model against what the author's public code computes on random weights (`../shared/vectors`).

The names and two conventions differ. Queries, keys and values are one matrix there. And dct followed by idct
gives 2x there and x here, so that a filter w there is 2w here, and its gradient half as large.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiaroscuro import ChiarConfig, ChiarForCausalLM

ROUTED = ["chiar-threshold", "chiar-soft"]
ATOL = 1e-4
PARTS = [
    (r"^token_emb\.", "model.embed_tokens."),
    (r"^meta_router\.gate_proj\.", "model.meta_router."),
    (r"^norm\.", "model.norm."),
    (r"^layers\.(\d+)\.", r"model.layers.\1."),
    (r"^attns\.(\d+)\.", r"model.layers.\1.attn."),
    (r"^ffns\.(\d+)\.", r"model.layers.\1.feed_forward."),
    (r"^ffn_norms\.(\d+)\.", r"model.layers.\1.feed_forward_norm."),
    (r"\.dct_mix\.w$", ".operators.dct.weight"),
    (r"\.dct_mix\.norm\.", ".operator_norms.dct."),
    (r"\.attn\.norm\.", ".operator_norms.attention."),
    (r"\.attn\.", ".operators.attention."),
    (r"\.ffn_norm\.", ".feed_forward_norm."),
    (r"\.ffn\.", ".feed_forward."),
    (r"\.router\.gate_proj\.", ".router.proj."),
]


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        if "rope" in name:
            continue
        for pattern, replacement in PARTS:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".operators.dct.weight"):
            value = 2 * value
        if ".qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                ours[name.replace(".qkv.", f".{part}_proj.")] = third
        else:
            ours[name] = value
    return ours


def load(folder: Path, name: str) -> tuple[ChiarForCausalLM, dict[str, Any]]:
    checkpoint = torch.load(folder / "vectors" / f"{name}.checkpoint.pt", weights_only=True)
    expected = torch.load(folder / "vectors" / f"{name}.expected.pt", weights_only=True)
    theirs = checkpoint["cfg"]
    fields: dict[str, Any] = {"meta_router": "batch", "num_hidden_layers": theirs["n_layers"]}
    if name == "baseline":
        fields = {"operators": [["attention"]] * theirs["n_layers"]}
    elif name == "chiar-soft":
        fields["router"] = "soft"
    else:
        fields |= {"calibration": "fixed", "entropy_thresholds": [theirs["tau_low"], theirs["tau_high"]]}
    config = ChiarConfig(
        vocab_size=97,
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=48,
        norm="post",
        embedding_norm=False,
        spectrum="reference",
        **fields,
    )
    model = ChiarForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(renamed(checkpoint["model"]), strict=False)
    assert not unexpected
    assert all("calibration" in name for name in missing)
    return model, expected


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
