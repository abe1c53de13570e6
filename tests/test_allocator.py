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


GROWING = """
from pathlib import Path
import torch
from chiaroscuro.allocator import keep_freed_memory
keep_freed_memory()
kept = []
for n in range(12):
    first = torch.ones(25_000_000)
    second = first + 1
    del first
    kept.append(torch.ones(2_000 + n))
    third = second * 2
    del second
    kept.append(torch.ones(2_000 + n))
    del third
    kept.append(torch.ones(2_000 + n))
# getrusage's figure would have the parent's in it.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_large_blocks_do_not_add_up() -> None:
    """Two of 100 MB at a time, and between them small ones that stay."""
    run = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 750_000  # of 1,024 bytes
