"""The operators and the feed-forward as modules that work alone, each against another implementation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from chiaroscuro.layers import (
    Context,
    FeedForward,
    GatedFeedForward,
    RBFMixing,
    SelfAttention,
    Spectra,
    SpectralMixing,
)
from chiaroscuro.layers.feed_forward import FEED_FORWARDS, FeedForwardKind
from chiaroscuro.ops import dct, fourier_features, idct


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that no initialisation would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def as_torchs(ours: SelfAttention, width: int) -> nn.MultiheadAttention:
    """PyTorch's own module with our weights; it knows no positions."""
    theirs = nn.MultiheadAttention(width, ours.heads, batch_first=True).eval()
    with torch.no_grad():
        parts = (ours.q_proj, ours.k_proj, ours.v_proj)
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return theirs


# DCT


@given(width=st.integers(1, 130), seed=st.integers(0, 999))
def test_spectral_mixing(width: int, seed: int) -> None:
    layer, x = SpectralMixing(width), draw(seed, 2, 3, width)
    torch.testing.assert_close(layer(x), x, rtol=1e-4, atol=1e-5)  # at first the identity
    shake(layer, seed)
    expected = idct(dct(x.double()) * layer.weight.double()).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x, Context(spectra=Spectra(x))), layer(x))  # the router's transform serves as well


def test_spectral_mixing_in_bfloat16() -> None:
    layer, x = SpectralMixing(48).bfloat16(), draw(0, 2, 3, 48).bfloat16()
    assert torch.equal(layer(x), x)


# Attention


@given(
    heads=st.sampled_from([1, 2, 4]),
    time=st.integers(1, 7),
    implementation=st.sampled_from(["sdpa", "eager"]),
    seed=st.integers(0, 999),
)
def test_self_attention_is_pytorchs_where_positions_are_alike(
    heads: int, time: int, implementation: str, seed: int
) -> None:
    layer, x = shake(SelfAttention(16, num_attention_heads=heads), seed), draw(seed, 2, time, 16)
    theirs = as_torchs(layer, 16)
    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    everywhere = torch.zeros(2, time, dtype=torch.long)
    ours = layer(x, Context(position_ids=everywhere, implementation=implementation))
    torch.testing.assert_close(ours, theirs(x, x, x, attn_mask=future)[0], rtol=1e-4, atol=1e-5)
    # Padded on the left by none, one, two tokens; what stands at padding is of no account.
    real = torch.arange(time) >= torch.tensor([[0], [min(2, time - 1)]])
    ours = layer(x, Context(attention_mask=real, position_ids=everywhere, implementation=implementation))
    theirs_padded = theirs(x, x, x, attn_mask=future, key_padding_mask=~real)[0]
    torch.testing.assert_close(ours[real], theirs_padded[real], rtol=1e-4, atol=1e-5)
    assert ours.isfinite().all()


def test_positions_matter_by_their_differences() -> None:
    layer, x = shake(SelfAttention(16, num_attention_heads=2)), draw(1, 2, 6, 16)
    counted = torch.arange(6).expand(2, -1)
    torch.testing.assert_close(layer(x), layer(x, Context(position_ids=counted)))
    torch.testing.assert_close(layer(x), layer(x, Context(position_ids=counted + 100)), rtol=1e-3, atol=1e-4)
    assert (layer(x) - layer(x, Context(position_ids=counted * 3))).abs().max() > 1e-3
    slow = shake(SelfAttention(16, num_attention_heads=2, rope_theta=10.0))
    assert (layer(x) - slow(x)).abs().max() > 1e-3


def test_layers_share_the_mask_and_the_table() -> None:
    layer, x = shake(SelfAttention(16, num_attention_heads=2)), draw(1, 2, 6, 16)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    context = Context(attention_mask=real)
    assert torch.equal(layer(x, context), layer(x, context))
    kept = dict(context.shared)
    assert len(kept) == 2  # a mask and a table of angles
    layer(x, context)
    assert all(context.shared[name] is value for name, value in kept.items())


