"""A router from one file outside the package, with a parameter and a drawn buffer, does all that those inside do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from examples.sketch_router import SketchRouter
from torch import Tensor

from chiaroscuro import ChiarConfig, ChiarForCausalLM, calibrate
from chiaroscuro.analysis.flops import count_flops


def build(seed: int = 0, **changes: Any) -> ChiarForCausalLM:
    torch.manual_seed(seed)
    fields = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
    model = ChiarForCausalLM(ChiarConfig(**{**fields, "router": "sketch", **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def ids(seed: int) -> Tensor:
    return torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(seed))


def test_uncalibrated_it_sends_the_share_of_white_noise() -> None:
    router = SketchRouter(64, ("dct", "attention"), attention_share=0.3)
    decision = router(torch.randn(1, 20_000, 64), torch.zeros(1, 20_000))
    assert float(decision.operator_index.float().mean()) == pytest.approx(0.3, abs=0.08)
    torch.testing.assert_close(decision.scale, decision.score.sigmoid())


def test_the_buffer_is_the_seed_s_and_the_layer_s() -> None:
    sketches = [[layer.router.sketch for layer in build(seed).model.layers[1:3]] for seed in (0, 1)]
    assert torch.equal(sketches[0][0], sketches[1][0])
    assert not torch.equal(sketches[0][0], sketches[0][1])
    assert not torch.equal(build(router_seed=7).model.layers[1].router.sketch, sketches[0][0])


def test_sparse_is_dense_and_the_parameter_learns() -> None:
    found = []
    for execution in ("sparse", "dense"):
        model = build(execution=execution).train()
        model(ids(0), labels=ids(0)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)
    assert float(found[0]["model.layers.1.router.weight"].abs().max()) > 0


def test_it_is_calibrated_counted_saved_loaded_and_cached(tmp_path: Path) -> None:
    model = build(router={"sketch": {"features": 8}})
    assert model.model.layers[1].router.sketch.shape == (8, 32)
    calibrate(model, [ids(0), ids(1)], share=0.25)
    routing = model(ids(0), output_routing=True).routing
    assert all(float(r.share[-1]) == pytest.approx(0.25, abs=0.1) for r in routing[1:3])
    assert count_flops(build().config, 16).by_operator["router"] > 0
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids(2)).logits, model(ids(2)).logits)
    cached, uncached = (
        model.generate(ids(2), max_new_tokens=10, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached, uncached)
