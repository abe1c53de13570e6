"""Language models that spend attention only where a token needs it.

CHIAR-Former (arXiv 2606.08327): each token goes to cheap DCT spectral mixing or to full self-attention, by the
spectral entropy of its vector. `ChiarConfig` says what is on a layer's menu, `ChiarForCausalLM` is the model,
`chiaroscuro.layers` the parts for a model of your own, `chiaroscuro.ops` the arithmetic.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from chiaroscuro.errors import UserError
from chiaroscuro.layers import register_operator, register_router
from chiaroscuro.model import (
    ChiarCache,
    ChiarForCausalLM,
    ChiarForMixedTasks,
    ChiarForSequenceClassification,
    ChiarModel,
)
from chiaroscuro.model.config import ChiarConfig

if TYPE_CHECKING:
    from chiaroscuro.model.calibration import calibrate

__version__ = "0.1.0"

__all__ = [
    "ChiarCache",
    "ChiarConfig",
    "ChiarForCausalLM",
    "ChiarForMixedTasks",
    "ChiarForSequenceClassification",
    "ChiarModel",
    "UserError",
    "calibrate",
    "register_operator",
    "register_router",
]

AutoConfig.register(ChiarConfig.model_type, ChiarConfig)
AutoModel.register(ChiarConfig, ChiarModel)
AutoModelForCausalLM.register(ChiarConfig, ChiarForCausalLM)
AutoModelForSequenceClassification.register(ChiarConfig, ChiarForSequenceClassification)


def __getattr__(name: str) -> Any:
    # The training package brings the Trainer and datasets: seconds that a user of the model need not wait for.
    if name == "calibrate":
        from chiaroscuro.model.calibration import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
