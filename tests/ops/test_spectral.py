"""The DCT pair and the spectral entropy against scipy in float64, by the matrix product and by the FFT."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from chiaroscuro.ops import (
    dct,
    entropy_of_spectrum,
    idct,
    spectral,
    spectral_coefficients,
    spectral_entropy,
    spectral_filter,
    spectral_mix,
)

LENGTHS = [*range(1, 68), 256, 1000, 1024]
WAYS = {"matrix": spectral.dct_by_matrix, "fft": spectral.dct_by_fft}
FORCED = {"matrix": {"MATRIX_UP_TO": 10**9, "FEW": 0}, "fft": {"MATRIX_UP_TO": 0, "FEW": 0}}


def scipy_dct(x: np.ndarray) -> np.ndarray:
    return scipy.fft.dct(x, type=2, norm="ortho", axis=-1)


def scipy_idct(x: np.ndarray) -> np.ndarray:
    return scipy.fft.idct(x, type=2, norm="ortho", axis=-1)


def entropy_by_hand(x: np.ndarray, dc_weight: float = 1.0) -> np.ndarray:
    power = scipy_dct(x) ** 2
    power[..., 0] *= dc_weight
    p = power / (power.sum(-1, keepdims=True) + 1e-8)
    width = x.shape[-1]
    return np.zeros(x.shape[:-1]) if width == 1 else -(p * np.log(p + 1e-8)).sum(-1) / math.log(width)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that asks for it runs twice: all lengths by the matrix product, and all by the FFT."""
    for name, value in FORCED[request.param].items():
        monkeypatch.setattr(spectral, name, value)
    return request.param


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to lay the same numbers out in memory."""
    return {
        "contiguous": lambda x: x.contiguous(),
        "transposed": lambda x: x.mT.contiguous().mT,
        "strided": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
        "offset": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
        "expanded": lambda x: x[..., :1, :].expand(x.shape),
    }


# Against scipy


@pytest.mark.parametrize("width", LENGTHS)
def test_the_pair_and_the_entropy_are_scipys(width: int, way: str) -> None:
    x = noise(3, 4, width, seed=width)
    for ours, theirs in ((dct, scipy_dct), (idct, scipy_idct), (spectral_entropy, entropy_by_hand)):
        np.testing.assert_allclose(ours(x).numpy(), theirs(x.numpy()), rtol=0, atol=1e-10)
    reference = spectral_entropy(x, "reference").numpy()
    np.testing.assert_allclose(reference, entropy_by_hand(x.numpy(), 2.0), rtol=0, atol=1e-10)


shapes = st.lists(st.integers(0, 3), max_size=3)


@given(
    leading=shapes,
    width=st.integers(1, 140),
    layout=st.sampled_from(sorted(layouts())),
    way=st.sampled_from(sorted(WAYS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
)
def test_any_shape_layout_and_type(
    leading: list[int], width: int, layout: str, way: str, dtype: torch.dtype, seed: int
) -> None:
    x = noise(*leading, width, seed=seed, dtype=dtype)
    if x.ndim > 1:
        x = layouts()[layout](x)
    before = x.clone()
    with mock.patch.multiple(spectral, **FORCED[way]):
        results = [dct(x), idct(x), spectral_entropy(x), spectral_coefficients(x)]
    assert torch.equal(x, before), "the input was written to"
    exact = x.double().numpy()
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    oracles = [(scipy_dct, dtype), (scipy_idct, dtype), (entropy_by_hand, wide), (scipy_dct, wide)]
    for ours, (oracle, expected_type) in zip(results, oracles, strict=True):
        assert ours.dtype == expected_type
        # Half precision rounds once, at the end: float32 arithmetic inside.
        error = torch.finfo(expected_type).eps * (1 if expected_type not in (dtype, wide) else 4)
        scale = 10 * math.sqrt(width) if expected_type == wide else 1
        reach = np.abs(oracle(exact)).max(initial=1.0)
        np.testing.assert_allclose(ours.double().numpy(), oracle(exact), rtol=0, atol=error * scale * reach)


@given(leading=shapes, width=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_the_transform_is_orthogonal(leading: list[int], width: int, seed: int) -> None:
    x = noise(*leading, width, seed=seed)
    torch.testing.assert_close(dct(x).square().sum(-1), x.square().sum(-1))
    torch.testing.assert_close(idct(dct(x)), x)
    torch.testing.assert_close(dct(idct(x)), x)


# Gradients


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_gradients(width: int, way: str) -> None:
    x = noise(2, width).requires_grad_()
    weight = noise(width, seed=1).requires_grad_()
    functions: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (dct, (x,)),
        (idct, (x,)),
        (spectral_entropy, (x,)),
        (lambda x: spectral_entropy(x, "reference"), (x,)),
        (spectral_mix, (x, weight)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_the_gradient_of_silence_is_finite(way: str) -> None:
    x = torch.zeros(3, 70, requires_grad=True)
    entropy = spectral_entropy(x)
    assert torch.equal(entropy, torch.zeros(3))
    entropy.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# Types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, way: str) -> None:
    x = noise(64, 100, dtype=dtype)
    for function in (dct, idct):
        assert torch.equal(function(x), function(x.float()).to(dtype))
    assert torch.equal(spectral_entropy(x), spectral_entropy(x.float()))
    weight = noise(100, seed=1, dtype=dtype)
    assert torch.equal(spectral_mix(x, weight), spectral_mix(x.float(), weight.float()).to(dtype))
    sparse = torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=dtype)
    torch.testing.assert_close(entropy_of_spectrum(sparse), entropy_of_spectrum(sparse.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, way: str) -> None:
    x, weight = noise(6, 40, dtype=torch.float32), noise(40, seed=1, dtype=torch.float32)
    for function in (dct, idct, spectral_entropy, lambda x: spectral_mix(x, weight)):
        expected = function(x)
        with torch.autocast("cpu", dtype):
            assert torch.equal(function(x), expected)


def test_double_and_single_tables_are_kept_apart(way: str) -> None:
    single = dct(noise(2, 37, dtype=torch.float32))
    double = dct(noise(2, 37))
    np.testing.assert_allclose(double.numpy(), scipy_dct(noise(2, 37).numpy()), rtol=0, atol=1e-12)
    assert single.dtype == torch.float32


@pytest.mark.parametrize(
    ("tokens", "width", "expected"), [(9999, 64, "matrix"), (9999, 65, "fft"), (16, 256, "matrix")]
)
def test_which_way_is_taken(tokens: int, width: int, expected: str) -> None:
    with mock.patch.object(spectral, "dct_by_matrix", side_effect=ZeroDivisionError):
        if expected == "matrix":
            with pytest.raises(ZeroDivisionError):
                dct(torch.ones(tokens, width))
        else:
            dct(torch.ones(tokens, width))


# The tables


def test_a_table_is_computed_once(way: str) -> None:
    x = noise(2, 59)
    expected = dct(x), idct(x)
    with mock.patch.multiple(np, cos=None, exp=None):
        assert torch.equal(dct(x), expected[0]) and torch.equal(idct(x), expected[1])


def test_a_table_on_another_device_is_copied_there_once() -> None:
    x = torch.ones(2, 53)
    arguments = spectral._dct_matrix, x.shape[-1], x.dtype, x.device
    with torch.inference_mode():
        copy = spectral._on_device(*arguments)
    assert spectral._on_device(*arguments) is copy
    assert not copy.is_inference(), "autograd could not save it"
    torch.testing.assert_close(copy @ copy.T, torch.eye(53))


@pytest.mark.parametrize("width", [61, 71])  # widths of no other test, so that the tables are made here
def test_tables_made_under_inference_mode_serve_in_training(width: int, way: str) -> None:
    x = noise(2, width + list(WAYS).index(way))
    with torch.inference_mode():
        first = dct(x)
    x.requires_grad_()
    y = dct(x)
    y.sum().backward()
    assert torch.equal(y, first)
    torch.testing.assert_close(x.grad, idct(torch.ones_like(x)))


def test_a_table_made_under_a_default_device_is_real(way: str) -> None:
    x = noise(2, 73 + list(WAYS).index(way))
    with torch.device("meta"):
        y = dct(x)
    np.testing.assert_allclose(y.numpy(), scipy_dct(x.numpy()), rtol=0, atol=1e-12)


def test_a_view_that_is_negated_when_it_is_read(way: str) -> None:
    x = torch.complex(noise(2, 70), noise(2, 70, seed=1)).conj().imag
    assert x.is_neg()
    np.testing.assert_allclose(dct(x).numpy(), scipy_dct(-noise(2, 70, seed=1).numpy()), rtol=0, atol=1e-12)


# Transformed functions


def test_vmap_and_functional_gradients(way: str) -> None:
    x = noise(3, 4, 43 + list(WAYS).index(way))  # a width of no other test: the tables are made under vmap
    each = torch.func.vmap(dct)(x)
    torch.testing.assert_close(each, dct(x))
    torch.testing.assert_close(torch.func.vmap(idct, in_dims=1, out_dims=1)(x), idct(x))
    gradient = torch.func.vmap(torch.func.grad(lambda row: dct(row).pow(3).sum()))(x.flatten(0, 1))
    torch.testing.assert_close(gradient, idct(3 * dct(x.flatten(0, 1)) ** 2))


@pytest.mark.parametrize("some", [False, True])
def test_the_filter_under_vmap(some: bool, way: str) -> None:
    x, weight = noise(3, 50, 70), noise(3, 70, seed=1)
    index = torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(2)) if some else None
    each = [spectral_filter(x[n], weight[n], index[n] if index is not None else None) for n in range(3)]
    over_all = torch.func.vmap(spectral_filter, in_dims=(0, 0, 0 if some else None))
    torch.testing.assert_close(over_all(x, weight, index), torch.stack(each))
    shared = torch.func.vmap(spectral_filter, in_dims=(0, None, None))(x, weight[0], None)
    torch.testing.assert_close(shared, spectral_filter(x, weight[0]))


def test_fake_tensors(way: str) -> None:
    """With tables made before, and with tables made among them, which are of use afterwards too."""
    for width in (70, 75 + list(WAYS).index(way)):
        x, mode = noise(3, width), FakeTensorMode()
        before = dct(x) if width == 70 else None
        with mode:
            fake = dct(mode.from_tensor(x))
        assert fake.shape == x.shape and fake.dtype == x.dtype
        after = dct(x)
        assert before is None or torch.equal(after, before)
        np.testing.assert_allclose(after.numpy(), scipy_dct(x.numpy()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("learning", [True, False])
def test_forward_mode_derivatives(learning: bool, way: str) -> None:
    x, tangent, weight = noise(50, 70), noise(50, 70, seed=1), noise(70, seed=2)
    with torch.set_grad_enabled(learning):
        for function in (dct, idct, lambda x: spectral_filter(x, weight)):  # each a linear map
            torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,))[1], function(tangent))
        change = torch.func.jvp(spectral_entropy, (x,), (tangent,))[1]
    step = 1e-6 * tangent
    differences = (spectral_entropy(x + step) - spectral_entropy(x - step)) / 2e-6
    torch.testing.assert_close(change, differences, atol=1e-6, rtol=1e-5)


COMPILED = """
import torch
from torch._dynamo.backends.common import aot_autograd
from chiaroscuro.ops import spectral

