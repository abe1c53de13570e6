"""Continuing a text with a trained model."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from chiaroscuro.analysis.routing import refuse_broken_text
from chiaroscuro.errors import UserError
from chiaroscuro.layers.operator import is_whole
from chiaroscuro.model.batches import check_vocabulary
from chiaroscuro.model.loading import longest_sequence

COLDEST = 1e-6
"""The lowest temperature but 0. Logits divided by less may overflow a float32."""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
        text: without the prompt.
        tokens: how many tokens that is.
        seconds: the time it took.
        full: whether it stopped at the model's longest sequence, before it had written as many tokens as asked.

    """

    text: str
    tokens: int
    seconds: float
    full: bool

    def figures(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "full": self.full,
        }


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Continuation:
    """Continue a prompt by sampling, or greedily at temperature 0.

    Args:
        model: any causal language model; its cache is used where it has one.
        tokenizer: the model's.
        prompt: the text to continue.
        max_new_tokens: at most this many tokens; fewer if the text ends or the model's longest sequence is reached.
        temperature: divides the logits, `COLDEST` or more; 0 takes the likeliest token.
        top_k: sample from this many likeliest tokens; 0 for all.
        seed: seed of the sampling.

    Raises:
        UserError: the prompt is empty or not Unicode, or leaves no room in the model's longest sequence; an option
            is impossible; a token is not in the model's vocabulary; or the model's logits are not finite.

    """
    refuse_broken_text(prompt)
    refuse_impossible(max_new_tokens, seed)
    sampled = how_to_sample(temperature, top_k)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    longest = longest_sequence(model.config)
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty: give at least one character to continue")
    if ids.shape[1] >= longest:
        raise UserError(f"the prompt has {ids.shape[1]} tokens and the model reads at most {longest}: shorten it")
    check_vocabulary([ids], model.config.get_text_config().vocab_size)
    set_seed(seed)
    generating: Any = model  # for mypy: PreTrainedModel itself has no generate
    start = time.perf_counter()
    with torch.inference_mode():
        answer = generating.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            max_new_tokens=min(max_new_tokens, longest - ids.shape[1]),
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([refuse_broken_logits]),
            **sampled,
        )
    new = answer[0, ids.shape[1] :]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    full = len(new) < max_new_tokens and len(answer[0]) == longest
    return Continuation(text, len(new), time.perf_counter() - start, full)


def how_to_sample(temperature: float, top_k: int) -> dict[str, Any]:
    """Arguments of `generate`: sampling, or at temperature 0 the likeliest token.

    Raises:
        UserError: the temperature or top_k is impossible.

    """
    if not is_whole(top_k) or top_k < 0:
        raise UserError(f"top_k {top_k!r}: take a whole number, 0 for all tokens")
    if not (temperature == 0 or COLDEST <= temperature < math.inf):
        raise UserError(f"temperature {temperature:g}: take 0 for the likeliest token, or {COLDEST:g} and above")
    return {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}


def refuse_impossible(max_new_tokens: int, seed: int) -> None:
    """Raise a UserError if so many tokens can't be written, or nothing be drawn from this seed."""
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens!r}: take a whole number, 1 or more")
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise UserError(f"seed {seed!r}: take a whole number from 0 to 2³² − 1")


def refuse_broken_logits(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that changes nothing.

    Raises:
        UserError: a logit is not finite.

    """
    if scores.isnan().any() or scores.isposinf().any():
        raise UserError("the model's logits are not finite: its weights hold NaN or infinity")
    return scores
