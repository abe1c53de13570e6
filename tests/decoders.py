"""Small random decoders of ten families, and attention by a mask that is written out: the oracle of routed ones."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from chiaroscuro.ops.reach_attention import reach_mask

VOCABULARY, TIME = 61, 256

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def build(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A decoder of three layers, with weights large enough that attention is not even."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TIME,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    fields |= FAMILIES.get(family, {}) | changes
    fields = {name: value for name, value in fields.items() if value is not None or name == "sliding_window"}
    config = AutoConfig.for_model(family, **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if family == "gemma2" else "sdpa"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def ids(seed: int, rows: int = 2, time: int = 48) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


class Noted(list[Any]):
    """The decisions of a module's forwards."""

    def __call__(self, looks: Tensor, kept: Tensor, real: Tensor | None) -> None:
        self.append((looks, kept))


def note_decisions(routed: Any) -> None:
    """From now on each `Reach` has its decisions as `noted`."""
    for reach in routed.reaches.values():
        reach.noted = Noted()
        reach.watchers.append(reach.noted)


def masked(original: Any, routed: Any, real: Tensor | None = None) -> Any:
    """The original model with masks written out, by what a routed copy decided in its last forward."""
    model = copy.deepcopy(original)
    kind = torch.float32 if model.config._attn_implementation == "eager" else torch.bool
    modules = {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")}
    for i, reach in routed.reaches.items():
        looks, kept = reach.noted[-1]
        real = torch.ones(looks.shape[:2], dtype=torch.bool) if real is None else real
        places = (real.cumsum(1) - 1).clamp(min=0)[:, None]
        looks, kept = (x[:, None] if x.ndim == 2 else x.transpose(1, 2) for x in (looks, kept))
        seen = reach_mask(places, places, looks, kept, reach.window, reach.sinks) & real[:, None, None]
        seen = seen & torch.ones(seen.shape[-2:], dtype=torch.bool).tril() | torch.eye(seen.shape[-1]).bool()
        heads = model.config.num_attention_heads
        seen = seen.repeat_interleave(heads // seen.shape[1], 1)
        mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)

        def put_in(module: Any, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            return args, kwargs | {"attention_mask": mask}

        modules[i].register_forward_pre_hook(put_in, with_kwargs=True)
    return model
