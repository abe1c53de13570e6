"""trl's trainers: supervised (plain, packed, with an adapter), preferences, and rewards."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chiaroscuro import ChiarForCausalLM, ChiarForSequenceClassification
from chiaroscuro.analysis.chatting import Conversation

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEXTS = ["light and dark", "light on dark", "and the dark between the lights", "the lights"]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **more,
    }


def assert_trains(trainer: Any) -> None:
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(logged) == 2 and all(torch.tensor(logged).isfinite())
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    "more",
    [{}, {"packing": True, "packing_strategy": "bfd", "padding_free": True}, {"gradient_checkpointing": True}],
    ids=["plain", "packed", "checkpointed"],
)
def test_supervised(
    tmp_path: Path, model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast, more: dict[str, Any]
) -> None:
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, max_length=32, **more)),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    assert_trains(trainer)


def test_supervised_with_an_adapter(
    tmp_path: Path, model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    peft = pytest.importorskip("peft")
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, max_length=32)),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    assert_trains(trainer)


def test_instructions_with_the_prompt_masked(
    tmp_path: Path, model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Messages by a chat template: only what the assistant says is predicted; and a conversation goes on from there."""
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    rows = {
        "prompt": [[{"role": "user", "content": text}] for text in TEXTS],
        "completion": [[{"role": "assistant", "content": "dark"}]] * len(TEXTS),
    }
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    predicted = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert all(text.replace(" ", "").startswith("dark") and "light" not in text for text in predicted)
    assert_trains(trainer)
    talk = Conversation(model.eval(), tokenizer, max_new_tokens=4, temperature=0)
    talk.reply("light", lambda piece: None)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_preferences(tmp_path: Path, model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {"prompt": ["light"] * 4, "chosen": [" and dark"] * 4, "rejected": [" on light"] * 4}
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(**settings(tmp_path, max_length=32)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    assert_trains(trainer)


def test_rewards(tmp_path: Path, model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=trl.GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=4)),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["light", "dark", "light and", "the"]}),
        processing_class=tokenizer,
    )
    assert_trains(trainer)


def test_a_reward_model(tmp_path: Path, model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.config.num_labels = 1
    rows = {"chosen": ["light and dark"] * 4, "rejected": ["light on light"] * 4}
    trainer = trl.RewardTrainer(
        model=ChiarForSequenceClassification(model.config),
        args=trl.RewardConfig(**settings(tmp_path, max_length=32)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    assert_trains(trainer)
