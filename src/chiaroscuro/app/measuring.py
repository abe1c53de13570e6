"""What a model costs on this machine, beside its full-attention self; and whom it routes in a file."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiaroscuro.analysis.flops import count_flops, full_attention
from chiaroscuro.analysis.memory import prefill_memory
from chiaroscuro.analysis.speed import DECODED, can_be_cached, decoding, forward_pass, take_turns
from chiaroscuro.app.reading import MOST, read, take_up
from chiaroscuro.app.served import Served
from chiaroscuro.app.writing import new_cache, numbers_in
from chiaroscuro.errors import UserError
from chiaroscuro.model.cache import CACHE, ChiarCache
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.retrofitting import unretrofit
from chiaroscuro.retrofitting.routed_model import RoutedModel

SECONDS = 2.0
"""Of each length and kind of work."""

LENGTHS = (256, 512, 1024, 2048)

CHARACTERS = 2**18
"""Of a file that is dropped; what is shown are its first tokens."""


def lengths_of(served: Served) -> list[int]:
    """The lengths that are measured, of those after which the model still has room to write."""
    room = served.longest - DECODED
    return [length for length in LENGTHS if length <= room] or [max(1, min(served.longest // 2, room))]


def measure(served: Served, look: float | None, kept: float | None) -> Iterator[list[dict[str, Any]]]:
    """By length, how many times faster than full attention a forward and decoding are; after each length, all so far.

    Beside them stands the number of operations, where it can be counted, and the memory that the cache takes.
    """
    rows: list[dict[str, Any]] = []
    vocabulary = served.model.config.vocab_size
    for length in lengths_of(served):
        ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
        ids = ids.to(served.model.device)
        row: dict[str, Any] = {"length": length}
        with served.at(look, kept) as model:
            routed = copy.deepcopy(model)
        with served.whole() as model:
            whole = copy.deepcopy(model)
        config: Any = routed.config
        works = {"forward": forward_pass} | ({"decoding": decoding} if _decodes(routed, ids[:, :2]) else {})
        for kind, work in works.items():
            made = {"routed": work(routed, ids), "whole": work(whole, ids)}
            timings = take_turns(made, SECONDS, turns=3)
            row[f"{kind}, ms"] = 1e3 * timings["routed"].median
            row[f"{kind}, times as fast"] = timings["whole"].median / timings["routed"].median
        if isinstance(config, ChiarConfig):
            counted = count_flops(config, length).total, count_flops(full_attention(config), length).total
            row["operations, of full attention's"] = counted[0] / counted[1]
        caches = [_cache(model, ids) for model in (routed, whole)]
        if None not in caches:
            row["cache, MB"], row["cache of full attention, MB"] = caches
        if isinstance(whole, RoutedModel):  # what `whole` sets is not saved, and memory is measured of what is
            unretrofit(whole)
        for name, model in (("forward's memory, MB", routed), ("memory of full attention, MB", whole)):
            if (peak := prefill_memory(model, length)) is not None:
                row[name] = peak / 2**20
        rows.append(row)
        yield list(rows)


@torch.no_grad()
def _decodes(model: Any, ids: Tensor) -> bool:
    """Whether decoding can be timed: over and over, from a cache that is cropped to what it was."""
    if not can_be_cached(model):
        return False
    cache = new_cache(model)
    model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    return not isinstance(cache, ChiarCache) or cache.is_croppable


@torch.no_grad()
def _cache(model: Any, ids: Tensor) -> float | None:
    """The megabytes of a model's cache after some tokens; None where it can't be cached."""
    cache = new_cache(model)
    if cache is None:
        return None
    model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    return float(numbers_in(cache) * model.dtype.itemsize / 2**20)


def shares_of_file(served: Served, file: str | Path, look: float | None, kept: float | None) -> list[dict[str, Any]]:
    """By layer, whom the model routes in the beginning of a text file.

    Raises:
        UserError: the file is no text, is empty, or the model routes nothing.

    """
    try:
        with Path(file).open(encoding="utf-8") as stream:
            text = stream.read(CHARACTERS)
    except OSError as error:
        raise UserError(f"{Path(file).name} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{Path(file).name} is not UTF-8 text: save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{Path(file).name} is empty: drop a file with text in it")
    reading = read(served, take_up(served, _beginning(served, text)), look, kept)
    if not reading.layers:
        raise UserError(f"{served.name} routes nothing: it has no layer that chooses")
    rows = []
    for i, layer in reading.layers.items():
        row: dict[str, Any] = {"layer": i + 1, "menu": " · ".join(layer.operators)}
        for number, name in enumerate(layer.operators):
            row[name] = sum(chosen == number for chosen in layer.index) / len(layer.index)
        if layer.looking is not None:  # head by head
            near, far = layer.operators
            row[far] = sum(layer.looking) / len(layer.looking)
            row[near] = 1 - row[far]
        row["kept"] = None if layer.kept is None else sum(layer.kept) / len(layer.kept)
        row["mean H"] = sum(layer.entropy) / len(layer.entropy)
        rows.append(row)
    return rows


def _beginning(served: Served, text: str) -> str:
    """So much of a text as is shown at once: no half character, and what is decoded can have more tokens."""
    most = min(MOST, served.longest)
    ids = served.tokenizer(text, add_special_tokens=False)["input_ids"][:most]
    beginning = str(served.tokenizer.decode(ids)).rstrip("\N{REPLACEMENT CHARACTER}")
    while len(served.tokenizer(beginning, add_special_tokens=False)["input_ids"]) > most:
        beginning = beginning[:-1]
    return beginning
