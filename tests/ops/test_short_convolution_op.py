"""Short convolutions. Oracles: PyTorch's own where nothing is padded, one token after another where something is."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro.ops import short_convolution, short_convolution_at

WIDTH = 3


def one_by_one(x: Tensor, weight: Tensor, real: Tensor, segments: Tensor, before: Tensor | None) -> Tensor:
    rows = []
    for b in range(len(x)):
        outputs = []
        for t in range(x.shape[1]):
            own = [x[b, s] for s in range(t + 1) if real[b, s] and segments[b, s] == segments[b, t]]
            own = own if before is None else [*before[b], *own]
            terms = [w * token for w, token in zip(weight, reversed(own), strict=False)]
            outputs.append(sum(terms, torch.zeros(WIDTH, dtype=x.dtype)))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Tensor | None]:
    batch, time, kernel = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    randn = {"generator": generator, "dtype": torch.float64}
    documents = draw(st.booleans())
    found: dict[str, Tensor | None] = {
        "x": torch.randn(batch, time, WIDTH, **randn),
        "weight": torch.randn(kernel, WIDTH, **randn),
        "real": torch.rand(batch, time, generator=generator) < 0.7 if draw(st.booleans()) else None,
        "segments": (torch.rand(batch, time, generator=generator) < 0.3).cumsum(1) if documents else None,
        "before": torch.randn(batch, kernel - 1, WIDTH, **randn) if not documents and draw(st.booleans()) else None,
        "chosen": torch.rand(batch, time, generator=generator) < 0.5,
    }
    return found


@given(cases())
def test_values_and_gradients_are_those_of_one_token_after_another(case: dict[str, Tensor | None]) -> None:
    chosen, x, weight = case.pop("chosen"), case["x"], case["weight"]
    assert chosen is not None and x is not None and weight is not None
    real = torch.ones(x.shape[:2], dtype=torch.bool) if case["real"] is None else case["real"]
    segments = torch.zeros(x.shape[:2], dtype=torch.long) if case["segments"] is None else case["segments"]
    taken = chosen & real
    index = taken.flatten().nonzero()[:, 0]

    def answers(packed: bool, plain: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        if plain:
            y = one_by_one(leaves[0], leaves[1], real, segments, case["before"])
        elif packed:
            y = short_convolution_at(leaves[0], index, leaves[1], case["real"], case["segments"], case["before"])
        else:
            y = short_convolution(leaves[0], leaves[1], case["real"], case["segments"], case["before"])
        y = y if packed and not plain else y[taken if packed else real]
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        gradients = torch.autograd.grad((y * noise).sum() + 0 * sum(leaf.sum() for leaf in leaves), leaves)
        return [y, *gradients]

    for packed in (False, True):
        torch.testing.assert_close(answers(packed, plain=False), answers(packed, plain=True))


@given(kernel=st.integers(1, 6), time=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_without_padding_it_is_pytorch_s_convolution(kernel: int, time: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, time, 8, generator=generator), torch.randn(kernel, 8, generator=generator)
    wanted = F.conv1d(F.pad(x.mT, (kernel - 1, 0)), weight.flip(0).T[:, None], groups=8).mT
    torch.testing.assert_close(short_convolution(x, weight), wanted, atol=1e-5, rtol=1e-5)


def test_by_hand() -> None:
    x = torch.arange(1.0, 7).view(1, 6, 1)
    real = torch.tensor([[0, 1, 1, 0, 1, 1]], dtype=torch.bool)  # 2, 3, 5, 6
    assert short_convolution(x, torch.ones(3, 1), real)[real][:, 0].tolist() == [2.0, 5.0, 10.0, 14.0]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert short_convolution(x, torch.ones(2, 1), None, documents).flatten().tolist() == [1, 3, 5, 4, 9, 11]
