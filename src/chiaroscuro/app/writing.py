"""A text continued token by token, by a routed model and by its full-attention self in turns."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from chiaroscuro import ChiarCache
from chiaroscuro.analysis.routing import refuse_broken_text
from chiaroscuro.app.served import Served
from chiaroscuro.errors import UserError
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.cache import CACHE
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.retrofitting.inside import noting_decisions
from chiaroscuro.retrofitting.routed_cache import numbers_held

COLDEST = 0.01


@dataclass(frozen=True)
class Written:
    """What one of the two models has written so far.

    Attributes:
        pieces: the text of each new token; of a character of several tokens it is at the last of them.
        levels: in what part of the layers that choose each of them got the costliest operator, or looked far.
        seconds: spent on those after the first, which comes with the prompt.
        numbers: that the cache holds; None for a model that can't be cached.

    """

    pieces: tuple[str, ...] = ()
    levels: tuple[float, ...] = ()
    seconds: float = 0.0
    numbers: int | None = None

    @property
    def speed(self) -> float:
        """Tokens a second, after the first, which comes with the prompt."""
        return (len(self.pieces) - 1) / self.seconds if self.seconds else 0.0


@dataclass
class _Writer:
    """One of the two: its ids, how many of them are the prompt's, its cache, and what it has written."""

    ids: list[int]
    prompt: int
    cache: Any
    generator: torch.Generator
    written: Written = field(default_factory=Written)
    done: bool = False


def write(
    served: Served,
    prompt: str,
    *,
    look: float | None,
    kept: float | None,
    most: int = 100,
    temperature: float = 0.8,
    seed: int = 0,
) -> Iterator[tuple[Written, Written]]:
    """Continue a prompt; after each token of either, what the routed model and the full one have written.

    Args:
        served: the model.
        prompt: the text to continue.
        look: the share that looks far; see `Served.at`.
        kept: the share that is kept.
        most: new tokens, at most; fewer if a text ends or the model's longest sequence is reached.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of the sampling, the same for both.

    Raises:
        UserError: the prompt is empty, not Unicode or too long, or the temperature or the seed is impossible.

    """
    refuse_broken_text(prompt)
    ids = served.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("the prompt is empty: type some text to continue")
    if len(ids) >= served.longest:
        raise UserError(f"the prompt has {len(ids):,} tokens and the model reads {served.longest:,}: shorten it")
    if temperature != 0 and temperature < COLDEST:
        raise UserError(f"temperature {temperature:g}: take 0 for the likeliest token, or {COLDEST:g} and above")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed}: give a whole number from 0 to 2⁶³ − 1")
    writers = [
        _Writer(list(ids), len(ids), new_cache(served.model), torch.Generator().manual_seed(seed)) for _ in range(2)
    ]
    for _ in range(min(most, served.longest - len(ids))):
        for number, writer in enumerate(writers):
            if writer.done:
                continue
            with served.at(look, kept) if number == 0 else served.whole() as model:
                _step(model, served.tokenizer, writer, temperature, full=number == 1)
            yield writers[0].written, writers[1].written
        if all(writer.done for writer in writers):
            return


def new_cache(model: Any) -> Any:
    """An empty cache for a model; None where it can't be cached."""
    if isinstance(model.config, ChiarConfig):
        return None if model.config.uncacheable() else ChiarCache(model.config)
    return DynamicCache(config=model.config)


@torch.no_grad()
def _step(model: Any, tokenizer: Any, writer: _Writer, temperature: float, full: bool) -> None:
    """Add one token to what a writer has written."""
    first = not writer.written.pieces
    new = writer.ids if first or writer.cache is None else writer.ids[-1:]
    given = torch.tensor([new], device=model.device)
    own = isinstance(model, ChiarPreTrainedModel)
    asked = {"output_routing": True} if own else {}
    with noting_decisions(model) as decided:
        begin = time.perf_counter()
        output = model(
            input_ids=given,
            use_cache=writer.cache is not None,
            logits_to_keep=1,
            **{CACHE: writer.cache},
            **asked,
        )
        seconds = time.perf_counter() - begin
    token = _choose(output.logits[0, -1].float().cpu(), temperature, writer.generator)
    writer.ids.append(token)
    before = writer.written
    writer.written = replace(
        before,
        pieces=(*before.pieces, _piece(tokenizer, writer.ids[writer.prompt :], before.pieces)),
        levels=(*before.levels, 1.0 if full else _level(output.routing if own else None, decided.values())),
        seconds=before.seconds + (0.0 if first else seconds),
        numbers=None if writer.cache is None else numbers_in(writer.cache),
    )
    writer.done = token == tokenizer.eos_token_id


def _piece(tokenizer: Any, ids: list[int], pieces: tuple[str, ...]) -> str:
    """What the newest token adds to a text; nothing yet where it ends within a character, of four bytes at most."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    waits = text.endswith("\N{REPLACEMENT CHARACTER}") and (len(pieces) < 3 or any(pieces[-3:]))
    return "" if waits else text[sum(map(len, pieces)) :]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if not bool(logits.isfinite().any()) or bool(logits.isnan().any()):
        raise UserError("the model's logits are not finite: its weights hold NaN or infinity")
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


def _level(routing: Any, decided: Iterable[Any]) -> float:
    """In what part of the layers that choose the newest token got the costliest operator; of a retrofit, its looks."""
    if routing is not None:
        chosen = [float(r.operator_index[0, -1] == len(r.operators) - 1) for r in routing if len(r.operators) > 1]
    else:
        chosen = [float(looks[0, -1].float().mean()) for layer in decided for looks, _ in layer]
    return sum(chosen) / len(chosen) if chosen else 1.0


def numbers_in(cache: Any) -> int:
    """How many numbers a cache holds, of whichever kind of model."""
    return int(cache.numbers_kept()) if isinstance(cache, ChiarCache) else numbers_held(cache)
