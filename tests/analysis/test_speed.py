"""The stop-watch: turns that alternate, medians of what was done, and work that does what its name says."""

import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from chiaroscuro import ChiarConfig, ChiarForCausalLM
from chiaroscuro.analysis.speed import (
    DECODED,
    code_version,
    decoding,
    forward_pass,
    profile_by_kind,
    spectral_part,
    take_turns,
    training_step,
)
from chiaroscuro.layers import Context, PackedTokens, build_block
from chiaroscuro.model.cache import CACHE

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "max_position_embeddings": 64}


def ours(**changes: object) -> ChiarForCausalLM:
    return ChiarForCausalLM(ChiarConfig(**SIZES, num_attention_heads=2, meta_router="none", **changes))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, intermediate_size=32))


def test_figures_say_of_which_code_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        assert code_version.__wrapped__() in (commit, f"{commit}-dirty")
    monkeypatch.setenv("PATH", "")  # where there is no git, and no clone
    assert code_version.__wrapped__() == metadata.version("chiaroscuro")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rehearse", [False, True])
def test_candidates_take_turns_and_all_get_as_many(rehearse: bool) -> None:
    calls: list[str] = []
    timings = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0, 4, rehearse)
    each = ["a", "a", "b", "b"] if rehearse else ["a", "b"]
    assert calls == ["a", "b"] + 4 * each
    assert {name: t.turns for name, t in timings.items()} == {"a": 4, "b": 4}


def test_the_median_is_of_the_time_that_the_work_took() -> None:
    timings = take_turns({"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.04)}, 0.3)
    assert timings["short"].turns >= 3
    for name, least in (("short", 0.01), ("long", 0.04)):
        t = timings[name]
        assert least <= t.lower <= t.median <= t.upper
    assert timings["short"].median < timings["long"].median


@pytest.mark.parametrize("make", [ours, llama])
def test_a_training_step_makes_gradients_and_leaves_the_weights_as_they_are(make: object, ids: torch.Tensor) -> None:
    model, seen = make(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.register_hook(lambda grad: seen.append(grad.abs().sum()))
    training_step(model, ids)()
    assert model.training and len(seen) == len(before) and sum(seen) > 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("length", [20, 5])
@pytest.mark.parametrize("make", [ours, llama])
def test_decoding_reads_as_many_tokens_on_the_same_cache_every_time(
    make: object, length: int, ids: torch.Tensor
) -> None:
    model, inputs, ids = make(), [], ids[:, :length]
    work = decoding(model, ids)
    handle = model.register_forward_pre_hook(
        lambda _, __, given: inputs.append((given["input_ids"].shape[1], given[CACHE].get_seq_length())),
        with_kwargs=True,
    )
    for _ in range(2):
        work()
    handle.remove()
    assert inputs == 2 * [(1, ids.shape[1] + n) for n in range(DECODED)]


def test_decoding_of_a_model_with_a_sliding_window_reads_the_same_every_time(ids: torch.Tensor) -> None:
    """Its cache can't be cropped once the window is full."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(**SIZES, **heads, intermediate_size=32, sliding_window=8)
    model, seen = MistralForCausalLM(config), list[int]()
    work = decoding(model, ids)
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given[CACHE].get_seq_length()),
        with_kwargs=True,
    )
    for _ in range(2):
        work()
    assert seen == 2 * [ids.shape[1] + n for n in range(DECODED)]


def test_a_forward_pass_is_a_prefill(ids: torch.Tensor) -> None:
    model, outputs = ours().train(), []
    model.register_forward_hook(lambda _, __, out: outputs.append(out))
    forward_pass(model, ids)()
    assert outputs[0].logits.shape == (2, 1, 50) and not outputs[0].logits.requires_grad
    assert outputs[0][CACHE].get_seq_length() == 20


@pytest.mark.parametrize("training", [True, False])
def test_the_spectral_part_is_less_work_than_its_layer(training: bool) -> None:
    block, x = build_block(64, ["dct", "attention"], {"num_attention_heads": 2}), torch.randn(2, 300, 64)
    mixing, rows = block.operators["dct"], list[int]()
    real = mixing.mix_packed

    def noted(x: torch.Tensor, tokens: PackedTokens, context: Context) -> torch.Tensor:
        rows.append(len(tokens))
        return real(x, tokens, context)

    mixing.mix_packed = noted
    timings = take_turns(spectral_part(block, x, training), 0, 5)
    # Both take the same tokens: those that the block itself sends to dct.
    assert len(set(rows)) == 1 and 0 < rows[0] < 600
    assert timings["router and transform"].median < timings["layer"].median


@pytest.mark.skipif(torch.cuda.is_available(), reason="the array lies on the CPU")
def test_peak_memory_sees_what_is_allocated_and_given_back() -> None:
    program = """
import torch
from chiaroscuro.analysis.speed import peak_memory

def make():
    torch.zeros(100_000_000).sum()  # more than the work, but before it
    return lambda: torch.zeros(30_000_000).sum()

print(peak_memory(make))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) == pytest.approx(120e6, rel=0.3)


def test_a_profile_says_what_the_time_went_into() -> None:
    a, b = torch.randn(400, 400), torch.randn(2_000_000)
    products = profile_by_kind(lambda: [a @ a for _ in range(20)])
    moving = profile_by_kind(lambda: [b.clone() for _ in range(20)])
    assert max(products, key=products.__getitem__) == "matrix products"
    assert max(moving, key=moving.__getitem__) == "moving"
