"""A model that learns from its full-attention self.

The oracles: `torch.nn.functional.kl_div` on whole logits in float64, with autograd's gradients; and for a run, the
divergence between two copies of its model, one of which sends every token to attention by the public dial.
"""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_recipe import LLAMA, SMALL, assert_refused, with_changes
from test_schedule import REACH
from test_train import FIXED, Go, assert_same_bits, blocks_of, break_off, interrupt_at, weights
from torch import Tensor

from chiaroscuro import ChiarConfig, ChiarForCausalLM
from chiaroscuro.model import ChiarForMixedTasks
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.full_attention import full_attention
from chiaroscuro.training import Recipe, TrainingInterrupted, distillation, read_records
from chiaroscuro.training.distillation import kl_divergence
from chiaroscuro.training.recipe import DistillSection
from chiaroscuro.training.trainer import RunTrainer

DRY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}


def plainly(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, weights: Tensor) -> Tensor:
    log_q = (student @ weight.T / temperature).log_softmax(-1)
    p = (teacher @ weight.detach().T / temperature).softmax(-1)
    return (weights * F.kl_div(log_q, p, reduction="none").sum(-1)).sum()


@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 5),
    vocabulary=st.integers(2, 7),
    temperature=st.floats(0.2, 5),
    chunk=st.integers(1, 4),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_divergence_and_its_gradients(
    tokens: int, width: int, vocabulary: int, temperature: float, chunk: int, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    student, weight = draw(tokens, width), draw(vocabulary, width)
    teacher, weights = draw(tokens, width).detach(), draw(tokens).detach().exp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "CHUNK", chunk)
        ours = kl_divergence(student, teacher, weight, temperature, weights if weighted else None)
    expected = plainly(student, teacher, weight, temperature, weights if weighted else torch.ones_like(weights))
    torch.testing.assert_close(ours, expected)
    assert ours >= -1e-12
    ours_of, theirs_of = (torch.autograd.grad(3 * x, [student, weight]) for x in (ours, expected))
    for gradient, other in zip(ours_of, theirs_of, strict=True):
        torch.testing.assert_close(gradient, other)


def test_a_frozen_head_gets_no_gradient_and_bf16_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(40, 8), torch.randn(40, 8), torch.randn(11, 8)
    student.requires_grad_()
    kl_divergence(student, teacher, weight).backward()
    assert weight.grad is None and student.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        narrow = kl_divergence(student, teacher, weight)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, kl_divergence(student, teacher, weight), rtol=0.02, atol=0)


# The model's other self


def test_the_divergence_has_no_second_derivative_and_says_so() -> None:
    student, teacher, weight = torch.randn(3, 5, 4).unbind()
    divergence = kl_divergence(student.requires_grad_(), teacher, weight)
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph"):
        torch.autograd.grad(divergence, student, create_graph=True)


@pytest.mark.parametrize("fixed", [False, True], ids=["running", "fixed"])
def test_full_attention_is_the_dial_at_one_and_leaves_no_trace(fixed: bool) -> None:
    torch.manual_seed(0)
    fields = {
        name: value for name, value in FIXED.items() if fixed or name not in ("calibration", "entropy_thresholds")
    }
    model = ChiarForCausalLM(ChiarConfig(vocab_size=50, **fields)).eval()
    ids = torch.randint(50, (2, 12))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    with torch.no_grad():
        routed = model(ids).logits
        with full_attention(model):
            inside = model(ids, output_routing=True)
        with pytest.raises(KeyError), full_attention(model):
            raise KeyError
        assert torch.equal(model(ids).logits, routed)
    assert (inside.routing[1].operator_index == 1).all()
    assert model.config.to_dict() == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model.set_attention_share(1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, inside.logits)
    assert not torch.allclose(inside.logits, routed)


