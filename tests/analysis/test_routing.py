"""A trace is the model's own routing, and its pieces are the text, whatever the tokenizer cuts it into."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import byte_tokenizer
from chiaroscuro import ChiarConfig, ChiarForCausalLM, fit
from chiaroscuro.analysis.routing import LayerTrace, RoutingTrace, level_of, trace_routing
from chiaroscuro.errors import UserError
from chiaroscuro.ops import null_entropy_mean


def byte_level(trim=False):
    """A byte-level BPE that knows a few English words and no other script: there it cuts characters apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim:  # spans without the space before a word, as RoBERTa has them
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def whole_words():
    """A tokenizer that lowercases and throws whitespace away."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


class WithoutOffsets:
    """The same tokenizer as a Python one would be: it can decode, and knows no spans."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self.tokenizer(text, **options)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def tiny(**changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "operators": [["dct"], ["dct", "attention"], ["dct", "rbf", "attention"], ["attention"]],
        "num_hidden_layers": 4,
        "use_cache": False,
    }
    return ChiarForCausalLM(ChiarConfig(**fields | changes))


TOKENIZERS = {"bytes": byte_level(), "trimmed": byte_level(trim=True), "python": WithoutOffsets(byte_level())}
MODEL = tiny()
TEXT = "the cat sat on 漢字 naïve 👩‍🚀\n\n  the mat"


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
)
def test_the_pieces_are_the_text(name, text):
    trace = trace_routing(MODEL, TOKENIZERS[name], text)
    assert "".join(trace.tokens) == text
    assert len(trace.tokens) == len(TOKENIZERS["bytes"](text)["input_ids"])


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_no_piece_is_a_broken_character(name):
    tokens = trace_routing(MODEL, TOKENIZERS[name], TEXT).tokens
    assert not any("\ufffd" in token for token in tokens)
    # Three tokens share the three bytes of 漢, and one of them has it.
    start = next(i for i, token in enumerate(tokens) if "漢" in token)
    assert tokens[start - 2 : start].count("") + tokens[start + 1 : start + 3].count("") >= 2


def test_words_keep_the_space_before_them():
    assert trace_routing(MODEL, TOKENIZERS["bytes"], "the cat the").tokens[-1] == " the"


def test_a_tokenizer_that_drops_whitespace_still_gives_the_text():
    tokens = trace_routing(MODEL, whole_words(), "The cat \n the dog ").tokens
    assert tokens == ("The", " cat", " \n the", " dog ")


@pytest.mark.parametrize("training", [True, False])
def test_the_numbers_are_the_models_own(training):
    model = tiny(hidden_dropout=0.5).train(training)
    tokenizer = TOKENIZERS["bytes"]
    trace = trace_routing(model, tokenizer, TEXT)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        routing = model.eval()(ids, use_cache=False, output_routing=True).routing
    assert len(trace.layers) == 4
    for layer, said, theirs in zip(model.model.layers, routing, trace.layers, strict=True):
        assert theirs.operators == said.operators == tuple(layer.operator_names)
        assert theirs.operator_index == tuple(said.operator_index[0].tolist())
        assert theirs.entropy == tuple(said.entropy[0].tolist())
        assert theirs.share == pytest.approx([count / ids.shape[1] for count in theirs.counts])
        expected = layer.thresholds.tolist() if layer.thresholds is not None else []
        assert theirs.thresholds == tuple(expected)
        if theirs.thresholds:
            # The router's rule, token by token: how many thresholds H exceeds.
            above = [sum(h > threshold for threshold in theirs.thresholds) for h in theirs.entropy]
            assert list(theirs.operator_index) == above
    assert trace.width == 32 and trace.null_mean == null_entropy_mean(32)


@pytest.mark.parametrize("pooling", ["none", "batch", "sequence", "causal"])
def test_the_gate_is_one_number_or_one_per_token(pooling):
    gate = trace_routing(tiny(meta_router=pooling), TOKENIZERS["bytes"], TEXT).meta_gate
    tokens = len(TOKENIZERS["bytes"](TEXT)["input_ids"])
    expected = {"none": None, "batch": 1, "sequence": 1, "causal": tokens}[pooling]
    assert (gate if gate is None else len(gate)) == expected


