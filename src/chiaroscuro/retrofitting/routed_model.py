"""The classes of a model that was retrofitted: the model's own, with shares and thresholds, and a saved form of theirs.

They are made from the classes that the model has, one each, when they are first needed.
"""

import json
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from chiaroscuro.auto_classes import RETROFIT_AUTO_MAP, RETROFIT_TYPE, write_hub_module
from chiaroscuro.errors import UserError
from chiaroscuro.files import refuse_file
from chiaroscuro.layers import ExactBuffers, Router, exact_modules
from chiaroscuro.layers.registry import refuse_model_s_options, split_entry, with_history
from chiaroscuro.layers.thresholds import refuse_impossible_share
from chiaroscuro.model.card import write_model_card
from chiaroscuro.model.generation import bound_drafts, bound_own_draft
from chiaroscuro.model.spread import SPREADS, spread
from chiaroscuro.ops.reach_attention import LONGEST_WINDOW
from chiaroscuro.retrofitting.routed_attention import (
    IMPLEMENTATION,
    NO_WEIGHTS,
    SHARED,
    ConfigView,
    Forward,
    MadeClass,
    Reach,
    RoutedAttention,
    present,
)

FIELD = "chiaroscuro"
"""The name of the configuration's field, and of a module's child."""

SAID = (
    *("window", "sinks", "attention_share", "attention_spread", "kv_share", "kv_spread"),
    *("router", "kv_router", "layers"),
)
"""What that field says."""


class RoutedModel(MadeClass, PreTrainedModel):
    """Put before a model class of transformers: `class Routed(RoutedModel, LlamaForCausalLM)`."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self)
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *exact_modules(self)}

    @property
    def reaches(self) -> dict[int, Reach]:
        """The routed layers, by number."""
        return {module.layer: module for module in self.modules() if isinstance(module, Reach)}

    def layer_shares(self, side: str, mean: float | None = None) -> dict[int, float]:
        """The share of each routed layer, of a side, at a mean share; the present one unless given."""
        field, weights = SPREADS[side]
        said = getattr(self.config, FIELD)
        mean = said[field] if mean is None else mean
        layers = list(self.reaches)
        return dict(zip(layers, spread(said[weights] or [1.0] * len(layers), mean), strict=True))

    def set_attention_share(self, share: float | None = None, *, kv_share: float | None = None) -> None:
        """Let this share of the tokens look, and keep that share, by the quantiles that were seen in the fit.

        Args:
            share: from 0 to 1, the mean over the routed layers; as it is unless given.
            kv_share: likewise of those that are kept.

        Raises:
            UserError: neither is given, or a share is no such number.

        """
        if share is None and kv_share is None:
            raise UserError("no share to set: give the share that looks, kv_share, the share that is kept, or both")
        for name, given in (("attention_share", share), ("kv_share", kv_share)):
            if given is not None:
                refuse_impossible_share(name, given)
        for reach in self.reaches.values():
            for router in reach.routers.values():
                router.calibration.check_present()
        for side, given in (("look", share), ("kept", kv_share)):
            if given is None:
                continue
            getattr(self.config, FIELD)[SPREADS[side][0]] = float(given)
            for i, own in self.layer_shares(side).items():
                self.reaches[i].routers[side].calibration.set_share(own)

    def set_history(self, history: int | None) -> None:
        """Let thresholds follow so many tokens of each row, which brings the shares nearer to those asked for.

        See `chiaroscuro.layers.row_thresholds`.

        Args:
            history: None for thresholds that stand still.

        Raises:
            UserError: no positive whole number.

        """
        routers = [router for reach in self.reaches.values() for router in reach.routers.values()]
        options = [router.with_history(history) for router in routers]
        for router, own in zip(routers, options, strict=True):
            router.options = own
        said = getattr(self.config, FIELD)
        for name in ("router", "kv_router"):
            said[name] = with_history(said[name], history)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching, whose cache holds pages of whole keys."""
        raise UserError(
            "a retrofitted model can't do continuous batching, whose cache has pages: use generate without it"
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; as the assistant of another model it drafts no more tokens than its cache can take back."""
        return cast(Any, super()).generate(*args, **bound_own_draft(kwargs))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        return bound_drafts(cast(Any, super())._get_candidate_generator(*args, **kwargs))

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the parent; what routes comes first, for the model inside does not know it."""
        for module in self.modules():
            if isinstance(module, ExactBuffers):
                self._initialize_weights(module, is_custom_code=True)  # which leaves alone what was loaded
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router | ExactBuffers):
            module.reset_parameters()
        elif not isinstance(module, Reach):
            super()._init_weights(module)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever; beside the weights lie a module by which `trust_remote_code=True` finds this library, and a page."""
        writes = args[0] if args else kwargs.get("is_main_process", True)
        refuse_file(Path(save_directory), str(save_directory))  # of which the parent only writes into a log
        if writes:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_model_card(self, save_directory)
            write_hub_module(save_directory)  # before all is uploaded, if that is asked for
        super().save_pretrained(save_directory, *args, **kwargs)


class RoutedConfig(MadeClass, PreTrainedConfig):
    """Put before a configuration class of transformers; saved under a model type of this library.

    A library that does not know the type refuses to load the folder, where it would else load a model without routing.
    A class that is named, as in `LlamaForCausalLM.from_pretrained`, does not ask for the type: it is refused for its
    attention.
    """

    def to_json_string(self, use_diff: bool = True) -> str:
        """What is saved. `to_dict` has the model's own type, by which peft knows what to adapt."""
        fields = json.loads(super().to_json_string(use_diff))
        fields |= {"model_type": RETROFIT_TYPE, "base_model_type": type(self).model_type, "auto_map": RETROFIT_AUTO_MAP}
        fields["attn_implementation"] = IMPLEMENTATION
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """What was saved, without what says that it is of this library: the class does."""
        fields, others = super().get_config_dict(*args, **kwargs)
        return _without_library(fields), others


