"""The Hugging Face Hub without retries: asked once whether it answers, and if not, only the local cache is read."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 5.0
"""How long to wait for an answer, unless HF_HUB_ETAG_TIMEOUT is set."""


@contextmanager
def cache_if_unreachable(name: str) -> Iterator[str]:
    """Inside the block, switch Hugging Face's libraries to their offline mode if the Hub doesn't answer.

    Without a network, `huggingface_hub` tries each request six times, and `transformers` makes several requests: half a
    minute or more, and a line for each try, before a name turns out to be unknown.

    Args:
        name: what is to be loaded; for a local folder nothing is asked.

    Yields:
        What an error in the block means: that the Hub can't be reached, or "" where the error says it itself.

    """
    from huggingface_hub import constants

    if os.path.isdir(name) or constants.is_offline_mode() or _answers(constants.ENDPOINT):
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
