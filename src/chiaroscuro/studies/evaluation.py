"""How good a trained model is: perplexity on its text, or accuracy on its task."""

from typing import Any

from torch.utils.data import Subset

from chiaroscuro.analysis.classification import evaluate_rows, evaluate_targets
from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.analysis.recall import WINDOW
from chiaroscuro.analysis.routing_summary import describe_routing
from chiaroscuro.data import TokenBlocks
from chiaroscuro.data.progress import patient_bar
from chiaroscuro.data.tasks import PadToLongest
from chiaroscuro.errors import UserError
from chiaroscuro.model.loading import window_of
from chiaroscuro.retrofitting.inside import watching
from chiaroscuro.studies.workspace import Workspace


def evaluate(
    workspace: Workspace,
    *,
    source: str | None = None,
    split: str = "validation",
    length: int | None = None,
    stride: int | None = None,
    window: int | None = None,
    batch_size: int = 8,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Measure a language model on a split of its text, or a classifier on a split of its task.

    Args:
        workspace: the model; of a mixed run, `Workspace(task=…)` chooses one of the tasks.
        source: another text or folder than the recipe's.
        split: `"train"`, `"validation"` or `"test"`.
        length: T, tokens that the model reads at once; see `Workspace.length`.
        stride: of language models, how far one block is from the next; T unless given.
        window: of language models, how far back the pair of a recall token must lie; the model's `window` or, where its
            config has none, 64. See `chiaroscuro.analysis.recall`.
        batch_size: windows at once.
        tokens: of a text, measure only the first windows, as few as hold this many tokens; all of it unless given.

    Returns:
        What was measured, ready for JSON; with the routing of every layer if the model routes. Of a retrofitted model
        and a text that is the share of the tokens that looked and that were kept, by layer.

    Raises:
        UserError: the text or task can't be found, T, the stride or the window is impossible, or the model is a
            regression.

    """
    # A model that was trained to predict targets is a language model too: another source measures it on a text.
    on_targets = source is None and workspace.has_targets and not workspace.classifies
    for option, value in {"stride": stride, "window": window, "tokens": tokens}.items():
        if (workspace.classifies or on_targets) and value is not None:
            raise UserError(
                f"--{option} {value}: --{option} goes with a text, and this checkpoint is measured row by row"
            )
    if window is not None and window < 1:
        raise UserError(f"--window {window}: must be at least 1")
    if workspace.classifies and workspace.head is None and workspace.model.config.num_labels == 1:
        raise UserError(
            f"evaluate counts the right labels of a classifier, and {workspace.name} is a regression (num_labels=1): "
            "measure its errors with a Trainer and compute_metrics"
        )
    length = workspace.length(length)
    figures: dict[str, Any] = {"checkpoint": workspace.name, "data": "", "split": split, "length": length}
    model, routes = workspace.model, workspace.routes
    result: Any
    if workspace.classifies:
        task, rows = workspace.labelled_rows(split, length=length, source=source)
        with patient_bar("evaluating", len(rows)) as advance:
            result = evaluate_rows(
                model,
                rows,
                PadToLongest(workspace.tokenizer.pad_token_id),
                batch_size=batch_size,
                output_routing=routes,
                progress=advance,
                inputs=None if workspace.head is None else {"task": workspace.head},
            )
        figures |= {"data": task.name, **result.figures()}
    elif on_targets:
        sequences, targets = workspace.target_rows(split, length=length)
        with patient_bar("evaluating", len(targets)) as advance:
            result = evaluate_targets(
                model,
                targets,
                PadToLongest(workspace.tokenizer.pad_token_id),
                batch_size=batch_size,
                output_routing=routes,
                progress=advance,
            )
        figures |= {"data": sequences.name, **result.figures()}
    else:
        corpus, whole = workspace.blocks(split, length=length, stride=stride, source=source)
        if workspace.reads_words:
            raise UserError(
                f"the tokenizer of {workspace.name} is one of words, which loses the spaces of a text and the words "
                "that it has not seen: a perplexity would not be that of the text; evaluate a model with another one"
            )
        blocks = whole if tokens is None else first_blocks(whole, _windows(tokens, length, stride or length))
        with patient_bar("evaluating", len(blocks)) as advance, watching(model) as seen:
            result = evaluate_blocks(
                model,
                blocks,
                batch_size=batch_size,
                window=window or window_of(model.config) or WINDOW,
                output_routing=routes,
                progress=advance,
            )
        figures |= {"data": corpus.name, "stride": stride or length, **result.figures()}
        if seen.kept:
            figures |= {"looked": seen.look, "kept": seen.kept}
    if not routes:
        return figures
    return figures | describe_routing(result.routings, model.config.hidden_size, model.config.spectrum)


def _windows(tokens: int, length: int, stride: int) -> int:
    """How many windows hold so many predictions: the first one T of them, each other one as many as the stride."""
    return 1 + max(0, -(-(tokens - length) // stride))


def first_blocks(blocks: TokenBlocks, count: int) -> Any:
    """The first blocks of a text, as `evaluate_blocks` takes them."""
    first: Any = Subset(blocks, range(min(count, len(blocks))))
    first.tokens = blocks.tokens
    return first
