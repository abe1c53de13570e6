"""docs/reliability.md: what the trials of `experiments.faults` and `experiments.fuzz` found."""

import json
from pathlib import Path
from typing import Any

from chiaroscuro.report.tables import markdown_table

FAULTS, INPUTS = Path("experiments/results/faults.json"), Path("experiments/results/fuzz.json")
PAGE = Path("docs/reliability.md")

NAMES = {
    "train": "kill −9 at a random moment of training",
    "fit": "kill −9 at a random moment of `fit`",
    "heal": "kill −9 at a random moment of `heal`",
    "sweep": "kill −9 of a sweep and its runs at a random moment",
    "disk": "a disk that runs full, sooner or later, in training",
    "read-only": "a disk on which nothing can be written, by command",
    "clock": "a clock that jumps by up to a day, back and forth, in training",
    "bits": "a flipped bit in a file of the newest checkpoint",
    "two": "a second run begun in the folder of one at work",
}


KINDS = {
    "recipes": "recipes, to `train`",
    "plans": "recipes, to `plan`",
    "configs": "configurations of a model",
    "checkpoints": "files of a model",
    "references": "checkpoints of the reference code",
    "corpora": "files of a text",
    "streams": "files and options of a streamed text, to `train`",
    "records": "records of a run",
    "arguments": "command lines",
}


def _cell(text: str) -> str:
    """The first line, as a table takes it."""
    return text.splitlines()[0][:120].replace("|", "/")


def write_page() -> None:
    """Write the page from the figures that are there."""
    PAGE.write_text(render(json.loads(FAULTS.read_text()), json.loads(INPUTS.read_text())))


def render(faults: dict[str, dict[str, Any]], inputs: dict[str, Any]) -> str:
    """The figures as a page."""
    lost = [
        [what, str(one["trials"]), str(len(one["lost"])), "; ".join(dict.fromkeys(one["lost"]))[:200]]
        for name, what in NAMES.items()
        if (one := faults.get(name)) is not None
    ]
    counted = [
        [what, *(f"{one[how]:,}" for how in ("succeeded", "refused", "findings"))]
        for kind, what in KINDS.items()
        if (one := inputs["inputs"].get(kind)) is not None
    ]
    findings = [
        [KINDS[one["kind"]], f"{one['number']:,}", _cell(one["finding"]), _cell(one.get("now", "not tried again"))]
        for one in inputs["findings"]
    ]
    total = sum(sum(one.values()) for one in inputs["inputs"].values())
    return "\n".join(
        [
            "# Reliability",
            "",
            "Written by `python -m experiments.faults` and `python -m experiments.fuzz` from `faults.json` and",
            "`fuzz.json` in `experiments/results`; do not edit.",
            "",
            "## Faults",
            "",
            "Each trial runs a command on a model of a few thousand weights, disturbs it, looks at what is left,",
            "goes on, and compares the weights with those of a run that was left alone, bit for bit. A trial counts",
            "as lost if a checkpoint or a model that is there can't be read whole, if the command can't go on, or if",
            "it ends with other weights. A fault that can't be survived is one line that says what is wrong, and exit",
            "code 2.",
            "",
            markdown_table(["fault", "trials", "lost", "what"], lost),
            "A checkpoint's manifest has the size and the SHA-256 of each of its files. The folder `model/` that a run",
            "ends with has none: a bit that is flipped there is not seen.",
            "",
            "## Broken inputs",
            "",
            f"{total:,} inputs that were valid and then changed at random, drawn from the seed {inputs['seed']}.",
            "Each should end in success, or in one line and exit code 2. A finding is anything else: a traceback, a",
            "signal, a mistake told in more lines, a command that takes a core for 30 seconds, or a gigabyte more",
            "than it had.",
            "",
            markdown_table(["what was broken", "succeeded", "refused", "findings"], counted),
            *(
                [
                    "The findings, and how the same inputs end now (`python -m experiments.fuzz --again`):",
                    "",
                    markdown_table(["what was broken", "input", "finding", "now"], findings),
                ]
                if findings
                else []
            ),
        ]
    )
