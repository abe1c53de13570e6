"""The annotations are checked in the test run, in calls and in what they return."""

import pytest
import torch
from jaxtyping import TypeCheckError

from chiaroscuro.layers import MetaRouter, build_block
from chiaroscuro.ops import attend, dct, spectral_mix


def test_a_wrong_shape_raises() -> None:
    x = torch.randn(2, 3, 8)
    spectral_mix(x, torch.ones(8))
    with pytest.raises(TypeCheckError, match="weight"):
        spectral_mix(x, torch.ones(7))
    heads = torch.randn(2, 4, 3, 8)
    with pytest.raises(TypeCheckError):
        attend(heads, heads, heads[:, :, :2])


def test_a_wrong_type_raises() -> None:
    with pytest.raises(TypeCheckError):
        dct(torch.ones(3, dtype=torch.long))


def test_the_layers_are_checked_too() -> None:
    with pytest.raises(TypeCheckError):
        MetaRouter(8)(torch.randn(3, 8))
    with pytest.raises(TypeCheckError):
        build_block(8, ["dct", "attention"], {"num_attention_heads": 2})(torch.randn(3, 8))


@pytest.mark.usefixtures("unchecked")
def test_a_test_can_switch_it_off() -> None:
    with pytest.raises(TypeError, match=r"real floating numbers, got torch\.int64"):
        dct(torch.ones(3, dtype=torch.long))
