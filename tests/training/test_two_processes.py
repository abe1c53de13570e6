"""One job of two processes (gloo): one folder, one lock, and a resumed run that ends with the same bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chiaroscuro.files import alone_in
from chiaroscuro.training import Recipe, read_records, train

# As the command does, but with a kill of the main process between the backward and the optimizer of one step.
SCRIPT = """
import os, signal, sys
from chiaroscuro.cli import main
from chiaroscuro.training.trainer import RunTrainer
killed_at, original = int(os.environ["KILLED_AT"]), RunTrainer._clip_grad_norm
def clip(self, model):
    if self.state.global_step + 1 == killed_at and self.args.process_index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, model)
RunTrainer._clip_grad_norm = clip
main()
"""


def torchrun(folder: Path, *arguments: str, killed_at: int = 0) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "train"]
    return subprocess.run(
        [sys.executable, *launcher, str(folder / "recipe.yaml"), *arguments],
        env=os.environ | {"KILLED_AT": str(killed_at), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_job_of_two_processes_is_one_run(content: dict[str, Any], tmp_path: Path) -> None:
    content["trainer"] |= {"batch_size": 2, "log_every": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    whole, broken = (f"trainer.output_dir={tmp_path / name}" for name in ("whole", "broken"))

    done = torchrun(tmp_path, whole)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 12/12  loss") == 1  # the main process alone speaks
    records = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert [record["tokens"] for record in records if record["kind"] == "train"] == [64, 192, 384, 576, 768]

    assert torchrun(tmp_path, broken, killed_at=7).returncode != 0
    assert not (tmp_path / "broken" / "model").exists()
    resumed = torchrun(tmp_path, broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 4 of 12" in resumed.stdout
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    timed = {"seconds", "tokens_per_second"}
    again = read_records(tmp_path / "broken" / "metrics.jsonl")
    assert [{n: v for n, v in r.items() if n not in timed} for r in records] == [
        {n: v for n, v in r.items() if n not in timed} for r in again
    ]

    with alone_in(tmp_path / "held"):
        refused = torchrun(tmp_path, f"trainer.output_dir={tmp_path / 'held'}")
    assert refused.returncode != 0
    assert refused.stderr.count("held is in use: a run or a sweep is at work there") == 2  # both learn it, none waits
    assert not (tmp_path / "held").exists()


@pytest.mark.slow
def test_two_processes_distil_as_one_and_draw_one_share(content: dict[str, Any], tmp_path: Path) -> None:
    """Two processes of one batch each are one process that accumulates two."""
    content["model"] |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "attention_share": [0.1, 1.0]}
    content |= {"distill": {"weight": 5.0}}
    content["trainer"] |= {"batch_size": 2, "log_every": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    two, one = (tmp_path / name for name in ("two", "one"))
    done = torchrun(tmp_path, f"trainer.output_dir={two}")
    assert done.returncode == 0, done.stderr
    train(Recipe.load(tmp_path / "recipe.yaml", [f"trainer.output_dir={one}", "trainer.gradient_accumulation=2"]))
    records = [[r for r in read_records(f / "metrics.jsonl") if r["kind"] == "train"] for f in (two, one)]
    for theirs, ours in zip(*records, strict=True):
        assert theirs["attention_share"] == ours["attention_share"]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["kl"] == pytest.approx(ours["kl"], rel=0.02, abs=1e-7)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (two, one))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-3)
