"""`ChiarForSequenceClassification`: labels or numbers for a whole text.

The trunk is that of the language model, so a trained one can be used. The real tokens are pooled into one vector, and a
linear layer or a small MLP scores the labels.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.utils import can_return_tuple

from chiaroscuro.errors import UserError
from chiaroscuro.model.config import ChiarConfig, ClassifierPooling
from chiaroscuro.model.modeling import ChiarModel, ChiarPreTrainedModel, refuse_keywords, refuse_no_tensor
from chiaroscuro.model.outputs import ChiarSequenceClassifierOutput


class ChiarForSequenceClassification(ChiarPreTrainedModel):
    """The CHIAR-Former as a text classifier with `config.num_labels` labels, or a regression for `num_labels=1`.

    A checkpoint of `ChiarForCausalLM` loads into it: the trunk is kept, and the head is initialised.
    """

    # A language model's head is ignored without a warning.
    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]  # noqa: RUF012 (transformers reads it so)
    # Every sequence is one prediction, so the mean over equal batches is the mean over their sequences.
    accepts_loss_kwargs = False

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__(config)
        if config.num_labels is None or config.num_labels < 1:
            raise UserError(f"num_labels={config.num_labels!r}: give at least 2 to choose from, or 1 for a regression")
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
        labels: Shaped[Tensor, "batch *labels"] | None = None,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ChiarSequenceClassifierOutput:
        """Score the labels: logits = W pool(h) + b, h after the final norm.

        The loss is the one of `config.problem_type`, as in transformers, which sets it by the first labels where it is
        not given: `"single_label_classification"`, −mean log softmax(logits)[label];
        `"multi_label_classification"`, the binary cross-entropy of each label, for floats from 0 to 1; and for
        `num_labels=1` `"regression"`, the mean squared error.

        Args:
            input_ids: see `ChiarModel.forward`, as for all that is not named here.
            attention_mask: 1 for real tokens, 0 for padding, on either side. Without it every token is real.
                `pad_token_id` is not used: many tokenizers pad with a token that occurs in texts.
            position_ids: see there.
            inputs_embeds: see there.
            labels: (B,), the label of each sequence, from 0; (B, num_labels) for several labels per sequence; for a
                regression of one number (B,) or (B, 1).
            output_routing: see there.
            output_hidden_states: see there.
            return_dict: see there.
            kwargs: `num_items_in_batch`: divide the sum of the losses by this instead of by the batch size.
                `use_cache` is ignored, because a classifier continues nothing. Others as in `ChiarModel.forward`.

        Raises:
            UserError: a sequence has no real token, labels don't suit the problem type, or a cache is given;
                and as `ChiarModel.forward`.

        """
        refuse_keywords(kwargs, ChiarForSequenceClassification.forward, self.config)
        return classify(
            self.model,
            self.score,
            labels,
            loss_function=self._loss,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_routing=output_routing,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """The loss of the config's problem type, or of the one that the labels show."""
        several = labels.is_floating_point() and labels.shape == logits.shape
        one = "regression" if logits.shape[1] == 1 else "single_label_classification"
        problem = self.config.problem_type or ("multi_label_classification" if several and logits.shape[1] > 1 else one)
        if problem == "single_label_classification":
            labels = check_labels(logits, labels)
            return self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
            )
        if labels.shape == logits.shape[:1] and logits.shape[1] == 1:
            labels = labels[:, None]
        if labels.shape != logits.shape:
            raise UserError(
                f"labels of shape {tuple(labels.shape)} for problem_type={problem!r}: need shape {tuple(logits.shape)}"
            )
        loss = self.loss_function(labels=labels.to(logits.dtype), pooled_logits=logits, config=self.config)
        return loss if num_items_in_batch is None else loss * (len(logits) / num_items_in_batch)


def check_labels(logits: Tensor, labels: Tensor) -> Int[Tensor, " batch"]:
    """The labels as int64; a UserError where they are not one whole number a row."""
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise UserError(
            f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype}: need one whole number a row, shape "
            f"({len(logits)},) and dtype torch.int64"
        )
    return labels.long()


def label_loss(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """−mean log softmax(logits)[label] of a head with one label a row."""
    count: Any = num_items_in_batch  # an int will do, whatever its annotation says
    return fixed_cross_entropy(logits, check_labels(logits, labels), count)


def classify(
    trunk: ChiarModel,
    head: nn.Module,
    labels: Shaped[Tensor, "batch *labels"] | None = None,
    *,
    loss_function: Callable[[Tensor, Tensor, int | Tensor | None], Tensor] = label_loss,
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    output_routing: bool = False,
    num_items_in_batch: int | Tensor | None = None,
    **inputs: Any,
) -> ChiarSequenceClassifierOutput:
    """`ChiarForSequenceClassification.forward` with a given trunk, head and loss; arguments and errors are the same."""
    for name in ("cache", "past_key_values"):
        if inputs.pop(name, None) is not None:
            raise UserError(f"{name}: a classifier scores whole texts, and continues none: drop it")
    inputs["use_cache"] = False
    outputs = trunk(attention_mask=attention_mask, output_routing=output_routing, return_dict=True, **inputs)
    logits = head(pool_tokens(outputs.last_hidden_state, attention_mask, trunk.config.classifier_pooling))
    loss = term = None
    if labels is not None:
        refuse_no_tensor("labels", labels)
        try:
            loss = loss_function(logits, labels, num_items_in_batch)
        except IndexError:
            last = logits.shape[1] - 1
            raise UserError(
                f"labels {sorted(set(labels.tolist()))} for a head of {last + 1} labels: give labels from 0 to {last}"
            ) from None
        if trunk.penalises():
            # As much of λ Σ U as this forward is of its step, so that accumulated forwards sum to one.
            part: float | Tensor = 1.0
            if num_items_in_batch is not None:
                part = (labels.reshape(len(labels), -1)[:, 0] != -100).sum() / num_items_in_batch
            term = part * trunk.collapse_term(outputs.routing, attention_mask)
            loss = loss - term
    return ChiarSequenceClassifierOutput(
        loss=loss,
        logits=logits,
        hidden_states=outputs.hidden_states,
        routing=outputs.routing if output_routing else None,
        meta_gate=outputs.meta_gate,
        collapse_term=term,
    )


def pool_tokens(
    hidden: Float[Tensor, "batch time width"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    pooling: ClassifierPooling = "mean",
) -> Float[Tensor, "batch width"]:
    """One vector per sequence: the mean of its real tokens, or the last of them.

    Args:
        hidden: the tokens.
        attention_mask: 1 for real tokens, 0 for padding, on either side.
        pooling: `"mean"` or `"last"`.

    Raises:
        UserError: a sequence has no real token.

    """
    rows, time, _ = hidden.shape
    real = hidden.new_ones(rows, time, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    counts = real.sum(1)
    if time == 0 or bool((counts == 0).any()):
        empty = int((counts == 0).nonzero()[0]) if rows else 0
        raise UserError(
            f"row {empty} of the batch has no real token to pool: leave it out, or correct its attention_mask"
        )
    if pooling == "last":
        places = torch.arange(time, device=hidden.device)
        last = torch.where(real, places, 0).amax(1)
        return hidden[torch.arange(rows, device=hidden.device), last]
    return (hidden * real[..., None]).sum(1) / counts[:, None]
