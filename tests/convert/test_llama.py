"""A Llama as a CHIAR-Former and back: logits, loss, gradients and cached generation. Oracle: transformers' Llama."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from chiaroscuro import ChiarConfig, ChiarForCausalLM, ChiarForMixedTasks, UserError, check_model, retrofit, unretrofit
from chiaroscuro.convert import from_llama, to_llama

SCALED = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.2,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 3.5],
        "original_max_position_embeddings": 16,
    },
]


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as in a trained model, where no norm is 1 and no bias 0
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def ids(seed: int, rows: int = 2, time: int = 24) -> Tensor:
    return torch.randint(3, 60, (rows, time), generator=torch.Generator().manual_seed(seed))


def step(model: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits, and the gradient at the embeddings' output."""
    embeds = model.get_input_embeddings()(x).detach().requires_grad_()
    out = model(inputs_embeds=embeds, labels=x, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), embeds.grad


@settings(max_examples=12)
@given(
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    tied=st.booleans(),
    head_dim=st.sampled_from([None, 8, 12]),
    epsilon=st.sampled_from([1e-5, 1e-6]),
    seed=st.integers(0, 99),
)
def test_both_ways(groups: int, bias: bool, tied: bool, head_dim: int | None, epsilon: float, seed: int) -> None:
    changes = {"num_key_value_heads": groups, "attention_bias": bias, "tie_word_embeddings": tied, "head_dim": head_dim}
    theirs = llama(seed, rms_norm_eps=epsilon, **changes)
    ours = from_llama(theirs)
    back = to_llama(ours)
    x = ids(seed)
    wanted = step(theirs, x)
    for model in (ours, back):
        torch.testing.assert_close(step(model, x), wanted, atol=1e-5, rtol=1e-5)
    assert {k: v.tolist() for k, v in back.state_dict().items()} == {
        k: v.tolist() for k, v in theirs.state_dict().items()
    }
    assert {k: v for k, v in back.config.to_dict().items() if k != "dtype"} == {
        k: v for k, v in theirs.config.to_dict().items() if k != "dtype"
    }
    # Every parameter's gradient too, by Llama's names.
    gradients = dict(to_llama(with_gradients(ours)).named_parameters())
    for name, parameter in theirs.named_parameters():
        wanted_one = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name].detach(), wanted_one, atol=1e-5, rtol=1e-4)


