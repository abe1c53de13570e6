"""`generate()` with a cache is `generate()` without one, token for token."""

from typing import Any

import pytest
import torch
from small_models import LENGTH, PRESETS, ROUTERS, VOCABULARY, build, shrunk, tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError
from chiaroscuro.model.cache import CACHE

ATOL = 1e-4
NEW = 12


def cacheable(preset: str, router: str) -> ChiarConfig:
    causal = {"meta_router": "causal"} if shrunk(preset).meta_router != "none" else {}
    return shrunk(preset, router=router, **causal)


CASES = [(p, r) for p in PRESETS for r in ROUTERS if not cacheable(p, r).uncacheable()]


def left_padded() -> dict[str, Tensor]:
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, :3] = mask[2, :6] = 0
    return {"input_ids": tokens(0, 3, 8), "attention_mask": mask}


def generate(model: ChiarForCausalLM, prompt: dict[str, Tensor], **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(**prompt, return_dict_in_generate=True, output_logits=True, **settings)


def by_hand(model: ChiarForCausalLM, prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The oracle: append the likeliest token, run everything again."""
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    logits = []
    for _ in range(NEW):
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids, torch.stack(logits)


@pytest.mark.parametrize(("preset", "router"), CASES)
def test_greedy_with_and_without_a_cache(preset: str, router: str) -> None:
    model, prompt = build(cacheable(preset, router)), left_padded()
    ids, logits = by_hand(model, prompt)
    for use_cache in (True, False):
        out = generate(model, prompt, use_cache=use_cache)
        assert torch.equal(out.sequences, ids)
        torch.testing.assert_close(torch.stack(out.logits), logits, atol=ATOL, rtol=0)
        assert (getattr(out, CACHE) is not None) == use_cache
    # By itself it caches.
    assert generate(model, prompt)[CACHE].get_seq_length() == 8 + NEW - 1


@pytest.mark.parametrize("changes", [{"meta_router": "batch"}, {"meta_router": "sequence"}])
def test_greedy_where_nothing_can_be_cached(changes: dict[str, str]) -> None:
    model, prompt = build(shrunk(**({"preset": "small"} | changes))), left_padded()
    ids, logits = by_hand(model, prompt)
    out = generate(model, prompt)
    assert torch.equal(out.sequences, ids)
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=ATOL, rtol=0)
    assert getattr(out, CACHE) is None


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 0, "temperature": 1.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["small", "v1-dct-attention"])
def test_other_ways_to_choose_are_the_same_with_a_cache_too(preset: str, options: dict[str, Any]) -> None:
    model, prompt, found = build(cacheable(preset, "threshold")), left_padded(), []
    for use_cache in (True, False):
        set_seed(5)
        found.append(generate(model, prompt, use_cache=use_cache, **options).sequences)
    assert torch.equal(*found)
    assert len(found[0]) == 3 * options.get("num_return_sequences", 1)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_that_generation_returned_goes_on(name: str) -> None:
    model, prompt = build(shrunk("small")), left_padded()
    first = generate(model, prompt)
    ids = torch.cat([first.sequences, tokens(9, 3, 4)], dim=1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(3, NEW + 4, dtype=torch.long)], dim=1)
    both = {"input_ids": ids, "attention_mask": mask}
    onward = generate(model, both, **{name: first[CACHE]})
    assert onward[CACHE] is first[CACHE]
    assert torch.equal(onward.sequences, generate(model, both, use_cache=False).sequences)


def test_generation_from_embeddings() -> None:
    model, ids = build(shrunk("small")), tokens(0, 2, 6)
    embeddings = model.get_input_embeddings()(ids)
    wanted = generate(model, {"input_ids": ids}).sequences[:, 6:]
    assert torch.equal(generate(model, {"inputs_embeds": embeddings}).sequences, wanted)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_where_the_positions_do(use_cache: bool) -> None:
    model, ids = build(shrunk("small")), tokens(0, 1, 8)
    # The last token is given back, and needs no position.
    full = generate(model, {"input_ids": ids}, max_new_tokens=LENGTH - 7, use_cache=use_cache)
    assert full.sequences.shape == (1, LENGTH + 1)
    # Asked for more, it stops there with the text that there is.
    more = generate(model, {"input_ids": ids}, max_new_tokens=LENGTH, use_cache=use_cache)
    assert torch.equal(more.sequences, full.sequences)
    with pytest.raises(UserError, match=f"{LENGTH + 1} tokens, but max_position_embeddings={LENGTH}") as error:
        generate(model, {"input_ids": tokens(0, 1, LENGTH + 1)}, use_cache=use_cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True}], ids=["beams", "drawn"])
def test_it_stops_where_the_positions_end_however_it_generates(options: dict[str, Any]) -> None:
    model, prompt = build(shrunk("small", max_position_embeddings=20)), left_padded()
    assert generate(model, prompt, max_new_tokens=100, **options).sequences.shape == (3, 21)
    assert generate(model, prompt, max_new_tokens=5, **options).sequences.shape == (3, 13)


def test_criteria_of_the_caller_s_own_count_too() -> None:
    model, prompt = build(shrunk("small")), left_padded()
    stop = [lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] == 10)]
    assert generate(model, prompt, stopping_criteria=stop).sequences.shape == (3, 10)


def test_an_end_of_text_ends_a_row() -> None:
    model, prompt = build(shrunk("small")), left_padded()
    free = generate(model, prompt).sequences
    end = free[0, 10].item()
    found = generate(model, prompt, eos_token_id=end, pad_token_id=VOCABULARY - 1).sequences
    stop = (free[0, 8:] == end).nonzero()[0].item() + 8
    assert torch.equal(found[0, : stop + 1], free[0, : stop + 1])
    assert (found[0, stop + 1 :] == VOCABULARY - 1).all()


def test_a_prompt_of_embeddings_takes_up_positions_too() -> None:
    model = build(cacheable("small", "threshold"))
    ids = tokens(0, 1, LENGTH - 4)
    embedded = model.get_input_embeddings()(ids)
    written = model.generate(inputs_embeds=embedded, max_new_tokens=20, do_sample=False)
    assert torch.equal(written, model.generate(ids, max_new_tokens=20, do_sample=False)[:, LENGTH - 4 :])
    assert written.shape == (1, 5)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": True}], ids=str)
def test_drafts_end_where_the_positions_end(options: dict[str, Any]) -> None:
    """All that is drafted is read, so no draft may go beyond them; the text is that of plain generation."""
    config = shrunk("small", max_position_embeddings=24)
    model = build(config)
    assistant = {"assistant_model": build(config, seed=1)} if "assistant_model" in options else {}
    prompt = {"input_ids": tokens(0, 1, 4).repeat(1, 3)}
    plain = generate(model, prompt, max_new_tokens=100).sequences
    assert plain.shape == (1, 25)
    given = options | assistant | {"max_new_tokens": 100, "eos_token_id": None}
    assert torch.equal(model.generate(**prompt, **given, do_sample=False), plain)
    assert model.generate(**prompt, **given, do_sample=True).shape == (1, 25)
    embeds = {"inputs_embeds": model.get_input_embeddings()(prompt["input_ids"]).detach()}
    if not assistant:
        assert torch.equal(model.generate(**embeds, **given, do_sample=False), plain[:, 12:])


def test_an_assistant_keeps_its_schedule_of_drafts() -> None:
    """transformers writes it back to assistants of its own kind alone."""
    model, assistant = build(shrunk("small")), build(shrunk("small"))
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    given = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    model.generate(tokens(0, 1, 4), assistant_model=assistant, **given)
    assert assistant.generation_config.num_assistant_tokens > 2


def test_an_assistant_of_another_model_drafts_what_its_cache_can_take_back() -> None:
    options = {"window": 8, "max_position_embeddings": 512}
    assistant = build(shrunk("reach-small", router="random", kv_router="random", **options))
    assistant.generation_config.num_assistant_tokens = 90
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None)).eval()
    few = [lambda found, scores, **_: found.new_full((1,), found.shape[1] >= 24, dtype=torch.bool)]
    prompt, given = tokens(0, 1, 20), {"max_new_tokens": 100, "do_sample": False, "stopping_criteria": few}
    wanted = model.generate(prompt, **given)
    assert torch.equal(model.generate(prompt, **given, assistant_model=assistant)[:, :24], wanted)


def test_a_cache_of_a_model_that_trains_densely_says_what_to_do() -> None:
    model = build(shrunk("small", router="hard", attention_context="routed", meta_router="none")).train()
    with pytest.raises(UserError, match=r"call model\.eval"):
        model.generate(tokens(0, 1, 4), max_new_tokens=2)
    assert model.eval().generate(tokens(0, 1, 4), max_new_tokens=2, eos_token_id=None).shape == (1, 6)
