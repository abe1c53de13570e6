"""A run that starts from a trained model: every tensor but a router's is the trained one's, or the run is refused.

The oracle is the file of the trained weights. The steps taken here move no weight.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_schedule import REACH
from test_train import LLAMA, Go, assert_same_bits, break_off, interrupt_at
from torch import Tensor

from chiaroscuro import ChiarForCausalLM, register_operator
from chiaroscuro.errors import UserError
from chiaroscuro.layers import Context, Operator
from chiaroscuro.layers.registry import OPERATORS
from chiaroscuro.layers.thresholds import shares_to_thresholds
from chiaroscuro.training import TrainingInterrupted, TrainResult
from chiaroscuro.training.trainer import RunTrainer


class Nothing(Operator):
    """Has no parameters, as the near part of an attention that is split by distance has none of its own."""

    def mix(self, x: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(x)


@pytest.fixture(autouse=True)
def nothing() -> Iterator[None]:
    register_operator("nothing", Nothing)
    yield
    del OPERATORS["nothing"]


FULL = {"hidden_size": 32, "num_attention_heads": 2, "operators": [["attention"]] * 3, "meta_router": "none"}
ROUTED = FULL | {"operators": [["nothing", "attention"], ["nothing", "attention"], ["attention"]]}
FROZEN = {"trainer__learning_rate": 1e-30, "trainer__min_learning_rate": 0.0, "trainer__weight_decay": 0.0}

Stage = Callable[..., TrainResult]


@pytest.fixture
def stage(run: Go, tmp_path: Path) -> Stage:
    """One of several runs, in a folder of its own name."""
    return lambda name, **changes: run(trainer__output_dir=str(tmp_path / name), **changes)[0]


def tensors(result: TrainResult, *, routers: bool = False) -> dict[str, Tensor]:
    found = load_file(result.model / "model.safetensors")
    return {name: tensor for name, tensor in found.items() if (".router." in name) == routers}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def initial(stage: Stage, name: str, **changes: Any) -> Any:
    """The model as a run begins with it."""

    class Begun(Exception):
        pass

    found = []

    def begin(self: RunTrainer, *args: Any, **kwargs: Any) -> None:
        found.append(self.model)
        raise Begun

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Begun):
        patch.setattr(RunTrainer, "train", begin)
        stage(name, **changes)
    return found[0]


def test_full_attention_first_and_then_routed(stage: Stage) -> None:
    full = stage("full", model=FULL)
    for name in (str(full.folder), str(full.model), str(full.folder / "checkpoint-12")):
        routed = stage(f"from-{Path(name).name}", model=ROUTED, trainer__init_from=name, **FROZEN)
        assert_same(tensors(full), tensors(routed))
        assert len(tensors(routed, routers=True)) == 6  # values, quantiles and steps of two layers
        assert (routed.folder / "recipe.yaml").read_text().count(f"init_from: {name}") == 1


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_near_and_far_share_the_weights_of_full_attention(stage: Stage, norm: str) -> None:
    full = stage("full", model=FULL | {"norm": norm})
    near = stage("near", model=FULL | {"norm": norm, "operators": [["local"]] * 3, "window": 4})
    for first in (full, near):
        model = REACH | {"meta_router": "none", "norm": norm}
        if first is near:
            model |= {"operators": [["local", "attention"]] * 3}
        started = initial(stage, f"from-{first.folder.name}", model=model, trainer__init_from=str(first.folder))
        saved = ChiarForCausalLM.from_pretrained(first.model)
        for blocks in zip(started.trunk.blocks, saved.trunk.blocks, strict=True):
            ours, theirs = (next(iter(block.operators.values())) for block in blocks)
            assert_same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
        assert torch.equal(started.lm_head.weight, saved.lm_head.weight)


def test_an_equal_router_keeps_what_it_learned_and_is_set_to_the_new_share(stage: Stage) -> None:
    model = ROUTED | {"router": "learned"}
    first = stage("first", model=model)
    asked = {"trainer__seed": 5, "trainer__init_from": str(first.folder)}
    before = ChiarForCausalLM.from_pretrained(first.model)
    for share in (0.25, 0.6):
        now = initial(stage, f"at-{share}", model=model | {"attention_share": share}, **asked)
        for layer, thresholds in now.thresholds().items():
            old = before.thresholds()[layer]
            assert torch.equal(thresholds.quantiles, old.quantiles) and thresholds.calibrated
            assert torch.equal(thresholds.values, shares_to_thresholds(old.quantiles, share, 2))
            ours, theirs = (m.trunk.blocks[layer].router.proj.weight for m in (now, before))
            assert torch.equal(ours, theirs)


def test_another_router_begins_untrained(stage: Stage) -> None:
    first = stage("first", model=ROUTED)
    for router in ("random", "learned"):
        started = initial(stage, router, model=ROUTED | {"router": router}, trainer__init_from=str(first.folder))
        assert not any(thresholds.calibrated for thresholds in started.thresholds().values())
        assert_same(tensors(first), {k: v for k, v in started.state_dict().items() if k in tensors(first)})


def test_a_resumed_run_needs_the_first_model_no_more(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    full = stage("full", model=FULL)
    asked = {"model": ROUTED, "trainer__init_from": str(full.folder)}
    whole = stage("whole", **asked)
    interrupt_at(monkeypatch, 7, break_off)
    with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        stage("broken", **asked)
    shutil.rmtree(full.folder)
    assert_same_bits(whole.model, stage("broken", resume=True, **asked).model)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (FULL | {"operators": [["dct", "attention"], ["attention"], ["attention"]]}, {}, "dct"),
        (FULL | {"bias": False}, {}, "was trained with model.bias=True, and the recipe has False; put it back"),
        (FULL | {"num_attention_heads": 4}, {}, "was trained with model.num_attention_heads=2, and the recipe has 4"),
        (FULL | {"embedding_norm": False}, {}, "was trained with model.embedding_norm=True, and the recipe has False"),
        (
            FULL | {"meta_router": "causal"},
            {},
            "trained with model.meta_router='none', and the recipe has 'causal'",
        ),
        (LLAMA, {}, "is a ChiarForCausalLM, and the recipe's model a LlamaForCausalLM"),
        (FULL, {"tokenizer": "bpe:280"}, "was trained with another tokenizer; set tokenizer: "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    stage: Stage, model: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    full = stage("full", model=FULL, trainer__steps=3)
    with pytest.raises(UserError) as caught:
        stage("then", model=model, trainer__init_from=str(full.folder), **changes)
    assert message in str(caught.value) and str(caught.value).startswith("trainer.init_from=")
    assert "\n" not in str(caught.value)


def test_a_tensor_too_many(stage: Stage) -> None:
    dct = FULL | {"operators": [["dct"], ["attention"], ["attention"]]}
    saved = stage("dct", model=dct, trainer__steps=3)
    with pytest.raises(UserError, match=r"dct\S* is \(.*\) in it and missing in the model; only routers may differ$"):
        stage(
            "then",
            model=FULL | {"operators": [["nothing"], ["attention"], ["attention"]]},
            trainer__init_from=str(saved.folder),
        )


def test_a_place_without_a_model_is_refused_before_anything_is_loaded(stage: Stage) -> None:
    with pytest.raises(UserError, match=r"^trainer\.init_from: no such checkpoint: ./nowhere"):
        stage("run", trainer__init_from="./nowhere", data__source="nowhere/at-all")
