"""Gradients without a graph: asked for one, they raise an error instead of leaving terms out."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def refuse_second_derivative(name: str, instead: str) -> None:
    """Raise a RuntimeError inside a backward with `create_graph=True`.

    `torch.autograd.function.once_differentiable` does so only where the backward of the result reaches what it marked;
    `torch.autograd.grad` of other inputs leaves its terms out without a word.

    Args:
        name: of the function.
        instead: what to use.

    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: drop create_graph=True, or use {instead}")


def without_second_derivative(name: str, instead: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the `backward` of a `torch.autograd.Function`: see `refuse_second_derivative`."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def checked(*args: Any) -> Any:
            refuse_second_derivative(name, instead)
            return backward(*args)

        return checked

    return decorate
