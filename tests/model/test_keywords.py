"""The keywords that transformers and other libraries pass to every model: honoured, ignored, or refused by name."""

from typing import Any

import pytest
import torch
from small_models import build, shrunk, tokens
from torch import Tensor
from transformers import DataCollatorWithFlattening, LlamaConfig

from byte_tokenizer import byte_tokenizer
from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM, ChiarForMixedTasks, ChiarModel, UserError

HARMLESS: list[dict[str, Any]] = [
    {"output_attentions": None},
    {"output_attentions": False},
    {"tokenizer": object()},
    {"cache_position": torch.arange(12)},
    {"token_type_ids": torch.zeros(2, 12, dtype=torch.long)},
    {"head_mask": None, "max_length_q": 12, "anything": "at all"},
]


@pytest.mark.parametrize("keywords", HARMLESS, ids=lambda keywords: "+".join(keywords))
def test_what_changes_nothing_is_ignored(keywords: dict[str, Any]) -> None:
    model, ids = build(shrunk("small")), tokens(0)
    assert torch.equal(model(ids, **keywords).logits, model(ids).logits)
    trunk = model.model
    assert torch.equal(trunk(ids, **keywords).last_hidden_state, trunk(ids).last_hidden_state)


def mixed() -> ChiarForMixedTasks:
    return ChiarForMixedTasks(shrunk("small", task_labels={"sums": 3}))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"output_attentions": True}, "output_attentions: .*output_routing=True"),
        ({"head_mask": torch.ones(4, 2)}, "head_mask: "),
        ({"attn_mask": torch.ones(2, 12)}, "attn_mask: .*called attention_mask"),
        ({"attention_masks": torch.ones(2, 12)}, "attention_masks: did you mean attention_mask"),
    ],
    ids=["output_attentions", "head_mask", "attn_mask", "misspelt"],
)
def test_what_would_change_the_result_is_refused(keywords: dict[str, Any], message: str) -> None:
    model = mixed()
    for forward in (model, model.model, lambda *a, **k: model(*a, task="sums", **k)):
        with pytest.raises(UserError, match=message) as caught:
            forward(tokens(0), **keywords)
        assert "\n" not in str(caught.value)


def test_logits_are_of_positions_that_there_are() -> None:
    model = build(shrunk("small"))
    cache = ChiarCache(model.config)
    with pytest.raises(UserError, match=r"logits_to_keep=\[99\]: positions of 12 tokens are 0 to 11"):
        model(tokens(0, 2, 12), logits_to_keep=torch.tensor([99]), cache=cache)
    assert cache.tokens_seen == 0
    assert model(tokens(0, 2, 12), logits_to_keep=torch.tensor([11, -1, 3])).logits.shape[1] == 3


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_config_is_one_line() -> None:
    with pytest.raises(UserError, match="ChiarForCausalLM takes a ChiarConfig, not a LlamaConfig"):
        ChiarForCausalLM(LlamaConfig())
    with pytest.raises(UserError, match=r"ChiarCache takes a ChiarConfig, such as model\.config, not a ChiarFor"):
        ChiarCache(build(shrunk("small")))
    with pytest.raises(UserError, match="unknown preset"):
        ChiarConfig.preset(["small"])


def test_batches_that_change_while_they_generate_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"generate_batch: .*use generate"):
        build(shrunk("small")).generate_batch([[1, 2, 3]], max_new_tokens=2)