@pytest.mark.parametrize("steps", [[6], [1] * 6, [3, 1, 2]])
def test_continued_from_a_cache(steps: list[int]) -> None:
    layer, x = shake(SelfAttention(16, num_attention_heads=2)), draw(1, 2, 6, 16)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    state, outputs, seen = layer.new_cache(), [], 0
    for new in steps:
        ids = torch.arange(seen, seen + new).expand(2, -1)
        part = x[:, seen : seen + new]
        seen += new
        outputs.append(layer(part, Context(attention_mask=real[:, :seen], position_ids=ids, state=state)))
    torch.testing.assert_close(torch.cat(outputs, 1)[real], layer(x, Context(attention_mask=real))[real])


def test_dropout_acts_in_training_alone() -> None:
    layer, x = shake(SelfAttention(16, num_attention_heads=2, attention_dropout=0.5)), draw(1, 2, 6, 16)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("width", "heads"), [(16, 3), (12, 4)])
def test_heads_that_do_not_fit(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=r"is not divisible by num_attention_heads=3|need an even width"):
        SelfAttention(width, num_attention_heads=heads)


# RBF


def change_the_end(x: Tensor) -> Tensor:
    changed = x.clone()
    changed[:, 4:] += 1
    return changed


def test_rbf_mixing_by_hand() -> None:
    layer, x = shake(RBFMixing(8, features=5)), draw(0, 2, 6, 8)
    features = fourier_features(x, layer.frequencies)
    scores = (features @ features.mT).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(layer(x), layer.out_proj(scores.softmax(-1) @ features))


def test_rbf_is_causal_unless_told_otherwise() -> None:
    x = draw(0, 2, 6, 8) * 0.2  # near each other, so that they do mix
    causal = shake(RBFMixing(8))
    assert torch.equal(causal(x)[:, :4], causal(change_the_end(x))[:, :4])
    leaking = shake(RBFMixing(8, rbf_causal=False))
    assert (leaking(x)[:, :4] - leaking(change_the_end(x))[:, :4]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_rbf_does_not_weigh_padding(causal: bool) -> None:
    layer, x = shake(RBFMixing(8, rbf_causal=causal)), draw(0, 2, 6, 8) * 0.2
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    hidden = torch.where(real[..., None], x, x + 3)
    padded = Context(attention_mask=real)
    torch.testing.assert_close(layer(x, padded)[real], layer(hidden, padded)[real])
    assert (layer(x)[real] - layer(x, padded)[real]).abs().max() > 1e-4
    assert layer(hidden, padded).isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_rbf_frequencies_have_variance_2_gamma_and_stay(gamma: float) -> None:
    torch.manual_seed(0)
    layer = RBFMixing(256, gamma=gamma)
    assert layer.frequencies.shape == (256, 64)
    assert float(layer.frequencies.var()) == pytest.approx(2 * gamma, rel=0.05)
    assert "frequencies" in layer.state_dict() and "frequencies" not in dict(layer.named_parameters())


# Feed-forward


def test_feed_forward() -> None:
    layer, x = shake(FeedForward(8, 20)), draw(0, 2, 3, 8)
    first, last = layer[0], layer[3]
    hidden = x @ first.weight.T + first.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(layer(x), gelu @ last.weight.T + last.bias)
    assert (first.out_features, last.in_features) == (20, 20)


def test_gated_feed_forward_is_llama_s() -> None:
    ours, x = shake(GatedFeedForward(8, 20)), draw(0, 2, 3, 8).requires_grad_()
    theirs = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=20, num_attention_heads=1)).to(x.dtype)
    theirs.load_state_dict({f"{name.split('.')[0]}_proj.weight": w for name, w in ours.state_dict().items()})
    torch.testing.assert_close(ours(x), theirs(x))
    (gradient,), (wanted,) = (torch.autograd.grad(mlp(x).square().sum(), x) for mlp in (ours, theirs))
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_both_feed_forwards_have_as_many_parameters_and_drop(kind: FeedForwardKind) -> None:
    layer = FEED_FORWARDS[kind](128)
    weights = [p for p in layer.parameters() if p.ndim == 2]
    assert len(weights) == layer.matrices
    assert sum(w.numel() for w in weights) == pytest.approx(8 * 128**2, rel=0.01)
    noisy, x = shake(FEED_FORWARDS[kind](8, 20, dropout=0.5)).train(), draw(0, 2, 3, 8)
    assert not torch.equal(noisy(x), noisy(x))
    torch.testing.assert_close(noisy.eval()(x), noisy(x))
