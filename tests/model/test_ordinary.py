"""With attention alone on every menu the model is an ordinary transformer: Hugging Face's GPT-NeoX, weight for weight.

GPT-NeoX is the library's model of these very parts: LayerNorm before, GELU feed-forward of width 4d, biases, rotary
positions in the rotate-half convention. It is the oracle; our weights are copied into it. With `feed_forward="swiglu"`
the oracle is Llama, whose norms are LayerNorms here and whose attention has biases.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chiaroscuro import ChiarConfig, ChiarForCausalLM


def sizes(config: ChiarConfig) -> dict[str, int]:
    """What every Hugging Face config calls the same."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {name: getattr(config, name) for name in (*names, "max_position_embeddings")}


def as_gpt_neox(model: ChiarForCausalLM) -> GPTNeoXForCausalLM:
    config = model.config
    twin = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **sizes(config),
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0},
            hidden_act="gelu",
            use_parallel_residual=False,
            tie_word_embeddings=True,
            layer_norm_eps=1e-5,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )
    heads = config.num_attention_heads
    ours = model.state_dict()
    theirs = {
        "gpt_neox.embed_in.weight": ours["model.embed_tokens.weight"],
        "lm_head.weight": ours["model.embed_tokens.weight"],
        "gpt_neox.final_layer_norm.weight": ours["model.norm.weight"],
        "gpt_neox.final_layer_norm.bias": ours["model.norm.bias"],
    }
    for i in range(config.num_hidden_layers):
        a, b = f"model.layers.{i}", f"gpt_neox.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [ours[f"{a}.operators.attention.{name}_proj.{kind}"] for name in "qkv"]
            # One matrix there, in which each head has its query, key and value rows together.
            fused = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)
            theirs[f"{b}.attention.query_key_value.{kind}"] = fused
            theirs[f"{b}.attention.dense.{kind}"] = ours[f"{a}.operators.attention.out_proj.{kind}"]
            theirs[f"{b}.input_layernorm.{kind}"] = ours[f"{a}.operator_norms.input.{kind}"]
            theirs[f"{b}.post_attention_layernorm.{kind}"] = ours[f"{a}.feed_forward_norm.{kind}"]
            theirs[f"{b}.mlp.dense_h_to_4h.{kind}"] = ours[f"{a}.feed_forward.0.{kind}"]
            theirs[f"{b}.mlp.dense_4h_to_h.{kind}"] = ours[f"{a}.feed_forward.3.{kind}"]
    twin.load_state_dict(theirs)
    return twin


def as_llama(model: ChiarForCausalLM) -> LlamaForCausalLM:
    config = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            **sizes(config),
            tie_word_embeddings=True,
            attention_bias=True,
        )
    )
    names = {
        ".operators.attention.out_proj.": ".self_attn.o_proj.",
        ".operators.attention.": ".self_attn.",
        ".operator_norms.input.": ".input_layernorm.",
        ".feed_forward_norm.": ".post_attention_layernorm.",
        ".feed_forward.gate.": ".mlp.gate_proj.",
        ".feed_forward.up.": ".mlp.up_proj.",
        ".feed_forward.down.": ".mlp.down_proj.",
    }
    for layer in twin.model.layers:
        layer.input_layernorm = nn.LayerNorm(config.hidden_size)
        layer.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
    twin.model.norm = nn.LayerNorm(config.hidden_size)
    theirs = {}
    for name, weight in model.state_dict().items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        theirs[name] = weight
    twin.load_state_dict(theirs)
    return twin


def ordinary(seed: int, heads: int, layers: int, feed_forward: str = "gelu") -> ChiarForCausalLM:
    torch.manual_seed(seed)
    model = ChiarForCausalLM(
        ChiarConfig(
            vocab_size=50,
            hidden_size=32,
            num_attention_heads=heads,
            max_position_embeddings=64,
            operators=[["attention"]] * layers,
            embedding_norm=False,
            feed_forward=feed_forward,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(2, 40))
def test_logits_loss_and_gradients_are_those_of_gpt_neox(seed: int, heads: int, layers: int, time: int) -> None:
    model = ordinary(seed, heads, layers)
    assert_equal(model, as_gpt_neox(model), time)


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(2, 40))
def test_with_swiglu_they_are_those_of_llama(seed: int, heads: int, layers: int, time: int) -> None:
    model = ordinary(seed, heads, layers, "swiglu")
    assert_equal(model, as_llama(model), time)


def assert_equal(model: ChiarForCausalLM, twin: PreTrainedModel, time: int) -> None:
    tokens = torch.randint(50, (2, time))
    ours, theirs = model(tokens, labels=tokens, output_logits=True), twin(tokens, labels=tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-5, rtol=1e-4)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    torch.testing.assert_close(
        model.model.embed_tokens.weight.grad, twin.get_input_embeddings().weight.grad, atol=1e-5, rtol=1e-3
    )


def test_it_has_as_many_parameters() -> None:
    model = ordinary(0, 4, 3)
    assert model.num_parameters() == as_gpt_neox(model).num_parameters()
