"""The language-model loss without its logits: a head and its cross-entropy in one, some tokens at a time.

The logits of 8192 tokens over 8192 words are 256 MB, and the loss and its gradient hold several such at once: more
than all layers of a small model. Nothing needs them together. So a chunk of tokens goes from hidden states to logits,
to its share of the loss and to its share of the gradients, and the next chunk overwrites it. The gradients are made in
the forward, where the logits are; made in the backward they would need the logits a second time.

PyTorch has this from 2.13 on (`torch.nn.functional.linear_cross_entropy` with `LinearCrossEntropyOptions`), but not in
2.11 and 2.12, and it is no better where it is there: `benchmarks/choices.py` measures time and memory of both, and of
the logits in full. And PyTorch 2.13's

- rounds the loss of bfloat16 hidden states to bfloat16, 10.04 to 10.06;
- computes in float32 under autocast, unless the hidden states come in bfloat16, and then see above;
- has NaN for gradients where all targets are ignored, and works as long for an ignored token as for any other;
- answers `create_graph=True` with gradients that have no graph, and without an error.

So this one serves every version.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
"""The target of a token that is to predict nothing, as in `torch.nn.functional.cross_entropy`."""

CHUNK = 512
"""Tokens of a chunk. Fewer read the head's weights too often, of many more the logits fall out of the CPU's caches;
measured by `benchmarks/choices.py`."""


@torch.compiler.disable
def linear_cross_entropy(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    *,
    divisor: int | float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Σ_t −log softmax(h_t Wᵀ)[target_t] / N over the tokens t whose target is not −100, in nats.

    The products are in the inputs' type, or autocast's; softmax, loss and the weight's gradient in float32 at least.
    A token without a target costs nothing.

    Args:
        hidden: what the head reads, a row a token.
        weight: the head's, a row a word; may be the embedding's too.
        targets: the word that each token is to predict, or −100.
        divisor: N; the number of targets that are not −100 unless given. Over none at all the mean is NaN and its
            gradient 0, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: a target that is no word's number and not −100.
        RuntimeError: in a backward with `create_graph=True`: the gradients have no graph.

    """
    total = _ChunkedLoss.apply(hidden, weight, targets, torch.is_grad_enabled())
    if divisor is None:
        divisor = (targets != IGNORED).sum()
    return total / torch.as_tensor(divisor, dtype=total.dtype, device=total.device)


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss, and with it the sum's gradients: ∂/∂h = (p − onehot) W and ∂/∂W = (p − onehot)ᵀ h."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learning: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        to_hidden = torch.zeros_like(hidden) if learning and ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=wide) if learning and ctx.needs_input_grad[1] else None
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and wide == torch.float32:  # it leaves float64 alone
            narrow = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(narrow), weight.to(narrow)
        tokens = (targets != IGNORED).nonzero()[:, 0]
        words = targets[tokens].long()
        if bool(((words < 0) | (words >= len(weight))).any()):
            raise ValueError(
                f"targets from {int(words.min())} to {int(words.max())}: need 0 to {len(weight) - 1}, the vocabulary, "
                f"or {IGNORED} where nothing is to be predicted"
            )
        # One buffer for all chunks: a new one each time would be memory that the CPU has to clear.
        buffer = hidden.new_empty((min(CHUNK, len(tokens)), len(weight)), dtype=wide)
        with torch.autocast(device, enabled=False):
            for chunk, word in zip(tokens.split(CHUNK), words[:, None].split(CHUNK), strict=True):
                h = hidden[chunk]
                logits = buffer[: len(chunk)]
                if h.dtype == wide:
                    torch.mm(h, weight.T, out=logits)
                else:
                    logits.copy_(h @ weight.T)
                at_word, largest = logits.gather(1, word), logits.amax(1, keepdim=True)
                z = logits.sub_(largest).exp_().sum(1, keepdim=True)
                total += (largest + z.log() - at_word).sum()
                if to_hidden is None and to_weight is None:
                    continue
                error = logits.div_(z).scatter_add_(1, word, logits.new_full(word.shape, -1)).to(h.dtype)
                if to_hidden is not None:
                    to_hidden[chunk] = (error @ weight).to(to_hidden.dtype)
                if to_weight is not None and h.dtype == wide:
                    to_weight.addmm_(error.T, h)
                elif to_weight is not None:
                    to_weight += error.T @ h  # summed over the chunks in float32
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.predicted = len(tokens)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Asked here, because `once_differentiable` lets it pass where `grad` itself depends on nothing.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative: drop create_graph=True, or use logits")
        if not ctx.predicted:
            grad = torch.zeros_like(grad)  # a mean over nothing divides by 0, and so sends infinity here
        return *(None if gradient is None else gradient * grad for gradient in ctx.saved_tensors), None, None