graphs = []

def keep(graph, inputs):
    graphs.append(graph)
    return graph.forward

def everything(x, weight, index):
    coefficients = spectral.spectral_coefficients(x)
    some = spectral.spectral_filter(coefficients, weight, index)
    mixed, entropy = spectral.spectral_mix_with_entropy(x, weight)
    return spectral.dct(x), spectral.idct(x), spectral.entropy_of_spectrum(coefficients), some, mixed, entropy

for width in (40, 41, 100, 101):
    for dynamic in (None, True):
        torch._dynamo.reset()
        graphs.clear()
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        compiled = torch.compile(everything, backend=backend, fullgraph=True, dynamic=dynamic)
        for tokens in (3, 5, 4000, 7):
            x = torch.randn(tokens, width, requires_grad=True)
            weight, index = torch.randn(width, requires_grad=True), torch.tensor([2, 0])
            found, expected = compiled(x, weight, index), everything(x, weight, index)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            losses = [sum(y.pow(2).sum() for y in ys) for ys in (found, expected)]
            ours, theirs = (torch.autograd.grad(loss, (x, weight)) for loss in losses)
            torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-3)
        assert len(graphs) == (2 if dynamic else 4), len(graphs)  # forward and backward
        names = {str(node.target) for graph in graphs for node in graph.graph.nodes}
        assert any("mm" in name or "fft" in name for name in names), names
        assert not any(part in name for name in names for part in ("cos", "sin", "exp.", "polar")), names

