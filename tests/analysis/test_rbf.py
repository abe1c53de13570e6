"""The weight that a token gives itself, against the operator's own formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError
from chiaroscuro.analysis.rbf import self_weights
from chiaroscuro.layers import RBFMixing

MENUS = [["dct"], ["rbf"], ["dct", "rbf", "attention"]]


def model(norm: str = "pre", causal: bool = True, seed: int = 0) -> ChiarForCausalLM:
    torch.manual_seed(seed)
    fields = {"vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2, "operators": MENUS}
    return ChiarForCausalLM(ChiarConfig(**fields, norm=norm, rbf_causal=causal, meta_router="none")).eval()


def tokens(seed: int, rows: int = 2, time: int = 9) -> Tensor:
    return torch.randint(0, 31, (rows, time), generator=torch.Generator().manual_seed(seed))


def scaled(model: ChiarForCausalLM, factor: float) -> ChiarForCausalLM:
    for module in model.modules():
        if isinstance(module, RBFMixing):
            module.frequencies.mul_(factor)
    return model


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), norm=st.sampled_from(["pre", "post"]), causal=st.booleans())
def test_it_is_what_the_operator_computes(seed: int, norm: str, causal: bool) -> None:
    net, ids, seen = scaled(model(norm, causal, seed), 0.1), tokens(seed), {}
    rbf = net.model.layers[1].operators["rbf"]
    rbf.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    found = self_weights(net, [ids])
    angle = seen["x"] @ rbf.frequencies / rbf.frequencies.shape[1] ** 0.5
    phi = torch.cat([angle.cos(), angle.sin()], -1)
    scores = phi @ phi.mT
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    own = scores.softmax(-1).diagonal(dim1=1, dim2=2)
    copies, later = 0.0, 0.0
    for row, weights in zip(ids.tolist(), scores.softmax(-1).tolist(), strict=True):
        for t, word in enumerate(row):
            copies += sum(weight for weight, other in zip(weights[t], row, strict=True) if other == word)
            later += sum(weight for weight, other in zip(weights[t][t:], row[t:], strict=True) if other != word)
    assert found[1]["copies"] == pytest.approx(copies / ids.numel(), abs=1e-5)
    assert found[1]["later"] == pytest.approx(later / ids.numel(), abs=1e-5) and (found[1]["later"] == 0) == causal
    assert found[1]["mean"] == pytest.approx(own.mean().item(), abs=1e-5)
    assert found[1]["smallest"] == pytest.approx(own.min().item(), abs=1e-5)
    assert sorted(found) == [1, 2]


@pytest.mark.parametrize("causal", [True, False])
def test_a_flat_kernel_weighs_all_alike(causal: bool) -> None:
    found = self_weights(scaled(model(causal=causal), 0.0), [tokens(0), tokens(1)])
    wanted = sum(1 / n for n in range(1, 10)) / 9 if causal else 1 / 9
    for layer in found.values():
        assert layer["uniform"] == pytest.approx(wanted) and layer["mean"] == pytest.approx(wanted)


def test_nothing_to_measure() -> None:
    with pytest.raises(UserError, match="no batch"):
        self_weights(model(), [])
    plain = ChiarForCausalLM(ChiarConfig(vocab_size=31, hidden_size=16, operators=[["dct"], ["attention"]]))
    with pytest.raises(UserError, match=r"no layer has rbf.*\['dct'\]"):
        self_weights(plain, [tokens(0)])


def test_of_a_model_in_training_nothing_is_noted() -> None:
    in_training, ids = model().train(), torch.arange(20).reshape(2, 10)
    self_weights(in_training, [ids])
    assert in_training.training and not any(t.noted for t in in_training.thresholds().values())
