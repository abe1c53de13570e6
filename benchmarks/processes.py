"""Weak scaling: the throughput of two processes, each with batches of its own, as a part of twice that of one.

    python -m benchmarks.processes

`recipes/small.yaml` by torchrun on gloo, one thread a process: alone, two with whole weights (DDP), and two with shards
(FSDP2). In turns; figures are means of the rounds, and go to benchmarks/results/processes.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from chiaroscuro.training import read_records

RESULTS = Path("benchmarks/results/processes.json")
CASES: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "two, DDP": (2, []),
    "two, FSDP2": (2, ["trainer.fsdp=true"]),
}
ROUNDS, STEPS = 3, 30


def tokens_a_second(processes: int, changes: list[str]) -> float:
    """Of all processes of a run together, after its first third."""
    with tempfile.TemporaryDirectory() as folder:
        length = [f"trainer.steps={STEPS}", "trainer.tokens=null", "trainer.warmup_steps=1", "trainer.log_every=10"]
        where = [f"trainer.output_dir={folder}/run", "trainer.validation_tokens=2048", *changes]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, "-m", "chiaroscuro", "train", "recipes/small.yaml", *length, *where]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        records = [record for record in read_records(Path(folder) / "run/metrics.jsonl") if record["kind"] == "train"]
    return statistics.fmean(record["tokens_per_second"] for record in records[2:])


def main() -> None:
    """Measure, print, and write."""
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, (processes, changes) in CASES.items():
            found[name].append(tokens_a_second(processes, changes))
    alone = statistics.fmean(found["one process"])
    table = {name: statistics.fmean(speeds) / (CASES[name][0] * alone) for name, speeds in found.items()}
    for name, efficiency in table.items():
        print(f"{name:<12} {efficiency:.2f} of as many alone")
    RESULTS.write_text(json.dumps({"efficiency": table, "cores": os.cpu_count(), "rounds": ROUNDS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
