"""A few steps of the recipes at the paper's own scale, 17 M and 400 M parameters, on a CPU.

    python -m chiaroscuro.studies.paper DATA

DATA holds WikiText-2 (`wikitext-2/train.txt` and `validation.txt`) and GPT-2's tokenizer (`gpt2/`).

They are meant for GPUs and WikiText-103. That they build and train the paper's models can be seen with less: the same
recipes with a page of WikiText-2, GPT-2's tokenizer from files, and so few steps that the losses show only that they
fall. The 17 M recipe goes through all of its three parts, baseline, percentiles, model; the 400 M one has its
thresholds given, for its baseline would take as long again. Figures go to experiments/results/paper/steps.json, from
there onto docs/reproduction.md.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from chiaroscuro.errors import UserError
from chiaroscuro.files import write_text
from chiaroscuro.model.loading import load_checkpoint
from chiaroscuro.studies.command import exit_code
from chiaroscuro.training import Recipe, read_records, train

RESULTS = Path("experiments/results/paper/steps.json")
LINES = {"train": 600, "validation": 20}
SHORT = ["trainer.epochs=null", "trainer.warmup_steps=1", "trainer.log_every=1", "trainer.save_every=1000"]
BEGUN = {
    "recipes/paper/17m.yaml": [
        "trainer.steps=48",
        "trainer.batch_size=4",
        "trainer.gradient_accumulation=1",
        "trainer.log_every=4",
    ],
    "recipes/paper/400m.yaml": [
        "trainer.steps=4",
        "trainer.batch_size=2",
        "trainer.gradient_accumulation=1",
        "calibration={method: fixed, thresholds: [0.85, 0.87]}",
    ],
}


def main() -> None:
    """Train a few steps of each, and write its records."""
    if len(sys.argv) != 2:
        raise UserError("give the folder with the text and the tokenizer: python -m chiaroscuro.studies.paper DATA")
    data, figures = Path(sys.argv[1]), []
    with TemporaryDirectory() as folder:
        text = a_page(data, Path(folder) / "text")
        for path, changes in BEGUN.items():
            output = Path(folder) / Path(path).stem
            common = [f"data.source={text}", f"tokenizer={data / 'gpt2'}", f"trainer.output_dir={output}"]
            recipe = Recipe.load(path, [*SHORT, *changes, *common])
            result = train(recipe, console=Console())
            sizes = {"parameters": result.parameters}
            if (output / "baseline").is_dir():
                sizes["baseline_parameters"] = load_checkpoint(str(output / "baseline")).num_parameters()
            figures.append({"recipe": path, "changes": changes, **sizes, **losses(output)})
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS, json.dumps(figures, indent=1) + "\n")


def a_page(data: Path, folder: Path) -> Path:
    """The first lines of WikiText-2."""
    folder.mkdir()
    for split, count in LINES.items():
        lines = (data / "wikitext-2" / f"{split}.txt").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def losses(output: Path) -> dict[str, Any]:
    """Mean losses since the record before, of the model and, if one was trained first, of its baseline."""
    found: dict[str, Any] = {}
    for name, folder in (("baseline_loss", output / "baseline"), ("loss", output)):
        if (folder / "metrics.jsonl").is_file():
            steps = [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "train"]
            found[name] = [record["loss"] for record in steps]
            found["steps"] = [record["step"] for record in steps]
            found["tokens_a_step"] = steps[0]["tokens"] // steps[0]["step"]
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main))
