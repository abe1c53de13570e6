"""The null against another simulation, Gaussian vectors through the real entropy, and the published figures."""

import math
from functools import cache

import pytest
import scipy.special
import torch
from torch import Tensor

from chiaroscuro.ops import null, null_entropy_mean, null_entropy_quantiles, spectral_entropy
from chiaroscuro.ops.spectral import Spectrum, entropy_of_spectrum

DRAWS = 20_000


@cache
def simulated(width: int, spectrum: str = "orthonormal") -> Tensor:
    """H of 20,000 white-noise vectors (not of coefficients, as the library draws them), from another seed."""
    generator = torch.Generator().manual_seed(width)
    chunks = [torch.randn(2000, width, generator=generator) for _ in range(DRAWS // 2000)]
    return torch.cat([spectral_entropy(chunk, spectrum) for chunk in chunks]).double()


def test_the_published_null_is_reproduced() -> None:
    at_256 = simulated(256)
    # The extremes of 20,000 draws scatter themselves: the published [0.826, 0.904] is one sample.
    assert float(at_256.min()) == pytest.approx(0.826, abs=0.006)
    assert float(at_256.max()) == pytest.approx(0.904, abs=0.003)
    at_1024 = simulated(1024)
    assert float(at_1024.mean()) == pytest.approx(0.8949, abs=1e-4)
    thirds = torch.quantile(at_1024, torch.tensor([0.33, 0.67], dtype=torch.float64)).tolist()
    assert thirds == pytest.approx([0.8932, 0.8967], abs=2e-4)


@pytest.mark.parametrize("width", [2, 3, 16, 64, 100, 128, 256, 1024])
def test_the_closed_mean(width: int) -> None:
    draws = simulated(width)
    error = float(draws.std()) / math.sqrt(DRAWS)
    assert null_entropy_mean(width) == pytest.approx(float(draws.mean()), abs=4 * error + 1e-6)
    by_scipy = (scipy.special.digamma(width / 2 + 1) - scipy.special.digamma(1.5)) / math.log(width)
    assert null_entropy_mean(width) == pytest.approx(by_scipy, abs=1e-12)
    if width >= 64:
        assert null_entropy_mean(width) == pytest.approx(float(draws.mean()), abs=1e-3)


@pytest.mark.parametrize("width", [64, 256, 1024, 4096])
def test_the_closed_mean_approaches_the_one_of_the_paper(width: int) -> None:
    approximate = 1 - 0.7296 / math.log(width)
    difference = 1 / (width * math.log(width))
    assert null_entropy_mean(width) - approximate == pytest.approx(difference, rel=0.1, abs=1e-5)


@pytest.mark.parametrize("spectrum", ["orthonormal", "reference"])
@pytest.mark.parametrize("width", [16, 64, 256])
def test_quantiles_are_those_of_noise(width: int, spectrum: str) -> None:
    probabilities = [0.05, 0.25, 0.33, 0.5, 0.67, 0.75, 0.95]
    ours = null_entropy_quantiles(width, probabilities, spectrum)
    theirs = torch.quantile(simulated(width, spectrum), torch.tensor(probabilities, dtype=torch.float64))
    # The share of noise that lies below each: what a threshold put there would send on. A median's standard error
    # is 0.0035 with 20,000 draws and 0.0055 with 8192.
    below = (simulated(width, spectrum)[:, None] <= ours.double()).double().mean(0)
    torch.testing.assert_close(below, torch.tensor(probabilities, dtype=torch.float64), rtol=0, atol=0.02)
    assert (ours.double() - theirs).abs().max() < 0.15 * float(simulated(width, spectrum).std())
    assert ours.dtype == torch.float32 and (ours.diff() > 0).all()


def test_the_width_of_one() -> None:
    assert null_entropy_mean(1) == 0
    assert torch.equal(null_entropy_quantiles(1, [0.0, 0.5, 1.0]), torch.zeros(3))


def test_nothing_around_it_changes_it() -> None:
    probabilities = [0.0, 0.3, 1.0]
    tables = []
    for width in (40, 41):
        null._null_draws.cache_clear()
        tables.append(null_entropy_quantiles(width, probabilities))
    null._null_draws.cache_clear()
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    with torch.device("meta"):
        first = null_entropy_quantiles(40, probabilities)
    null._null_draws.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            second = null_entropy_quantiles(41, probabilities)
    finally:
        torch.set_default_dtype(torch.float32)
    after = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(after, torch.random.get_rng_state()), "drawing the null moved the global generator"
    torch.random.set_rng_state(state)
    assert torch.equal(first, tables[0]) and torch.equal(second, tables[1])
    # A table made under inference mode is an ordinary tensor to autograd.
    assert not null._null_draws(41, "orthonormal").is_inference()


@pytest.mark.parametrize("width", [1, 7, 64, 257])
def test_draws_in_parts_are_the_same(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = [0.0, 0.1, 0.5, 1.0]
    tables, drawn = [], []

    def entropy(coefficients: torch.Tensor, spectrum: Spectrum) -> torch.Tensor:
        drawn.append(coefficients.numel())
        return entropy_of_spectrum(coefficients, spectrum)

    monkeypatch.setattr(null, "entropy_of_spectrum", entropy)
    for at_once in (2**24, 48 * width):
        monkeypatch.setattr(null, "_AT_ONCE", at_once)
        null._null_draws.cache_clear()
        tables.append(null_entropy_quantiles(width, probabilities))
    null._null_draws.cache_clear()
    assert torch.equal(*tables)
    assert drawn[0] == 8192 * width and max(drawn[1:]) == 48 * width


@pytest.mark.parametrize("width", [4, 16, 64])
def test_the_mean_of_the_reference_spectrum_is_that_of_draws(width: int) -> None:
    noise = torch.randn(20_000, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draws = spectral_entropy(noise, "reference")
    assert null_entropy_mean(width, "reference") == pytest.approx(float(draws.mean()), abs=0.005)
    assert abs(null_entropy_mean(width, "reference") - null_entropy_mean(width)) > 1e-4
