"""The DCT pair and the spectral entropy against scipy in float64, on all ways of computing them."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
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
PATHS = {"matrix": spectral.dct_by_matrix, "fft": spectral.dct_by_fft, "scipy": spectral.dct_by_scipy}


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


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that asks for it runs three times: all lengths by the matrix, by PyTorch's FFT, by scipy."""
    monkeypatch.setattr(spectral, "_way", lambda x: PATHS[request.param])
    monkeypatch.setattr(spectral, "FEW", 0)
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
def test_the_pair_and_the_entropy_are_scipys(width: int, path: str) -> None:
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
    path=st.sampled_from(sorted(PATHS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
)
def test_any_shape_layout_and_type(
    leading: list[int], width: int, layout: str, path: str, dtype: torch.dtype, seed: int
) -> None:
    x = noise(*leading, width, seed=seed, dtype=dtype)
    if x.ndim > 1:
        x = layouts()[layout](x)
    before = x.clone()
    with mock.patch.multiple(spectral, _way=lambda x: PATHS[path], FEW=0):
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
def test_gradients(width: int, path: str) -> None:
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


def test_the_gradient_of_silence_is_finite(path: str) -> None:
    x = torch.zeros(3, 70, requires_grad=True)
    entropy = spectral_entropy(x)
    assert torch.equal(entropy, torch.zeros(3))
    entropy.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# Types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, path: str) -> None:
    x = noise(64, 100, dtype=dtype)
    for function in (dct, idct):
        assert torch.equal(function(x), function(x.float()).to(dtype))
    assert torch.equal(spectral_entropy(x), spectral_entropy(x.float()))
    weight = noise(100, seed=1, dtype=dtype)
    assert torch.equal(spectral_mix(x, weight), spectral_mix(x.float(), weight.float()).to(dtype))
    sparse = torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=dtype)
    torch.testing.assert_close(entropy_of_spectrum(sparse), entropy_of_spectrum(sparse.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, path: str) -> None:
    x, weight = noise(6, 40, dtype=torch.float32), noise(40, seed=1, dtype=torch.float32)
    for function in (dct, idct, spectral_entropy, lambda x: spectral_mix(x, weight)):
        expected = function(x)
        with torch.autocast("cpu", dtype):
            assert torch.equal(function(x), expected)


def test_double_and_single_tables_are_kept_apart(path: str) -> None:
    single = dct(noise(2, 37, dtype=torch.float32))
    double = dct(noise(2, 37))
    np.testing.assert_allclose(double.numpy(), scipy_dct(noise(2, 37).numpy()), rtol=0, atol=1e-12)
    assert single.dtype == torch.float32


@pytest.mark.parametrize(
    ("width", "device", "shareable", "expected"),
    [
        (64, "cpu", True, "matrix"),
        (64, "meta", True, "matrix"),
        (65, "cpu", True, "scipy"),
        (65, "cpu", False, "fft"),
        (65, "meta", True, "fft"),
    ],
)
def test_which_way_is_taken(width: int, device: str, shareable: bool, expected: str) -> None:
    with mock.patch.object(spectral, "can_share_out", return_value=shareable):
        assert spectral._way(torch.ones(2, width, device=device)) is PATHS[expected]


# The tables


@pytest.mark.parametrize("table", [spectral._dct_matrix, spectral._twiddle, spectral._inverse_twiddle])
def test_a_table_is_made_once(table: Callable[..., Tensor]) -> None:
    arguments = (53, torch.float32, torch.device("cpu"))
    table.cache_clear()
    with torch.inference_mode():
        made = table(*arguments)
    assert table(*arguments) is made
    assert not made.is_inference(), "autograd could not save it"


def test_no_trigonometry_at_the_second_call(path: str) -> None:
    x = noise(2, 59)
    expected = dct(x), idct(x)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cos", "sin", "polar", "exp"):
            patch.setattr(torch, name, None)
        assert torch.equal(dct(x), expected[0]) and torch.equal(idct(x), expected[1])


@pytest.mark.parametrize("width", [61, 71])  # widths of no other test, so that the tables are made here
def test_tables_made_under_inference_mode_serve_in_training(width: int, path: str) -> None:
    x = noise(2, width + list(PATHS).index(path))
    with torch.inference_mode():
        first = dct(x)
    x.requires_grad_()
    y = dct(x)
    y.sum().backward()
    assert torch.equal(y, first)
    torch.testing.assert_close(x.grad, idct(torch.ones_like(x)))


def test_a_table_made_under_a_default_device_is_real(path: str) -> None:
    x = noise(2, 73 + list(PATHS).index(path))
    with torch.device("meta"):
        y = dct(x)
    np.testing.assert_allclose(y.numpy(), scipy_dct(x.numpy()), rtol=0, atol=1e-12)


def test_a_view_that_is_negated_when_it_is_read(path: str) -> None:
    x = torch.complex(noise(2, 70), noise(2, 70, seed=1)).conj().imag
    assert x.is_neg()
    for function in (dct, PATHS[path]):  # an operator gets it resolved
        expected = scipy_dct(-noise(2, 70, seed=1).numpy())
        np.testing.assert_allclose(function(x).numpy(), expected, rtol=0, atol=1e-12)


# Transformed functions


def test_vmap_and_functional_gradients(path: str) -> None:
    x = noise(3, 4, 43 + list(PATHS).index(path))
    assert torch.equal(torch.func.vmap(dct)(x), dct(x))
    torch.testing.assert_close(torch.func.vmap(idct, in_dims=1, out_dims=1)(x), idct(x))
    gradient = torch.func.vmap(torch.func.grad(lambda row: dct(row).pow(3).sum()))(x.flatten(0, 1))
    torch.testing.assert_close(gradient, idct(3 * dct(x.flatten(0, 1)) ** 2))


COMPILED = """
import torch
from chiaroscuro.ops import spectral

operations = set()

def backend(graph, example):
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            operations.update(str(node.target) for node in module.graph.nodes)
    return graph.forward

for width in (40, 41, 100, 101):
    x, weight = torch.randn(3, width), torch.randn(width)
    expected = spectral.spectral_mix(x, weight)
    y = torch.compile(spectral.spectral_mix, backend=backend, fullgraph=True)(x, weight)
    torch.testing.assert_close(y, expected)
    x.requires_grad_()
    y = torch.compile(spectral.spectral_mix, backend="aot_eager", fullgraph=True)(x, weight)
    (gradient,) = torch.autograd.grad(y.pow(2).sum(), x)
    (expected,) = torch.autograd.grad(spectral.spectral_mix(x, weight).pow(2).sum(), x)
    torch.testing.assert_close(gradient, expected)
assert any("orthonormal_dct" in name for name in operations), operations
assert not any(part in name for name in operations for part in ("cos", "sin", "polar")), operations
for inverse in (False, True):
    for width in (40, 101):
        rows = torch.randn(2, width, 3).mT
        torch.library.opcheck(torch.ops.chiaroscuro.orthonormal_dct.default, (rows, inverse))
for index in (None, torch.tensor([2, 0])):
    inputs = torch.randn(3, 101), torch.randn(101), index
    torch.library.opcheck(torch.ops.chiaroscuro.filtered_idct.default, inputs)

def learn(x):
    spectral.dct(x).sum().backward()

torch.compile(learn, backend="eager")(torch.randn(20000, 101, requires_grad=True))
frames = {metrics.co_name for metrics in torch._dynamo.utils.get_compilation_metrics()}
assert "learn" in frames and not frames & {"_", "dct_by_scipy", "share_out", "dct_by_fft", "work"}, frames
"""


def test_compiled_it_is_the_same_without_a_break_or_a_cosine() -> None:
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


# In blocks


@given(
    rows=st.integers(0, 30),
    width=st.sampled_from([1, 5, 64, 65, 96]),
    seed=st.integers(0, 2**31),
    some=st.booleans(),
    block=st.sampled_from([1, 200, 2**18]),
    path=st.sampled_from(sorted(PATHS)),
)
def test_blocks_change_nothing(rows: int, width: int, seed: int, some: bool, block: int, path: str) -> None:
    """Scipy's transform goes through the rows in blocks, and without a gradient the filter and the entropy too."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rows, width), (width,)))
    index = torch.randperm(rows, generator=generator)[: rows // 2] if some else None
    with mock.patch.multiple(spectral, BLOCK=block, FEW=0, _way=lambda x: PATHS[path]):
        blocks = dct(x), spectral_filter(x, weight, index), entropy_of_spectrum(x)
    matrix = torch.from_numpy(scipy_dct(np.eye(width)))
    x.requires_grad_()
    whole = x @ matrix, spectral_filter(x, weight, index), entropy_of_spectrum(x)
    torch.testing.assert_close(blocks, tuple(y.detach() for y in whole), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(whole[1], ((x if index is None else x[index]) * weight) @ matrix.T)


@pytest.mark.parametrize("learning", [False, True])
def test_blocks_are_taken_where_nothing_is_learned(learning: bool) -> None:
    """Else the property above would compare one way with itself."""
    x, weight = noise(10 * torch.get_num_threads(), 70).requires_grad_(learning), noise(70, seed=1)
    with (
        mock.patch.multiple(spectral, BLOCK=2 * 70, FEW=0, _way=lambda x: spectral.dct_by_scipy),
        mock.patch.object(spectral, "_entropy", wraps=spectral._entropy) as entropy,
        mock.patch.object(spectral, "idct", wraps=spectral.idct) as whole,
        mock.patch.object(spectral.scipy.fft, "dct", wraps=scipy.fft.dct) as transform,
    ):
        spectral_filter(x, weight)
        entropy_of_spectrum(x)
    assert (whole.call_count, entropy.call_count) == ((1, 1) if learning else (0, 5))
    assert [len(call.args[0]) for call in transform.call_args_list] == [2] * (5 * torch.get_num_threads())


@pytest.mark.parametrize("index", [None, torch.tensor([3, 0, 3])])
@pytest.mark.parametrize(
    ("of_coefficients", "of_weight", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_a_filter_in_blocks_has_the_type_of_the_product(
    index: Tensor | None, of_coefficients: torch.dtype, of_weight: torch.dtype, expected: torch.dtype
) -> None:
    coefficients, weight = noise(4, 70, dtype=of_coefficients), noise(70, seed=1, dtype=of_weight)
    with mock.patch.multiple(spectral, BLOCK=70, FEW=0, _way=lambda x: spectral.dct_by_scipy):
        y = spectral_filter(coefficients, weight, index)
    assert y.dtype == expected
    chosen = coefficients if index is None else coefficients[index]
    torch.testing.assert_close(y, idct(chosen * weight))


@pytest.mark.parametrize("layout", sorted(layouts()))
def test_blocks_of_any_layout(layout: str) -> None:
    coefficients, weight = layouts()[layout](noise(50, 70)), noise(2 * 70, seed=1)[::2]
    index = torch.randint(50, (2 * 40,), generator=torch.Generator().manual_seed(2))[::2]
    for kind in (torch.int64, torch.int32):
        with mock.patch.multiple(spectral, BLOCK=2 * 70, FEW=0, _way=lambda x: spectral.dct_by_scipy), torch.no_grad():
            y = spectral_filter(coefficients, weight, index.to(kind))
        torch.testing.assert_close(y, spectral_filter(coefficients[index].contiguous(), weight.contiguous()))


@pytest.mark.parametrize("rows", [3, 300])
def test_a_row_that_is_not_there(rows: int) -> None:
    """In one block and in several."""
    x, weight = noise(400, 70), torch.ones(70, dtype=torch.float64)
    with mock.patch.object(spectral, "BLOCK", 100 * 70):
        for wrong in (-1, 400):
            index = torch.arange(rows)
            index[1] = wrong
            with pytest.raises(IndexError):
                spectral_filter(x, weight, index)


@pytest.mark.parametrize("rows", [2, 50])
def test_an_index_needs_rows(rows: int) -> None:
    with pytest.raises(ValueError, match="flatten X first"):
        spectral_filter(noise(rows, 2, 70), noise(70), torch.zeros(rows, dtype=torch.long))


def test_a_filter_on_another_device_is_an_error_in_blocks_too() -> None:
    with mock.patch.object(spectral, "BLOCK", 70), pytest.raises((RuntimeError, NotImplementedError)):
        spectral_filter(noise(50, 70), torch.ones(70, dtype=torch.float64, device="meta"))


@pytest.mark.filterwarnings("error")
def test_infinity_times_nothing_is_no_warning() -> None:
    x = torch.full((50, 70), math.inf)
    with mock.patch.object(spectral, "BLOCK", 2 * 70), np.errstate(all="raise"):
        assert spectral_filter(x, torch.zeros(70)).isnan().all()


@pytest.mark.parametrize("learning", [True, False])
def test_forward_mode_derivatives(learning: bool, path: str) -> None:
    """Of all three functions, in blocks too, and where no gradient is wanted."""
    x, tangent, weight = noise(50, 70), noise(50, 70, seed=1), noise(70, seed=2)
    with mock.patch.object(spectral, "BLOCK", 2 * 70), torch.set_grad_enabled(learning):
        for function in (dct, idct, lambda x: spectral_filter(x, weight)):  # each a linear map
            torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,))[1], function(tangent))
        change = torch.func.jvp(spectral_entropy, (x,), (tangent,))[1]
    step = 1e-6 * tangent
    differences = (spectral_entropy(x + step) - spectral_entropy(x - step)) / 2e-6
    torch.testing.assert_close(change, differences, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("some", [False, True])
def test_blocks_under_vmap_and_of_fake_tensors(some: bool) -> None:
    x, weight = noise(3, 50, 70), noise(3, 70, seed=1)
    index = torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(2)) if some else None
    with mock.patch.multiple(spectral, BLOCK=2 * 70, FEW=0), torch.no_grad():
        each = [spectral_filter(x[n], weight[n], index[n] if index is not None else None) for n in range(3)]
        over_all = torch.func.vmap(spectral_filter, in_dims=(0, 0, 0 if some else None))
        torch.testing.assert_close(over_all(x, weight, index), torch.stack(each))
        shared = torch.func.vmap(spectral_filter, in_dims=(0, None, None))(x, weight[0], None)
        torch.testing.assert_close(shared, spectral_filter(x, weight[0]))
        mode = FakeTensorMode()
        fake = [None if t is None else mode.from_tensor(t) for t in (x[0], weight[0], index[0] if some else None)]
        with mode:
            y = spectral_filter(*fake)
    assert (y.shape, y.dtype) == (each[0].shape, each[0].dtype)


def test_a_transform_that_scipy_does_elsewhere_is_copied() -> None:
    """That it may be done in place is no promise."""
    x, theirs = noise(5, 70), scipy.fft.dct

    def elsewhere(part: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
        return theirs(part.copy(), *arguments, **options)

    with mock.patch.object(spectral, "BLOCK", 2 * 70), mock.patch.object(spectral.scipy.fft, "dct", elsewhere):
        y = spectral.dct_by_scipy(x)
    np.testing.assert_allclose(y.numpy(), scipy_dct(x.numpy()), rtol=0, atol=1e-12)
