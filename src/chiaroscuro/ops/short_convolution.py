"""A short causal convolution of each feature by itself: what a token gets from its neighbours at little cost."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def short_convolution(
    x: Float[Tensor, "batch time width"],
    weight: Float[Tensor, "kernel width"],
    real: Bool[Tensor, "batch time"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    before: Float[Tensor, "batch kernel_less_1 width"] | None = None,
) -> Float[Tensor, "batch time width"]:
    """y_t = Σ_{j<k} w_j ⊙ x_{t−j}, where t − j counts the real tokens of t's row, or of its document.

    On one thread, shifting, weighing and adding takes less time than `conv1d`, forward and backward.

    Args:
        x: the tokens.
        weight: w, the token's own first.
        real: true for real tokens. At padding y means nothing.
        segments: the document of each token, rising within a row, where a row holds several; then nothing is before x.
        before: the last k − 1 real tokens before x, the newest at the end; zeros unless given.

    Source: Canon layers, Allen-Zhu 2025 (arXiv 2512.17351).

    """
    line, segments = _line(x, len(weight) - 1, real, segments, before)
    start, time = len(weight) - 1, x.shape[1]
    if time == 1:
        return (line * weight.flip(0)).sum(1, keepdim=True) if segments is None else line[:, start:] * weight[0]
    mixed = line[:, start:] * weight[0]
    for j in range(1, len(weight)):
        earlier = line[:, start - j : start - j + time]
        if segments is not None:
            earlier = earlier * (segments[:, start:] == segments[:, start - j : start - j + time])[..., None]
        mixed = torch.addcmul(mixed, earlier, weight[j])
    return mixed if real is None else mixed.gather(1, _places(real)[..., None].expand_as(x))


def short_convolution_at(
    x: Float[Tensor, "batch time width"],
    index: Int[Tensor, " tokens"],
    weight: Float[Tensor, "kernel width"],
    real: Bool[Tensor, "batch time"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    before: Float[Tensor, "batch kernel_less_1 width"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """`short_convolution` of some tokens of the flattened batch alone, by gathering the k that each of them needs."""
    line, segments = _line(x, len(weight) - 1, real, segments, before)
    batch, length, _ = line.shape
    if real is None:
        here = index + (index // x.shape[1] + 1) * (len(weight) - 1)
    else:
        place = _places(real) + torch.arange(batch, device=x.device)[:, None] * length + len(weight) - 1
        here = place.flatten()[index]
    flat, documents = line.flatten(0, 1), None if segments is None else segments.flatten()
    mixed = flat.index_select(0, here) * weight[0]
    for j in range(1, len(weight)):
        earlier = flat.index_select(0, here - j)
        if documents is not None:
            earlier = earlier * (documents[here] == documents[here - j])[:, None]
        mixed = torch.addcmul(mixed, earlier, weight[j])
    return mixed


def line_up(x: Tensor, real: Bool[Tensor, "batch time"]) -> Tensor:
    """The real tokens of each row (B, T, d) without gaps, and zeros behind them."""
    batch, time, width = x.shape
    slot = torch.where(real, real.cumsum(1) - 1, time)  # padding all goes to one place more, which is cut off
    return x.new_zeros(batch, time + 1, width).scatter(1, slot[..., None].expand_as(x), x)[:, :time]


def _places(real: Tensor) -> Tensor:
    """Where `line_up` puts each real token; padding's place is that of the one before it."""
    return (real.cumsum(1) - 1).clamp(min=0)


def _line(
    x: Tensor, kept: int, real: Tensor | None, segments: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The k − 1 tokens before, and the real ones of x without gaps; and the documents of these."""
    if real is not None:
        x = line_up(x, real)
        segments = None if segments is None else line_up(segments[..., None], real)[..., 0]
    line = F.pad(x, (0, 0, kept, 0)) if before is None else torch.cat([before.to(x.dtype), x], 1)
    return line, None if segments is None else F.pad(segments, (kept, 0), value=-1)
