"""The Auto classes of transformers learn our models by name, whether they are imported before chiaroscuro or after it.

`AutoConfig.register` takes a class, and to have the class is to import transformers and the whole model: seconds, for a
user of `chiaroscuro.ops` who needs neither. For its own models transformers keeps tables of names, and imports a model
when it is asked for. Ours are entered there as soon as the modules that hold the tables are imported.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

MODEL_TYPE = "chiar"
CONFIG = "ChiarConfig"
CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"
MAPPINGS = {
    "MODEL_MAPPING": "ChiarModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "ChiarForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "ChiarForSequenceClassification",
}


HUB_MODULE = "chiaroscuro_hub"
"""The module that lies beside saved weights, for a process that has not imported chiaroscuro."""

AUTO_MAP = {
    "AutoConfig": f"{HUB_MODULE}.{CONFIG}",
    "AutoModel": f"{HUB_MODULE}.ChiarModel",
    "AutoModelForCausalLM": f"{HUB_MODULE}.ChiarForCausalLM",
    "AutoModelForSequenceClassification": f"{HUB_MODULE}.ChiarForSequenceClassification",
}
"""What a saved config.json says as `auto_map`: the Auto classes find ours there, with `trust_remote_code=True`."""


RETROFIT_TYPE, RETROFIT_CONFIG = "chiar_retrofit", "RetrofitConfig"
"""The model type, and the configuration, of any model that was retrofitted."""

RETROFIT_AUTO_MAP = {"AutoConfig": f"{HUB_MODULE}.{RETROFIT_CONFIG}"}
"""As `AUTO_MAP`, for these."""


def write_hub_module(folder: str | os.PathLike[str]) -> None:
    """Write the module that `AUTO_MAP` names."""
    names = ", ".join(sorted({CONFIG, RETROFIT_CONFIG, *MAPPINGS.values()}))
    note = '"""For transformers with trust_remote_code=True. Needs the chiaroscuro package."""'
    text = f"{note}\n\nfrom chiaroscuro import {names}  # noqa: F401\n"
    Path(folder, f"{HUB_MODULE}.py").write_text(text, encoding="utf-8")


def register() -> None:
    """Enter our names into the tables, now or when transformers' modules are imported."""
    for name in (CONFIGS, MODELS):
        module = sys.modules.get(name)
        if module is not None:
            _enter_names(module)
    sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Enters our names into a module of tables right after it was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (CONFIGS, MODELS):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _NamesEntered(spec.loader)
        return spec


class _NamesEntered(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _enter_names(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # `inspect` asks a loader for the source


def _enter_names(module: ModuleType) -> None:
    mappings = {"CONFIG_MAPPING": CONFIG} if module.__name__ == CONFIGS else MAPPINGS
    for mapping, name in mappings.items():
        named = {MODEL_TYPE: name} | ({RETROFIT_TYPE: RETROFIT_CONFIG} if mapping == "CONFIG_MAPPING" else {})
        table = getattr(module, mapping)
        for model_type, ours in named.items():
            getattr(module, f"{mapping}_NAMES")[model_type] = ours
            table._modules[model_type] = sys.modules["chiaroscuro"]  # where it looks up the name
        if module.__name__ == MODELS:
            table._reverse_config_mapping[CONFIG] = MODEL_TYPE
