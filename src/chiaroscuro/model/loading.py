"""Load a checkpoint by the name that a user gives it. Whatever is wrong with it is one line."""

import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from chiaroscuro.errors import UserError
from chiaroscuro.hub import cache_if_unreachable, find_checkpoint, is_gguf
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.mixed import ChiarForMixedTasks

VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")
"""The files that hold a vocabulary. The other files of a tokenizer only configure it."""


NO_LIMIT = 2**31 - 1
"""The longest sequence of a model that says none: one without learned or rotary positions."""


def _place(path: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given for a folder, a Hub name, or a GGUF file: a place, and which file in it."""
    return (str(Path(path).parent), {"gguf_file": Path(path).name}) if is_gguf(path) else (path, {})


def window_of(config: PreTrainedConfig) -> int | None:
    """The window of a model's near attention, in our models and in retrofitted ones; None where all see everything.

    The widest, where menus have windows of their own.
    """
    if isinstance(config, ChiarConfig):
        return max(config.windows, default=None)
    return (getattr(config, "chiaroscuro", None) or {}).get("window")


def near_of(config: PreTrainedConfig) -> int:
    """The most tokens that one which does not look far sees, its window's and the sinks, in layers with a choice."""
    if isinstance(config, ChiarConfig):
        choosing = {*config.routed_layers, *config.keeping_layers}
        entries = [entry for i, menu in enumerate(config.entries) if i in choosing for entry in menu]
        found = [options for _, options in entries if hasattr(options, "window")]
        return max(((options.window or 1) + options.sinks for options in found), default=1)
    said = getattr(config, "chiaroscuro", None) or {}
    return int(said.get("window", 1) + said.get("sinks", 0))


def longest_sequence(config: PreTrainedConfig) -> int:
    """The most tokens that a model reads."""
    return int(getattr(config, "max_position_embeddings", None) or NO_LIMIT)


def load_checkpoint_config(name: str) -> PreTrainedConfig:
    """Load the configuration of a checkpoint, without its weights.

    Args:
        name: as in `find_checkpoint`.

    Raises:
        UserError: it can't be found or read, or is impossible.

    """
    path = find_checkpoint(name)
    place, file = _place(path)
    described = path if file else f"{path}/config.json"
    with cache_if_unreachable(path) as unreachable:
        try:
            config = AutoConfig.from_pretrained(place, **file)
            named = config.architectures or []
            if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
                raise UserError(f"architectures={named!r}: must be a list of names of classes")
            return config
        except UserError as error:
            raise UserError(f"{described}: {error}") from None
        except Exception as error:  # there are as many errors as ways to damage a file
            why = unreachable or _one_line(error)
            if not Path(path).exists():
                raise UserError(f"there is no folder {path}, and it can't be had from the Hub: {why}") from None
            raise UserError(f"{described} can't be read, it is missing or damaged: {why}") from None


def load_checkpoint(name: str) -> PreTrainedModel:
    """Load a model in evaluation mode: a CHIAR-Former, or another model to compare it with.

    It is loaded as a text classifier if config.json says so, and as a causal language model otherwise. The weights of a
    GGUF file are dequantised to float32.

    Args:
        name: as in `find_checkpoint`.

    Raises:
        UserError: it can't be found or read, a file is cut short, or the weights don't fit the configuration.

    """
    path = find_checkpoint(name)
    place, file = _place(path)
    config = load_checkpoint_config(name)
    if file:  # transformers leaves the weights quantised unless told otherwise, and such a model can't be saved
        file |= {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        file["config"] = config  # to read it again from a GGUF file takes seconds
    kind, *_ = config.architectures or [""]
    verbosity = logging.get_verbosity()
    # Tensors that don't fit are reported below in one line; transformers would print a table.
    logging.set_verbosity_error()
    with cache_if_unreachable(path) as unreachable:
        try:
            cls: Any = AutoModelForCausalLM
            if kind == ChiarForMixedTasks.__name__:  # the Auto classes load it without its heads
                cls = ChiarForMixedTasks
            elif kind.endswith("ForSequenceClassification"):
                cls = AutoModelForSequenceClassification
            loaded: Any = cls.from_pretrained(
                place, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True, **file
            )
        except UserError:
            raise
        except Exception as error:  # see above; SafetensorError, OSError and RuntimeError are the usual ones
            why = f": {unreachable}" if unreachable else f", a file is missing or damaged: {_one_line(error)}"
            raise UserError(f"{path} can't be loaded{why}") from None
        finally:
            logging.set_verbosity(verbosity)
    model, info = loaded
    # transformers initialises missing tensors at random and warns. Here that is an error.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            first, *others = sorted(str(key) for key in info[kind])
            more = f" and {len(others)} more" if others else ""
            raise UserError(f"{path}: weights don't fit its config.json: {kind.replace('_', ' ')}: {first}{more}")
    return model.eval()


def load_checkpoint_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer that was saved with the model.

    Raises:
        UserError: there is none, or it can't be read.

    """
    path = find_checkpoint(name)
    place, file = _place(path)
    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        raise UserError(
            f"{path} has no tokenizer: copy tokenizer.json and tokenizer_config.json of the one that the model was "
            "trained with (the author's models: GPT-2's) into it"
        )
    with cache_if_unreachable(path) as unreachable:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **file)
        except Exception as error:  # the files raise errors of many kinds, of which tokenizers' are bare Exceptions
            why = unreachable or _one_line(error)
            raise UserError(f"{path} has no tokenizer that can be read: {why}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{path} has a {type(tokenizer).__name__}: need one of the tokenizers library (a tokenizer.json)"
        )
    return tokenizer


def _one_line(error: Exception) -> str:
    # The whole message, because its first line may end in a colon.
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300, placeholder=' …') or 'no message'}"
