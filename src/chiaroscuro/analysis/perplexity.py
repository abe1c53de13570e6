"""How well a model predicts a text: loss, perplexity, bits per byte."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from chiaroscuro.analysis.recall import SliceSums, TextSlices
from chiaroscuro.analysis.routing_summary import to_summarise
from chiaroscuro.errors import UserError
from chiaroscuro.model.batches import check_vocabulary
from chiaroscuro.model.evaluation_mode import evaluation_mode


class TextSize(Protocol):
    """How much text there is."""

    @property
    def count(self) -> int:
        """In tokens."""

    @property
    def bytes(self) -> float:
        """In bytes of UTF-8."""


class Blocks(Protocol):
    """A dataset of blocks, such as `chiaroscuro.data.TokenBlocks`.

    Block i holds tensors `input_ids` (T,) and `shift_labels` (T,): for each position the token after it, or −100 where
    nothing is to be predicted.
    """

    @property
    def tokens(self) -> TextSize:
        """The whole text that the blocks are cut from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a split.

    Attributes:
        loss: mean negative log-likelihood per predicted token, in nats.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte of the text, loss / ln 2 · (tokens of the split / bytes of the split). It is
            comparable between models with different tokenizers.
        tokens: how many tokens were predicted.
        slices: the loss by position, and on recall tokens, if a window was given.
        routings: of every batch what `to_summarise` keeps, if it was asked for.

    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    slices: TextSlices | None
    routings: list[tuple[Any, Any]]

    def figures(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        figures: dict[str, Any] = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }
        return figures if self.slices is None else figures | self.slices.figures()


@torch.no_grad()
def evaluate_blocks(
    model: PreTrainedModel,
    blocks: Blocks,
    *,
    batch_size: int = 8,
    window: int | None = None,
    output_routing: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Predict every block's tokens and average over tokens, not over batches.

    Args:
        model: any causal language model; put into evaluation mode and back.
        blocks: the text, cut into blocks.
        batch_size: blocks at once.
        window: w; if given, the loss by position, and on the recall tokens beyond so many tokens, is measured too. See
            `chiaroscuro.analysis.recall`.
        output_routing: keep the routing of every batch; only a CHIAR-Former has one.
        progress: called with the number of blocks after every batch.

    Raises:
        UserError: the loss is not finite, nothing is predicted, or a token is not in the model's vocabulary.

    """
    total, count, routings = 0.0, 0, []
    sums = None if window is None else SliceSums(window)
    asked = {"output_routing": True} if output_routing else {}
    with evaluation_mode(model):
        for batch in DataLoader(cast(Dataset[Any], blocks), batch_size=batch_size):
            check_vocabulary([batch], model.config.get_text_config().vocab_size)
            outputs = model(
                **{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False, **asked
            )
            predicted = int((batch["shift_labels"] != -100).sum())
            if predicted:  # else the loss is the mean of nothing, NaN
                total += outputs.loss.double().item() * predicted
            count += predicted
            if sums is not None:
                sums.add(outputs.logits, batch)
            if output_routing:
                routings.append(to_summarise(outputs.routing, outputs.meta_gate))
            if progress is not None:
                progress(len(batch["input_ids"]))
    if not count:
        raise UserError("the text has no token to predict: give a longer one")
    loss = total / count
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: the model's weights hold numbers that are not finite")
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=loss / math.log(2) * blocks.tokens.count / blocks.tokens.bytes,
        tokens=count,
        slices=None if sums is None else sums.slices(),
        routings=routings,
    )
