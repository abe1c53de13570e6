"""`ChiarForMixedTasks`: a language model that classifies texts too, one head a task on one trunk."""

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
    """The language model, and a classifier for every task in `config.task_labels`.

    Every loss goes through the whole model: embeddings, MetaRouter and layers. (In the author's code those of the
    classification tasks run on the bare embeddings, past what they are meant to teach.) Its checkpoint loads into
    `ChiarForCausalLM`, which leaves the heads out.

    Raises:
        UserError: the config names no task.

    Source: the paper, v2, mixed training.

    """

    # A language model leaves the heads out without a word; here they have a place.
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
        **others: Any,
    ) -> ChiarCausalLMOutput | ChiarSequenceClassifierOutput:
        """Predict the next tokens, or a task's label.

        Args:
            input_ids: the tokens.
            attention_mask: 1 for real tokens.
            task: one of `config.task_labels`; None for language modelling.
            labels: the tokens themselves, or for a task the label of every row.
            beside: beside language modelling, the arguments of a second forward, whose loss is added. So a step of
                mixed training is one call, and what wraps a model to spread it over processes sees all that it uses.
            return_dict: False for a plain tuple.
            others: see `ChiarForCausalLM.forward`, or for a task `ChiarForSequenceClassification.forward`. A task takes
                `num_items_in_batch` too: the losses of its rows are summed and divided by that. As transformers'
                Trainer leaves out the first of `labels` when it counts them, which only suits a text, give it those of
                a task as `shift_labels` too: these it counts as they are.

        Returns:
            The output of the one or the other. With `beside`, the loss is the sum, and `beside` the second's output.

        Raises:
            UserError: the model has no such task, a second forward goes beside one, or there are no labels for a sum
                of losses.

        """
        others |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if task is not None:
            if beside is not None:
                raise UserError(f"beside with task={task!r}: a second forward goes beside language modelling alone")
            others.pop("shift_labels", None)  # the same labels, for the Trainer to count
            return classify(self.model, self.head_of(task), labels, **others)
        output = super().forward(labels=labels, return_dict=True, **others)
        if beside is not None:
            second = self.forward(**beside, return_dict=True)
            if output.loss is None or second.loss is None:
                raise UserError("a forward beside another is there for its loss: give labels to both")
            output.loss = output.loss + second.loss
            output.beside = second
        return output

    def head_of(self, task: str) -> nn.Linear:
        """The classifier of a task."""
        if task not in self.heads:
            raise UserError(f"task={task!r}: this model has heads for {', '.join(self.heads)}")
        head = self.heads[task]
        assert isinstance(head, nn.Linear)
        return head
