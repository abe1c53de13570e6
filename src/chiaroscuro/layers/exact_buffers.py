"""Buffers that follow a model to its device, and not to its type."""

from typing import Any

from torch import nn


class ExactBuffers(nn.Module):
    """A module whose buffers keep their type: `model.bfloat16()` would round them to three digits."""

    def reset_parameters(self) -> None:
        """Give every buffer the value that it has in a new model."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> "ExactBuffers":
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def exact_modules(model: nn.Module) -> set[str]:
    """The names that such modules have in a model, without those of the modules around them."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, ExactBuffers)}