def test_everybody_looks_and_everything_is_kept() -> None:
    torch.manual_seed(0)
    # With a learned router on either side, a factor of its score would remain.
    model = ChiarForCausalLM(ChiarConfig(vocab_size=50, **REACH | {"router": "threshold"})).train()
    every = {"operators": [["attention"]] * 3, "window": None, "sinks": 0, "attention_context": "all"}
    plain = ChiarForCausalLM(ChiarConfig(vocab_size=50, **REACH | every | {"meta_router": "causal"}))
    assert not plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    ids = torch.randint(50, (2, 12))
    with torch.no_grad(), evaluation_mode(model):
        routed = model(ids).logits
        with full_attention(model):
            inside = model(ids).logits
        assert torch.equal(model(ids).logits, routed)
        torch.testing.assert_close(inside, plain.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(inside, routed, atol=1e-4)
    calibrations = [*model.thresholds().values(), *model.kv_thresholds().values()]
    assert len(calibrations) == 5 and not any(thresholds.noted for thresholds in calibrations)


# Runs


def trained(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "train"]


def mean_divergence(path: Path, content: dict[str, Any], count: int, temperature: float) -> float:
    """The mean over all predictions of the first `count` train blocks, by two models."""
    routed, full = (ChiarForCausalLM.from_pretrained(path).eval() for _ in range(2))
    full.set_attention_share(1.0)
    blocks, _ = blocks_of(content, "train")
    found = []
    with torch.no_grad():
        for i in range(count):
            ids = blocks[i]["input_ids"][None]
            log_q, log_p = ((m(ids).logits.double() / temperature).log_softmax(-1) for m in (routed, full))
            found.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
    return torch.cat(found).mean().item()


@pytest.mark.parametrize(
    ("batch", "accumulation", "more"), [(4, 1, {}), (2, 2, {}), (2, 2, {"cross_entropy": 0.0, "by_row": True})]
)
def test_what_is_recorded_is_the_mean_divergence_and_the_loss_without_it(
    content: dict[str, Any], run: Go, tmp_path: Path, batch: int, accumulation: int, more: dict[str, Any]
) -> None:
    blocks, _ = blocks_of(content, "train")
    steps = len(blocks) // 4
    shape = {"steps": steps, "batch_size": batch, "gradient_accumulation": accumulation, "log_every": 1}
    frozen = {"learning_rate": 1e-30, "min_learning_rate": 0.0, "weight_decay": 0.0}
    trainer = {**content["trainer"], **shape, **frozen}
    model = FIXED | {"entropy_thresholds": [0.85, 0.85]}
    learned = {"output_dir": str(tmp_path / "first"), "learning_rate": 0.03, "steps": 40}
    first, _ = run(model=model, trainer=content["trainer"] | learned)
    trainer |= {"init_from": str(first.folder)}
    plain, _ = run(model=model, trainer=trainer | {"output_dir": str(tmp_path / "plain")})
    result, printed = run(model=model, trainer=trainer, distill={"weight": 3.0, "temperature": 2.0, **more})
    records = trained(result.folder)
    expected = mean_divergence(result.model, content, steps * 4, temperature=2.0)
    assert expected > 1e-4
    assert sum(record["kl"] for record in records) / steps == pytest.approx(expected, rel=1e-4)
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in trained(plain.folder)], rel=1e-5)
    assert f"KL {records[-1]['kl']:.4f}" in printed
    assert "KL: what full attention would predict" in " ".join(printed.split())


def test_at_a_share_of_one_there_is_nothing_to_learn(run: Go, tmp_path: Path) -> None:
    model = {**DRY, "attention_share": 1.0}
    result, _ = run(model=model, distill={"weight": 1.0}, trainer__log_every=1)
    assert max(abs(record["kl"]) for record in trained(result.folder)) < 1e-6
    plain, _ = run(model=model, trainer__output_dir=str(tmp_path / "plain"))
    one, other = weights(result.model), weights(plain.model)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-4)


def test_the_texts_own_loss_counts_as_much_as_is_said(run: Go, tmp_path: Path) -> None:
    """Where the divergence is nothing, the gradient is that of the cross-entropy alone."""
    norms = {}
    for part in (1.0, 0.5, 0.0):
        asked: dict[str, Any] = {"model": {**DRY, "attention_share": 1.0}, "distill": {"cross_entropy": part}}
        result, _ = run(**asked, trainer__output_dir=str(tmp_path / f"part-{part}"), trainer__log_every=1)
        norms[part] = trained(result.folder)[0]["grad_norm"]
    assert norms[0.5] == pytest.approx(norms[1.0] / 2, rel=1e-3)
    assert norms[0.0] < 1e-3 * norms[1.0]


