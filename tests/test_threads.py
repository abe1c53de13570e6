"""How threads wait, and how many: by the variables that a process ends up with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chiaroscuro.threads import SPINS, container_cores, share_the_machine


def system(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "700000 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_the_cores_of_a_container(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    assert container_cores(system(tmp_path, files)) == cores


def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    limited = system(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"})
    mine: dict[str, str] = {}
    share_the_machine(mine, limited)
    assert mine == {"GOMP_SPINCOUNT": SPINS, "OMP_NUM_THREADS": "4"}
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        given = own | {"OMP_NUM_THREADS": "9"}
        share_the_machine(given, limited)
        assert given == own | {"OMP_NUM_THREADS": "9"}


def test_the_command_line_sets_it_before_pytorch_is_loaded() -> None:
    """The first import of torch finds the variable, and `import chiaroscuro` alone sets nothing."""
    code = """
import os, sys
import chiaroscuro
assert "GOMP_SPINCOUNT" not in os.environ and "torch" not in sys.modules
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Watch())
sys.argv = ["chiaroscuro", "flops", "recipes/small.yaml"]
from chiaroscuro.__main__ import main
main()
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == SPINS, done.stderr
