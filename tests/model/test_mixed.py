"""One trunk, a language model's head and one a task: each is what the model for it alone computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, shrunk, tokens
from torch import Tensor
from transformers import Trainer, TrainingArguments

from chiaroscuro import (
    ChiarConfig,
    ChiarForCausalLM,
    ChiarForMixedTasks,
    ChiarForSequenceClassification,
    UserError,
)

TASKS = {"sentiment": 2, "sums": 10}


def mixed(**changes: object) -> ChiarForMixedTasks:
    torch.manual_seed(0)
    return ChiarForMixedTasks(shrunk("small", task_labels=TASKS, **changes)).eval()


def masked(seed: int, rows: int = 3, time: int = 11) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(1, time + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return tokens(seed, rows, time), (torch.arange(time) < lengths).long()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), task=st.sampled_from(list(TASKS)), pooling=st.sampled_from(["mean", "last"]))
def test_a_task_is_the_classifier_with_its_head(seed: int, task: str, pooling: str) -> None:
    model = mixed(classifier_pooling=pooling)
    alone = ChiarForSequenceClassification(shrunk("small", num_labels=TASKS[task], classifier_pooling=pooling)).eval()
    alone.model.load_state_dict(model.model.state_dict())
    alone.score.load_state_dict(model.heads[task].state_dict())
    ids, mask = masked(seed)
    labels = torch.randint(0, TASKS[task], (3,), generator=torch.Generator().manual_seed(seed))
    found = model(ids, attention_mask=mask, task=task, labels=labels, output_routing=True)
    wanted = alone(ids, attention_mask=mask, labels=labels, output_routing=True)
    torch.testing.assert_close((found.loss, found.logits), (wanted.loss, wanted.logits))
    assert torch.equal(found.meta_gate, wanted.meta_gate) and len(found.routing) == len(wanted.routing)


def test_without_a_task_it_is_the_language_model() -> None:
    model, ids = mixed(), tokens(0)
    alone = ChiarForCausalLM(model.config).eval()
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("heads.")})
    torch.testing.assert_close(model(ids, labels=ids).loss, alone(ids, labels=ids).loss)
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, do_sample=False), alone.generate(ids, max_new_tokens=5, do_sample=False)
    )


def test_generation_computes_the_last_logits_alone() -> None:
    model, computed = mixed(), []
    model.lm_head.register_forward_hook(lambda module, given, logits: computed.append(logits.shape[1]))
    model.generate(tokens(0, 1, 6), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert computed == [1, 1, 1]


def test_the_losses_are_added_and_both_teach_the_whole_trunk() -> None:
    model, (ids, mask) = mixed().train(), masked(1)
    text, labels = tokens(2), torch.tensor([0, 9, 4])
    beside = {"task": "sums", "input_ids": ids, "attention_mask": mask, "labels": labels}
    together = model(text, labels=text, beside=beside)
    together.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apart = model(text, labels=text).loss, model(**beside).loss
    torch.testing.assert_close(together.loss, apart[0] + apart[1])
    torch.testing.assert_close(together.beside.loss, apart[1])
    sum(apart).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    model.zero_grad()
    model(**beside).loss.backward()
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.grad is None} == {
        f"heads.sentiment.{p}" for p in ("weight", "bias")
    }
    for name in (
        "embed_tokens.weight",
        "meta_router.weight",
        "layers.0.operators.dct.weight",
        "layers.3.feed_forward.0.bias",
    ):
        assert parameters[f"model.{name}"].grad.abs().max() > 0, name


@pytest.mark.parametrize("penalty", [{}, {"router": "soft", "collapse_penalty": 0.5}], ids=["plain", "penalised"])
def test_a_task_s_accumulated_losses_are_one(penalty: dict[str, object]) -> None:
    model = mixed(meta_router="none", **penalty).train()
    (ids, mask), labels = masked(4, rows=4), torch.tensor([0, 9, 4, 7])
    whole = model(ids, attention_mask=mask, task="sums", labels=labels).loss
    counted = model(ids, attention_mask=mask, task="sums", labels=labels, num_items_in_batch=torch.tensor(4)).loss
    torch.testing.assert_close(counted, whole)
    # Rows alike have the same router weights, so that the penalty of parts is the whole's.
    ids, labels = ids[:1].expand(4, -1), labels.new_tensor([3, 3, 3, 5])
    whole = model(ids, task="sums", labels=labels).loss
    parts = [
        model(ids[rows], task="sums", labels=labels[rows], num_items_in_batch=4).loss
        for rows in (slice(0, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_transformers_trainer_accumulates_a_task(tmp_path: Path) -> None:
    rows = [{"ids": tokens(i, 1)[0], "label": i} for i in range(6)]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        labels = torch.tensor([row["label"] for row in rows])
        ids = torch.stack([row["ids"] for row in rows])
        return {"task": "sums", "input_ids": ids, "labels": labels, "shift_labels": labels}

    weights = []
    for size in (6, 2, 1):
        model = mixed(meta_router="none", calibration="fixed", entropy_thresholds=[0.7, 0.8])
        before = model.heads["sums"].weight.detach().clone()
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=6 // size,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, data_collator=collate, train_dataset=rows).train()
        assert (model.heads["sums"].weight - before).abs().max() > 1e-4
        weights.append(dict(model.named_parameters()))
    for other in weights[1:]:
        for name, parameter in weights[0].items():
            torch.testing.assert_close(other[name], parameter, msg=name)


def test_saved_and_loaded_whole_and_as_a_language_model(tmp_path: Path) -> None:
    model, (ids, mask) = mixed(), masked(3)
    model.save_pretrained(tmp_path)
    loaded = ChiarForMixedTasks.from_pretrained(tmp_path).eval()
    assert loaded.config.task_labels == TASKS
    arguments = {"attention_mask": mask, "task": "sums"}
    assert torch.equal(loaded(ids, **arguments).logits, model(ids, **arguments).logits)
    language, info = ChiarForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(language.eval()(ids).logits, model(ids).logits)


def test_heads_that_have_no_place_are_said(tmp_path: Path) -> None:
    mixed().save_pretrained(tmp_path)
    _, info = ChiarForMixedTasks.from_pretrained(tmp_path, task_labels={"sums": 10}, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"heads.sentiment.weight", "heads.sentiment.bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chess"}, "task='chess': this model has heads for sentiment, sums"),
        ({"beside": {"task": "sums", "input_ids": tokens(0)}}, "give labels to both"),
        ({"task": "sums", "beside": {"input_ids": tokens(0)}}, "goes with language modelling only"),
        ({"task": "sums", "labels": torch.tensor([0, 10])}, r"labels \[0, 10\] for a head of 10 labels"),
    ],
)
def test_what_it_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixed()(tokens(0), **arguments)


@pytest.mark.parametrize("task_labels", [{"a.b": 2}, {"a": 1}, {"": 2}, {"a": True}, {"keys": 2}, 3, ["a"]])
def test_task_labels_that_are_none(task_labels: object) -> None:
    with pytest.raises(UserError, match="task_labels="):
        ChiarConfig(vocab_size=VOCABULARY, task_labels=task_labels)


def test_a_model_of_no_task() -> None:
    with pytest.raises(UserError, match="task_labels names no task"):
        ChiarForMixedTasks(shrunk("small"))
