"""How far a routed model's predictions are from those of its full-attention self, without either's logits as a whole.

Both are computed a chunk of tokens at a time, and the gradients with them, as in
[`linear_cross_entropy`][chiaroscuro.ops.linear_cross_entropy].
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.ops.first_derivatives import without_second_derivative
from chiaroscuro.ops.linear_cross_entropy import CHUNK


def kl_divergence(
    student: Float[Tensor, "tokens width"],
    teacher: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    temperature: int | float = 1.0,
    weights: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Σ_t w_t KL(p_t ‖ q_t) in nats, p_t = softmax(teacher_t Wᵀ / T) and q_t = softmax(student_t Wᵀ / T).

    The gradient reaches the student and, through q alone, the head's weights: what the teacher says is given. Products
    are in the inputs' type, or autocast's; all else is in float32 at least.

    Args:
        student: The head's input, one row per token.
        teacher: The same for the model to learn from.
        weight: The head's weights, which both share.
        temperature: T, above 0.
        weights: w, 1 unless given.

    Raises:
        RuntimeError: In a backward with `create_graph=True`: the gradients have no graph.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531.
    """
    sum_of_all: Tensor = _Divergence.apply(student, teacher, weight, temperature, weights)
    return sum_of_all


class _Divergence(torch.autograd.Function):
    """The sum and its gradients, w (q − p) W / T and w (q − p)ᵀ h / T, in one pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, weights: Tensor | None
    ) -> Tensor:
        device = student.device.type
        narrows = torch.is_autocast_enabled(device) and student.dtype != torch.float64
        product_type = torch.get_autocast_dtype(device) if narrows else student.dtype
        wide = torch.promote_types(student.dtype, torch.float32)
        to_student = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[2] else None
        total = student.new_zeros((), dtype=wide)
        head = weight.to(product_type)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(student), CHUNK):
                chunk = slice(start, start + CHUNK)
                h = student[chunk].to(product_type)
                log_p, log_q = (
                    (hidden @ head.T).to(wide).div_(temperature).log_softmax(1)
                    for hidden in (teacher[chunk].to(product_type), h)
                )
                p = log_p.exp()
                divergence, error = (p * log_p.sub_(log_q)).sum(1), log_q.exp_().sub_(p).div_(temperature)
                if weights is not None:
                    divergence, error = divergence * weights[chunk], error.mul_(weights[chunk, None])
                total += divergence.sum()
                error = error.to(product_type)
                if to_student is not None:
                    to_student[chunk] = error @ head
                if to_weight is not None:
                    to_weight += error.T @ h
        ctx.save_for_backward(to_student, to_weight)
        return total

    @staticmethod
    @without_second_derivative("kl_divergence", "the logits")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_student, to_weight = (None if x is None else x * grad for x in ctx.saved_tensors)
        return to_student, None, to_weight, None, None
