"""LoRA adapters, trained, saved and loaded, with the thresholds and without."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chiaroscuro import ChiarForCausalLM, ChiarForSequenceClassification

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj"]


def train(adapted: torch.nn.Module, ids: torch.Tensor, steps: int = 3, **labels: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    adapted.train()
    for _ in range(steps):
        loss = adapted(input_ids=ids, **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapted.base_model.model.step_calibration()
        losses.append(loss.item())
    adapted.eval()
    return losses


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_carries_the_thresholds(
    tmp_path: Path, model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str | None
) -> None:
    model.save_pretrained(tmp_path / "base")
    ids = torch.tensor([tokenizer("light and dark").input_ids])
    before = {i: thresholds.values.clone() for i, thresholds in model.thresholds().items()}
    config = peft.LoraConfig(target_modules=TARGETS, task_type=task, modules_to_save=["calibration"])
    adapted = peft.get_peft_model(model, config)
    losses = train(adapted, ids, labels=ids)
    assert losses[-1] < losses[0]
    moved = {i: thresholds.values.clone() for i, thresholds in model.thresholds().items()}
    assert moved and all(not torch.equal(moved[i], before[i]) for i in moved)
    adapted.save_pretrained(tmp_path / "adapter")

    fresh = ChiarForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    for i, thresholds in fresh.thresholds().items():
        assert torch.equal(thresholds.values, moved[i]) and thresholds.steps == 3
    torch.testing.assert_close(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
    generated = again.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    fresh.set_attention_share(0.6)
    merged = again.merge_and_unload()
    assert type(merged) is ChiarForCausalLM and merged.config.attention_share == 0.6
    assert generated.shape == (1, ids.shape[1] + 3)
    merged.save_pretrained(tmp_path / "merged")
    loaded = ChiarForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(ids).logits, merged(ids).logits)


def test_a_classifier_and_its_head(tmp_path: Path, model: ChiarForCausalLM) -> None:
    config = model.config
    config.num_labels = 3
    classifier = ChiarForSequenceClassification(config)
    classifier.save_pretrained(tmp_path / "base")
    ids, labels = torch.arange(12).reshape(2, 6), torch.tensor([0, 2])
    adapted = peft.get_peft_model(classifier, peft.LoraConfig(target_modules=TARGETS, task_type="SEQ_CLS"))
    losses = train(adapted, ids, labels=labels)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = ChiarForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert (again.base_model.model.score.weight - adapted.base_model.model.score.weight).abs().max() == 0
