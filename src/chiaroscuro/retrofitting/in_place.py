"""`retrofit`: a decoder of transformers whose attention is routed from now on, and `unretrofit`, which undoes it."""

import copy
import sys
from collections.abc import Iterable, Mapping
from inspect import signature
from itertools import islice
from numbers import Integral
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from chiaroscuro.errors import UserError
from chiaroscuro.layers.registry import Entry
from chiaroscuro.retrofitting.routed_attention import RoutedAttention
from chiaroscuro.retrofitting.routed_model import (
    FIELD,
    RoutedModel,
    attention_modules,
    checked,
    install,
    routed_class,
)

_UNKNOWN = {
    "sinks": "learned attention sinks",
    "kv_a_proj_with_mqa": "latent keys and values",
    "kv_lora_rank": "latent keys and values",
    "qk_rope_head_dim": "latent keys and values",
    "lambda_q1": "differential attention",
    "indexer": "an attention that selects its keys itself",
    "is_kv_shared_layer": "keys and values of another layer",
}
"""Attributes of attention modules that compute something else than softmax over rotated keys, and what that is."""


def retrofit(
    model: PreTrainedModel,
    *,
    window: int = 128,
    sinks: int = 4,
    attention_share: float = 1.0,
    kv_share: float = 0.25,
    layers: Iterable[int] | None = None,
    router: Entry = "fitted",
    kv_router: Entry = "fitted",
) -> None:
    """Route the attention of a decoder: every token sees the window and the sinks, and what is far is routed.

    Token i of a routed layer attends to token j ≤ i where i − j < w, or j < s, or i looks and j is kept. What is not
    looked at or kept is not computed and not cached. Weights and their names stay as they are; the routers come beside
    them. With both shares 1 the outputs are the original's.

    Scores are fitted by `chiaroscuro.fit(model, batches)`, and a model whose shares are less than 1 needs that first.
    Layers that have a sliding window of their own stay as they are.

    Args:
        model: a causal language model of transformers whose attention is softmax attention with rotary positions, such
            as Llama, Mistral, Qwen, Gemma, Phi-3, OLMo 2, GPT-NeoX or SmolLM3. Changed in place, its class too.
        window: w, how many tokens each token sees in any case, its own included.
        sinks: s, how many tokens at the beginning of a sequence all see.
        attention_share: the share of the tokens that look beyond their window.
        kv_share: the share of the tokens that are kept, to be seen from beyond the window.
        layers: which layers to route, by number; all that can be unless given.
        router: what scores who looks; see `ChiarConfig.router`. With `{"fitted": {"heads": n}}` each of the n key-value
            heads chooses for itself for which tokens its queries look far.
        kv_router: what scores who is kept; with heads each keeps tokens of its own.

    Raises:
        UserError: a model, a layer or an option of another kind. The model is then as it was.

    """
    _check_model(model)
    modules = attention_modules(model)
    able = [i for i, module in modules.items() if not _own_window(model, i, module)]
    chosen = _layers(layers, modules, able, model)
    for i in chosen:
        _check_module(i, modules[i], model)
    said = {
        "window": window,
        "sinks": sinks,
        "attention_share": attention_share,
        "attention_spread": None,
        "kv_share": kv_share,
        "kv_spread": None,
        "router": router,
        "kv_router": kv_router,
        "layers": chosen,
    }
    _adopt(model, checked(said, model.config))


def unretrofit(model: PreTrainedModel) -> None:
    """Give a retrofitted model back as it was, bit for bit. Changed in place; the fitted scores are lost.

    Raises:
        UserError: the model was not retrofitted.

    """
    if not isinstance(model, RoutedModel):
        raise UserError(f"unretrofit takes a model that was retrofitted, and this is a {type(model).__name__}")
    _abandon(model)


def _adopt(model: Any, said: dict[str, Any]) -> None:
    """Make the model and its configuration ones of the routed classes, and route; or leave all as it was."""
    own: Any = type(model)
    routed = routed_class(own)
    shared, config = model.config, copy.deepcopy(model.config)  # another model may have the same object
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
    model.config.__class__ = routed.config_class
    setattr(model.config, FIELD, said)
    model.__class__ = routed
    try:
        install(model)
    except BaseException:
        _abandon(model)
        raise


