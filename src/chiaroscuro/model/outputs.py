"""What a forward returns: outputs as in transformers, with the routing."""

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
        last_hidden_state: the tokens after the final norm.
        past_key_values: the cache, if one was used.
        hidden_states: with `output_hidden_states=True`: the input of each layer and, last, `last_hidden_state`.
        routing: with `output_routing=True`: a `Routing` for each layer (entropy, operator index, share per operator).
            In training with a collapse penalty it is always given, with None for layers of one operator.
        meta_gate: with `output_routing=True`: g of the MetaRouter, of shape (1, 1) if pooled over the batch, (B, 1)
            over the sequence, (B, T) causally; None without a MetaRouter.

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
        loss: mean negative log-likelihood of the next token in nats, if labels were given; in training with
            `collapse_penalty` λ > 0, minus λ Σ_layers U.
        logits: scores of the next token; None in training with labels, unless `output_logits=True` asked for them.
        past_key_values: see `ChiarModelOutput`.
        hidden_states: see `ChiarModelOutput`.
        routing: see `ChiarModelOutput`.
        meta_gate: see `ChiarModelOutput`.
        collapse_term: λ Σ_layers U, which was subtracted from the loss, if there is a penalty.
        beside: from `ChiarForMixedTasks`, the output of the second forward, if there was one.

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
        loss: the loss of the problem type, if labels were given; in training with `collapse_penalty` λ > 0, minus
            λ Σ_layers U.
        logits: scores of the labels; for a regression, the predicted numbers.
        hidden_states: see `ChiarModelOutput`.
        routing: see `ChiarModelOutput`.
        meta_gate: see `ChiarModelOutput`.
        collapse_term: λ Σ_layers U, which was subtracted from the loss, if there is a penalty.

    """

    loss: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "batch labels"] | None = None
    hidden_states: tuple[Float[Tensor, "batch time width"], ...] | None = None
    routing: tuple[Routing, ...] | None = None
    meta_gate: Float[Tensor, "#batch #time"] | None = None
    collapse_term: Float[Tensor, ""] | None = None
