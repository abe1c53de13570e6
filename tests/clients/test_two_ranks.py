"""transformers' own Trainer on two ranks, and PyTorch's FSDP2: see `two_ranks.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chiaroscuro import ChiarForCausalLM


@pytest.mark.slow
@pytest.mark.parametrize("way", ["trainer", "fsdp"])
def test_two_ranks(tmp_path: Path, way: str) -> None:
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, way, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    if way == "trainer":
        assert ChiarForCausalLM.from_pretrained(tmp_path)(torch.arange(8)[None]).logits.isfinite().all()
