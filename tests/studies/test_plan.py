"""What a run needs on GPUs: that the counts are counts, and that mistakes are one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from chiaroscuro import ChiarConfig, UserError
from chiaroscuro.analysis.flops import count_flops, full_attention
from chiaroscuro.studies.plan import count_activations, plan_run
from chiaroscuro.training import Recipe

Run = Callable[..., tuple[int, str, str]]
SMALL: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3},
    "data": {"sequence_length": 64},
    "tokenizer": "bpe:300",
    "trainer": {"output_dir": "x", "steps": 100, "batch_size": 4, "gradient_accumulation": 2},
}


def test_figures_are_the_counts_of_the_project() -> None:
    recipe = Recipe.from_dict(SMALL)
    found = plan_run(recipe, 8, "h100", used=0.5)
    config: Any = recipe.build_config(300)
    flops = count_flops(config, 64, training=True).total * 8
    assert found["step"]["compute"] == pytest.approx(flops / (67e12 * 0.5))
    assert found["step"]["exchange of gradients"] == pytest.approx(2 * 7 / 8 * 4 * found["parameters"] / 450e9)
    assert found["step"]["tokens"] == 4 * 2 * 8 * 64
    assert found["run"] == {"steps": 100, "tokens": 100 * 4096, "seconds": 100 * found["step"]["seconds"]}
    ddp, fsdp = found["memory"]["ddp"], found["memory"]["fsdp"]
    assert ddp["AdamW"] == 8 * found["parameters"] == 8 * fsdp["AdamW"]
    assert ddp["activations"] == fsdp["activations"] > 0 and ddp["weights in bf16"] == 0
    assert all(parts["total"] == sum(v for k, v in parts.items() if k != "total") for parts in (ddp, fsdp))


def test_activations_are_those_that_autograd_keeps() -> None:
    """A model of nothing but one product's worth more keeps what that product needs."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "hidden_dropout": 0.0}
    full = {"operators": [["attention"]] * 2, "num_hidden_layers": 2, "meta_router": "none", "attention_dropout": 0.0}
    config = ChiarConfig(**fields, **full)
    whole, nothing = count_activations(config, 64, half=False, checkpointing=False)
    assert nothing == 0
    # At the least the inputs of six products (q, k and v share one), of the activation, and of both norms.
    least = 4 * (32 + 3 * 32 + 32 + 32 + 4 * 32 + 4 * 32)
    assert 2 * least < whole < 8 * least
    inputs, layer = count_activations(config, 64, half=False, checkpointing=True)
    assert inputs < whole / 2 and layer == pytest.approx((whole - inputs) / 2)
    assert count_activations(config, 64, half=True, checkpointing=False)[0] < whole


def test_what_is_as_large_for_any_batch_is_not_multiplied_by_it() -> None:
    """Such as the gradient of a head of many tokens, which the loss computes in the forward."""
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "meta_router": "none",
    }
    small, large = (
        count_activations(ChiarConfig(vocab_size=size, **fields), 16, half=False, checkpointing=False)
        for size in (1000, 4000)
    )
    assert large[0] == pytest.approx(small[0], rel=0.01)


def test_the_baseline_that_is_trained_first_is_planned() -> None:
    content = SMALL | {"calibration": {"method": "paper"}}
    found = plan_run(Recipe.from_dict(content), 8, "h100")
    alone = plan_run(Recipe.from_dict(content).baseline(), 8, "h100")
    assert found["baseline"] == alone and alone["step"]["of full attention's operations"] == 1
    assert "baseline" not in plan_run(Recipe.from_dict(SMALL), 8, "h100")


def test_averages_and_a_teacher_are_counted() -> None:
    plain = plan_run(Recipe.from_dict(SMALL), 8, "h100")
    averaged = plan_run(Recipe.from_dict(SMALL | {"trainer": SMALL["trainer"] | {"ema": 0.9}}), 8, "h100")
    assert averaged["memory"]["ddp"]["averaged weights"] == 4 * plain["parameters"]
    more = averaged["memory"]["ddp"]["total"] - plain["memory"]["ddp"]["total"]
    assert more == pytest.approx(4 * plain["parameters"])
    taught = plan_run(Recipe.from_dict(SMALL | {"distill": {}}), 8, "h100")
    config: Any = Recipe.from_dict(SMALL).build_config(300)
    teacher = count_flops(full_attention(config), 64).total * 8 / (67e12 * 0.4)
    assert taught["step"]["compute"] - plain["step"]["compute"] == pytest.approx(teacher)


