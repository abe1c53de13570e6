"""Language models that spend attention only where a token needs it.

CHIAR-Former (arXiv 2606.08327): each token goes to cheap DCT spectral mixing or to full self-attention, by the
spectral entropy of its vector. `ChiarConfig` says what is on a layer's menu, `ChiarForCausalLM` is the model,
`chiaroscuro.layers` has the parts for a model of your own, and `chiaroscuro.ops` the arithmetic.

Names are imported when they are first used, so `import chiaroscuro.ops` costs little more than PyTorch. After
`import chiaroscuro` the Auto classes of transformers know the models.
"""

from typing import TYPE_CHECKING

from chiaroscuro import auto_classes
from chiaroscuro.errors import UserError
from chiaroscuro.lazy import lazily

if TYPE_CHECKING:
    from chiaroscuro.layers import register_operator, register_router
    from chiaroscuro.model import (
        ChiarCache,
        ChiarForCausalLM,
        ChiarForMixedTasks,
        ChiarForSequenceClassification,
        ChiarModel,
    )
    from chiaroscuro.model.checks import check_model
    from chiaroscuro.model.config import ChiarConfig
    from chiaroscuro.retrofitting.calibration import calibrate
    from chiaroscuro.retrofitting.fitting import fit
    from chiaroscuro.retrofitting.in_place import retrofit, unretrofit
    from chiaroscuro.retrofitting.routed_model import RetrofitConfig

__version__ = "0.1.0"

__all__ = [
    "ChiarCache",
    "ChiarConfig",
    "ChiarForCausalLM",
    "ChiarForMixedTasks",
    "ChiarForSequenceClassification",
    "ChiarModel",
    "RetrofitConfig",
    "UserError",
    "calibrate",
    "check_model",
    "fit",
    "register_operator",
    "register_router",
    "retrofit",
    "unretrofit",
]

_MODULES = {
    "analysis": (),
    "convert": (),
    "layers": ("register_operator", "register_router"),
    "model": ("ChiarCache", "ChiarForCausalLM", "ChiarForMixedTasks", "ChiarForSequenceClassification", "ChiarModel"),
    "model.checks": ("check_model",),
    "model.config": ("ChiarConfig",),
    "ops": (),
    "retrofitting.calibration": ("calibrate",),
    "retrofitting.fitting": ("fit",),
    "retrofitting.in_place": ("retrofit", "unretrofit"),
    "retrofitting.routed_model": ("RetrofitConfig",),
}

auto_classes.register()
__getattr__, __dir__ = lazily(__name__, _MODULES)
