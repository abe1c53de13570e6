"""LoRA on a retrofitted model's attention while it is healed: put in first, and merged into the weights last.

Source: arXiv 2106.09685; the layers are those of peft.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from chiaroscuro.errors import UserError
from chiaroscuro.retrofitting.routed_model import attention_modules


def add_adapters(model: Any, rank: int) -> None:
    """Put LoRA layers of this rank around the projections of a model's attention, and train nothing else.

    Raises:
        UserError: peft is not installed, or the rank is larger than the model's width.

    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "model.lora needs peft: pip install peft, or set model.lora: null to train all weights"
        ) from None
    names = sorted(
        {
            name
            for module in attention_modules(model).values()
            for name, child in module.named_children()
            if isinstance(child, nn.Linear)
        }
    )
    if rank > model.config.hidden_size:
        raise UserError(
            f"model.lora={rank} is more than the model's width, {model.config.hidden_size}: give a smaller rank"
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapted(model: nn.Module) -> bool:
    """Whether a model has LoRA layers."""
    return any(hasattr(module, "lora_A") for module in model.modules())


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block LoRA layers add nothing: the model is as it was before it was healed."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapters(model: nn.Module) -> None:
    """Add what LoRA layers have learned to the weights that they stand around, and take them out; or do nothing."""
    merged = False
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "lora_A") and hasattr(child, "base_layer"):
                layer: Any = child
                layer.merge()
                setattr(module, name, layer.get_base_layer())
                merged = True
    for parameter in model.parameters() if merged else ():
        parameter.requires_grad_(True)
