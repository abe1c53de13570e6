"""How many needles a model finds in a haystack of noise, by length and depth."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch

from chiaroscuro.data.needles import Haystack
from chiaroscuro.data.progress import patient_bar
from chiaroscuro.errors import UserError
from chiaroscuro.model.batches import check_vocabulary
from chiaroscuro.model.loading import longest_sequence
from chiaroscuro.retrofitting.inside import watching
from chiaroscuro.studies.workspace import Workspace

DEPTHS = 5
FIRST_DRAW = 7_000_003
"""Of the rows that models are judged by: none of those that scores are fitted on or models are healed on."""


def find_needles(workspace: Workspace, lengths: Sequence[int], *, keys: Sequence[int], tries: int) -> dict[str, Any]:
    """How many needles a language model finds.

    Args:
        workspace: the model.
        lengths: of the rows, in tokens.
        keys: how many needles a row has, of which one is asked for.
        tries: rows of each length, number of keys and depth.

    Returns:
        By length and number of keys, the part that is found at each of five depths and in all; of a retrofitted model
        also the parts of these rows' tokens that looked and that were kept, means over its routed layers, since
        thresholds that were set on other rows let more or fewer through. Ready for JSON.

    Raises:
        UserError: a row is longer than the model reads, or too short for its needles.

    """
    model = workspace.language_model("needles")
    longest = longest_sequence(model.config)
    if max(lengths) > longest:
        raise UserError(f"--lengths {max(lengths)}: {workspace.name} reads {longest} tokens at most; give less")
    haystack = Haystack(workspace.tokenizer)
    for length in lengths:  # or an error, before all that takes time
        for number in keys:
            haystack.needle(length, 0.5, 0, keys=number)
    rows = []
    with patient_bar("looking for needles", len(lengths) * len(keys)) as advance:
        for length in lengths:
            for number in keys:
                with watching(model) as seen:
                    found = needles_found(model, haystack, length, DEPTHS, tries, keys=number)
                row = {"length": length, "keys": number, "found": mean(found), "by depth": found}
                if seen.kept:
                    row |= {"looked": mean(seen.look.values()), "kept": mean(seen.kept.values())}
                rows.append(row)
                advance(1)
    return {"checkpoint": workspace.name, "tries a depth": tries, "needles": rows}


@torch.no_grad()
def needles_found(
    model: Any, haystack: Haystack, length: int, depths: int, tries: int, *, keys: int = 1
) -> list[float]:
    """How many of the needles a model finds, at each of some depths: the answer's tokens are each the likeliest.

    Args:
        model: any causal language model.
        haystack: that draws the rows, in noise.
        length: of the rows.
        depths: how many, spread evenly over the haystack.
        tries: rows of each depth.
        keys: needles in a row.

    Raises:
        UserError: a token of a row is not in the model's vocabulary.

    """
    found = []
    for d in range(depths):
        right = 0
        for i in range(tries):
            row = haystack.needle(length, (d + 0.5) / depths, FIRST_DRAW + d * tries + i, keys=keys)
            check_vocabulary([row.input_ids[None]], model.config.get_text_config().vocab_size)
            ids = row.input_ids[None].to(model.device)
            logits = model(input_ids=ids, logits_to_keep=row.answer + 1, use_cache=False).logits[0, :-1]
            right += int((logits.argmax(-1) == ids[0, -row.answer :]).all())
        found.append(right / tries)
    return found
