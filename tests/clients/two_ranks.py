"""What each of two processes runs: transformers' Trainer under DDP, or FSDP2. Started by torch.distributed.run."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from chiaroscuro import ChiarConfig, ChiarForCausalLM


def small() -> ChiarForCausalLM:
    torch.manual_seed(0)
    return ChiarForCausalLM(ChiarConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=3))


def rows() -> list[dict[str, Any]]:
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def by_trainer(folder: str) -> None:
    """Both ranks end with the same weights, which are saved."""
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=2, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = Trainer(small(), arguments, train_dataset=rows())
    trainer.train()
    trainer.save_model()
    for parameter in trainer.model.parameters():
        both = [torch.empty_like(parameter.data) for _ in range(2)]
        dist.all_gather(both, parameter.data)
        assert torch.equal(*both)


def by_fsdp(folder: str) -> None:
    """Sharded layers compute, and learn, what whole ones do."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole, model = small().train(), small().train()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.stack([row["input_ids"] for row in rows()[:4]])  # the same on both, so that the mean gradient is too
    for _ in range(2):
        losses = []
        for kind in (whole, model):
            optimizer = torch.optim.SGD(kind.parameters(), lr=0.1)
            loss = kind(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kind.step_calibration()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    for (name, ours), (_, theirs) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert isinstance(theirs, DTensor)
        torch.testing.assert_close(theirs.full_tensor(), ours, msg=name)
    for ours, theirs in zip(whole.thresholds().values(), model.thresholds().values(), strict=True):
        assert ours.steps == 2
        torch.testing.assert_close(theirs.values, ours.values)


if __name__ == "__main__":
    {"trainer": by_trainer, "fsdp": by_fsdp}[sys.argv[1]](sys.argv[2])
    dist.destroy_process_group()
