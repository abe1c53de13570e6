"""Our models, and a Llama as the control, put before transformers' common tests.

`python -m experiments.transformers_tests` copies this file into the package `tests` of transformers' sources, beside
the mixins that it names.
"""

import unittest
from typing import Any, ClassVar

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from chiaroscuro import ChiarConfig, ChiarForCausalLM, retrofit
from chiaroscuro.model import ChiarForSequenceClassification, ChiarModel

from . import test_fsdp_mixin
from .test_fsdp_mixin import FSDPTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin

test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None  # their list names models of transformers alone
SIZE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
REACH: dict[str, Any] = {
    "operators": [["local", "attention"]] * 2,
    "window": 4,
    "sinks": 1,
    "attention_context": "kept",
    "kv_share": 0.5,
}


class Maker:
    """What the mixins ask about a model: its configuration, and inputs for it."""

    batch_size, seq_length, is_training = 13, 7, True
    num_labels, type_sequence_label_size, num_choices, pad_token_id = 3, 2, 4, 0
    vocab_size, hidden_size = SIZE["vocab_size"], SIZE["hidden_size"]
    num_hidden_layers, num_attention_heads = SIZE["num_hidden_layers"], SIZE["num_attention_heads"]

    def __init__(self, config: PreTrainedConfig, classes: tuple[type[PreTrainedModel], ...]) -> None:
        self._config = config
        self.base_model_class = classes[0]
        self.causal_lm_class = next(each for each in classes if "CausalLM" in each.__name__)

    def get_config(self) -> PreTrainedConfig:
        """A copy, which a test may change."""
        return type(self._config).from_dict(self._config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """The configuration, and ids at random."""
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Judged(ModelTesterMixin, TrainingTesterMixin, FSDPTesterMixin):
    """All of their tests that need no code of a model's own."""

    config: ClassVar[PreTrainedConfig]
    model_tester: Any = None

    def setUp(self) -> None:
        """Say which model is meant."""
        self.model_tester = Maker(self.config, self.all_model_classes)


class PublishedTest(Judged, unittest.TestCase):
    """The paper's model: DCT mixing or attention, by H, in both layers."""

    config = ChiarConfig(**SIZE, operators=[["dct", "attention"]] * 2)
    all_model_classes = (ChiarModel, ChiarForCausalLM, ChiarForSequenceClassification)
    has_attentions = False


class ReachTest(Judged, unittest.TestCase):
    """Near for all, far for some: who looks and who is kept, by the norm of a token's vector."""

    config = ChiarConfig(**SIZE, **REACH, router="norm", kv_router="norm")
    all_model_classes = (ChiarModel, ChiarForCausalLM, ChiarForSequenceClassification)
    has_attentions = False


class FittedTest(Judged, unittest.TestCase):
    """The same, by scores that are to be fitted."""

    config = ChiarConfig(**SIZE, **REACH, router="fitted", kv_router="fitted")
    all_model_classes = (ChiarModel, ChiarForCausalLM, ChiarForSequenceClassification)
    has_attentions = False


def _retrofitted() -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    retrofit(model, window=4, sinks=1, attention_share=0.5, kv_share=0.5, router="norm", kv_router="norm")
    return model


RoutedLlamaConfig = type(_retrofitted().config)
RoutedLlamaConfig.__module__ = __name__  # some tests send it to new processes by its name


class RetrofittedTest(Judged, unittest.TestCase):
    """A Llama whose attention is routed afterwards."""

    config = _retrofitted().config
    all_model_classes = (type(_retrofitted()),)
    has_attentions = False

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> dict[str, Any]:
        # They look a class up by its name to know its labels.
        inputs: dict[str, Any] = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})


class LlamaTest(Judged, unittest.TestCase):
    """The control: what fails here, fails for reasons that are not ours."""

    config = LlamaConfig(**SIZE)
    all_model_classes = (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification)
