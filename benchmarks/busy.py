"""What the way in which threads wait costs on a quiet machine, and what it spares on a busy one.

    python -m benchmarks.busy

One training step after another, of the model of `recipes/small.yaml`, in a process of its own: alone, two such
processes at once, and one beside two busy loops. By each setting of OpenMP, in turns. Figures are tokens a second as
parts of those of one process alone with the setting of OpenMP itself; they go to benchmarks/results/busy.json.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chiaroscuro.threads import SPINS

RESULTS = Path("benchmarks/results/busy.json")
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=1500": {"GOMP_SPINCOUNT": "1500"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
ROUNDS, SECONDS, LENGTH = 2, 4.0, 1024
BUSY = "while True: pass"


def work() -> None:
    """One process: train for some seconds from a given moment on, and print tokens a second."""
    import torch

    from chiaroscuro import ChiarForCausalLM
    from chiaroscuro.analysis.speed import training_step
    from chiaroscuro.training import Recipe

    config = Recipe.load("recipes/small.yaml", [f"data.sequence_length={LENGTH}"]).build_config(8192)
    torch.manual_seed(0)
    step = training_step(ChiarForCausalLM(config), torch.randint(config.vocab_size, (1, LENGTH)))
    step()
    print("ready", flush=True)
    sys.stdin.readline()
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() < begin + SECONDS:
        step()
        steps += 1
    print(steps * LENGTH / (time.perf_counter() - begin))


def speeds(setting: dict[str, str], copies: int, loops: int) -> list[float]:
    """Tokens a second of each of some copies at once, beside some busy loops."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names} | setting
    command = [sys.executable, "-c", "from benchmarks.busy import work; work()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    running = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(copies)]
    others = []
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(loops)]
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [float(process.communicate()[0]) for process in running]
    finally:
        for process in [*running, *others]:
            process.kill()


def main() -> None:
    """Measure, and print it."""
    cases = {"alone": (1, 0), "two at once, each": (2, 0), "beside two busy loops": (1, 2)}
    found: dict[str, dict[str, list[float]]] = {name: {case: [] for case in cases} for name in SETTINGS}
    for _ in range(ROUNDS):
        for case, (copies, loops) in cases.items():
            for name, setting in SETTINGS.items():
                found[name][case] += speeds(setting, copies, loops)
    whole = statistics.median(found["as it is"]["alone"])
    parts = {name: {case: statistics.median(v) / whole for case, v in by.items()} for name, by in found.items()}
    RESULTS.write_text(json.dumps({"cores": os.cpu_count(), "parts": parts, "seconds": SECONDS}, indent=1) + "\n")
    table = Table("setting", *cases)
    for name, by in parts.items():
        table.add_row(name, *(f"{value:.2f}" for value in by.values()))
    Console().print(table)
    print(f"the command line sets GOMP_SPINCOUNT={SPINS}")


if __name__ == "__main__":
    main()