torch._dynamo.reset()
wide = torch.compile(spectral.dct, backend="aot_eager", fullgraph=True, dynamic=True)
for width in (40, 41, 100, 101, 64):  # a graph per width: the tables are constants
    x = torch.randn(3, width)
    torch.testing.assert_close(wide(x), spectral.dct(x), atol=1e-5, rtol=1e-5)

class Everything(torch.nn.Module):
    forward = staticmethod(everything)

for width in (40, 101):
    inputs = torch.randn(3, width), torch.randn(width), torch.tensor([2, 0])
    for strict in (False, True):
        shapes = {0: torch.export.Dim.DYNAMIC}, None, None
        exported = torch.export.export(Everything(), inputs, dynamic_shapes=shapes, strict=strict).module()
        more = torch.randn(9, width), *inputs[1:]
        torch.testing.assert_close(exported(*more), everything(*more), atol=1e-5, rtol=1e-5)
"""


def test_it_compiles_whole_and_exports_with_tables_as_constants() -> None:
    """In a process of its own, for torch.compile can't see through the annotations' checks."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# The entropy


@given(
    width=st.integers(2, 300),
    seed=st.integers(0, 2**32),
    scale=st.floats(-2, 6).map(lambda e: 10**e),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    spectrum=st.sampled_from(["orthonormal", "reference"]),
)
def test_entropy_lies_in_its_range_and_forgets_the_scale(
    width: int, seed: int, scale: float, dtype: torch.dtype, spectrum: str
) -> None:
    x = noise(4, width, seed=seed, dtype=dtype)
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-3) * math.sqrt(width)
    entropy = spectral_entropy(x, spectrum)
    rounding = 1e-7 if dtype == torch.float64 else 1e-6
    assert ((entropy >= -rounding) & (entropy <= 1 + rounding)).all()
    # Where x is tiny, ε takes part in the energy d · scale².
    tolerance = 2 * rounding + 2e-8 / (width * scale**2)
    torch.testing.assert_close(spectral_entropy(scale * x, spectrum), entropy, rtol=0, atol=tolerance)


