"""Each of these libraries runs on our models as on any other of transformers'. A test of a missing one is skipped."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import byte_tokenizer
from chiaroscuro import ChiarConfig, ChiarForCausalLM


@pytest.fixture(autouse=True)
def as_for_users(unchecked: None) -> None:
    """Without the annotations' checks: some clients wrap tensors, or build outputs of dictionaries."""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> ChiarForCausalLM:
    torch.manual_seed(0)
    return ChiarForCausalLM(
        ChiarConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_attention_heads=2,
            num_hidden_layers=3,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
