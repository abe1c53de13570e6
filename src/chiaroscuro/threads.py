"""How PyTorch's threads wait, and how many there are: settings of OpenMP, which reads them when PyTorch is loaded."""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which a user says himself how threads wait."""

SPINS = "1500"
"""Turns that a thread of GNU's OpenMP waits awake for the others before it sleeps. Left alone it is 300,000, or without
end where the threads have a core each: then all of them spin while one waits for a core that another program has.
`benchmarks/busy.py` measures both cases."""


def share_the_machine(environment: MutableMapping[str, str] | None = None, system: Path = Path("/")) -> None:
    """Let idle threads sleep, and start as many as the container may run; what the user has set stays.

    It is for programs of one's own, as this package's command line is, and has no effect after PyTorch was loaded.

    Args:
        environment: the process's, unless given.
        system: where /proc and /sys are.

    """
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS
    cores = container_cores(system)
    if cores is not None and "OMP_NUM_THREADS" not in environment and cores < (os.cpu_count() or 1):
        environment["OMP_NUM_THREADS"] = str(cores)


def container_cores(system: Path = Path("/")) -> int | None:
    """How many cores this process's control group may use, rounded up; None where nothing limits it.

    Args:
        system: where /proc and /sys are.

    """
    limits = []
    for line in _read(system / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":  # version 2: "quota period", for the group and for each above it
            root = system / "sys/fs/cgroup"
            groups = [root / place.lstrip("/"), *(root / place.lstrip("/")).parents]
            limits += [_read(group / "cpu.max").split() for group in groups if group.is_relative_to(root)]
        elif "cpu" in controllers.split(","):
            root = system / "sys/fs/cgroup/cpu"
            for group in {root / place.lstrip("/"), root}:  # inside a container its own group may be the root
                limits.append([_read(group / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period")])
    shares = [int(limit[0]) / int(limit[1]) for limit in limits if len(limit) == 2 and all(p.isdigit() for p in limit)]
    return max(1, math.ceil(min(shares))) if shares else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
