"""What a forward returns: the outputs of transformers, with the routing.

Their field for the cache is inherited, because its name depends on the version: `cache`, and `past_key_values` before
transformers 5.24. `attentions` is always None.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils import ModelOutput

from chiaroscuro.layers import Routing


@dataclass
class ChiarModelOutput(BaseModelOutputWithPast):
    """Output of `ChiarModel`.

    Attributes:
        last_hidden_state: the tokens after the final norm.
        cache: the `ChiarCache`, if one was used.
        hidden_states: with `output_hidden_states=True`: the input of each layer and, last, `last_hidden_state`.
        routing: with `output_routing=True`: a `Routing` for each layer (entropy, operator index, share per operator).
            In training with a collapse penalty it is always given, with None for layers of one operator.
        meta_gate: with `output_routing=True`: g of the MetaRouter, of shape (1, 1) if pooled over the batch, (B, 1)
            over the sequence, (B, T) causally; None without a MetaRouter.

    """

    last_hidden_state: Float[Tensor, "batch time width"] | None = None
    hidden_states: tuple[Float[Tensor, "batch time width"], ...] | None = None
    routing: tuple[Routing | None, ...] | None = None
    meta_gate: Float[Tensor, "#batch #time"] | None = None


@dataclass
class ChiarCausalLMOutput(CausalLMOutputWithPast):
    """Output of `ChiarForCausalLM`: the loss and the logits, and the rest as in `ChiarModelOutput`.

    Attributes:
        loss: mean negative log-likelihood of the next token in nats, if labels were given; in training with
            `collapse_penalty` λ > 0, minus λ Σ_layers U.
        logits: scores of the next token; None in training with labels, unless `output_logits=True` asked for them.
        cache: see `ChiarModelOutput`.
        hidden_states: see `ChiarModelOutput`.
        routing: see `ChiarModelOutput`.
        meta_gate: see `ChiarModelOutput`.
        collapse_term: λ Σ_layers U, which was subtracted from the loss, if there is a penalty.
        beside: from `ChiarForMixedTasks`, the output of the second forward, if there was one.

    """

    loss: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "batch kept vocabulary"] | None = None
    hidden_states: tuple[Float[Tensor, "batch time width"], ...] | None = None
    routing: tuple[Routing, ...] | None = None
    meta_gate: Float[Tensor, "#batch #time"] | None = None
    collapse_term: Float[Tensor, ""] | None = None
    beside: ModelOutput | None = None


@dataclass
class ChiarSequenceClassifierOutput(SequenceClassifierOutput):
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