def with_gradients(model: ChiarForCausalLM) -> ChiarForCausalLM:
    """The model with its gradients in its weights' places."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return model


@pytest.mark.parametrize("rope", SCALED, ids=lambda rope: rope["rope_type"])
def test_rotary_scaling(rope: dict[str, Any]) -> None:
    # Below and above the original length, where transformers has other factors for a longrope; ours are a model's.
    for time in (40,) if rope["rope_type"] == "longrope" else (10, 40):
        theirs = llama(rope_parameters=rope)
        ours, x = from_llama(theirs), ids(1, 2, time)
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-5, rtol=1e-5)
    assert to_llama(ours).config.rope_parameters == theirs.config.rope_parameters


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_generation(options: dict[str, Any], padded: bool) -> None:
    theirs, x = llama(), ids(2, 3, 9)
    mask = torch.ones_like(x)
    if padded:
        mask = (torch.arange(9) >= torch.tensor([[0], [3], [7]])).long()
    found = []
    for model in (from_llama(theirs), theirs):
        set_seed(4)
        given_too = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
        found.append(model.generate(x, attention_mask=mask, **given_too))
    assert torch.equal(*found)


def test_a_menu_can_grow_from_it() -> None:
    ours = from_llama(llama())
    config = ours.config.to_dict() | {
        "operators": [["dct", "attention"]] * 2,
        "attention_share": 1.0,
        "use_cache": None,
    }
    grown = ChiarForCausalLM(type(ours.config).from_dict(config)).eval()
    grown.load_state_dict(ours.state_dict(), strict=False)
    grown.set_attention_share(1.0)
    torch.testing.assert_close(grown(ids(3)).logits, ours(ids(3)).logits, atol=1e-5, rtol=1e-5)


def test_what_was_added_to_a_model_is_named() -> None:
    routed = llama()
    retrofit(routed, window=4, sinks=1, kv_share=0.5, kv_router="norm")
    with pytest.raises(UserError, match=r"the model has '.*self_attn\.chiaroscuro.*: undo what was added"):
        from_llama(routed)
    unretrofit(routed)
    assert from_llama(routed).num_parameters()
    like_llama: Any = {"norm": "pre", "norm_type": "rms", "feed_forward": "swiglu", "embedding_norm": False}
    like_llama |= {"operators": [["attention"]], "meta_router": "none", "hidden_dropout": 0.0}
    config = ChiarConfig(vocab_size=60, hidden_size=16, num_attention_heads=2, **like_llama)
    config.task_labels = {"a": 3}
    with pytest.raises(UserError, match=r"the model has 'heads\.a\.weight', which the other has not"):
        to_llama(ChiarForMixedTasks(config))


def test_the_settings_of_generate_go_along() -> None:
    theirs = llama(eos_token_id=[3, 7])
    theirs.generation_config.update(temperature=0.4, do_sample=True, max_new_tokens=9)
    ours = from_llama(theirs)
    back = to_llama(ours)
    for model in (ours, back):
        assert model.generation_config.to_dict() == theirs.generation_config.to_dict()
    back.generation_config.temperature = 2.0
    assert ours.generation_config.temperature == theirs.generation_config.temperature == 0.4


def test_bfloat16_and_the_mode_are_kept() -> None:
    ours = from_llama(llama().bfloat16().train())
    assert ours.dtype == torch.bfloat16 and ours.training
    assert to_llama(ours).dtype == torch.bfloat16


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(UserError, match="mlp_bias=True"):
        from_llama(llama(mlp_bias=True))
    with pytest.raises(UserError, match="hidden_act='gelu'"):
        from_llama(llama(hidden_act="gelu"))
    other = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UserError, match="takes a LlamaForCausalLM, not a GPTNeoXForCausalLM"):
        from_llama(other)
    ours = from_llama(llama())
    for name, value in {"norm_type": "layer", "meta_router": "causal", "embedding_norm": True, "short_conv": 4}.items():
        kept = getattr(ours.config, name)
        setattr(ours.config, name, value)
        with pytest.raises(UserError, match=f"{name}=.*a Llama needs {name}="):
            to_llama(ours)
        setattr(ours.config, name, kept)
    config = ChiarConfig(**ours.config.to_dict() | {"attention_context": "kept", "kv_router": "random", "window": 4})
    with pytest.raises(UserError, match="attention_context='kept': a Llama drops no token"):
        to_llama(ChiarForCausalLM(config))


def test_what_a_longrope_turns_a_token_by_does_not_depend_on_what_is_beside_or_after_it() -> None:
    """transformers takes other factors for a longer sequence, so that a later token changes the earlier ones."""
    model = from_llama(llama(rope_parameters=SCALED[-1]))
    row = ids(0, 1, 10)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.long), row], 1)
    mask = torch.arange(40)[None] >= 30
    three = torch.cat([row, ids(1, 1, 10), ids(2, 1, 10)], 1)
    with torch.no_grad():
        alone = model(row, use_cache=False).logits
        found = model(padded, attention_mask=mask, use_cache=False).logits[:, 30:]
        first = model(three, position_ids=torch.arange(10).repeat(3)[None], use_cache=False).logits[:, :10]
        longer = model(torch.cat([row, ids(3, 1, 30)], 1), use_cache=False).logits[:, :10]
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(first, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(longer, alone, atol=1e-4, rtol=0)
    check_model(model)
    short = from_llama(llama(rope_parameters=SCALED[-1] | {"original_max_position_embeddings": 64}))
    with torch.no_grad():
        assert (short(row, use_cache=False).logits - alone).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"short_factor": [1.0, 1.1, 1.2]}, "short_factor must be a list of 4 positive numbers"),
        ({"long_factor": [1.0]}, "long_factor must be a list of 4 positive numbers"),
        ({"long_factor": [1.0, 1.0, -1.0, 1.0]}, "long_factor must be a list of 4 positive numbers"),
        ({"factor": -2.0}, "factor must be a positive number"),
        ({"factor": "2"}, "factor must be a positive number"),
        ({"factor": np.float32(2)}, "factor must be a positive number"),
        ({"factor": float("inf")}, "factor must be a positive number"),
        ({"factor": 10**400}, "rope_parameters="),
        ({"original_max_position_embeddings": 1}, "rope_parameters="),
        ({"beta": {1, 2}}, "rope_parameters="),
    ],
)
def test_rotary_parameters_that_cannot_be_used_are_refused_at_once(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ChiarConfig(hidden_size=32, num_attention_heads=4, rope_parameters=SCALED[-1] | changes)
