"""The allocator's setting, by what the system counts: pages that it had to hand out anew."""

import subprocess
import sys

import pytest

LOOP = """
import resource
import torch
{setting}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        a, b = torch.ones(3_000_000), torch.ones(12_000_000)
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_freed_memory_is_used_again() -> None:
    found = {}
    for name, setting in (
        ("default", ""),
        ("kept", "from chiaroscuro.allocator import keep_freed_memory\nkeep_freed_memory()"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", LOOP.format(setting=setting)], capture_output=True, text=True, check=True
        )
        found[name] = int(run.stdout)
    assert found["kept"] < found["default"] / 10
