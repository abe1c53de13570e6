"""The Hugging Face classes: a CHIAR-Former to call, train, generate with, save and load."""

from typing import TYPE_CHECKING

from chiaroscuro.lazy import lazily

if TYPE_CHECKING:
    from chiaroscuro.model.cache import ChiarCache
    from chiaroscuro.model.classification import ChiarForSequenceClassification
    from chiaroscuro.model.mixed import ChiarForMixedTasks
    from chiaroscuro.model.modeling import ChiarForCausalLM, ChiarModel, ChiarPreTrainedModel
    from chiaroscuro.model.move_thresholds import MoveThresholds
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
    "MoveThresholds",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "cache": ["ChiarCache"],
        "calibration": [],
        "classification": ["ChiarForSequenceClassification"],
        "config": [],
        "loading": [],
        "mixed": ["ChiarForMixedTasks"],
        "modeling": ["ChiarForCausalLM", "ChiarModel", "ChiarPreTrainedModel"],
        "move_thresholds": ["MoveThresholds"],
        "outputs": ["ChiarCausalLMOutput", "ChiarModelOutput", "ChiarSequenceClassifierOutput"],
    },
)
