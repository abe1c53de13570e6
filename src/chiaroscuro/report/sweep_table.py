"""A sweep's tables: as Markdown, as CSV, and for the terminal."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chiaroscuro.files import write_bytes, write_text
from chiaroscuro.report.sweep_figure import draw_curves, draw_sweep
from chiaroscuro.report.tables import markdown_table, shares, three
from chiaroscuro.training.records import routed

_ENDS = ("mean", "low", "high")
_ON_TERMINAL = (0, 1, 2, 4, 5, 6)


def write_results(found: dict[str, Any], folder: Path) -> None:
    """Write results.json, table.md, table.csv, plot.png and curves.png into a folder, each whole."""
    write_text(folder / "results.json", json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "table.md", render_markdown(found))
    write_text(folder / "table.csv", render_csv(found))
    write_bytes(folder / "plot.png", draw_sweep(found))
    write_bytes(folder / "curves.png", draw_curves(found))


def table_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header of the table, and a row per variant, as text."""
    metric = found["metric"]
    head = [
        "variant",
        "seeds",
        metric,
        "95% interval",
        "against the baseline",
        "p",
        "ρ",
        "parameters",
        "FLOPs a token",
        "step",
    ]
    rows = []
    for variant in found["variants"]:
        cells = [variant["name"], _seeds(variant, len(found["seeds"]))]
        if "estimate" not in variant:
            rows.append([*cells, *["–"] * (len(head) - 2)])
            continue
        value, effect = variant["estimate"], variant.get("effect")
        spread = "" if value["sd"] is None else f" ± {number(value['sd'], metric)}"
        cells += [f"{number(value['mean'], metric)}{spread}", _range(value, lambda x: number(x, metric))]
        cells += [_effect_text(effect), _p(effect)]
        cells += [f"{variant['share']:.3f}" if "share" in variant else "–"]
        cells += [f"{variant['parameters'] / 1e6:.3f} M" if variant["parameters"] else "–"]
        flops = variant["flops_per_token"]
        cells += [f"{flops['training'] / 1e6:,.2f} M{_times(variant, 'flops_ratio')}" if flops else "–"]
        cells += [f"{variant['seconds_per_step']:.3g} s{_times(variant, 'time_ratio')}"]
        rows.append(cells)
    return head, rows


def render_markdown(found: Mapping[str, Any]) -> str:
    """The tables as a Markdown page."""
    head, rows = table_rows(found)
    seeds = ", ".join(map(str, found["seeds"]))
    of_logarithms = found["metric"] == "perplexity"
    effect = "the ratio of perplexities" if of_logarithms else "the difference of accuracies"
    parts = [
        markdown_table(head, rows),
        f"Seeds {seeds}. Mean ± standard deviation of the last validation, its 95% interval by Student's t. Against "
        f"the baseline, *{found['baseline']}*: {effect} over the seeds that both have, its 95% interval, and p by a "
        f"paired t-test{' of the logarithms' if of_logarithms else ''}, not corrected for the number of variants. ρ: "
        "what the last validation sent to a menu's last operator, mean over the routed layers. FLOPs: of a training "
        "step, exact protocol, at that ρ. Step: median time; the runs shared a machine, so take it as a hint. In "
        "brackets: times the baseline's.\n",
    ]
    routing = [row for variant in found["variants"] for row in _routing_rows(variant)]
    if routing:
        routed = [variant for variant in found["variants"] if "null_entropy" in variant]
        nulls: dict[str, list[str]] = {}
        for variant in routed:
            nulls.setdefault(three(variant["null_entropy"]), []).append(variant["name"])
        null = "; ".join(h if len(nulls) == 1 else f"{h} ({', '.join(names)})" for h, names in nulls.items())
        parts += [
            "## Where the tokens went\n",
            markdown_table(["variant", "layer", "share per operator", "H 5 / 50 / 95 %"], routing),
            f"Of the last validation, mean over the seeds. White noise of the same width: H {null}.\n",
        ]
    gates = [[variant["name"], _gate(variant["gate"])] for variant in found["variants"] if "gate" in variant]
    if gates:
        parts += ["## The MetaRouter's gate\n", markdown_table(["variant", "g"], gates)]
    if found["failed"]:
        parts += ["## Failed\n", *(f"- {line}" for line in found["failed"]), ""]
    return "\n".join(parts)


def render_csv(found: Mapping[str, Any]) -> str:
    """The table as CSV: a row per variant, plain numbers, empty cells for missing values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    tests = ("kind", *_ENDS, "p")
    steps = ("forward", "training")
    others = ("flops_ratio", "seconds_per_step", "time_ratio", "share", "parameters")
    writer.writerow(
        ["variant", "metric", "seeds_done", "failed", "mean", "sd", "low", "high"]
        + [f"effect_{name}" for name in tests]
        + [f"flops_per_token_{step}" for step in steps]
        + [*others]
    )
    for variant in found["variants"]:
        value, effect, flops = (variant.get(name) or {} for name in ("estimate", "effect", "flops_per_token"))
        writer.writerow(
            [variant["name"], found["metric"], len(variant["seeds_done"]), len(variant["failed"])]
            + [value.get(name) for name in ("mean", "sd", "low", "high")]
            + [effect.get(name) for name in tests]
            + [flops.get(step) for step in steps]
            + [variant.get(name) for name in others]
        )
    return text.getvalue()


def print_sweep(found: Mapping[str, Any], console: Console) -> None:
    """Print the table without the columns that don't fit a terminal."""
    head, rows = table_rows(found)
    table = Table(*(head[i] for i in _ON_TERMINAL), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(row[i] for i in _ON_TERMINAL))
    console.print(table)


def _seeds(variant: Mapping[str, Any], asked: int) -> str:
    done, failed = len(variant["seeds_done"]), len(variant["failed"])
    return (f"{done}" if done == asked else f"{done} of {asked}") + (f", {failed} failed" if failed else "")


def number(value: float, metric: str) -> str:
    """Format a value of the metric."""
    return f"{value:.2%}" if metric == "accuracy" else f"{value:,.2f}"


def _range(ends: Mapping[str, Any], show: Callable[[float], str]) -> str:
    return "–" if ends["low"] is None else f"{show(ends['low'])} to {show(ends['high'])}"


def _effect_text(effect: Mapping[str, Any] | None) -> str:
    if effect is None:
        return "–"
    show: Callable[[float], str] = "×{:.3f}".format if effect["kind"] == "ratio" else "{:+.2%}".format
    return show(effect["mean"]) + ("" if effect["low"] is None else f" ({_range(effect, show)})")


def _p(effect: Mapping[str, Any] | None) -> str:
    p = effect["p"] if effect else None
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _times(variant: Mapping[str, Any], ratio: str) -> str:
    return f" (×{variant[ratio]:.2f})" if ratio in variant else ""


def _routing_rows(variant: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            variant["name"],
            str(layer["layer"]),
            shares(layer["operators"], layer["share"]),
            three(layer["entropy"]),
        ]
        for layer in routed(dict(variant))
    ]


def _gate(gate: Mapping[str, Any]) -> str:
    return f"{gate['mean']:.3f}" + ("" if gate["sd"] is None else f" ± {gate['sd']:.3f}")
