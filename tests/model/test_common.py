"""Some of what transformers' own common tests ask of every model, beside what the other files here test."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from small_models import VOCABULARY, WIDTH, build, shrunk, tokens
from torch import nn

from chiaroscuro import ChiarForCausalLM, ChiarForSequenceClassification
from chiaroscuro.model.cache import CACHE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [VOCABULARY + 10, VOCABULARY - 10])
def test_another_number_of_tokens(tmp_path: Path, tied: bool, size: int) -> None:
    model, ids = build(shrunk("small", tie_word_embeddings=tied)), tokens(0) % (VOCABULARY - 10)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size and model.lm_head.out_features == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    kept = min(size, VOCABULARY)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
    ids[0, -1] = size - 1
    model.train()(ids, labels=ids).loss.backward()
    model.eval().save_pretrained(tmp_path)
    loaded, info = ChiarForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_other_embeddings() -> None:
    model = build(shrunk("small"))
    model.set_input_embeddings(nn.Embedding(VOCABULARY, WIDTH))
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_is_missing_for_another_head_is_said(tmp_path: Path) -> None:
    build(shrunk("small")).save_pretrained(tmp_path)
    _, info = ChiarForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight", "score.bias"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]


def test_copies() -> None:
    model, ids = build(shrunk("small", router="learned")), tokens(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_generation_goes_on_from_a_returned_cache() -> None:
    model, ids = build(shrunk("small")), tokens(0)
    options = {"do_sample": False, "pad_token_id": 0}
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **options)
    again = model.generate(first.sequences, cache=first[CACHE], max_new_tokens=4, **options)
    assert torch.equal(again, model.generate(ids, max_new_tokens=8, **options))


def test_inputs_that_are_embedded_already() -> None:
    model, ids = build(shrunk("small")), tokens(0)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(found, model.generate(ids, **options)[:, ids.shape[1] :])


def test_what_generation_returns_beside_the_tokens() -> None:
    model, ids = build(shrunk("small")), tokens(0)
    wants = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    found = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **wants)
    assert len(found.logits) == len(found.scores) == len(found.hidden_states) == 3
    assert [state.shape[1] for state in (found.hidden_states[0][0], found.hidden_states[1][0])] == [12, 1]
    with torch.no_grad():
        torch.testing.assert_close(found.logits[2], model(found.sequences[:, :-1]).logits[:, -1])
