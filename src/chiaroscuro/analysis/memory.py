"""How much memory a prefill takes, measured in a process of its own."""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from chiaroscuro import plugins
from chiaroscuro.analysis.speed import forward_pass, peak_memory
from chiaroscuro.errors import UserError
from chiaroscuro.model.loading import load_checkpoint


def prefill_memory(model: PreTrainedModel, length: int) -> int | None:
    """Peak memory in bytes of a model that reads one row and fills its cache, weights included.

    Memory that a process used and freed before would be used again, and not be counted. So the model is saved to a
    temporary folder, and measured by a process that has done nothing else.

    Args:
        model: any causal language model that `load_checkpoint` reads.
        length: of the row, in tokens.

    Returns:
        Bytes: of a GPU's memory where the model lies on one. None for a CPU of a system that does not tell, as all but
        Linux.

    Raises:
        UserError: there is too little memory.

    """
    if not (model.device.type == "cuda" or Path("/proc/self/clear_refs").exists()):
        return None
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        model.save_pretrained(folder)
        try:
            return pool.submit(_peak, folder, length, model.device.type, plugins.named()).result()
        except BrokenProcessPool:
            raise UserError(
                f"a prefill of {length} tokens was killed, likely for its memory: take shorter lengths"
            ) from None


def _peak(folder: str, length: int, device: str, modules: tuple[str, ...]) -> int:
    plugins.import_installed()
    plugins.import_modules(modules)
    logging.disable_progress_bar()  # of the model that is loaded once more

    def make() -> Any:
        model: Any = load_checkpoint(folder)
        ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        return forward_pass(model.to(device), ids.to(device))

    return peak_memory(make, device)
