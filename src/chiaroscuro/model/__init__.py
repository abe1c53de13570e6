"""The Hugging Face classes: a CHIAR-Former to call, train, generate with, save and load."""

from chiaroscuro.model.cache import ChiarCache
from chiaroscuro.model.classification import ChiarForSequenceClassification
from chiaroscuro.model.mixed import ChiarForMixedTasks
from chiaroscuro.model.modeling import ChiarForCausalLM, ChiarModel, ChiarPreTrainedModel
from chiaroscuro.model.outputs import ChiarCausalLMOutput, ChiarModelOutput, ChiarSequenceClassifierOutput

__all__ = [
    "ChiarCache",
    "ChiarCausalLMOutput",
    "ChiarForCausalLM",
    "ChiarForMixedTasks",
    "ChiarForSequenceClassification",
    "ChiarModel",
    "ChiarModelOutput",
    "ChiarPreTrainedModel",
    "ChiarSequenceClassifierOutput",
]
