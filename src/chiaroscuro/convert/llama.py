"""Llama's weights into our class, and back: with attention alone the two compute the same.

Both directions copy weights and check that each has found its place. A Llama is a CHIAR-Former whose menus hold
attention alone, with RMSNorm before each sub-layer, a gated feed-forward and no MetaRouter. From there a menu can grow.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from chiaroscuro.errors import UserError
from chiaroscuro.model import ChiarForCausalLM
from chiaroscuro.model.config import ChiarConfig

# Ours on the left, Llama's on the right; within layer i behind `model.layers.i.`.
_LAYER = {
    "operator_norms.input.weight": "input_layernorm.weight",
    "operators.attention.q_proj": "self_attn.q_proj",
    "operators.attention.k_proj": "self_attn.k_proj",
    "operators.attention.v_proj": "self_attn.v_proj",
    "operators.attention.out_proj": "self_attn.o_proj",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_WHOLE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "attention_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Fields of the same name and meaning in both configurations."""


def from_llama(model: LlamaForCausalLM) -> ChiarForCausalLM:
    """The same function as a CHIAR-Former with attention alone.

    Args:
        model: any `LlamaForCausalLM`, on any device, in any type.

    Returns:
        A model of its own, on the same device, in the same type and mode: the weights are copied.

    Raises:
        UserError: another class, or a Llama with something that ours has not: biases in its feed-forward, or another
            activation than SiLU.

    """
    if not isinstance(model, LlamaForCausalLM):
        raise UserError(f"from_llama takes a LlamaForCausalLM, not a {type(model).__name__}")
    llama = model.config
    if llama.hidden_act not in ("silu", "swish"):
        raise UserError(f"hidden_act={llama.hidden_act!r}: the feed-forward of ours has SiLU alone")
    if llama.mlp_bias:
        raise UserError("mlp_bias=True: the gated feed-forward of ours has no biases")
    config = ChiarConfig(
        **{name: getattr(llama, name) for name in _SAME},
        operators=[["attention"]] * llama.num_hidden_layers,
        rope_parameters=dict(llama.rope_parameters or {}),
        bias=llama.attention_bias,
        feed_forward="swiglu",
        norm="pre",
        norm_type="rms",
        norm_epsilon=llama.rms_norm_eps,
        embedding_norm=False,
        meta_router="none",
    )
    ours = ChiarForCausalLM(config)
    _copy(model.state_dict(), ours, {theirs: mine for mine, theirs in _names(config)})
    ours.generation_config = copy.deepcopy(model.generation_config)
    return ours.to(model.device, model.dtype).train(model.training)  # type: ignore[arg-type]


def to_llama(model: ChiarForCausalLM) -> LlamaForCausalLM:
    """The same function as a `LlamaForCausalLM`; for a model such as `from_llama` gives.

    Args:
        model: a CHIAR-Former with attention alone in every layer, RMSNorm before each sub-layer, a gated feed-forward,
            and no embedding norm, MetaRouter or short convolution.

    Returns:
        A model of its own, on the same device, in the same type and mode: the weights are copied.

    Raises:
        UserError: a Llama can't compute what this model does; the message names the field.

    """
    if not isinstance(model, ChiarForCausalLM):
        raise UserError(f"to_llama takes a ChiarForCausalLM, not a {type(model).__name__}")
    config = model.config
    wanted: dict[str, Any] = {
        "operators": [["attention"]] * len(config.menus),
        "feed_forward": "swiglu",
        "norm": "pre",
        "norm_type": "rms",
        "embedding_norm": False,
        "meta_router": "none",
        "short_conv": None,
        "hidden_dropout": 0.0,
    }
    if config.attention_context == "kept":
        raise UserError("attention_context='kept': a Llama drops no token; convert a model that keeps all")
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise UserError(f"{name}={getattr(config, name)!r}: a Llama needs {name}={value!r}")
    llama = LlamaConfig(
        **{name: getattr(config, name) for name in _SAME},
        rope_parameters=config.rope_parameters or {"rope_type": "default", "rope_theta": config.rope_theta},
        attention_bias=config.bias,
        rms_norm_eps=model.model.norm.eps,
        hidden_act="silu",
    )
    theirs = LlamaForCausalLM(llama)
    _copy(model.state_dict(), theirs, dict(_names(config)))
    theirs.generation_config = copy.deepcopy(model.generation_config)
    return theirs.to(model.device, model.dtype).train(model.training)  # type: ignore[arg-type]


def _names(config: ChiarConfig) -> Iterator[tuple[str, str]]:
    """Every parameter's name in ours and in Llama's."""
    yield from ((name, name) for name in _WHOLE)
    for i in range(len(config.menus)):
        for ours, theirs in _LAYER.items():
            for part in ("",) if ours.endswith(".weight") else (".weight", ".bias"):
                yield f"model.layers.{i}.{ours}{part}", f"model.layers.{i}.{theirs}{part}"


@torch.no_grad()
def _copy(weights: dict[str, Tensor], target: torch.nn.Module, names: dict[str, str]) -> None:
    """Load renamed weights; a place that stays empty is an error of ours."""
    if added := [name for name in weights if name not in names]:
        raise UserError(
            f"the model has {added[0]!r}, which the other has not: undo what was added to it (unretrofit, merge the "
            "adapter, or convert it without its other heads)"
        )
    renamed = {names[name]: tensor for name, tensor in weights.items()}
    target.load_state_dict(renamed, strict=True)
    target.tie_weights()  # type: ignore[operator]
