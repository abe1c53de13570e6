"""Short convolutions in a model: the operator `conv` on menus, and `short_conv` before the operators of every layer.

Oracles: the model without a cache, dense execution, a row alone, and for `short_conv` the layer without it.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import WIDTH, shrunk, tokens
from torch import Tensor, nn
from transformers import set_seed

from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM, UserError, calibrate
from chiaroscuro.analysis.flops import count_decode_flops, count_flops
from chiaroscuro.layers import Context, LayerStates, NeighbourMixing, PackedTokens, ShortConvolution, build_block
from chiaroscuro.layers.state import REMEMBERED
from chiaroscuro.model.cache import CACHE

MENUS: list[list[Any]] = [["dct", "conv"], ["dct", {"conv": {"kernel": 2}}, "attention"], ["conv"], ["attention"]]
KINDS: dict[str, dict[str, Any]] = {
    "operator": {"operators": MENUS},
    "before": {"short_conv": 3},
    "post-norm": {"short_conv": 3, "norm": "post"},
    "routed context": {"operators": MENUS, "short_conv": 4, "attention_context": "routed"},
    "both": {"operators": MENUS, "short_conv": 4, "router": "learned"},
}
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def build(seed: int = 0, **fields: Any) -> ChiarForCausalLM:
    """A model whose every parameter matters."""
    torch.manual_seed(seed)
    model = ChiarForCausalLM(shrunk("small", attention_share=0.4, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def padding(*sides: tuple[int, int], time: int) -> Tensor:
    left, right = torch.tensor(sides).T[:, :, None]
    return (torch.arange(time) >= left) & (torch.arange(time) < time - right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [True, False])
def test_sparse_is_dense_in_values_and_gradients(kind: str, padded: bool) -> None:
    mask, found = padding((0, 0), (4, 3), (9, 0), time=20), []
    for execution in ("sparse", "dense"):
        model = build(**KINDS[kind], execution=execution).train()
        out = model(tokens(0, 3, 20), attention_mask=mask if padded else None, output_routing=True, output_logits=True)
        real = mask if padded else torch.ones_like(mask)
        out.logits[real].square().mean().backward()
        found.append([out.logits[real], *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole(kind: str) -> None:
    model = build(**KINDS[kind])
    time = 16

    @settings(max_examples=8)
    @given(
        seed=st.integers(0, 2**31),
        cuts=st.sets(st.integers(1, time - 1)).map(sorted),
        sides=st.none() | st.lists(st.tuples(st.integers(0, 8), st.integers(0, 7)), min_size=2, max_size=2),
        crop=st.integers(0, 3),
    )
    def holds(seed: int, cuts: list[int], sides: list[tuple[int, int]] | None, crop: int) -> None:
        ids, cache, logits = tokens(seed, 2, time), ChiarCache(model.config), []
        mask = None if sides is None else padding(*sides, time=time)
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, use_cache=False).logits
            for start, end in pairwise([0, *cuts, time]):
                seen = None if mask is None else mask[:, :end]
                logits.append(model(ids[:, start:end], attention_mask=seen, cache=cache).logits)
                if 0 < crop < end - start:  # and the same again
                    cache.crop(-crop)
                    model(ids[:, end - crop : end], attention_mask=seen, cache=cache)
        real = slice(None) if mask is None else mask
        torch.testing.assert_close(torch.cat(logits, 1)[real], whole[real], **CLOSE)

    holds()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}, {"prefill_chunk_size": 3}], ids=str
)
def test_cached_generation_is_uncached_generation(kind: str, options: dict[str, Any]) -> None:
    model, found = build(**KINDS[kind]), []
    mask = padding((0, 0), (3, 0), (6, 0), time=8).long()
    for cache in (True, False):
        set_seed(3)
        asked = options if cache else {k: v for k, v in options.items() if k != "prefill_chunk_size"}
        given = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **asked}
        found.append(model.generate(tokens(1, 3, 8), attention_mask=mask, use_cache=cache, **given))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_drafted_generation_is_greedy_generation(kind: str) -> None:
    model, assistant = build(**KINDS[kind]), build(seed=1, short_conv=2)
    given = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(tokens(2, 1, 8), **given)
    assert torch.equal(wanted, model.generate(tokens(2, 1, 8), assistant_model=assistant, **given))
    assert torch.equal(wanted, model.generate(tokens(2, 1, 8), prompt_lookup_num_tokens=3, **given))


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one_or_another_document(kind: str) -> None:
    model, ids = build(**KINDS[kind]), tokens(0, 1, 20)
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % model.config.vocab_size
    torch.testing.assert_close(model(changed).logits[:, :12], model(ids).logits[:, :12], atol=1e-5, rtol=0)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    together = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(ids[:, :7]).logits, model(ids[:, 7:]).logits], 1)
    torch.testing.assert_close(together, alone, **CLOSE)


@given(
    kernel=st.integers(1, 5),
    pieces=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    crops=st.lists(st.integers(0, REMEMBERED), min_size=5, max_size=5),
    padded=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_a_state_is_cropped_to_what_it_was(
    kernel: int, pieces: list[int], crops: list[int], padded: list[bool], seed: int
) -> None:
    torch.manual_seed(seed)
    layer = ShortConvolution(2, kernel=kernel)
    nn.init.normal_(layer.weight)
    state, line, real = layer.new_cache(), torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.bool)
    for time, crop, holes in zip(pieces, crops, padded, strict=False):
        new = torch.randn(2, time, 2)
        mask = torch.rand(2, time) < 0.6 if holes else torch.ones(2, time, dtype=torch.bool)
        line, real = torch.cat([line, new], 1), torch.cat([real, mask], 1)
        with torch.no_grad():
            found = layer(new, Context(attention_mask=real, state=state))
            wanted = layer(line, Context(attention_mask=real))[:, -time:]
        torch.testing.assert_close(found[mask], wanted[mask], atol=1e-5, rtol=1e-5)
        assert state.numbers_kept() == 2 * 2 * (kernel - 1 + state.remembered)
        crop = min(crop, state.remembered)
        state.crop(crop)
        kept = line.shape[1] - crop
        line, real = line[:, :kept], real[:, :kept]
        if int(torch.randint(2, ())):
            order = torch.randint(2, (2,))
            state.select(order)
            line, real = line[order], real[order]
    with pytest.raises(UserError, match="crop of 65 tokens, but a convolution keeps the last 64"):
        state.crop(REMEMBERED + 1)
    with pytest.raises(UserError, match="holds 2 rows, the input has 3"):
        layer(torch.randn(3, 1, 2), Context(state=state))


def test_a_state_begun_in_inference_mode_goes_on_outside_of_it() -> None:
    layer, x = ShortConvolution(WIDTH), torch.randn(1, 9, WIDTH)
    nn.init.normal_(layer.weight)
    state = layer.new_cache()
    with torch.inference_mode():
        layer(x[:, :6], Context(state=state))
    found = [layer(token, Context(state=state)) for token in x[:, 6:].split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), layer(x)[:, 6:], atol=1e-5, rtol=1e-5)
    found[0].sum().backward()
    assert layer.weight.grad is not None and not state.buffer.requires_grad


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_starts_as_without_it(norm: str) -> None:
    torch.manual_seed(0)
    fields = {"norm": norm, "num_attention_heads": 2}
    block = build_block(WIDTH, ["dct", "attention"], {**fields, "short_conv": 4}).eval()
    plain = build_block(WIDTH, ["dct", "attention"], fields).eval()
    assert plain.load_state_dict(block.state_dict(), strict=False).unexpected_keys == ["short_conv.weight"]
    x = torch.randn(2, 9, WIDTH)
    assert torch.equal(block(x)[0], plain(x)[0])
    block(x)[0].square().sum().backward()
    gradient = block.short_conv.weight.grad
    assert gradient.shape == (4, WIDTH) and gradient.abs().amin(1).gt(0).all()


def test_router_entropy_and_operators_see_what_is_convolved() -> None:
    torch.manual_seed(0)
    fields = {"num_attention_heads": 2, "router": "learned"}
    block = build_block(WIDTH, ["dct", "attention"], {**fields, "short_conv": 3}).eval()
    nn.init.normal_(block.short_conv.weight)
    x, seen = torch.randn(2, 9, WIDTH), []
    plain = build_block(WIDTH, ["dct", "attention"], fields).eval()
    plain.load_state_dict(block.state_dict(), strict=False)
    normed = plain.operator_input(x)
    convolved = normed + ShortConvolution.forward(block.short_conv, normed) - normed
    plain.operator_norms["input"] = nn.Identity()
    block.router.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    ours, theirs = block.route(x), plain.route(convolved)
    assert torch.equal(seen[0], block.operator_input(x)) and not torch.allclose(seen[0], normed)
    torch.testing.assert_close(ours.entropy, theirs.entropy)
    torch.testing.assert_close(ours.score, theirs.score)


def test_routing_alone_does_not_advance_a_cache() -> None:
    block = build_block(WIDTH, ["dct", "attention"], {"num_attention_heads": 2, "short_conv": 4}).eval()
    nn.init.normal_(block.short_conv.weight)
    x, cache = torch.randn(1, 9, WIDTH), LayerStates()
    with torch.no_grad():
        whole = block(x, output_routing=True)[1].entropy
        block(x[:, :5], Context(cache=cache))
        for _ in range(2):
            again = Context(cache=cache, past=5)
            torch.testing.assert_close(block.route(x[:, 5:], again).entropy, whole[:, 5:])


def test_checkpointing_computes_the_same() -> None:
    found = []
    for checkpointing in (False, True):
        model = build(**KINDS["both"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(0), labels=tokens(0)).loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_calibrated(kind: str, tmp_path: Path) -> None:
    model = build(**KINDS[kind])
    calibrate(model, [tokens(0, 4, 40), tokens(1, 4, 40)], share=0.25)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["short_conv"] == KINDS[kind].get("short_conv")
    loaded = ChiarForCausalLM.from_pretrained(tmp_path).eval()
    out = loaded(tokens(0, 4, 40), output_routing=True)
    assert torch.equal(out.logits, model(tokens(0, 4, 40)).logits)
    assert all(float(r.share[-1]) == pytest.approx(0.25, abs=0.1) for r in out.routing[:2] if r and len(r.share) > 1)


def test_counted() -> None:
    config = shrunk("small", operators=[["conv"], ["dct", "conv", "attention"]], num_hidden_layers=2, short_conv=3)
    count = count_flops(config, 40, share=0.5)
    assert count.by_operator["conv"] == 2 * 4 * WIDTH * 40 * (1 + 0.25)
    assert count.by_operator["short convolution"] == 2 * 2 * 3 * WIDTH * 40
    training = count_flops(config, 40, share=0.5, training=True).by_operator
    assert training["short convolution"] == 3 * count.by_operator["short convolution"]
    model = build(operators=config.operators, num_hidden_layers=2, short_conv=3)
    cache = model(tokens(0, 1, 40))[CACHE]
    assert count_decode_flops(config, 39, share=0.5).numbers_kept == cache.numbers_kept()
    states = [layer.states["input.short_conv"] for layer in cache.states]
    assert [state.numbers_kept() for state in states] == [(2 + 40) * WIDTH] * 2


@pytest.mark.parametrize("wrong", [0, -1, True, 4.0, "4", 49])
def test_impossible_kernels_are_refused(wrong: Any) -> None:
    with pytest.raises(
        UserError, match=rf"^short_conv={wrong!r}: must be a whole number of tokens from 1 to 48[^\n]*$"
    ):
        shrunk("small", short_conv=wrong)
    if wrong in (0, -1):  # what else is wrong, the tests' checked annotations refuse
        with pytest.raises(UserError, match=rf"^operators\[0\].*kernel={wrong!r}: must be a whole number[^\n]*$"):
            ChiarConfig(operators=[[{"conv": {"kernel": wrong}}]])


def test_a_token_decoded_alone_needs_few_calls_of_torch() -> None:
    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        names: list[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    layer = NeighbourMixing(WIDTH)
    state = layer.new_cache()
    with torch.no_grad():
        layer(torch.randn(2, 9, WIDTH), Context(state=state))
        with Calls() as calls:
            calls.names = []
            layer(torch.randn(2, 1, WIDTH), Context(state=state))
            own = len(calls.names)
            ShortConvolution(WIDTH)(
                torch.randn(2, 1, WIDTH), Context(state=state), PackedTokens.none_of(torch.ones(2, 1))
            )
    assert own < 22 and not any("sort" in name or "nonzero" in name for name in calls.names)
