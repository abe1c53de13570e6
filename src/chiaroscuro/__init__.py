"""Language models that spend attention only where a token needs it.

CHIAR-Former (arXiv 2606.08327): each token goes to cheap DCT spectral mixing or to full self-attention, by the
spectral entropy of its vector. `ChiarConfig` says what is on a layer's menu, `ChiarForCausalLM` is the model,
`chiaroscuro.layers` has the parts for a model of your own, and `chiaroscuro.ops` the arithmetic.

Names are imported when they are first used, so `import chiaroscuro.ops` costs little more than PyTorch. After
`import chiaroscuro` the Auto classes of transformers know the models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from chiaroscuro import auto_classes
from chiaroscuro.errors import UserError

if TYPE_CHECKING:
    from chiaroscuro.layers import register_operator, register_router
    from chiaroscuro.model import (
        ChiarCache,
        ChiarForCausalLM,
        ChiarForMixedTasks,
        ChiarForSequenceClassification,
        ChiarModel,
    )
    from chiaroscuro.model.calibration import calibrate
    from chiaroscuro.model.config import ChiarConfig

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

_HOMES = {
    "ChiarCache": "chiaroscuro.model",
    "ChiarConfig": "chiaroscuro.model.config",
    "ChiarForCausalLM": "chiaroscuro.model",
    "ChiarForMixedTasks": "chiaroscuro.model",
    "ChiarForSequenceClassification": "chiaroscuro.model",
    "ChiarModel": "chiaroscuro.model",
    "calibrate": "chiaroscuro.model.calibration",
    "register_operator": "chiaroscuro.layers",
    "register_router": "chiaroscuro.layers",
}
_ROOMS = ("analysis", "convert", "layers", "model", "ops")

auto_classes.register()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
