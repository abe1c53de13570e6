"""A task on the terminal: how many rows, how long, and how the labels are spread."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from chiaroscuro.report.visible import harmless

# As much of an example's text as fits two lines of a terminal.
CHARACTERS = 160
BAR = 30


def print_task(figures: dict[str, Any], console: Console) -> None:
    """Print what `chiaroscuro.studies.tasks.describe_task` gives."""
    console.print(f"{figures['task']}: {figures['description']}\n", markup=False, highlight=False, soft_wrap=True)
    splits = figures["splits"]
    quantiles, labelled = next(iter(splits.values()))["tokens"], "labels" in next(iter(splits.values()))
    table = Table("split", *(_right(name) for name in ("rows", "chance", *quantiles)), box=None)
    for split, found in splits.items():
        lengths = (f"{length:,.0f}" for length in found["tokens"].values())
        table.add_row(split, f"{found['rows']:,}", f"{found['chance']:.1%}", *lengths)
    console.print(table)
    measure = f"{figures['tokenizer']} ({figures['vocabulary']:,})"
    console.print(
        f"lengths in tokens of {measure}; chance is the most frequent {'label' if labelled else 'target'}'s\n",
        markup=False,
        highlight=False,
    )
    if labelled:
        _print_labels(splits, console)
    for example in figures["examples"]:
        text = harmless(" ".join(example["text"].split()))
        shown = text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …"
        answer = (
            example["label"] if labelled else " ".join("." if word is None else word for word in example["targets"])
        )
        console.print(f"\n{shown}\n→ {harmless(answer)}", markup=False, highlight=False, soft_wrap=True)


def _print_labels(splits: dict[str, Any], console: Console) -> None:
    table = Table("label", *(_right(split) for split in splits), "", box=None)
    counts = splits["train"]["labels"]
    for label in counts:
        shares = (found["labels"][label] / found["rows"] for found in splits.values())
        bar = "█" * round(BAR * counts[label] / max(counts.values()))
        table.add_row(escape(harmless(label)), *(f"{share:.1%}" for share in shares), bar)
    console.print(table)


def _right(name: str) -> Column:
    return Column(name, justify="right")