@pytest.mark.parametrize("width", [2, 16, 70, 256])
def test_entropy_at_its_ends(width: int) -> None:
    tone = idct(torch.eye(width, dtype=torch.float64))
    nothing = torch.zeros(width, dtype=torch.float64)
    torch.testing.assert_close(spectral_entropy(tone), nothing, rtol=0, atol=1e-7)
    flat = idct(torch.ones(width, dtype=torch.float64))
    assert float(spectral_entropy(flat)) == pytest.approx(1, abs=1e-6)


def test_entropy_of_one_feature_is_zero() -> None:
    assert torch.equal(spectral_entropy(torch.tensor([[3.0], [0.0], [-1e4]])), torch.zeros(3))


def test_the_authors_transform(shared: Path) -> None:
    vectors = torch.load(shared / "vectors" / "dct.expected.pt", weights_only=True)
    x, theirs = vectors["x"], vectors["reference_dct"]
    gain = torch.full((x.shape[-1],), 2.0, dtype=x.dtype)
    gain[0] = 2 * math.sqrt(2)
    torch.testing.assert_close(dct(x) * gain, theirs)
    torch.testing.assert_close(2 * x, vectors["reference_idct_of_dct"])
    power = theirs.square()
    p = power / power.sum(-1, keepdim=True)
    entropy = -(p * p.log()).sum(-1) / math.log(x.shape[-1])
    torch.testing.assert_close(spectral_entropy(x, "reference"), entropy, rtol=0, atol=1e-6)
    assert (spectral_entropy(x) - entropy).abs().max() > 1e-4, "the two spectra should differ here"


