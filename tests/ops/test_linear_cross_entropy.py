"""The loss in chunks is the loss of the logits in full, and never holds them.

Oracle: `torch.nn.functional.cross_entropy` of all logits at once. The product that makes the logits is in the inputs'
type, or autocast's, as the function promises; from there on the oracle is in float64.
"""

import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chiaroscuro.ops import linear_cross_entropy

MODULE = import_module("chiaroscuro.ops.linear_cross_entropy")  # the function took its name in the package
IGNORED = MODULE.IGNORED


def in_chunks(chunk: int) -> Any:
    return mock.patch.object(MODULE, "CHUNK", chunk)


def in_full(hidden: Tensor, weight: Tensor, targets: Tensor, *, divisor: int | float | Tensor | None = None) -> Tensor:
    """The oracle."""
    logits = F.linear(hidden, weight).double()
    if divisor is None:
        return F.cross_entropy(logits, targets.long())
    return F.cross_entropy(logits, targets.long(), reduction="sum") / divisor


def numbers(
    seed: int, tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64, ignored: str = "some"
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head whose logits are about N(0, 1), and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * width**-0.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    left_out = torch.rand(tokens, generator=generator) < {"none": 0.0, "some": 0.5, "all": 1.0}[ignored]
    return hidden.to(dtype), weight.to(dtype), targets.masked_fill(left_out, IGNORED)


def results(
    function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of hidden states and weight where the loss counts 1.7 times."""
    # Not cloned, which would change how they lie in memory.
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, targets, **options)
    loss.backward(torch.tensor(1.7, dtype=loss.dtype))
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


divisors = st.one_of(
    st.none(),
    st.integers(1, 40),
    st.floats(0.5, 40),
    st.integers(1, 40).map(torch.tensor),
    st.floats(0.5, 40).map(torch.tensor),
)
cases = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 14),
        "width": st.integers(1, 7),
        "vocabulary": st.integers(1, 9),
        "chunk": st.sampled_from([1, 2, 3, 5, 14, 512]),
        "ignored": st.sampled_from(["none", "some", "all"]),
        "divisor": divisors,
        "indices": st.sampled_from([torch.int16, torch.int32, torch.int64]),
        "strided": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-12),
        (torch.float64, True, 1e-12),  # which autocast leaves alone
        (torch.float32, False, 1e-5),
        (torch.float32, True, 3e-2),
        (torch.bfloat16, False, 3e-2),
        (torch.bfloat16, True, 3e-2),
    ],
)
def test_chunks_equal_the_logits_in_full_with_both_gradients(
    dtype: torch.dtype, autocast: bool, tolerance: float
) -> None:
    @given(case=cases)
    def holds(case: dict[str, Any]) -> None:
        sizes = (case["tokens"], case["width"], case["vocabulary"])
        hidden, weight, targets = numbers(case["seed"], *sizes, dtype, case["ignored"])
        if case["strided"]:
            hidden, weight = (torch.stack([x, x.flip(0)], dim=-1)[..., 0] for x in (hidden, weight))
        inputs = hidden, weight, targets.to(case["indices"])
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            wanted = results(in_full, *inputs, divisor=case["divisor"])
            with in_chunks(case["chunk"]):
                found = results(linear_cross_entropy, *inputs, divisor=case["divisor"])
        assert [x.dtype for x in found] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance, equal_nan=True)

    holds()


def test_a_mean_over_nothing_is_nan_and_teaches_nothing() -> None:
    inputs = numbers(0, 5, 3, 7, ignored="all")
    loss, *gradients = results(linear_cross_entropy, *inputs)
    assert loss.isnan()
    assert all((g == 0).all() for g in gradients)
    assert results(linear_cross_entropy, *inputs, divisor=4)[0] == 0


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), chunk=st.integers(1, 6))
def test_gradients_are_those_of_finite_differences(seed: int, chunk: int) -> None:
    hidden, weight, targets = numbers(seed, 6, 3, 5)
    targets[0] = 0  # a mean over nothing is NaN
    with in_chunks(chunk):
        assert torch.autograd.gradcheck(
            lambda h, w: linear_cross_entropy(h, w, targets), (hidden.requires_grad_(), weight.requires_grad_())
        )


@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision_only_products_are_rounded(autocast: bool) -> None:
    """The sums, over words, tokens and chunks, are in float32: here 2000 chunks, of which bfloat16 would lose most."""
    hidden, weight, targets = numbers(0, 2000, 8, 11, torch.float32 if autocast else torch.bfloat16, "none")
    hidden = hidden.abs()  # so that what the chunks add is not random
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), in_chunks(1):
        loss, _, to_weight = results(linear_cross_entropy, hidden, weight, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), in_full(hidden, weight, targets), atol=0, rtol=1e-5)
    exact = results(in_full, hidden.double(), weight.double(), targets)[2]
    assert (to_weight - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_overflow_nothing(dtype: torch.dtype) -> None:
    hidden, weight, targets = numbers(0, 20, 8, 30, dtype)
    for scale in (1e4, -1e4):
        found, wanted = (results(f, scale * hidden, weight, targets) for f in (linear_cross_entropy, in_full))
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 2**31), chunk=st.integers(1, 8))
def test_a_head_that_is_the_embedding_too(seed: int, chunk: int) -> None:
    _, embedding, targets = numbers(seed, 8, 4, 6, ignored="none")
    found = []
    for function in (linear_cross_entropy, in_full):
        tied = embedding.clone().requires_grad_()
        with in_chunks(chunk):
            (function(tied[targets].tanh()[:-1], tied, targets[1:]) + tied.square().sum()).backward()
        found.append(tied.grad)
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="this PyTorch has no such loss of its own")
@pytest.mark.parametrize("divisor", [None, 7])
def test_pytorch_s_own_loss_in_chunks_is_the_same(divisor: int | None) -> None:
    inputs = numbers(0, 300, 16, 40, torch.float32)

    def pytorch_s(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=32)
        reduction = "mean" if divisor is None else "sum"
        loss = F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)
        return loss if divisor is None else loss / divisor

    with in_chunks(64):
        found = results(linear_cross_entropy, *inputs, divisor=divisor)
    torch.testing.assert_close(found, results(pytorch_s, *inputs), atol=1e-5, rtol=1e-4)


COMPILED = """
import torch
from chiaroscuro.ops import linear_cross_entropy

def loss(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, targets), linear_cross_entropy(hidden, weight, targets, divisor=7)

hidden, weight = torch.randn(30, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
targets = torch.randint(9, (30,)).masked_fill(torch.rand(30) < 0.5, -100)
for autocast in (False, True):
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for tokens in (30, 20, 9):
        inputs = hidden[:tokens].detach().requires_grad_(), weight, targets[:tokens]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = compiled(*inputs), loss(*inputs)
        torch.testing.assert_close(found, expected)
        ours, theirs = (torch.autograd.grad(sum(losses), inputs[:2]) for losses in (found, expected))
        torch.testing.assert_close(ours, theirs)
with torch.no_grad():
    torch.testing.assert_close(compiled(hidden, weight, targets), loss(hidden, weight, targets))
try:
    compiled(hidden, weight, targets.masked_fill(targets > 0, 9))
except ValueError as error:
    assert "targets from" in str(error), error
else:
    raise AssertionError("a target that is no word")
for learns in (True, False):
    torch.library.opcheck(
        torch.ops.chiaroscuro.linear_cross_entropy.default,
        (hidden, weight.detach().requires_grad_(learns), targets, torch.float32, True, learns),
    )
"""


def test_it_compiles_whole() -> None:
    """In a process of its own, for torch.compile can't see through the annotations' checks."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# What needs a gradient


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("weight_learns", [True, False])
@pytest.mark.parametrize("hidden_learns", [True, False])
def test_nothing_is_made_or_kept_but_the_gradients_asked_for(
    hidden_learns: bool, weight_learns: bool, learning: bool, autocast: bool
) -> None:
    hidden, weight, targets = numbers(1, 20, 4, 6, torch.float32)
    wanted = dict(zip((20, 6), results(in_full, hidden, weight, targets)[1:], strict=True))
    hidden.requires_grad_(hidden_learns)
    weight.requires_grad_(weight_learns)
    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.set_grad_enabled(learning), cast, in_chunks(3), hooks, Outputs() as made:
        loss = linear_cross_entropy(hidden, weight, targets)
    learns = {20: hidden_learns and learning, 6: weight_learns and learning}
    torch.testing.assert_close(loss.detach().double(), in_full(hidden, weight, targets).detach(), atol=1e-2, rtol=1e-2)
    assert sorted(tuple(x.shape) for x in kept if x.ndim == 2) == sorted((n, 4) for n in (20, 6) if learns[n])
    if not any(learns.values()):
        assert not loss.requires_grad
        assert not {"aten.zeros_like.default", "aten.scatter_add_.default"} & made.names
        return
    loss.backward(torch.tensor(1.7))
    for x in (hidden, weight):
        if learns[len(x)]:
            torch.testing.assert_close(x.grad, wanted[len(x)], atol=3e-2 if autocast else 1e-5, rtol=0)
        else:
            assert x.grad is None


def test_a_second_backward_adds_the_same_gradients_again() -> None:
    hidden, weight, targets = numbers(0, 5, 3, 4)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    once, twice = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(once, twice, atol=0, rtol=0)


@pytest.mark.parametrize("upstream_learns", [True, False])
def test_there_is_no_second_derivative_and_it_says_so(upstream_learns: bool) -> None:
    hidden, weight, targets = numbers(0, 5, 3, 4)
    upstream = torch.tensor(1.7, dtype=torch.float64, requires_grad=upstream_learns)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets) * upstream
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph") as error:
        torch.autograd.grad(loss, hidden, create_graph=True)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("targets", [torch.zeros(3).long(), torch.zeros(7).long(), torch.zeros(5)])
def test_targets_of_other_tokens_are_refused(targets: Tensor) -> None:
    hidden, weight, _ = numbers(0, 5, 3, 4)
    with pytest.raises(ValueError, match="need one whole number for each token"):
        linear_cross_entropy(hidden, weight, targets)


# What it takes


class Outputs(TorchDispatchMode):
    """Notes what operations return: names, the largest one's numbers, and how many numbers are over the vocabulary."""

    def __init__(self, vocabulary: int = -1) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.largest = self.over_vocabulary = 0
        self.names: set[str] = set()
        self.logits: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
                if x.shape[-1:] == (self.vocabulary,) and not func.is_view:
                    self.over_vocabulary += x.numel()
                    self.logits[x.untyped_storage().data_ptr()] = x  # kept, so that no other takes its place
        return out


WIDTH, VOCABULARY = 4, 100


def work(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    """What is made for loss and gradients. A dispatch mode does not see into an operator, so its function is called."""
    with Outputs(VOCABULARY) as seen:
        if function is linear_cross_entropy:
            MODULE._in_chunks(hidden, weight, targets, hidden.dtype, True, True)
        else:
            results(function, hidden, weight, targets)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_are_no_logits_of_all_tokens(dtype: torch.dtype) -> None:
    inputs = numbers(0, 64, WIDTH, VOCABULARY, dtype, "none")
    assert work(in_full, *inputs).largest == 64 * VOCABULARY  # that the measure sees them
    with in_chunks(4):
        seen = work(linear_cross_entropy, *inputs)
    assert seen.largest == 4 * VOCABULARY == WIDTH * VOCABULARY
    if dtype == torch.float32:
        assert len(seen.logits) == 1  # one buffer for all chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_an_ignored_token_costs_nothing(ignored: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = numbers(0, 64, WIDTH, VOCABULARY, dtype, ignored)
    predicted = targets != IGNORED
    with in_chunks(4):
        found = work(linear_cross_entropy, hidden, weight, targets).over_vocabulary
        alone = work(linear_cross_entropy, hidden[predicted], weight, targets[predicted]).over_vocabulary
    assert found == alone
    assert (found > 0) == (ignored == "some")


def test_an_ignored_token_is_not_read() -> None:
    hidden, weight, targets = numbers(0, 20, WIDTH, VOCABULARY)
    wanted = results(linear_cross_entropy, hidden, weight, targets)
    hidden[targets == IGNORED] = float("nan")
    torch.testing.assert_close(results(linear_cross_entropy, hidden, weight, targets), wanted, atol=0, rtol=0)


# What it refuses


@pytest.mark.parametrize("wrong", [-1, -99, -101, 7, 2**40])
@pytest.mark.parametrize("place", [0, 8])
def test_a_target_that_is_no_word(place: int, wrong: int) -> None:
    hidden, weight, targets = numbers(0, 9, 3, 7)
    targets[place] = wrong
    for learning in (True, False):
        with (
            torch.set_grad_enabled(learning),
            in_chunks(2),
            pytest.raises(ValueError, match=rf"{wrong}.*0 to 6.*-100") as error,
        ):
            linear_cross_entropy(hidden.requires_grad_(), weight, targets)
        assert "\n" not in str(error.value)
