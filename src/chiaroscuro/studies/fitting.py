"""Fitted scores for a trained model: a copy of it that routes by them, with the figures and a picture beside it."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from chiaroscuro.data.needles import Haystack
from chiaroscuro.data.tasks import PadToLongest
from chiaroscuro.errors import UserError
from chiaroscuro.files import refuse_unwritable, write_bytes
from chiaroscuro.model import ChiarForCausalLM
from chiaroscuro.model.loading import near_of
from chiaroscuro.report.fit_figure import draw_fit
from chiaroscuro.retrofitting.fitting import fit
from chiaroscuro.retrofitting.routed_model import RoutedModel
from chiaroscuro.studies.workspace import Workspace
from chiaroscuro.training import save_whole
from chiaroscuro.training.initial_weights import fit_batches

LONGEST_TEXT = 2**22
"""Tokens of a text, at most, from which the passages of a mixture are drawn."""

LONGEST = 1024
"""T where no recipe says one: what is far shows in long sequences."""

FIGURES, PICTURE = "fit.json", "fit.png"


def batches_of(
    workspace: Workspace, *, length: int, source: str | None = None, split: str = "train", tokens: int = 65536
) -> tuple[Any, list[dict[str, Tensor]]]:
    """The text or the task, and the first tokens of a split of it, as batches to fit on; arguments as of `fit_copy`."""
    named: Any
    rows: Any
    collate = None
    if source is None and workspace.has_targets:
        named, rows = workspace.target_rows(split, length=length)
        collate = PadToLongest(workspace.tokenizer.pad_token_id)
    else:
        named, rows = workspace.blocks(split, length=length, source=source)
    return named, fit_batches(rows, tokens, length, collate)


def mixture_of(
    workspace: Workspace, *, length: int, source: str | None, split: str, tokens: int
) -> tuple[Any, list[Int[Tensor, "1 length"]]]:
    """The text, and the rows that `chiaroscuro retrofit` fits on: passages of it, copies, and needles.

    They have as many tokens in all as are asked for. Arguments as of `fit_copy`.
    """
    refuse_few_rows(tokens // length)
    named, blocks = workspace.blocks(split, length=length, source=source)
    text = torch.from_numpy(blocks.tokens.tokens[:LONGEST_TEXT].astype("int64"))
    return named, Haystack(workspace.tokenizer, text).mixture(tokens // length, length)


def refuse_few_rows(rows: int) -> None:
    """Raise a UserError if a mixture of so many rows would lack a kind."""
    if rows < 10:
        raise UserError(f"{rows} rows to fit on: give 10 or more, of all kinds")


def refuse_no_far(length: int, near: int) -> None:
    """Raise a UserError if rows of so many tokens have nothing beyond the window and the sinks, to fit on."""
    if length <= near:
        raise UserError(
            f"--length {length}: all of a row is within the window and the sinks, {near} tokens; take several times as "
            "many"
        )


def fit_copy(
    workspace: Workspace,
    output: Path,
    *,
    look: float | None = None,
    kept: float | None = None,
    hidden: int | None = None,
    budget: float | None = None,
    source: str | None = None,
    split: str = "train",
    tokens: int = 65536,
    length: int | None = None,
) -> dict[str, Any]:
    """Save a copy of a model whose tokens look far, and are kept, by scores fitted on its text or its task.

    Args:
        workspace: the model.
        output: the folder of the copy; it must not exist. `fit.json` and `fit.png` in it hold what is returned.
        look: see `chiaroscuro.fit`; as `kept` and `hidden`.
        kept: see there.
        hidden: see there.
        budget: see there.
        source: another text than the recipe's.
        split: the split to fit on.
        tokens: how many to take, from the split's beginning; for a retrofitted model, of rows of `mixture_of`.
        length: T; see `Workspace.length`.

    Returns:
        What was fitted and how well it does, ready for JSON.

    Raises:
        UserError: the folder exists, or the model or its text can't be fitted.

    """
    if output.exists():
        raise UserError(f"--output {output} exists already: name another folder")
    refuse_unwritable(output)
    model = workspace.language_model("fit")
    length = workspace.length(length, most=LONGEST)
    named: Any
    batches: list[Any]
    if isinstance(model, RoutedModel):
        refuse_no_far(length, near_of(model.config))
        named, batches = mixture_of(workspace, source=source, split=split, tokens=tokens, length=length)
    elif isinstance(model, ChiarForCausalLM):
        refuse_no_far(length, near_of(model.config))
        named, batches = batches_of(workspace, source=source, split=split, tokens=tokens, length=length)
    else:
        raise UserError(
            f"fit needs a CHIAR-Former or a retrofitted model, and {workspace.name} is a {type(model).__name__}: "
            "chiaroscuro retrofit makes one of it"
        )
    if len(batches) < 2:
        raise UserError(
            f"--tokens {tokens}: they make less than two batches of rows of {length} tokens, of which the last is held "
            "out; take more"
        )
    found = {"data": named.name, "split": split, "length": length, "hidden": hidden}
    found |= fit(model, batches, look=look, kept=kept, hidden=hidden, budget=budget).figures()
    picture = draw_fit(found)  # before anything is saved, so that little is left to do after it
    beside = {FIGURES: json.dumps(found, indent=2) + "\n"}
    save_whole(output, model, workspace.tokenizer, workspace.recipe, beside=beside)
    write_bytes(output / PICTURE, picture)
    return found
