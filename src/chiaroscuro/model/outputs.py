"""What a forward returns: Hugging Face's outputs, and beside them what was routed where."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers.utils import ModelOutput

from chiaroscuro.layers import Routing
from chiaroscuro.model.cache import ChiarCache


@dataclass
class ChiarModelOutput(ModelOutput):
    """Output of `ChiarModel`.

    Attributes:
        last_hidden_state: after the final norm.
        past_key_values: the cache, where one was used.
        hidden_states: on `output_hidden_states=True`: the embedded input, and the tokens after every layer.
        routing: on `output_routing=True`: a `Routing` a layer (entropy, operator index, share per operator). In
            training with a collapse penalty also without being asked for, None for the layers of one operator.
        meta_gate: g of the MetaRouter, on `output_routing=True`: (1, 1) pooled over the batch, (B, 1) over the
            sequence, (B, T) causally; None without a MetaRouter.

    """

    last_hidden_state: Float[Tensor, "batch time width"] | None = None
    past_key_values: ChiarCache | None = None
    hidden_states: tuple[Float[Tensor, "batch time width"], ...] | None = None
    routing: tuple[Routing | None, ...] | None = None
    meta_gate: Float[Tensor, "#batch #time"] | None = None


@dataclass
class ChiarCausalLMOutput(ModelOutput):
    """Output of `ChiarForCausalLM`: the loss and the logits, and the rest as in `ChiarModelOutput`.

    Attributes:
        loss: mean negative log-likelihood of the next token in nats, where labels were given; in training with
            `collapse_penalty` λ > 0, less λ Σ_layers U.
        logits: scores of the next token; None in training with labels, unless `output_logits=True` asked for them.
        past_key_values: see `ChiarModelOutput`.
        hidden_states: see `ChiarModelOutput`.
        routing: see `ChiarModelOutput`.
        meta_gate: see `ChiarModelOutput`.
        collapse_term: what the penalty took off the loss, where there is one.
        beside: of `ChiarForMixedTasks`, the output of the second forward, where there was one.

    """

    loss: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "batch kept vocabulary"] | None = None
    past_key_values: ChiarCache | None = None
    hidden_states: tuple[Float[Tensor, "batch time width"], ...] | None = None
    routing: tuple[Routing, ...] | None = None
    meta_gate: Float[Tensor, "#batch #time"] | None = None
    collapse_term: Float[Tensor, ""] | None = None
    beside: ModelOutput | None = None


@dataclass
class ChiarSequenceClassifierOutput(ModelOutput):
    """Output of `ChiarForSequenceClassification`: the loss and the logits, and the rest as in `ChiarModelOutput`.

    Attributes:
        loss: mean negative log-likelihood of the rows' labels in nats, where they were given; in training with
            `collapse_penalty` λ > 0, less λ Σ_layers U.
        logits: scores of the labels.
        hidden_states: see `ChiarModelOutput`.
        routing: see `ChiarModelOutput`.
        meta_gate: see `ChiarModelOutput`.
        collapse_term: what the penalty took off the loss, where there is one.

    """

    loss: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "batch labels"] | None = None
    hidden_states: tuple[Float[Tensor, "batch time width"], ...] | None = None
    routing: tuple[Routing, ...] | None = None
    meta_gate: Float[Tensor, "#batch #time"] | None = None
    collapse_term: Float[Tensor, ""] | None = None