def test_a_task_beside_the_text_is_learned_whatever_the_text_counts(run: Go, tmp_path: Path) -> None:
    """With everybody at attention the divergence is nothing, so of the head's gradient only the task is left."""
    tasks = {"sums": {"task": "listops-flat", "train_examples": 60, "heldout_examples": 10, "sequence_length": 32}}
    asked: dict[str, Any] = {
        "model": {**DRY, "attention_share": 1.0},
        "mixture": {"ratio": 1.0, "tasks": tasks},
        "trainer__steps": 4,
    }
    heads = []
    for part in (1.0, 0.0):
        folder = str(tmp_path / f"part-{part}")
        result, _ = run(**asked, distill={"cross_entropy": part}, trainer__output_dir=folder)
        heads.append(ChiarForMixedTasks.from_pretrained(result.model).heads["sums"].bias)
    assert heads[0].abs().max() > 1e-3
    assert heads[1].abs().max() > heads[0].abs().max() / 2


def test_the_text_is_what_is_left_of_a_loss_without_task_and_penalty() -> None:
    text, task, penalty = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 0.25))
    outputs = {"beside": SimpleNamespace(loss=task), "collapse_term": penalty}
    for world, part in ((1, 1), (2, 2)):
        trainer = SimpleNamespace(args=SimpleNamespace(world_size=world), _part_of_step=lambda part=part: part)
        loss = world * (text + task - penalty)
        found = RunTrainer._of_text(cast(Any, trainer), loss, outputs)
        found.backward()
        assert found.item() == world * 2
        assert [text.grad, task.grad, penalty.grad] == [world, 0, 0]
        text.grad = task.grad = penalty.grad = None


def test_it_is_learned(run: Go, tmp_path: Path) -> None:
    last = {}
    for weight in (1e-9, 30.0):
        folder = str(tmp_path / f"by-{weight}")
        result, _ = run(model=DRY, distill={"weight": weight}, trainer__output_dir=folder, trainer__steps=40)
        last[weight] = trained(result.folder)[-1]["kl"]
    assert last[30.0] < 0.7 * last[1e-9]


def test_by_row_a_row_of_few_predictions_counts_as_much_as_one_of_many() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randint(5, (2, 6))
    labels[0, :5] = -100
    head = torch.nn.Linear(4, 5, bias=False)
    trainer = SimpleNamespace(
        run=SimpleNamespace(distill=DistillSection(by_row=True)),
        args=SimpleNamespace(world_size=1, gradient_accumulation_steps=2),
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        model=SimpleNamespace(get_output_embeddings=lambda: head),
    )
    found = RunTrainer._divergence(cast(Any, trainer), student, teacher, labels, None)
    log_q, log_p = (head(x).log_softmax(-1) for x in (student, teacher))
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found, (each[0, 5] + each[1].mean()) / 2 / 2)


def test_a_resumed_run_ends_with_the_same_bits(run: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "model": REACH,
        "distill": {},
        "schedule": {"attention_share": {"from": 1.0, "steps": 0.5}},
        "trainer__log_every": 5,
    }
    whole, _ = run(trainer__output_dir=str(tmp_path / "whole"), **asked)
    interrupt_at(monkeypatch, 7, break_off)
    with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        run(**asked)
    resumed, _ = run(resume=True, **asked)
    assert_same_bits(whole.model, resumed.model)
    assert [r["kl"] for r in trained(whole.folder)] == [r["kl"] for r in trained(resumed.folder)]


# Recipes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_changes(distill={"weight": 0}), "distill.weight=0: input should be greater than 0"),
        (with_changes(distill={"temperature": -1.0}), "distill.temperature=-1.0: input should be greater than 0"),
        (with_changes(distill={"wait": 1.0}), "distill.wait=1.0: unknown field; did you mean 'weight'?"),
        (with_changes(distill=True), "distill=True: give fields"),
        (with_changes(model=LLAMA, distill={}), "model.architecture: llama routes nothing"),
        (
            with_changes(model={"preset": "small-baseline"}, distill={}),
            "no layer chooses between operators by a score",
        ),
        (with_changes(model={"preset": "small", "router": "hard"}, distill={}), "distill with router='hard'"),
        (
            with_changes(data={"task": "imdb"}, distill={}),
            "distill with data.task='imdb': only predictions of tokens are distilled",
        ),
    ],
)
def test_a_mistake_is_one_line(content: dict[str, Any], message: str) -> None:
    assert_refused(content, message)


def test_the_baseline_of_a_calibration_has_nobody_to_learn_from() -> None:
    trainer = {**SMALL["trainer"], "init_from": "runs/full"}
    recipe = Recipe.from_dict(with_changes(calibration={"method": "paper"}, distill={}, trainer=trainer))
    assert recipe.baseline().distill is None and recipe.baseline().trainer.init_from is None
