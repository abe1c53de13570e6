"""`ChiarForSequenceClassification`: one label for a whole text.

The trunk is the language model's, so a trained one can be taken over. What is new is small: the tokens are pooled into
one vector, over the real ones alone, and a linear layer scores the labels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from chiaroscuro.errors import UserError
from chiaroscuro.model.config import ChiarConfig, ClassifierPooling
from chiaroscuro.model.modeling import ChiarModel, ChiarPreTrainedModel
from chiaroscuro.model.outputs import ChiarSequenceClassifierOutput


class ChiarForSequenceClassification(ChiarPreTrainedModel):
    """The CHIAR-Former as a classifier of texts, with `config.num_labels` labels.

    A checkpoint of `ChiarForCausalLM` loads into it: the trunk is taken, the head starts anew.
    """

    # A language model's head has no place here, and its absence is no news.
    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]  # noqa: RUF012 (transformers reads it so)
    # Every row is one prediction: the mean over equal batches is the mean over their rows.
    accepts_loss_kwargs = False

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__(config)
        if config.num_labels is None or config.num_labels < 2:
            raise UserError(f"num_labels={config.num_labels!r}: a classifier needs at least 2 labels to choose from")
        self.model = ChiarModel(config)
        width = config.hidden_size
        self.score: nn.Module = nn.Linear(width, config.num_labels)
        if config.classifier_head == "mlp":
            drop = nn.Dropout(config.hidden_dropout)
            self.score = nn.Sequential(nn.Linear(width, width), nn.GELU(), drop, self.score)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
        position_ids: Int[Tensor, "#batch time"] | None = None,
        inputs_embeds: Float[Tensor, "batch time width"] | None = None,
        labels: Int[Tensor, " batch"] | None = None,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ChiarSequenceClassifierOutput:
        """Score the labels: logits = W pool(h) + b, h after the final norm; loss = −mean log softmax(logits)[label].

        Args:
            input_ids: see `ChiarModel.forward`, as for all that is not named here.
            attention_mask: 1 for real tokens, 0 for padding, on either side. Without it every token is real: the id
                of a padding token says nothing, as many tokenizers pad with a token that texts hold too.
            position_ids: see there.
            inputs_embeds: see there.
            labels: the right one of every row, from 0.
            output_routing: see there.
            output_hidden_states: see there.
            return_dict: see there.

        Raises:
            UserError: a row has no real token, or labels are not one whole number a row, each one of the model's.

        """
        return classify(
            self.model,
            self.score,
            labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_routing=output_routing,
            output_hidden_states=output_hidden_states,
        )


def classify(
    trunk: ChiarModel,
    head: nn.Module,
    labels: Int[Tensor, " batch"] | None = None,
    *,
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    output_routing: bool = False,
    num_items_in_batch: int | Tensor | None = None,
    **inputs: Any,
) -> ChiarSequenceClassifierOutput:
    """What `ChiarForSequenceClassification.forward` does, with a head that is given; arguments and errors are its.

    With `num_items_in_batch` the loss is the sum over the rows divided by that, not by the number of this forward's.
    """
    outputs = trunk(
        attention_mask=attention_mask, output_routing=output_routing, use_cache=False, return_dict=True, **inputs
    )
    logits = head(pool_tokens(outputs.last_hidden_state, attention_mask, trunk.config.classifier_pooling))
    count = logits.shape[-1]
    loss = term = None
    if labels is not None:
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise UserError(
                f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype}: need one whole number a row, shape "
                f"({len(logits)},) and dtype torch.int64"
            )
        labels = labels.long()
        try:
            loss = F.cross_entropy(logits, labels, reduction="mean" if num_items_in_batch is None else "sum")
        except IndexError:
            raise UserError(
                f"labels {sorted(set(labels.tolist()))} for a head of {count} labels: give labels from 0 to {count - 1}"
            ) from None
        part: float | Tensor = 1.0
        if num_items_in_batch is not None:
            # As much of λ Σ U as this forward is of its step, so that accumulated forwards sum to one.
            loss, part = loss / num_items_in_batch, (labels != -100).sum() / num_items_in_batch
        if trunk.penalises():
            term = part * trunk.collapse_term(outputs.routing, attention_mask)
            loss = loss - term
    return ChiarSequenceClassifierOutput(
        loss=loss,
        logits=logits,
        hidden_states=outputs.hidden_states,
        routing=outputs.routing if output_routing else None,
        meta_gate=outputs.meta_gate,
        collapse_term=None if term is None else term.detach(),
    )


def pool_tokens(
    hidden: Float[Tensor, "batch time width"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    pooling: ClassifierPooling = "mean",
) -> Float[Tensor, "batch width"]:
    """One vector a row, of its real tokens alone: their mean, or the last of them.

    Args:
        hidden: the tokens.
        attention_mask: 1 for real tokens, 0 for padding, on either side.
        pooling: `"mean"` or `"last"`.

    Raises:
        UserError: a row has no real token.

    """
    rows, time, _ = hidden.shape
    real = hidden.new_ones(rows, time, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    counts = real.sum(1)
    if time == 0 or bool((counts == 0).any()):
        empty = int((counts == 0).nonzero()[0]) if rows else 0
        raise UserError(f"row {empty} of the batch has no real token to pool: leave it out, or mend its attention_mask")
    if pooling == "last":
        places = torch.arange(time, device=hidden.device)
        last = torch.where(real, places, 0).amax(1)
        return hidden[torch.arange(rows, device=hidden.device), last]
    return (hidden * real[..., None]).sum(1) / counts[:, None]
