"""The benchmark's figures as a Markdown page."""

from collections.abc import Callable
from typing import Any

from chiaroscuro.analysis.speed import DECODED
from chiaroscuro.report.tables import markdown_table

INTRODUCTION = """# What routing saves

{layers} layers: the first has dct alone, the last full attention, and the {routed} between them a choice. Width
{width}, {heads} heads, a vocabulary of {vocabulary}, {dtype}, no MetaRouter; {tokens} tokens a step, or one longer
sequence. Random weights and tokens, thresholds calibrated on these tokens. Measured on {machine}.

The candidates take turns in one process, which keeps freed memory for reuse (`chiaroscuro.allocator`). Every cell has
the median time with its interquartile range; how many times faster that is than our own full-attention baseline (the
same class, attention on every menu, PyTorch's SDPA); and, in brackets, what the operation counts predict for it
(`chiaroscuro flops`). *routed* and *all* say what a routed token attends to. *Dense execution* runs every operator on
every token, as the published code does. Hugging Face's Llama has the same layers, width, heads and vocabulary, and as
many weights. It computes its own loss, over all logits at once.

![Time per token over the length of the sequence, one line per model]({picture})
"""

TITLES: dict[str, tuple[str, str]] = {
    "train": ("Training step", "Forward, backward and AdamW."),
    "forward": ("Prefill", "Forward without gradients, which fills a cache and gives the logits of the last token."),
    "decode": (
        "Decoding",
        f"{DECODED} tokens, one after another, on a cache of T tokens. Our cache, which the baseline uses too, does "
        "not copy itself at every token; transformers' `DynamicCache`, which Llama uses, does. The second table has "
        "the size of the cache, as a fraction of the baseline's.",
    ),
    "memory": (
        "Peak memory of a training step",
        "For one sequence: weights, gradients, AdamW's moments and activations, that is, what the process holds beyond "
        "a process with PyTorch loaded. Each is measured in a process of its own, and given as a fraction of the "
        "baseline's too. All of our models, the baseline included, compute the loss in chunks.",
    ),
    "router": (
        "Router and transform",
        "Their share of a routed layer's time, at ρ = 0.25 and sequences of {time} tokens: the DCT and the entropy of "
        "all tokens, the choice, and the filter and the inverse transform of the tokens that are sent to dct.",
    ),
    "profile": (
        "Where the time goes",
        "Seconds of one step by kind of operation, under PyTorch's profiler. Routing saves matrix products and "
        "attention; it adds the transform and the movement of tokens.",
    ),
}


def render_page(found: dict[str, Any], picture: str) -> str:
    """What was measured as a Markdown page, with the plot of that name."""
    plan, host = found["plan"], found["machine"]
    where = [
        f"{host['cores']} cores of {host['cpu']}",
        f"PyTorch {host['torch']}",
        *([host["gpu"]] if "gpu" in host else []),
    ]
    if codes := sorted({cell["code"] for cell in found["cells"] if "code" in cell}):
        where.append(f"with {'version' if len(codes) == 1 else 'versions'} {', '.join(codes)}")
    parts = [INTRODUCTION.format(**plan, routed=plan["layers"] - 2, machine=", ".join(where), picture=picture)]
    for task, (title, text) in TITLES.items():
        if cells := [cell for cell in found["cells"] if cell["task"] == task]:
            text = text.replace("{time}", str(cells[0].get("time", 1024)))
            parts += [f"## {title}\n", f"{text}\n", *_tables(task, cells)]
    return "\n".join(parts)


def _tables(task: str, cells: list[dict[str, Any]]) -> list[str]:
    if task == "router":
        head = ["width", "context", "", "share of the layer's time"]
        what = {True: "training step", False: "forward"}
        return [
            markdown_table(
                head,
                [[f"{c['length']:,}", c["context"], what[c["training"]], f"{c['share_of_layer']:.1%}"] for c in cells],
            )
        ]
    if task == "profile":
        head = ["T", "", "", *cells[0]["seconds"]]
        steps = {"train": "training step", "forward": "prefill"}
        rows = [
            [f"{c['length']:,}", steps[c["step"]], c["candidate"], *(f"{s:.3g}" for s in c["seconds"].values())]
            for c in sorted(cells, key=lambda c: (c["length"], c["step"] == "forward"))
        ]
        return [markdown_table(head, rows)]
    if task == "memory":
        return [_by_length(cells, lambda c: f"{c['bytes'] / 2**20:,.0f} MiB · **{c['ratio']:.2f}**")]
    tables = [_by_length(cells, _timing)]
    if task == "decode":
        tables.append(_by_length([c for c in cells if "cache_ratio" in c], lambda c: f"{c['cache_ratio']:.3f}"))
    return tables


def _timing(cell: dict[str, Any]) -> str:
    lower, median, upper = (cell[part] for part in ("lower", "median", "upper"))
    unit, scale = ("s", 1) if median >= 1 else ("ms", 1000)
    spread = f"{median * scale:.3g} {unit} ({lower * scale:.3g}–{upper * scale:.3g})"
    return f"{spread} · **{cell['ratio']:.2f}×** [{cell['predicted']:.2f}]"


def _by_length(cells: list[dict[str, Any]], show: Callable[[dict[str, Any]], str]) -> str:
    """A table with a row per candidate and a column per length."""
    lengths = sorted({cell["length"] for cell in cells})
    names = list(dict.fromkeys(cell["candidate"] for cell in cells))
    shown = {(cell["candidate"], cell["length"]): show(cell) for cell in cells}
    rows = [[name, *(shown.get((name, length), "") for length in lengths)] for name in names]
    return markdown_table(["", *(f"T = {length:,}" for length in lengths)], rows)