def test_the_rate_and_the_vocabulary_are_those_of_the_run(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "words")
    own = plan_run(Recipe.from_dict(SMALL | {"tokenizer": str(tmp_path / "words")}), 8, "h100")
    given = plan_run(Recipe.from_dict(SMALL), 8, "h100", vocabulary=len(tokenizer))
    assert own["parameters"] == given["parameters"]
    assert f"the tokenizer has {len(tokenizer):,} tokens" in own["assumptions"]
    assert "a step reaches 40% of the peak of 67 TFLOP/s in float32" in own["assumptions"]
    half = plan_run(Recipe.from_dict(SMALL | {"trainer": SMALL["trainer"] | {"precision": "bf16"}}), 8, "h100")
    assert "a step reaches 40% of the peak of 989 TFLOP/s in bfloat16" in half["assumptions"]


def test_more_machines_exchange_through_the_network() -> None:
    recipe = Recipe.from_dict(SMALL)
    near, far = (plan_run(recipe, n, "h200")["step"]["exchange of gradients"] for n in (8, 64))
    assert far / near == pytest.approx(9 * (63 / 64) / (7 / 8))


@pytest.mark.parametrize(
    ("change", "arguments", "complaint"),
    [
        ({}, {"gpu": "h900"}, "--gpu h900: no such GPU"),
        ({}, {"gpus": 0}, "--gpus 0"),
        ({}, {"used": 1.5}, "--used 1.5"),
        ({"data": {"task": "listops-flat", "sequence_length": 16}, "tokenizer": "words"}, {}, "this recipe has tasks"),
        ({"mixture": {"ratio": 0.5, "tasks": {"a": {"task": "listops-flat"}}}}, {}, "this recipe has tasks"),
        ({"tokenizer": "owner/name"}, {}, "does not say how many tokens it has: give --vocabulary"),
        (
            {
                "model": {
                    "architecture": "llama",
                    **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48},
                }
            },
            {},
            "plan counts a CHIAR-Former, and this recipe's model is a llama",
        ),
    ],
)
def test_a_mistake_is_one_line(change: dict[str, Any], arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        plan_run(Recipe.from_dict(SMALL | change), **{"gpus": 8, "gpu": "h200"} | arguments)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_the_command(run: Run) -> None:
    code, out, err = run("plan", "recipes/small.yaml", "--gpus", 2, "--gpu", "a100", "--json")
    assert code == 0, err
    assert json.loads(out)["gpus"] == 2
    code, out, err = run("plan", "recipes/small.yaml", "trainer.warmup_steps=1", "--gpus", 64)
    assert code == 0 and "assumed:" in out and "FSDP" in out, err
    code, out, err = run("plan", "recipes/small.yaml", "--gpu", "abacus")
    assert code == 2 and err.count("\n") == 1


def test_layers_that_are_computed_again_are_counted() -> None:
    plain = plan_run(Recipe.from_dict(SMALL), 8, "h100")
    again = plan_run(
        Recipe.from_dict(SMALL | {"trainer": SMALL["trainer"] | {"gradient_checkpointing": True}}), 8, "h100"
    )
    config: Any = Recipe.from_dict(SMALL).build_config(300)
    layers = count_flops(config, 64, head=False).total * 8 / (67e12 * 0.4)
    assert again["step"]["compute"] - plain["step"]["compute"] == pytest.approx(layers)


def test_full_attention_is_all_of_full_attention_s_operations() -> None:
    full = {"operators": [["attention"]] * 3, "meta_router": "none", "num_hidden_layers": 3}
    model = {name: value for name, value in SMALL["model"].items() if name != "preset"} | full
    for more in ({}, {"trainer": SMALL["trainer"] | {"gradient_checkpointing": True}}):
        found = plan_run(Recipe.from_dict(SMALL | {"model": model} | more), 8, "h100")
        assert found["step"]["of full attention's operations"] == pytest.approx(1)


def test_what_training_refuses_is_not_planned() -> None:
    found = plan_run(Recipe.from_dict(SMALL | {"trainer": SMALL["trainer"] | {"ema": 0.9}}), 8, "h100")
    assert found["memory"].keys() == {"ddp"}
    falls = plan_run(
        Recipe.from_dict(SMALL | {"schedule": {"attention_share": {"from": 1.0, "steps": 0.5}}}), 8, "h100"
    )
    assert "shares are those at the end of the schedule" in falls["assumptions"]