def _without_library(fields: Mapping[str, Any]) -> dict[str, Any]:
    own = ("model_type", "base_model_type", "auto_map", "attn_implementation")
    return {name: value for name, value in fields.items() if name not in own}


class RetrofitConfig(PreTrainedConfig):
    """What the Auto classes know: reads the configuration of any retrofitted model, as one of its own class."""

    model_type = RETROFIT_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration, of a class made from that of the model's own type.

        Raises:
            UserError: the fields don't say what was done to which model.

        """
        fields, base = _without_library(config_dict), config_dict.get("base_model_type")
        if base not in CONFIG_MAPPING or not isinstance(fields.get(FIELD), Mapping):
            raise UserError(
                f"a config.json of model_type {RETROFIT_TYPE!r} with base_model_type={base!r} and "
                f"{FIELD}={fields.get(FIELD)!r}: it was not saved by this library, or by a newer transformers"
            )
        name = (fields.get("architectures") or [""])[0].removeprefix("Routed")
        models = _models_of(CONFIG_MAPPING[cast(str, base)])
        # As of a folder that was not retrofitted: a class of the user's is loaded as the library's of its type.
        model = next((m for m in models if m.__name__ == name), models[0])
        fields["architectures"] = [model.__name__]
        return routed_class(cast(Any, model)).config_class.from_dict(fields, **kwargs)


def _models_of(config: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    found: Any = AutoModelForCausalLM._model_mapping[config]
    return list(found) if isinstance(found, tuple | list) else [found]


@cache
def routed_class(model: Any) -> Any:
    """The class of a retrofitted model, made from the model's own; the Auto classes learn of it."""
    config = model.config_class
    names = {
        "__module__": config.__module__,
        "__doc__": f"A {config.__name__} of a retrofitted model.",
        "made_from": (_routed_config_class, model),
    }
    routed_config = type(f"Routed{config.__name__}", (RoutedConfig, config), names)
    made = type(
        f"Routed{model.__name__}",
        (RoutedModel, model),
        {
            "__module__": model.__module__,
            "__doc__": f"A {model.__name__} whose attention is routed.",
            "config_class": routed_config,
            "made_from": (routed_class, model),
        },
    )
    AutoModelForCausalLM.register(routed_config, made, exist_ok=True)
    # transformers knows by the name of a class which of its weights are called otherwise in files: GPT-NeoX's head.
    if (renamed := get_checkpoint_conversion_mapping(model.__name__)) is not None:
        register_checkpoint_conversion_mapping(made.__name__, renamed, overwrite=True)
    return made


