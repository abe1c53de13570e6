"""The models under transformers' own Trainer, as somebody who never reads our recipes trains them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build, shrunk, tokens
from torch import Tensor
from transformers import Trainer, TrainingArguments

from chiaroscuro import ChiarForCausalLM, UserError

LENGTHS = torch.tensor([5, 12, 8, 3])


def texts(side: str) -> tuple[Tensor, Tensor]:
    """Rows of unlike lengths, and which of their tokens are real."""
    place = torch.arange(12)
    real = place < LENGTHS[:, None] if side == "right" else place >= 12 - LENGTHS[:, None]
    return tokens(3, 4, 12), real


def trainer(folder: Path, model: ChiarForCausalLM, side: str, *, all_labels: bool) -> Trainer:
    ids, real = texts(side)
    labels = ids if all_labels else ids.masked_fill(~real, -100)
    rows: list[dict[str, Any]] = [
        {"input_ids": i, "attention_mask": m.long(), "labels": label}
        for i, m, label in zip(ids, real, labels, strict=True)
    ]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def by_hand(model: ChiarForCausalLM, side: str) -> float:
    """The mean over the predictions of a real token from a real one."""
    ids, real = texts(side)
    with torch.no_grad():
        log_p = model.eval()(ids, attention_mask=real.long()).logits[:, :-1].log_softmax(-1)
    losses = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    return losses[real[:, 1:] & real[:, :-1]].mean().item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("all_labels", [True, False])
def test_it_logs_the_loss_of_what_is_counted_and_evaluates(tmp_path: Path, side: str, all_labels: bool) -> None:
    model = build(shrunk("small"))
    wanted = by_hand(model, side)
    plain = trainer(tmp_path, model, side, all_labels=all_labels)
    assert plain.label_names == ["labels"]
    assert plain.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    plain.train()
    (logged,) = [record["loss"] for record in plain.state.log_history if "loss" in record]
    assert logged == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("wrong", ["shift_label", "attention_maks", "position_id"])
def test_a_misspelt_keyword_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=f"unknown keyword {wrong}: did you mean"):
        build(shrunk("small"))(tokens(0), **{wrong: tokens(0)})