# The filter


@given(width=st.integers(1, 140), seed=st.integers(0, 2**32))
def test_the_filter_is_one_linear_map(width: int, seed: int) -> None:
    x, weight = noise(5, width, seed=seed), noise(width, seed=seed + 1)
    matrix = torch.from_numpy(scipy_dct(np.eye(width)).T.copy())
    torch.testing.assert_close(spectral_mix(x, weight), x @ (matrix.mT @ torch.diag(weight) @ matrix).mT)
    torch.testing.assert_close(spectral_mix(x, torch.ones_like(weight)), x)


# Mistakes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", [dct, idct, spectral_entropy, lambda x: spectral_mix(x, torch.ones(3))])
def test_what_cannot_be_transformed(function: Callable[[Tensor], Tensor]) -> None:
    for wrong in (torch.ones(3, dtype=torch.long), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="real floating"):
            function(wrong)
    for wrong in (torch.tensor(1.0), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="width of at least 1"):
            function(wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(4,), (1,), (), (3, 3), (1, 3)])
def test_a_filter_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need \(3,\)"):
        spectral_mix(torch.ones(3, 3), torch.ones(shape))


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_spectrum() -> None:
    with pytest.raises(ValueError, match="'orthonormal', 'reference'"):
        spectral_entropy(torch.ones(2, 3), "Reference")  # type: ignore[arg-type]


# Some tokens


@given(
    rows=st.integers(1, 30), width=st.integers(1, 100), seed=st.integers(0, 2**31), way=st.sampled_from(sorted(WAYS))
)
def test_the_filter_of_some_tokens(rows: int, width: int, seed: int, way: str) -> None:
    x, weight = noise(rows, width, seed=seed), noise(width, seed=seed + 1)
    index = torch.randint(rows, (rows // 2,), generator=torch.Generator().manual_seed(seed))
    with mock.patch.multiple(spectral, **FORCED[way]):
        for kind in (torch.int64, torch.int32):
            y = spectral_filter(x, weight, index.to(kind))
    np.testing.assert_allclose(y.numpy(), scipy_idct((x[index] * weight).numpy()), rtol=0, atol=1e-10)


def test_no_tokens(way: str) -> None:
    nothing = spectral_filter(noise(4, 70), noise(70), torch.zeros(0, dtype=torch.long))
    assert nothing.shape == (0, 70)


def test_a_row_that_is_not_there() -> None:
    for wrong in (-1, 4):
        with pytest.raises(IndexError):
            spectral_filter(noise(4, 70), noise(70), torch.tensor([0, wrong]))


def test_an_index_needs_rows() -> None:
    with pytest.raises(ValueError, match="flatten X first"):
        spectral_filter(noise(2, 2, 70), noise(70), torch.zeros(2, dtype=torch.long))
