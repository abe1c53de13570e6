"""The Triton kernels of the spectral path against the plain functions: interpreted on a CPU, and on a GPU where one is.

Triton decides at its import whether its kernels are interpreted, and the annotations' checks wrap what they check, so
the kernels run in a process of their own: a test sends it a problem, and it compares.
"""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from chiaroscuro.ops import spectral

without_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is not installed")
Elsewhere = Callable[..., None]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(scope="module", params=DEVICES)
def elsewhere(request: pytest.FixtureRequest) -> Iterator[Elsewhere]:
    """Run a function of a device in a process where kernels run on that device."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield lambda function, *arguments: process.submit(function, request.param, *arguments).result()


def problem(device: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str) -> list[Tensor]:
    """X, w, and directions for the gradients of y and H."""
    generator = torch.Generator().manual_seed(seed)
    x, to_mixed = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    if layout == "silence":
        x[:1] = 0
    if layout == "faint":  # so that ε is no trifle
        x *= 1e-4
    if layout == "strided":
        x, to_mixed = (torch.stack([t, -t], -1)[..., 0] for t in (x, to_mixed))
    weight = torch.randn(shape[-1] + (layout == "filter too long"), generator=generator).to(device)
    return [x, weight, to_mixed, torch.randn(shape[:-1], generator=generator).to(device)]


def results(function: Any, numbers: list[Tensor], spectrum: str) -> list[Tensor]:
    """Y, H, and the gradients of x and w."""
    x, weight = (t.detach().requires_grad_() for t in numbers[:2])
    mixed, entropy = function(x, weight, spectrum)
    torch.autograd.backward([mixed, entropy], [numbers[2].to(mixed.dtype), numbers[3].to(entropy.dtype)])
    assert x.grad is not None and weight.grad is not None
    return [mixed.detach(), entropy.detach(), x.grad, weight.grad]


def differences(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, spectrum: str, layout: str, programs: int, seed: int
) -> None:
    """Raise unless the kernels, forward and backward, are the plain function in float64 but for rounding."""
    from chiaroscuro.ops.triton import spectral as kernels

    numbers = problem(device, shape, dtype, seed, layout)
    with mock.patch.object(kernels, "PROGRAMS", programs):
        found = results(kernels.spectral_mix_with_entropy, numbers, spectrum)
    exact = results(spectral.spectral_mix_with_entropy, [t.double() for t in numbers], spectrum)
    assert [t.dtype for t in found] == [dtype, torch.float32, dtype, torch.float32]
    for ours, wanted in zip(found, exact, strict=True):
        # A transform's error grows with the numbers it sums; what is in half precision is rounded once more.
        reach = float(wanted.abs().max().clamp(min=1))
        tolerance = 2e-6 * reach + torch.finfo(ours.dtype).eps * reach
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=tolerance)


widths = st.sampled_from([16, 32, 64, 128, 256, 512, 1024, 2048, 4096])


@without_triton
@settings(max_examples=30)
@given(
    width=widths,
    leading=st.one_of(st.integers(1, 20).map(lambda n: (n,)), st.sampled_from([(), (2, 3), (1, 1)])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spectrum=st.sampled_from(["orthonormal", "reference"]),
    layout=st.sampled_from(["contiguous", "strided", "faint"]),
    programs=st.sampled_from([1, 2, 512]),
    seed=st.integers(0, 2**31),
)
@example(4096, (3,), torch.float32, "reference", "strided", 2, 0)
@example(64, (3,), torch.float32, "reference", "faint", 1, 0)
@example(2048, (3,), torch.bfloat16, "orthonormal", "contiguous", 512, 0)
@example(16, (43,), torch.float16, "reference", "contiguous", 2, 0)  # tiles in turn, the last not full
def test_the_kernels_are_the_plain_function(
    elsewhere: Elsewhere,
    width: int,
    leading: tuple[int, ...],
    dtype: torch.dtype,
    spectrum: str,
    layout: str,
    programs: int,
    seed: int,
) -> None:
    elsewhere(differences, (*leading, width), dtype, spectrum, layout, programs, seed)


@without_triton
def test_silence_has_no_entropy_and_a_finite_gradient(elsewhere: Elsewhere) -> None:
    elsewhere(differences, (3, 64), torch.float32, "orthonormal", "silence", 512, 0)


@without_triton
def test_a_filter_or_spectrum_that_does_not_fit_is_refused(elsewhere: Elsewhere) -> None:
    with pytest.raises(ValueError, match="weight has shape"):
        elsewhere(differences, (3, 64), torch.float32, "orthonormal", "filter too long", 512, 0)
    with pytest.raises(ValueError, match="choose one of"):
        elsewhere(differences, (3, 64), torch.float32, "even", "contiguous", 512, 0)


def compiled(device: str) -> None:
    from chiaroscuro.ops.triton.spectral import spectral_mix_with_entropy

    x, weight, *_ = problem(device, (5, 32), torch.float32, 0, "contiguous")
    inputs = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.chiaroscuro.spectral_mix_with_entropy.default, (*inputs, "reference"))
    both = []
    for function in (
        spectral_mix_with_entropy,
        torch.compile(spectral_mix_with_entropy, backend="aot_eager", fullgraph=True),
    ):
        mixed, entropy = function(*inputs)
        both.append([mixed, entropy, *torch.autograd.grad(mixed.pow(2).sum() + entropy.pow(2).sum(), inputs)])
    torch.testing.assert_close(*both)


@without_triton
def test_compiled_it_is_the_same_without_a_break(elsewhere: Elsewhere) -> None:
    elsewhere(compiled)


# What the interpreter can't show: that a GPU's compiler takes the kernels, and that they fit.


def shared_memory(kernel_name: str, width: int, number: str, capability: int) -> int:
    """Bytes of shared memory that a kernel needs, as Triton's compiler has it; none of this needs a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from chiaroscuro.ops.triton import spectral as kernels

    kernel = getattr(kernels, kernel_name)
    names = kernel.arg_names
    constants = {**kernels._sizes(width), "REFERENCE": True}
    types = {**dict.fromkeys(names, "*fp32"), "rows": "i32", **dict.fromkeys(constants, "constexpr")}
    types.update((name, f"*{number}") for name in ("x", "mixed", "to_mixed", "to_x") if name in names)
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.LAUNCH)
    return built.metadata.shared


