"""Is the baseline fair? Our full attention against a Hugging Face Llama of the same size, in turn.

    python -m benchmarks.llama

`benchmarks.speed` has both among nine candidates with three turns each, which leaves an uncertainty of a few per cent.
Here their training steps take turns for 70 seconds per length. It takes five minutes on two otherwise idle cores; the
figures go to benchmarks/results/llama.json.
"""

import json
from dataclasses import asdict
from pathlib import Path

from chiaroscuro.allocator import keep_freed_memory
from chiaroscuro.analysis.speed import machine, take_turns, training_step
from chiaroscuro.files import write_text
from chiaroscuro.studies.benchmark import BASELINE, Candidate, Plan

RESULTS = Path("benchmarks/results/llama.json")
LENGTHS = (256, 1024)
SECONDS, TURNS = 70.0, 7


def main() -> None:
    """Measure, print and write."""
    keep_freed_memory()
    plan = Plan()
    found = {}
    for length in LENGTHS:
        ids = plan.ids(length)
        models = {"ours": BASELINE, "llama": Candidate("llama")}
        work = {name: training_step(plan.build(candidate, ids), ids) for name, candidate in models.items()}
        timings = take_turns(work, SECONDS, TURNS)
        ratio = timings["ours"].median / timings["llama"].median
        found[length] = {"ours_over_llama": ratio, **{name: asdict(timing) for name, timing in timings.items()}}
        print(f"T = {length:,}: a training step of ours takes {ratio:.3f} of Llama's time", flush=True)
    write_text(RESULTS, json.dumps({"machine": machine(), "training_step": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
