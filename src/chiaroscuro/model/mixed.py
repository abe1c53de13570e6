"""`ChiarForMixedTasks`: a language model with a classification head for each of several tasks, on one trunk."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from chiaroscuro.errors import UserError
from chiaroscuro.model.classification import classify
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.modeling import ChiarForCausalLM
from chiaroscuro.model.outputs import ChiarCausalLMOutput, ChiarSequenceClassifierOutput


class ChiarForMixedTasks(ChiarForCausalLM):
    """The language model, and a classification head for every task in `config.task_labels`.

    Every loss depends on the whole model: embeddings, MetaRouter and layers. (In the author's code the classification
    losses are computed on the bare embeddings, so they train no layer.) Its checkpoint loads into `ChiarForCausalLM`,
    without the heads.

    Raises:
        UserError: the config names no task.

    Source: the paper, v2, mixed training.

    """

    # `ChiarForCausalLM` ignores the heads; here they are loaded.
    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers reads it off a class's name
        if config.task_labels is None:
            raise UserError(
                "task_labels names no task: set it to the number of labels of each, or use ChiarForCausalLM"
            )
        self.heads = nn.ModuleDict(
            {task: nn.Linear(config.hidden_size, labels) for task, labels in config.task_labels.items()}
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Int[Tensor, "batch keys"] | Bool[Tensor, "batch keys"] | None = None,
        task: str | None = None,
        labels: Int[Tensor, "batch time"] | Int[Tensor, " batch"] | None = None,
        beside: Mapping[str, Any] | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        **others: Any,
    ) -> ChiarCausalLMOutput | ChiarSequenceClassifierOutput:
        """Predict the next tokens, or a task's label.

        Args:
            input_ids: the tokens.
            attention_mask: 1 for real tokens.
            task: one of `config.task_labels`, or None for language modelling.
            labels: the tokens themselves, or for a task the label of each sequence.
            beside: with language modelling, the arguments of a second forward, whose loss is added. A step of mixed
                training is then one call, as DDP needs it to know which parameters are used.
            return_dict: False for a plain tuple.
            logits_to_keep: of a text, see `ChiarForCausalLM.forward`; named here for generation, which asks by it for
                the last logits alone.
            others: see `ChiarForCausalLM.forward`, or for a task `ChiarForSequenceClassification.forward`. For a
                task, too, `num_items_in_batch` divides the sum of the losses. transformers' Trainer counts `labels`
                without the first, as for a text; it counts `shift_labels` as they are, so pass a task's labels under
                both names.

        Returns:
            The output of the language model or of the classifier. With `beside`, `loss` is the sum of both losses and
            `beside` is the second output.

        Raises:
            UserError: the model has no such task, `beside` is given with a task, or labels are missing for the sum.

        """
        others |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if task is None or not isinstance(logits_to_keep, int) or logits_to_keep:
            others["logits_to_keep"] = logits_to_keep
        if task is not None:
            if beside is not None:
                raise UserError(f"beside with task={task!r}: a second forward goes with language modelling only")
            others.pop("shift_labels", None)  # the same labels, for the Trainer to count
            return classify(self.model, self.head_of(task), labels, **others)
        output = super().forward(labels=labels, return_dict=True, **others)
        if beside is not None:
            second = self.forward(**beside, return_dict=True)
            if output.loss is None or second.loss is None:
                raise UserError("beside adds the losses of two forwards: give labels to both")
            output.loss = output.loss + second.loss
            output.beside = second
        return output

    def head_of(self, task: str) -> nn.Linear:
        """The classification head of a task."""
        if task not in self.heads:
            raise UserError(f"task={task!r}: this model has heads for {', '.join(self.heads)}")
        head = self.heads[task]
        assert isinstance(head, nn.Linear)
        return head
