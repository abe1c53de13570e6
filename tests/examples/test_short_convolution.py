"""An operator from one file outside the package does all that those inside do. Oracle: PyTorch's own convolution."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples.short_convolution import GatedConvolution
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import set_seed

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError, calibrate
from chiaroscuro.analysis.flops import count_decode_flops, count_flops
from chiaroscuro.layers import Context, PackedTokens
from chiaroscuro.model.cache import CACHE

MENU = ["dct", "gated_conv", "attention"]


def config(**changes: Any) -> ChiarConfig:
    fields = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
    return ChiarConfig(
        **{**fields, "operators": [["dct"], MENU, MENU, ["attention"]], "attention_share": 0.4, **changes}
    )


def build(**changes: Any) -> ChiarForCausalLM:
    torch.manual_seed(0)
    model = ChiarForCausalLM(config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def ids(seed: int, rows: int = 3, time: int = 20) -> Tensor:
    return torch.randint(50, (rows, time), generator=torch.Generator().manual_seed(seed))


@given(kernel=st.integers(1, 6), time=st.integers(1, 9), seed=st.integers(0, 999))
def test_it_is_pytorch_s_convolution(kernel: int, time: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = GatedConvolution(8, kernel=kernel), torch.randn(2, time, 8)
    take_up, pass_on, values = layer.in_proj(x).chunk(3, -1)
    torch.testing.assert_close(layer(x), layer.out_proj(take_up * pass_on * values))
    torch.nn.init.normal_(layer.weight)
    weight = layer.weight.flip(0).T[:, None]
    convolved = F.conv1d(F.pad((pass_on * values).mT, (kernel - 1, 0)), weight, groups=8).mT
    wanted = layer.out_proj(take_up * convolved)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
    tokens = PackedTokens.of(torch.rand(2, time) < 0.5)
    torch.testing.assert_close(layer(x, None, tokens), tokens.take(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_sparse_execution_is_dense_execution(padded: bool, training: bool) -> None:
    mask = (torch.arange(20) >= torch.tensor([[0], [4], [9]])) & (torch.arange(20) < torch.tensor([[20], [17], [20]]))
    found = []
    for execution in ("sparse", "dense"):
        model = build(execution=execution).train(training)
        out = model(ids(0), attention_mask=mask if padded else None, output_routing=True, output_logits=True)
        real = mask if padded else torch.ones_like(mask)
        assert all(min(r.share) > 0.1 for r in out.routing[1:3])
        out.logits[real].square().mean().backward()
        found.append([out.logits[real], *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}, {"prefill_chunk_size": 3}], ids=str
)
def test_cached_generation_is_uncached_generation(options: dict[str, Any]) -> None:
    model = build()
    assert model.config.use_cache
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [6]])).long()
    found = []
    for cache in (True, False):
        set_seed(3)
        asked = options if cache else {k: v for k, v in options.items() if k != "prefill_chunk_size"}
        given = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **asked}
        found.append(model.generate(ids(1, 3, 8), attention_mask=mask, use_cache=cache, **given))
    assert torch.equal(*found)


def test_it_is_calibrated_counted_saved_and_loaded(tmp_path: Any) -> None:
    model = build()
    calibrate(model, [ids(0), ids(1)], share=0.25)
    routing = model(ids(0), output_routing=True).routing
    assert all(float(r.share[-1]) == pytest.approx(0.25, abs=0.1) for r in routing[1:3])
    count = count_flops(model.config, 64)
    assert count.by_operator["gated conv"] == 2 * 64 * (4 * 32**2 + (4 * 32**2 + 2 * 4 * 32) * (1 - 0.25) / 2)
    assert count_decode_flops(model.config, 64).numbers_kept == 2 * 3 * 32 + 3 * 2 * 32 * 65
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids(2)).logits, model(ids(2)).logits)
    assert loaded(ids(2))[CACHE].states[1].states["gated_conv"].vectors.shape == (3, 3, 32)


def test_its_option_is_of_one_entry_of_a_menu() -> None:
    model = build(operators=[["dct"], ["dct", {"gated_conv": {"kernel": 2}}], MENU, ["attention"]])
    assert [len(model.model.layers[i].operators["gated_conv"].weight) for i in (1, 2)] == [2, 4]
    with pytest.raises(UserError, match=r"operators\[1\].*kernel=0: must be a positive whole number"):
        build(operators=[["dct"], [{"gated_conv": {"kernel": 0}}], MENU, ["attention"]])


def test_no_token_sees_a_later_one_or_another_document() -> None:
    model, x = build(), ids(0, 1)
    changed = x.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 50
    torch.testing.assert_close(model(changed).logits[:, :12], model(x).logits[:, :12], atol=1e-5, rtol=0)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    together = model(x, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(x[:, :7]).logits, model(x[:, 7:]).logits], 1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


def test_it_learns() -> None:
    model, x = build().train(), ids(0)
    before = model(x, labels=x).loss
    before.backward()
    assert float(model.model.layers[1].operators["gated_conv"].weight.grad.abs().max()) > 0


def test_padding_and_state_by_hand() -> None:
    layer = GatedConvolution(2, kernel=3)
    for parameter in (layer.weight, layer.in_proj.weight):
        torch.nn.init.ones_(parameter)
    torch.nn.init.eye_(layer.out_proj.weight)
    x = torch.arange(1.0, 7).view(1, 6, 1).expand(1, 6, 2)
    real = torch.tensor([[0, 1, 1, 0, 1, 1]], dtype=torch.bool)  # 2, 3, 5, 6, each 2x Σ (2x)²
    assert layer(x, Context(attention_mask=real))[real][:, 0].tolist() == [64.0, 312.0, 1520.0, 3360.0]
    state, found = layer.new_cache(), []
    for t in range(6):
        found.append(layer(x[:, t : t + 1], Context(attention_mask=real[:, : t + 1], state=state)))
    assert torch.cat(found, 1)[real][:, 0].tolist() == [64.0, 312.0, 1520.0, 3360.0]
