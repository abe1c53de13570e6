"""`generate`, which stops where the positions of the model end."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from chiaroscuro.layers.state import REMEMBERED
from chiaroscuro.model.cache import CACHE, given_cache


class _LongestSequence(StoppingCriteria):
    """Stop all rows at so many tokens, prompt and padding included."""

    # Not `MaxLengthCriteria`, which would replace the one that the caller's own `max_new_tokens` makes.

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        full = input_ids.shape[1] >= self.tokens
        return torch.full((len(input_ids),), full, dtype=torch.bool, device=input_ids.device)


def bound_drafts(generator: Any, tokens: int | None = None) -> Any:
    """Let the drafts of assisted generation be no longer than a cache can take back.

    Args:
        generator: of drafts. Changed in place, and returned.
        tokens: cut them off after so many tokens of a sequence, too: all of them are read.

    """
    get_candidates: Callable[..., Any] = generator.get_candidates

    def bounded(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if hasattr(generator, "num_assistant_tokens"):  # of an assistant: what it drafts beyond them is cut off
            generator.num_assistant_tokens = min(generator.num_assistant_tokens, REMEMBERED)
        ids, logits = get_candidates(input_ids, *args, **kwargs)
        longest = ids.shape[1] if tokens is None else min(ids.shape[1], tokens)
        new = min(max(0, longest - input_ids.shape[1]), REMEMBERED)
        ids = ids[:, : input_ids.shape[1] + new]
        return ids, logits[:, :new] if logits is not None and new else None

    generator.get_candidates = bounded
    return generator


def bound_own_draft(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `generate`, whose draft for another model is no longer than a cache can take back."""
    if not getattr(options.get("generation_config"), "is_assistant", False):
        return options
    names = {"max_new_tokens", "min_new_tokens"} & options.keys()
    return options | {name: min(options[name], REMEMBERED) for name in names if options[name] is not None}


class BoundedGenerationMixin(GenerationMixin):
    """`GenerationMixin`, whose `generate` stops where `config.max_position_embeddings` ends.

    Without it, a `max_new_tokens` beyond the positions would fail at the limit, and the text up to there be lost.
    """

    def generate(self, *args: Any, stopping_criteria: Any = None, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin.generate` does; all of its arguments are taken, criteria by name.

        A cache may be given as `cache` or as `past_key_values`, whatever the version of transformers.
        """
        inherited, config = cast(Any, super()), cast(Any, self).config
        longest = config.max_position_embeddings + 1  # the last token is not read, and needs no position
        prompt = kwargs.get("inputs_embeds")
        if prompt is not None and not args and kwargs.get("inputs") is None and kwargs.get("input_ids") is None:
            longest -= prompt.shape[1]  # transformers counts the new tokens alone
        criteria = StoppingCriteriaList([*(stopping_criteria or []), _LongestSequence(longest)])
        cache = given_cache(**{name: kwargs.pop(name, None) for name in ("cache", "past_key_values")})
        if cache is not None:
            kwargs[CACHE] = cache
        return inherited.generate(*args, stopping_criteria=criteria, **bound_own_draft(kwargs))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = cast(Any, super())._get_candidate_generator(*args, **kwargs)
        longest, given = cast(Any, self).config.max_position_embeddings, kwargs.get("inputs_tensor")
        if given is not None and given.ndim == 3:
            longest -= given.shape[1]  # a prompt of embeddings, which transformers does not count
        return bound_drafts(generator, longest)
