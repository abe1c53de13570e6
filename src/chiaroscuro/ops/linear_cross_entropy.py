"""The language-model loss without its logits: a head and its cross-entropy in one, some tokens at a time.

The logits of 8192 tokens over 8192 words are 256 MB, and the loss and its gradient hold several such tensors at once:
more than all layers of a small model. Nothing needs them all at the same time. So a chunk of tokens goes from hidden
states to logits, to its part of the loss and of the gradients, and the next chunk overwrites it. The gradients are
computed in the forward, while the logits are there; the backward would have to compute the logits a second time.

PyTorch has such a loss from 2.13 on (`torch.nn.functional.linear_cross_entropy` with `LinearCrossEntropyOptions`), but
not in 2.11 and 2.12. It is not faster and takes no less memory: `benchmarks/choices.py` measures both, and the logits
in full. And the one of PyTorch 2.13

- rounds the loss of bfloat16 hidden states to bfloat16, 10.04 to 10.06;
- computes in float32 under autocast, unless the hidden states are bfloat16, and then see above;
- gives NaN gradients where all targets are ignored, and spends as much on an ignored token as on any other;
- with `create_graph=True`, returns gradients without a graph, and raises no error.

So this one serves every version.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chiaroscuro.ops.first_derivatives import refuse_second_derivative

IGNORED = -100
"""The target of a token that has nothing to predict, as in `torch.nn.functional.cross_entropy`."""

CHUNK = 512
"""Tokens per chunk. With fewer, the head's weights are read too often; with many more, the logits fall out of the CPU's
caches. Measured by `benchmarks/choices.py`."""


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    *,
    divisor: int | float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Σ_t −log softmax(h_t Wᵀ)[target_t] / N over the tokens t whose target is not −100, in nats.

    The products are in the inputs' type, or autocast's; softmax, loss and the weight's gradient in float32 at least.
    A token without a target costs nothing. torch.compile takes all of it as one operator.

    Args:
        hidden: the head's input, one row per token.
        weight: the head's weights, one row per word; may be the embedding's too.
        targets: the word that each token is to predict, or −100.
        divisor: N, by default the number of targets that are not −100. Where N is 0 the loss is NaN and its gradient
            0, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: a target that is neither a word's number nor −100, or not as many targets as tokens.
        RuntimeError: in a backward with `create_graph=True`: the gradients have no graph.

    """
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"targets: {targets.dtype} of shape {tuple(targets.shape)} beside hidden states of shape "
            f"{tuple(hidden.shape)}: need one whole number for each token"
        )
    device = hidden.device.type
    narrows = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64  # autocast leaves float64 alone
    product_type = torch.get_autocast_dtype(device) if narrows else hidden.dtype
    learns = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    total = _summed_loss(hidden, weight, targets, product_type, *learns)[0]
    if divisor is None:
        divisor = (targets != IGNORED).sum()
    divisor = torch.as_tensor(divisor, dtype=total.dtype, device=total.device)
    empty = divisor == 0
    return torch.where(empty, torch.nan, total / torch.where(empty, 1, divisor))


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    product_type: torch.dtype,
    hidden_learns: bool,
    weight_learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss and the sum's gradients, each empty if not wanted: (p − onehot) W and (p − onehot)ᵀ h."""
    total, to_hidden, to_weight = _room(hidden, weight, targets, product_type, hidden_learns, weight_learns)
    for result in (total, to_hidden, to_weight):
        result.zero_()
    hidden, weight = hidden.to(product_type), weight.to(product_type)
    tokens = (targets != IGNORED).nonzero()[:, 0]
    words = targets[tokens].long()
    if bool(((words < 0) | (words >= len(weight))).any()):
        raise ValueError(
            f"targets from {int(words.min())} to {int(words.max())}: need 0 to {len(weight) - 1}, the vocabulary, "
            f"or {IGNORED} where nothing is to be predicted"
        )
    # One buffer for all chunks: a new one each time would be memory that the CPU has to clear.
    buffer = hidden.new_empty((min(CHUNK, len(tokens)), len(weight)), dtype=total.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk, word in zip(tokens.split(CHUNK), words[:, None].split(CHUNK), strict=True):
            h = hidden[chunk]
            logits = buffer[: len(chunk)]
            if h.dtype == logits.dtype:
                torch.mm(h, weight.T, out=logits)
            else:
                logits.copy_(h @ weight.T)
            at_word, largest = logits.gather(1, word), logits.amax(1, keepdim=True)
            z = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (largest + z.log() - at_word).sum()
            if not hidden_learns and not weight_learns:
                continue
            error = logits.div_(z).scatter_add_(1, word, logits.new_full(word.shape, -1)).to(h.dtype)
            if hidden_learns:
                to_hidden[chunk] = (error @ weight).to(to_hidden.dtype)
            if weight_learns and h.dtype == to_weight.dtype:
                to_weight.addmm_(error.T, h)
            elif weight_learns:
                to_weight += error.T @ h  # summed over the chunks in float32
    return total, to_hidden, to_weight


def _room(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    product_type: torch.dtype,
    hidden_learns: bool,
    weight_learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_in_chunks` returns, not filled."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    to_hidden = hidden.new_empty(hidden.shape if hidden_learns else 0)
    to_weight = weight.new_empty(weight.shape if weight_learns else 0, dtype=wide)
    return hidden.new_empty((), dtype=wide), to_hidden, to_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.learns = inputs[4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_cross_entropy", "logits")
    wanted = (learns and grad is not None for learns in ctx.learns)
    to_inputs = (x * grad if wants else None for x, wants in zip(ctx.saved_tensors, wanted, strict=True))
    return *to_inputs, None, None, None, None


# An operator to torch.compile, which can't trace a loop whose length depends on the targets.
_summed_loss = torch.library.custom_op("chiaroscuro::linear_cross_entropy", _in_chunks, mutates_args=())
_summed_loss.register_fake(_room)
_summed_loss.register_autograd(_gradients, setup_context=_keep)