def _routed_config_class(model: Any) -> Any:
    return routed_class(model).config_class


@cache
def routed_attention_class(attention: Any) -> Any:
    """The class of a routed attention module, made from its own."""
    names = {"__module__": attention.__module__, "made_from": (routed_attention_class, attention)}
    return type(f"Routed{attention.__name__}", (RoutedAttention, attention), names)


def checked(said: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What a configuration says of the routing, with numbers as Python has them.

    Args:
        said: its field, or what is to become it.
        config: of the model.

    Raises:
        UserError: something is missing or impossible.

    """
    if missing := [name for name in SAID if name not in said]:
        raise UserError(f"{FIELD} in the configuration lacks {missing[0]}: it was not saved by this library")
    layers = said["layers"]
    number = config.num_hidden_layers
    if not isinstance(layers, list) or not layers or not all(type(i) is int and 0 <= i < number for i in layers):
        raise UserError(f"layers={layers!r}: give a list of layers; the model has 0 to {number - 1}")
    if sorted({*layers}) != layers:
        raise UserError(f"layers={layers!r}: name each once, in order")
    own = key_heads(config)
    for name in ("router", "kv_router"):
        refuse_model_s_options(name, said[name])
        if split_entry(said[name])[1].get("heads", 1) not in (1, own):
            raise UserError(f"{name}={said[name]!r}: the model has {own} key-value heads: give heads={own}, or none")
    numbers = {name: _tokens(name, said[name], least) for name, least in (("window", 1), ("sinks", 0))}
    shares = {}
    for name, weights in SPREADS.values():
        shares[name] = _share(name, said[name])
        _check_weights(weights, said[weights], len(layers))
    return {**said, **numbers, **shares}


def _tokens(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= LONGEST_WINDOW:
        raise UserError(f"{name}={value!r}: must be a whole number of tokens from {least} to {LONGEST_WINDOW}")
    return int(value)


def _share(name: str, value: Any) -> float:
    refuse_impossible_share(name, value)
    return float(value)


def _check_weights(name: str, weights: Any, layers: int) -> None:
    if weights is None:
        return
    if not isinstance(weights, list) or len(weights) != layers or not all(_is_weight(weight) for weight in weights):
        raise UserError(f"{name}={weights!r}: give a weight, 0 or more, for each of the {layers} routed layers")


def _is_weight(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= cast(Any, value) < 1e300


def key_heads(config: Any) -> int:
    """How many heads the keys and values of a decoder have."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def install(model: Any) -> None:
    """Route the attention modules of a model as its configuration says.

    Raises:
        UserError: it says something impossible.

    """
    config = model.config
    said = checked(getattr(config, FIELD), config)
    modules = attention_modules(model)
    for place, i in enumerate(said["layers"]):
        module = modules[i]
        parameter = next(module.parameters())
        own = {
            field: spread(said[weights] or [1.0] * len(said["layers"]), said[field])[place]
            for field, weights in SPREADS.values()
        }
        reach = Reach(config.hidden_size, i, said | own)
        module.add_module(FIELD, reach.to(parameter.device).train(module.training))
        module.config = ConfigView(config)
        module.__class__ = routed_attention_class(cast(Any, type(module)))
    trunk = model.base_model
    hooks = trunk.register_forward_pre_hook(_hand_down, with_kwargs=True), trunk.register_forward_hook(_leave)
    model.__dict__["_chiaroscuro_hooks"] = hooks


def _hand_down(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook that hands what a forward's modules share down to them, and refuses what can't be had."""
    config = cast(Any, model).config
    if config.output_attentions:
        raise UserError(NO_WEIGHTS)
    without_mask = "flash" in (config._attn_implementation or "")
    places = kwargs.get("position_ids") if without_mask else None
    forward = Forward(kwargs.get("input_ids", args[0] if args else None), places)
    present.set(forward)
    return args, kwargs | {SHARED: forward}


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook for the end of a forward, which lets go of what its modules shared."""
    present.set(None)


def attention_modules(model: nn.Module) -> dict[int, Any]:
    """The attention modules of a decoder, by layer."""
    return {
        int(cast(Any, module).layer_idx): module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "scaling") and hasattr(module, "is_causal")
    }
