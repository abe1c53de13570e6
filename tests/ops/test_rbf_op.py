"""RBF mixing against a loop over tokens, and what is known of it at the published scale."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro.ops import causal_mask, fourier_features, rbf_mix


def features_by_hand(x: Tensor, frequencies: Tensor) -> Tensor:
    root = math.sqrt(frequencies.shape[1])
    angles = [sum(a * b for a, b in zip(x, column, strict=True)) / root for column in frequencies.T]
    return torch.stack([a.cos() for a in angles] + [a.sin() for a in angles])


def mix_by_loop(features: Tensor, mask: Tensor) -> Tensor:
    output = torch.zeros_like(features)
    for b, t in product(range(features.shape[0]), range(features.shape[1])):
        seen = [s for s in range(features.shape[1]) if mask[min(b, len(mask) - 1), 0, t, s]]
        weights = torch.stack([(features[b, t] @ features[b, s]).exp() for s in seen])
        output[b, t] = sum(w * features[b, s] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return output


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(leading=st.lists(st.integers(1, 3), max_size=2), width=st.integers(1, 4), seed=st.integers(0, 999))
def test_features(leading: list[int], width: int, seed: int) -> None:
    x, frequencies = draw(seed, *leading, width), draw(seed + 1, width, 3)
    expected = torch.stack([features_by_hand(row, frequencies) for row in x.reshape(-1, width)])
    torch.testing.assert_close(fourier_features(x, frequencies), expected.reshape(*leading, 6))


@given(batch=st.integers(1, 3), time=st.integers(1, 5), shared_mask=st.booleans(), seed=st.integers(0, 999))
def test_mixing(batch: int, time: int, shared_mask: bool, seed: int) -> None:
    features = fourier_features(draw(seed, batch, time, 4), draw(seed + 1, 4, 3))
    real = draw(seed + 2, 1 if shared_mask else batch, time) > -0.5
    mask = causal_mask(real, time)
    torch.testing.assert_close(rbf_mix(features, mask), mix_by_loop(features, mask))


def test_the_mask_hides_the_future() -> None:
    features = fourier_features(draw(0, 2, 6, 4), draw(1, 4, 3))
    changed = features.clone()
    changed[:, 4:] = draw(2, 2, 2, 6)
    mask = causal_mask(torch.ones(2, 6, dtype=torch.bool), 6)
    assert torch.equal(rbf_mix(features, mask)[:, :4], rbf_mix(changed, mask)[:, :4])
    everything = torch.ones_like(mask)
    assert (rbf_mix(features, everything)[:, :4] - rbf_mix(changed, everything)[:, :4]).abs().max() > 1e-3


def test_at_the_published_scale_it_mixes_almost_nothing() -> None:
    """At layer-normed input, d = 256, R = 64, a token's weight on itself averages 1.000."""
    x = F.layer_norm(draw(0, 4, 256, 256), (256,))
    features = fourier_features(x, math.sqrt(2) * draw(1, 256, 64))
    diagonal = (features @ features.mT).softmax(-1).diagonal(dim1=-2, dim2=-1)
    assert float(diagonal.mean()) == pytest.approx(1.0, abs=1e-3)
    everything = torch.ones(4, 1, 256, 256, dtype=torch.bool)
    torch.testing.assert_close(rbf_mix(features, everything), features, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_a_mask_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"need a mask of \(…, T, 3\) with T up to 3"):
        rbf_mix(torch.ones(1, 3, 2), torch.ones(1, 1, 3, 4, dtype=torch.bool))