@without_triton
@pytest.mark.slow
@pytest.mark.parametrize(("width", "number"), [(64, "fp32"), (4096, "bf16")])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_the_kernels_compile_for_a_gpu_and_fit_it(
    kernel: str, width: int, number: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        # What a block may have on the smallest processors of this kind; 227 KB on the largest.
        assert process.submit(shared_memory, kernel, width, number, 90).result() <= 99 * 1024


# The plain function, and who gets the kernels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_plain_function_is_filter_and_entropy_from_two_transforms(dtype: torch.dtype) -> None:
    x, weight, *_ = problem("cpu", (2, 3, 24), dtype, 0, "contiguous")
    wanted = spectral.spectral_mix(x, weight), spectral.spectral_entropy(x, "reference")
    with mock.patch.object(spectral, "_transform", mock.Mock(wraps=spectral._transform)) as transform:
        found = spectral.spectral_mix_with_entropy(x, weight, "reference")
    assert transform.call_count == 2
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def on_a_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, device="cuda", dtype=dtype)


def test_the_kernels_get_what_they_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(spectral, "HAS_TRITON", True)
    for width in (16, 64, 4096):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert spectral.has_kernel(on_a_gpu(2, 3, width, dtype=dtype))
    for width in (8, 24, 100, 1023, 8192):
        assert not spectral.has_kernel(on_a_gpu(2, width))
    assert not spectral.has_kernel(on_a_gpu(2, 64, dtype=torch.float64))
    assert not spectral.has_kernel(on_a_gpu(0, 64))
    assert not spectral.has_kernel(torch.empty(2, 64))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not spectral.has_kernel(on_a_gpu(2, 64))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(spectral, "HAS_TRITON", False)
    assert not spectral.has_kernel(on_a_gpu(2, 64))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import chiaroscuro.ops, torch
chiaroscuro.ops.spectral.spectral_mix_with_entropy(torch.randn(3, 64), torch.ones(64))
"""


def test_nobody_else_needs_triton() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