def test_a_model_without_a_head_does():
    assert trace_routing(MODEL.model, TOKENIZERS["bytes"], TEXT) == trace_routing(MODEL, TOKENIZERS["bytes"], TEXT)


def test_depth_counts_the_routed_layers_that_gave_the_costliest_operator():
    trace = trace_routing(MODEL, TOKENIZERS["bytes"], TEXT)
    assert trace.routed_layers == (1, 2)
    second, third = trace.layers[1:3]
    for token, depth in enumerate(trace.depth):
        assert depth == (second.operator(token) == "attention") + (third.operator(token) == "attention")


def test_it_can_be_written_as_json():
    trace = trace_routing(tiny(meta_router="causal"), TOKENIZERS["bytes"], TEXT)
    again = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert "".join(again["tokens"]) == TEXT
    assert [layer["layer"] for layer in again["layers"]] == [1, 2, 3, 4]
    for said, layer in zip(again["layers"], trace.layers, strict=True):
        assert list(said["share"]) == said["operators"] == list(layer.operators)
        assert said["entropy"] == pytest.approx(layer.entropy, abs=1e-6)


def test_an_infinite_threshold_is_null_in_json():
    layer = LayerTrace(("dct", "attention"), (0,), (0.8,), (math.inf,), (1.0, 0.0))
    trace = RoutingTrace(("a",), (layer,), None, 0.86, 256)
    assert json.loads(json.dumps(trace.to_dict(), allow_nan=False))["layers"][0]["thresholds"] == [None]


@pytest.mark.parametrize(
    "text, tokenizer, message",
    [
        ("", "bytes", "empty"),
        ("x" * 65, "bytes", "65 tokens.* at most 64 "),
        ("caf\udce9", "bytes", "not valid Unicode at character 3"),
    ],
)
def test_a_wrong_text_is_one_line(text, tokenizer, message):
    with pytest.raises(UserError, match=message) as error:
        trace_routing(MODEL, TOKENIZERS[tokenizer], text)
    assert "\n" not in str(error.value)


def test_a_text_of_nothing_but_what_the_tokenizer_drops_is_an_error():
    with pytest.raises(UserError, match="makes no token"):
        trace_routing(MODEL, whole_words(), " \n ")


def test_a_tokenizer_of_another_model_is_an_error():
    with pytest.raises(UserError, match="vocab_size is 64"):
        trace_routing(tiny(vocab_size=64), TOKENIZERS["bytes"], "zebra")


def test_a_model_that_gives_nan_is_an_error():
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(UserError, match="layer 1 is not a number"):
        trace_routing(model, TOKENIZERS["bytes"], TEXT)


@pytest.mark.parametrize("heads", [1, 2])
def test_who_is_kept_is_traced_by_the_part_of_the_heads(heads: int) -> None:
    kv_router: Any = {"fitted": {"heads": heads}}
    fields = {"operators": [["local", "attention"]] * 2, "window": 4, "attention_context": "kept", "router": "norm"}
    fields |= {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "kv_router": kv_router}
    model = ChiarForCausalLM(ChiarConfig(vocab_size=300, **fields))
    fit(model, [torch.randint(3, 200, (2, 32)) for _ in range(4)], kept=0.5)
    text = "the light falls on a wall"
    trace = trace_routing(model, byte_tokenizer(), text)
    ids = torch.tensor([byte_tokenizer()(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        routing = model.eval()(ids, use_cache=False, output_routing=True).routing
    for layer, one in zip(trace.layers, routing, strict=True):
        assert layer.kept == tuple(one.kept[0].float().reshape(len(ids[0]), -1).mean(-1).tolist())
        assert 0 < sum(layer.kept) < len(layer.kept)


def test_how_costly_an_operator_is() -> None:
    assert [level_of(("dct", "conv", "attention"), i) for i in range(3)] == [0, 0.5, 1]
    assert [level_of((name,), 0) for name in ("dct", "conv", "attention", "nobody's")] == [0, 0.25, 1, 1]
