"""Runs of several processes on gloo, by torchrun or its agent, and what they end with."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from chiaroscuro.training import read_records

# As the command does, but with a signal to one process between the backward and the optimizer of one step. Without
# torchrun the script starts its processes itself, with torchrun's agent: they are forks, which need not import again.
SCRIPT = """
import os, signal, sys
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from chiaroscuro.cli import main
torch.set_default_dtype(getattr(torch, os.environ["TYPE"]))
from chiaroscuro.training.trainer import RunTrainer
killed_at, original = int(os.environ["KILLED_AT"]), RunTrainer._clip_grad_norm
by, process = signal.Signals[os.environ["KILLED_BY"]], int(os.environ["KILLED"])
def clip(self, model):
    if self.state.global_step + 1 == killed_at and self.args.process_index == process:
        os.kill(os.getpid(), by)
    return original(self, model)
RunTrainer._clip_grad_norm = clip
if "RANK" in os.environ:
    main()
else:
    count = int(os.environ["PROCESSES"])
    how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "monitor_interval": 0.1, "max_restarts": 0}
    elastic_launch(LaunchConfig(1, 1, count, run_id="run", start_method="fork", **how), main)()
"""


def run_job(
    folder: Path,
    *arguments: str,
    processes: int = 2,
    killed_at: int = 0,
    killed_by: str = "SIGKILL",
    killed: int = 0,
    dtype: str = "float32",
    command: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Train in several processes: with `command` of `torchrun`, otherwise of its agent, in forks of the script."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if command else []
    return subprocess.run(
        [sys.executable, *launcher, str(script), "train", str(folder / "recipe.yaml"), *arguments],
        env=os.environ
        | {"KILLED_AT": str(killed_at), "KILLED_BY": killed_by, "KILLED": str(killed)}
        | {"OMP_NUM_THREADS": "1", "PROCESSES": str(processes), "TYPE": dtype},
        capture_output=True,
        text=True,
        timeout=300,
    )


NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
ONE = {1: 4, 2: 2, 4: 1}
"""Processes, and the batches that each accumulates: a step has the same four."""


def accumulating(processes: int) -> str:
    return f"trainer.gradient_accumulation={ONE[processes]}"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_records(run / "metrics.jsonl")]
