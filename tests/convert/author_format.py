"""The author's format, written out by hand: the state dict in which the author's code would save a model of ours."""

import torch
from torch import Tensor, nn

from chiaroscuro import ChiarForCausalLM, ChiarForSequenceClassification


def under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def rope_buffers(prefix: str, head_width: int, length: int, theta: float) -> dict[str, Tensor]:
    angles = 1.0 / (theta ** (torch.arange(0, head_width, 2).float() / head_width))
    table = torch.outer(torch.arange(length).float(), angles).repeat(1, 2)
    return {
        f"{prefix}.rope.inv_freq": angles,
        f"{prefix}.rope.cos_cache": table.cos(),
        f"{prefix}.rope.sin_cache": table.sin(),
    }


def author_state(model: ChiarForCausalLM | ChiarForSequenceClassification, *, bare: bool = False) -> dict[str, Tensor]:
    """The state dict; `bare` is a classifier without `backbone.` and without the language model's head."""
    config, trunk = model.config, model.model
    baseline = all(menu == ["attention"] for menu in config.menus)
    state = {"token_emb.weight": trunk.embed_tokens.weight.detach()}
    if trunk.meta_router is not None:
        state |= under("meta_router.gate_proj", trunk.meta_router)
    for i, block in enumerate(trunk.blocks):
        attn, ffn, ffn_norm = (
            (f"attns.{i}", f"ffns.{i}", f"ffn_norms.{i}")
            if baseline
            else (f"layers.{i}.attn", f"layers.{i}.ffn", f"layers.{i}.ffn_norm")
        )
        if "dct" in config.menus[i]:
            state[f"layers.{i}.dct_mix.w"] = block.operators["dct"].weight.detach() / 2
            state |= under(f"layers.{i}.dct_mix.norm", block.operator_norms["dct"])
        if "attention" in config.menus[i]:
            attention = block.operators["attention"]
            for part in ("weight", "bias"):
                three = [getattr(getattr(attention, f"{x}_proj"), part).detach() for x in "qkv"]
                state[f"{attn}.qkv.{part}"] = torch.cat(three)
            state |= under(f"{attn}.out_proj", attention.out_proj)
            state |= under(f"{attn}.norm", block.operator_norms["attention"])
            head_width = config.hidden_size // config.num_attention_heads
            state |= rope_buffers(f"{attn}", head_width, config.max_position_embeddings, config.rope_theta)
        state |= under(ffn, block.feed_forward)
        state |= under(ffn_norm, block.feed_forward_norm)
        if len(config.menus[i]) > 1 and config.router in ("soft", "hard"):
            state |= under(f"layers.{i}.router.gate_proj", block.router.proj)
    state |= under("norm", trunk.norm)
    if isinstance(model, ChiarForSequenceClassification):
        if not bare:
            state["lm_head.weight"] = state["token_emb.weight"]
            state = {f"backbone.{name}": value for name, value in state.items()}
        return state | under("classifier", model.score)
    return state | {"lm_head.weight": state["token_emb.weight"]}