def test_attentions_by_the_config_or_in_generation_are_refused_too() -> None:
    model = build(shrunk("small", attn_implementation="eager"))
    with pytest.raises(UserError, match="output_routing=True"):
        model.generate(tokens(0), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    model.config.output_attentions = True
    with pytest.raises(UserError, match="output_routing=True"):
        model(tokens(0))


# Documents in one row


TEXTS = [tokens(1, 1, 5)[0], tokens(2, 1, 3)[0], tokens(3, 1, 4)[0]]


def alone(model: ChiarForCausalLM) -> Tensor:
    return torch.cat([model(text[None]).logits[0] for text in TEXTS])


@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("keywords", ["flash", "flash without positions", "positions and a mask"])
def test_documents_that_are_flattened_into_one_row(keywords: str, execution: str) -> None:
    model = build(shrunk("small", execution=execution))
    collate = DataCollatorWithFlattening(
        return_position_ids="without" not in keywords, return_flash_attn_kwargs="flash" in keywords
    )
    batch = collate([{"input_ids": text.tolist()} for text in TEXTS])
    if "mask" in keywords:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch.pop("labels")
    assert ("cu_seq_lens_q" in batch) == ("flash" in keywords)
    found = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(found, alone(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_documents_in_a_padded_row(side: str, execution: str) -> None:
    model = build(shrunk("small", execution=execution))
    first, second = TEXTS[0], TEXTS[2]
    ids = torch.cat([torch.tensor([7, 7]), first, second] if side == "left" else [first, second, torch.tensor([7, 7])])
    positions = torch.cat([torch.arange(5), torch.arange(4)])
    real = torch.ones(11, dtype=torch.long)
    if side == "left":
        real[:2], positions = 0, torch.cat([torch.tensor([1, 1]), positions])
    else:
        real[-2:], positions = 0, torch.cat([positions, torch.tensor([1, 1])])
    batch = {"input_ids": ids[None], "attention_mask": real[None], "position_ids": positions[None]}
    found = model(**batch, use_cache=False).logits[0, real.bool()]
    wanted = torch.cat([model(text[None]).logits[0] for text in (first, second)])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("ids", "bounds"),
    [(tokens(0), [0, 12]), (tokens(0, 1), [0, 5]), (tokens(0, 1), [2, 12]), (tokens(0, 1), [0])],
    ids=["two rows", "too short", "not from 0", "no document"],
)
def test_documents_that_do_not_fill_the_row(ids: Tensor, bounds: list[int]) -> None:
    with pytest.raises(UserError, match=r"cu_seq_lens_q=.*give one row") as caught:
        build(shrunk("small"))(ids, cu_seq_lens_q=torch.tensor(bounds))
    assert "\n" not in str(caught.value)


# Labels


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize(
    "labels",
    [tokens(0, 1), tokens(0, 3), tokens(0, 2, 11), tokens(0, 2, 13), tokens(0)[0], tokens(0).float(), tokens(0).byte()],
    ids=["fewer rows", "more rows", "shorter", "longer", "one axis", "floats", "bytes"],
)
@pytest.mark.usefixtures("unchecked")
def test_labels_that_are_not_one_for_each_token(training: bool, name: str, labels: Tensor) -> None:
    model = build(shrunk("small")).train(training)
    with pytest.raises(UserError, match=rf"{name} of shape .*need a token id or -100 .*shape \(2, 12\)") as caught:
        model(tokens(0), **{name: labels})
    assert "\n" not in str(caught.value)


def test_labels_in_fewer_bits_and_of_kept_logits() -> None:
    model, ids = build(shrunk("small")), tokens(0)
    assert torch.equal(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss)
    assert model.train()(ids, labels=ids, logits_to_keep=3).loss.isfinite()


# Hidden states that the config asks for


@pytest.mark.parametrize("kind", ["trunk", "language model", "mixed", "task"])
def test_hidden_states_by_the_config(kind: str) -> None:
    config = shrunk("small", output_hidden_states=True, task_labels={"sums": 3})
    model = {"trunk": ChiarModel, "language model": ChiarForCausalLM}.get(kind, ChiarForMixedTasks)(config).eval()
    keywords = {"task": "sums"} if kind == "task" else {}
    assert len(model(tokens(0), **keywords).hidden_states) == 5
    assert model(tokens(0), **keywords, output_hidden_states=False).hidden_states is None


def test_generation_stops_at_a_string() -> None:
    tokenizer = byte_tokenizer()
    model = build(shrunk("small", vocab_size=len(tokenizer)))
    prompt = tokenizer("light and", return_tensors="pt")
    free = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(free[0])[len("light and") :]
    stop = text[4:7]
    stopped = model.generate(**prompt, max_new_tokens=20, do_sample=False, stop_strings=stop, tokenizer=tokenizer)
    assert len(stopped[0]) < len(free[0]) and stop in tokenizer.decode(stopped[0])
