"""Two pictures beside the tables of the studies: the operators' shares and the MetaRouter's gate over training.

    chiaroscuro sweep recipes/sweeps/wikitext2.yaml && chiaroscuro sweep recipes/sweeps/mixed.yaml
    python -m chiaroscuro.studies.courses

Two pictures from the records of the runs, all seeds of a variant in one panel: shares.png beside the tables of
wikitext2, of the variants with three operators (does one of them collapse?), and gates.png beside those of mixed, of
the gate by task (does it tell text from symbols?). What has not run yet is left out.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chiaroscuro.analysis.collapse import trace_collapse
from chiaroscuro.analysis.gates import trace_gates
from chiaroscuro.files import write_bytes
from chiaroscuro.report.figures import INK, as_png, new_figure, number_steps, quieten
from chiaroscuro.report.gate_figure import PUBLISHED
from chiaroscuro.report.palette import styles_of
from chiaroscuro.studies.command import exit_code
from chiaroscuro.training import read_records

RUNS, RESULTS = Path("runs/sweeps"), Path("experiments/results")
SHARES, GATES = RESULTS / "wikitext2" / "shares.png", RESULTS / "mixed" / "gates.png"
TASKS = {"text": "#1f3a93", "imdb": "#a32a20", "listops": "#b07a12"}


def main() -> None:
    """Draw the pictures of the runs that exist."""
    for path, draw, sweep, pattern in (
        (SHARES, draw_shares, "wikitext2", "three operators*"),
        (GATES, draw_gates, "mixed", "*gate*"),
    ):
        variants = dict(finished(RUNS / sweep, pattern))
        if variants:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, draw(variants))
        print(f"wrote {path}" if variants else f"{RUNS / sweep} holds no run {pattern}: train it by chiaroscuro sweep")


def finished(folder: Path, pattern: str) -> Iterator[tuple[str, list[Path]]]:
    """The finished runs, by variant."""
    for variant in sorted(folder.glob(pattern)):
        if runs := sorted(model.parent for model in variant.glob("seed-*/model")):
            yield variant.name, runs


def draw_shares(variants: dict[str, list[Path]]) -> bytes:
    """A row per variant, a panel per routed layer, a line per operator and seed."""
    traces = {
        name: [trace_collapse(read_records(run / "metrics.jsonl")) for run in runs] for name, runs in variants.items()
    }
    columns = max(len(trace.layers) for each in traces.values() for trace in each)
    figure, panels = _panels(len(traces), columns)
    styles = styles_of(name for each in traces.values() for trace in each for name in trace.operators)
    for row, (variant, each) in enumerate(traces.items()):
        for trace in each:
            for column, layer in enumerate(trace.layers):
                axes = panels[row * columns + column]
                for k, name in enumerate(layer.operators):
                    share = [look[k] for look in layer.share]
                    axes.plot(trace.steps, share, color=styles[name].ink, linewidth=1.0, label=name)
                axes.set_title(f"{variant}: layer {layer.layer}", loc="left", color=INK, fontsize=7)
    figure.supylabel("share of the tokens; a line a seed", color=INK, fontsize=9)
    return _finish(figure, panels)


def draw_gates(variants: dict[str, list[Path]]) -> bytes:
    """A panel per variant, a line per task and seed."""
    figure, panels = _panels(1, len(variants))
    for axes, (variant, runs) in zip(panels, variants.items(), strict=True):
        axes.axhline(PUBLISHED, color=INK, linewidth=0.8, linestyle="--", label=f"the paper's, {PUBLISHED}")
        for run in runs:
            for task, gate in trace_gates(read_records(run / "metrics.jsonl")).items():
                axes.plot(gate.steps, gate.gate, color=TASKS.get(task, INK), linewidth=1.0, label=task)
        axes.set_title(variant, loc="left", color=INK, fontsize=8)
    figure.supylabel("gate g; a line a seed", color=INK, fontsize=9)
    return _finish(figure, panels)


def _panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = new_figure(2.9 * columns + 1.3, 1.7 * rows + 0.9)
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten())


def _finish(figure: Figure, panels: list[Axes]) -> bytes:
    for axes in panels:
        axes.set_ylim(0, 1)
        number_steps(axes)
        quieten(axes, ["top", "right"])
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.supxlabel("step", color=INK, fontsize=9)
    return as_png(figure, dpi=130)


if __name__ == "__main__":
    sys.exit(exit_code(main))