def _abandon(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, RoutedAttention):
            module.__class__ = _own_class(module)
            module.config = model.config
            del module.chiaroscuro
    for hook in model.__dict__.pop("_chiaroscuro_hooks", ()):
        hook.remove()
    model.__class__ = _own_class(model)
    delattr(model.config, FIELD)
    if model.config.architectures:
        model.config.architectures = [name.removeprefix("Routed") for name in model.config.architectures]
    model.config.__class__ = _own_class(model.config)


def _own_class(thing: Any) -> Any:
    """The class that a routed one was made from."""
    return type(thing).__bases__[1]


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"retrofit takes a causal language model of transformers, not a {type(model).__name__}")
    name = type(model).__name__
    if isinstance(model, RoutedModel):
        raise UserError("this model is retrofitted already: unretrofit it first, or turn its shares")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UserError(f"this {name} is quantised: load it without quantisation (GGUF with dequantize=True)")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UserError(f"this {name} is spread over devices, or offloaded: load it on one, without device_map")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"this {name} is on the meta device, without weights: load them first")
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder and a decoder: a retrofit needs a decoder alone")
    if model.config.get_text_config() is not model.config:
        raise UserError(f"{name} reads more than text: give its language model")
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise UserError(f"{name} predicts no next token: a retrofit needs a ...ForCausalLM or ...LMHeadModel")
    modules = attention_modules(model)
    if len(modules) != model.config.num_hidden_layers:
        raise UserError(
            f"{name}: {len(modules)} of its {model.config.num_hidden_layers} layers have attention modules of the kind "
            "that transformers dispatches, with rotary positions: there is nothing to route in the others"
        )
    if not all(any(True for _ in module.parameters()) for module in modules.values()):
        raise UserError(f"the attention modules of this {name} hold no weights, as after quantisation by torch")
    if getattr(model.config, "is_causal", True) is False or not all(module.is_causal for module in modules.values()):
        raise UserError(f"{name} sees the future: a retrofit needs a causal decoder")


def _check_module(layer: int, module: nn.Module, model: PreTrainedModel) -> None:
    cls = type(module)
    missing = next((why for name, why in _UNKNOWN.items() if _has(module, name)), None)
    if "position_embeddings" not in signature(cls.forward).parameters:
        missing = "no rotary positions"
    elif not hasattr(sys.modules[cls.__module__], "ALL_ATTENTION_FUNCTIONS"):
        missing = "an attention of its own, which can't be replaced"
    elif len({getattr(getattr(module, name, None), "out_features", None) for name in ("k_proj", "v_proj")}) > 1:
        missing = "values of another width than keys"
    if missing:
        raise UserError(f"layer {layer} of {type(model).__name__} is a {cls.__name__}, with {missing}: not supported")


def _has(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return value is not None and value is not False


def _own_window(model: PreTrainedModel, layer: int, module: Any) -> int | None:
    """The sliding window of a layer that has one of its own."""
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        return None if types[layer] == "full_attention" else getattr(model.config, "sliding_window", None) or 1
    return getattr(module, "sliding_window", None) or getattr(model.config, "sliding_window", None)


def _layers(given: Any, modules: Mapping[int, nn.Module], able: list[int], model: PreTrainedModel) -> list[int]:
    if given is None:
        if not able:
            raise UserError(
                f"every layer of this {type(model).__name__} has a window or chunks of its own: there is nothing "
                "far to route"
            )
        return able
    if isinstance(given, str | int) or not isinstance(given, Iterable):
        raise UserError(f"layers={given!r}: give the numbers of layers, such as range(2, 28)")
    some = list(islice(given, len(modules) + 1))
    if len(some) > len(modules):
        raise UserError(f"layers={str(some[:3])[:-1]}, …]: the model has {len(modules)} layers; name each once")
    chosen = [int(i) if isinstance(i, Integral) and not isinstance(i, bool) else i for i in some]
    for i in chosen:
        if isinstance(i, bool) or not isinstance(i, int) or i not in modules:
            raise UserError(f"layers={chosen}: the model has the layers 0 to {len(modules) - 1}")
        if i not in able:
            raise UserError(f"layers={chosen}: layer {i} has a window or chunks of its own, and stays as it is")
    if not chosen or len(set(chosen)) != len(chosen):
        raise UserError(f"layers={chosen}: name at least one, and each once")
    return sorted(chosen)
