"""The runs of a sweep on the machines of a Ray cluster, which share a file system.

Ray finds a free core or GPU for each run and starts a process there. All else is as on one machine: the run's folder
has its recipe, its log, its records and its checkpoints, and the sweep looks there.
"""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chiaroscuro.errors import UserError
from chiaroscuro.studies.sweep import SweepRun, prepare

NOT_SHARED = "is not there on the machine {node}: a sweep's folder must lie on a file system that all machines share"


class RayCluster:
    """A cluster that is running.

    Args:
        address: `"auto"` for that of this machine, `host:port`, or `ray://host:port`.

    Raises:
        UserError: Ray is not installed, or no cluster answers there.

    """

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing phones home
        try:
            import ray
        except ImportError:
            raise UserError("--ray needs Ray: pip install 'chiaroscuro[ray]', or leave it out") from None
        self.ray: Any = ray
        _refuse_silence(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--ray {address}: no cluster answers ({reason[:200]}); start one by ray start") from None
        resources = ray.cluster_resources()
        self.gpus = int(resources.get("GPU", 0))
        self.cores = int(resources.get("CPU", 0))

    @property
    def jobs(self) -> int:
        """Runs at once: one for each GPU or, without one, for each core."""
        return max(1, self.gpus or self.cores)

    def start(self, run: SweepRun, device: str | None, lock: int) -> "RayRun":
        """Begin a run on a machine that is free; Ray says which GPU it has there, if any."""
        arguments, environment = prepare(run)
        needs: dict[str, Any] = {"num_gpus": 1} if self.gpus else {"num_cpus": 1}
        task = self.ray.remote(max_retries=0, **needs)(_train)
        log = run.log.resolve()
        return RayRun(self.ray, task.remote(arguments, environment, str(log), os.getcwd()), log)


def _refuse_silence(address: str) -> None:
    """Raise if nothing answers at a host and port, for which Ray would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--ray {address}: give auto, host:port, or ray://host:port")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"--ray {address}: no cluster answers ({error.strerror or error}); start one by ray start"
        ) from None


class RayRun:
    """A run's process on some machine, seen as `subprocess.Popen` shows one."""

    def __init__(self, ray: Any, result: Any, log: Path) -> None:
        self.ray, self.result, self.log = ray, result, log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self.returncode is None and self.ray.wait([self.result], timeout=0)[0]:
            self.returncode = self._code()
        return self.returncode

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        if self.returncode is None:
            self.returncode = self._code()
        return self.returncode

    def _code(self) -> int:
        try:
            ended = self.ray.get(self.result)
        except self.ray.exceptions.TaskCancelledError:
            return 2
        except self.ray.exceptions.RayError as error:  # the machine is gone, or its memory was full
            ended = f"Ray lost the run: {' '.join(str(error).split())[:300]}"
        if isinstance(ended, int):
            return ended
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"error: {ended}\n")
        return 2

    def terminate(self) -> None:
        """Ask it to save and stop."""
        self.ray.cancel(self.result)

    def kill(self) -> None:
        """End it at once."""
        self.ray.cancel(self.result, force=True)


def _train(arguments: Sequence[str], environment: Mapping[str, str], log: str, folder: str) -> int | str:
    """On a machine of the cluster: run a command there, and give its exit code, or why it could not be run."""
    for needed in (log, folder):
        if not Path(needed).exists():
            return f"{needed} {NOT_SHARED.format(node=platform.node())}"
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "chiaroscuro", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment),
            cwd=folder,
        )
        try:
            return process.wait()
        except BaseException:  # cancelled: it saves and stops
            process.terminate()
            process.wait()
            raise
