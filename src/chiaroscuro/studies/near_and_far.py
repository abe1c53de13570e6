"""docs/near-and-far.md: who should look far, who should be kept to be seen from far, and what it is worth.

    chiaroscuro sweep recipes/sweeps/reach-text.yaml      # likewise reach-mqar and reach-passkeys
    python -m chiaroscuro.studies.near_and_far

A finished model of full attention is also routed afterwards, with no training on: by chance, by H, and by scores that
are fitted to it. These models and the finished runs of the sweeps are measured on their validation split once: on a
text the perplexity of all tokens and of recall tokens, in a task the accuracy. Beside it stand the attention scores
that a model computes and the numbers that its cache holds, counted at the shares that were measured, as parts of full
attention's. The figures go to experiments/results/near-and-far; those that are there stay, where the runs themselves
are not. Then page and pictures are written. A verdict is what its rule, which stands beside it, makes of the figures.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from chiaroscuro.analysis.flops import count_flops, full_attention
from chiaroscuro.analysis.recall import WINDOW
from chiaroscuro.files import write_bytes, write_text
from chiaroscuro.layers.registry import split_entry
from chiaroscuro.model import ChiarForCausalLM
from chiaroscuro.model.calibration import calibrate
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.fitting import fit
from chiaroscuro.report.reach_figure import Point, draw_reach
from chiaroscuro.studies.command import exit_code
from chiaroscuro.studies.evaluation import evaluate
from chiaroscuro.studies.fitting import batches_of
from chiaroscuro.studies.statistics import Estimate, compare, compare_ratios, estimate
from chiaroscuro.studies.sweep import Sweep, SweepRun
from chiaroscuro.studies.workspace import Workspace

RESULTS = Path("experiments/results/near-and-far")
PAGE = Path("docs/near-and-far.md")
BASELINE = "full attention"
"""The variants that are called so: the best of them is what the others are held against."""

ONE_LAYER = "static, the middle layer"
"""The variant whose one layer of full attention is routed afterwards."""


@dataclass(frozen=True)
class Afterwards:
    """How a finished model is routed, with no training on.

    Attributes:
        side: `"look"`, `"kept"` or `"both"`.
        router: who is chosen by what.
        of: the variant of the model; the task's `whole` unless given.

    """

    side: str
    router: str
    of: str | None = None

    @property
    def pattern(self) -> str:
        """The variant whose window and shares it has."""
        return f"{self.side}, random"


_ROUTERS = (("random", "random"), ("H", "threshold"), ("fitted", "fitted"))

AFTERWARDS = {
    f"{side}, {name} afterwards": Afterwards(side, router)
    for side in ("look", "kept", "both")
    for name, router in _ROUTERS
} | {f"both, one layer, {name} afterwards": Afterwards("both", router, ONE_LAYER) for name, router in _ROUTERS}
"""By name."""

COSTS = ("scores", "cache")
UNFINISHED = " part"
"""What the runs that others go on from are called: they have seen fewer tokens, and are not compared."""

MOST_LOST, LEAST_KEPT = 0.02, 0.95
"""The goal at a quarter on both sides: perplexity at most so much higher, accuracy at least such a part."""


@dataclass(frozen=True)
class Metric:
    """What models are judged by.

    Attributes:
        key: its name in the figures.
        title: its name on the page.
        rises: whether more is better: an accuracy, not a perplexity.

    """

    key: str
    title: str
    rises: bool

    def shown(self, found: Estimate) -> str:
        """A mean, with its spread over several seeds."""
        scale, unit = (100, "%") if self.rises else (1, "")
        digits = 1 if self.rises else 2
        spread = "" if found.sd is None else f" ± {scale * found.sd:.{digits}f}"
        return f"{scale * found.mean:.{digits}f}{spread}{unit}"


PERPLEXITY = Metric("perplexity", "perplexity", rises=False)
RECALL = Metric("recall_perplexity", "on recall tokens", rises=False)
ACCURACY = Metric("accuracy", "accuracy", rises=True)


@dataclass(frozen=True)
class Task:
    """One of the sweeps, and what the page says of it."""

    name: str
    title: str
    question: str
    metrics: tuple[Metric, ...]
    whole: str = BASELINE
    """The variant whose models are routed afterwards."""

    @property
    def sweep(self) -> str:
        """The sweep's file."""
        return f"recipes/sweeps/reach-{self.name}.yaml"

    @property
    def results(self) -> Path:
        """The figures of its runs."""
        return RESULTS / f"{self.name}.json"


TASKS = (
    Task(
        "text",
        "Text",
        "WikiText-2 in rows of 1,024 tokens. *Recall tokens* end a pair of tokens that stood earlier in the row, last "
        f"more than {WINDOW} tokens ago: what a window cannot show.",
        (PERPLEXITY, RECALL),
        whole=f"{BASELINE}, trained on",
    ),
    Task(
        "mqar",
        "Associative recall",
        "Pairs of a key and a value, and later some of the keys again, each asking for its value (zoology's "
        "multi-query associative recall): far attention is all that the task needs. All models, the hybrids too, go on "
        "from one of full attention that has learned the task. A third of the words are keys, and a key can find "
        "out whether it will be asked for only by looking: if a quarter of the tokens looks in every layer, some keys "
        "never do. *One layer* is the hybrid of the middle layer, routed: the others have their window alone, and that "
        "one three times the share.",
        (ACCURACY,),
    ),
    Task(
        "passkeys",
        "Passkey",
        "A number of four digits in a long text of noise, and a question for it at the end (RULER's single needle). "
        "All models, the hybrids too, go on from one of full attention that has learned the task from rows of four "
        "numbers, all of which are asked for, first in short rows and then in long ones. Whether one learns it in so "
        "many steps depends on the seed: of 0 to 4, seeds 2 and 3 were at 39 and 22% after the short rows, and are "
        "left out. Seed 4 was trained on another machine than 0 and 1.",
        (ACCURACY,),
    ),
)


def main() -> int:
    """Measure what is not measured yet, and write figures, pictures and page: an exit code."""
    return exit_code(lambda: write(Console()))


def write(console: Console) -> None:
    """See `main`.

    Raises:
        UserError: a sweep's file or one of its runs can't be read.

    """
    found = {task.name: gather(task, console) for task in TASKS}
    for task in TASKS:
        variants = Variants(task, found[task.name])
        if variants.names:
            for metric in task.metrics:
                write_bytes(
                    RESULTS / _picture(task, metric), draw_reach(points(variants, metric), metric.title, metric.rises)
                )
    write_text(PAGE, page(found))
    console.print(f"wrote {PAGE}")


# ---- measuring ---------------------------------------------------------------------------------------------


def gather(task: Task, console: Console) -> dict[str, dict[str, Any]]:
    """The figures of a sweep's runs, by variant and seed: those that are known, and those of runs measured now.

    Raises:
        UserError: the sweep's file or one of its runs can't be read.

    """
    known = json.loads(task.results.read_text("utf-8")) if task.results.is_file() else {}
    sweep = Sweep.load(task.sweep)
    patterns = {run.variant: run for run in sweep.runs}
    routed = {
        name: how
        for name, how in AFTERWARDS.items()
        if how.pattern in patterns and (how.of is None or how.of in patterns)
    }
    found: dict[str, dict[str, Any]] = {name: known.get(name, {}) for name in (*sweep.changes, *routed)}
    for run in sweep.runs:
        seed = str(run.seed)
        if seed in found[run.variant] or run.variant.endswith(UNFINISHED) or not run.is_done():
            continue
        _take_up(task, run.variant, seed, measure(_workspace(run)), found, console)
    for name, how in routed.items():
        for run in (run for run in sweep.runs if run.variant == (how.of or task.whole)):
            seed = str(run.seed)
            if seed not in found[name] and run.is_done():
                workspace = _workspace(run)
                route_afterwards(workspace, patterns[how.pattern], how)
                _take_up(task, name, seed, measure(workspace), found, console)
    return found


def _workspace(run: SweepRun) -> Workspace:
    return Workspace(str(run.folder), device="cpu")


def _take_up(
    task: Task, name: str, seed: str, figures: dict[str, Any], found: dict[str, dict[str, Any]], console: Console
) -> None:
    """Keep the figures of a run."""
    found[name][seed] = figures
    write_text(task.results, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    console.print(f"{task.name}, {name}, seed {seed}: {figures}", highlight=False)


def route_afterwards(workspace: Workspace, pattern: SweepRun, how: Afterwards) -> None:
    """Route a finished model, and train it no further.

    Where full attention is in some layers alone, these are routed, by as much larger shares.

    Args:
        workspace: of the model, which is replaced by the routed one.
        pattern: a run whose menus, window and shares to take.
        how: the side and the router.

    """
    config = pattern.recipe.build_config(workspace.config.vocab_size)
    assert isinstance(config, ChiarConfig)
    fields: Any = {name: getattr(config, name) for name in ("operators", "window", "sinks", "attention_context")}
    before: Any = workspace.config.operators
    whole = [any(split_entry(entry)[0] == "attention" for entry in menu) for menu in before]
    fields["operators"] = [
        routed if is_whole else menu
        for menu, routed, is_whole in zip(before, config.operators or [], whole, strict=True)
    ]
    named = dict.fromkeys(("router", "kv_router"), "random" if how.router == "fitted" else how.router)
    model = ChiarForCausalLM.from_pretrained(workspace.path, **fields, **named)
    _, batches = batches_of(workspace, length=workspace.length())
    times = len(whole) / sum(whole)
    look = min(1.0, config.attention_share * times) if how.side != "kept" else None
    kept = min(1.0, config.kv_share * times) if how.side != "look" else None
    if how.router == "fitted":
        fit(model, batches, look=look, kept=kept)
    else:
        calibrate(model, batches, look, kept)
    workspace.model = model


def measure(workspace: Workspace) -> dict[str, Any]:
    """How good a model is, whom it routes, and what it costs."""
    window = None if workspace.has_targets else WINDOW
    seen = evaluate(workspace, window=window, batch_size=4 if window else 16)
    config, length = workspace.model.config, workspace.length()
    assert isinstance(config, ChiarConfig)
    look = [layer["share"][-1] if len(layer["operators"]) > 1 else None for layer in seen["layers"]]
    kept = [layer.get("kept") for layer in seen["layers"]]
    figures = (
        {"accuracy": seen["accuracy"], "depths": seen["depths"]}
        if window is None
        else {
            "perplexity": seen["perplexity"],
            "recall_perplexity": seen["recall"]["perplexity"],
            "recall_tokens": seen["recall"]["tokens"],
            "tokens": seen["tokens"],
        }
    )
    return {
        **figures,
        "look": _over_all(look),
        "kept": _over_all(kept),
        **costs(config, length, _over_those(look), _over_those(kept)),
        "parameters": workspace.model.num_parameters(),
    }


def _over_those(shares: list[float | None]) -> float | None:
    """The mean over the layers that have such a share; None where none has."""
    found = [share for share in shares if share is not None]
    return mean(found) if found else None


def _over_all(shares: list[float | None]) -> float | None:
    """The mean over all layers, of which one that chooses nobody counts nothing; None where none chooses."""
    found = [share for share in shares if share is not None]
    return sum(found) / len(shares) if found else None


def costs(config: ChiarConfig, length: int, look: float | None, kept: float | None) -> dict[str, float]:
    """The attention scores of a forward, and the numbers of the cache, as parts of full attention's, by count."""
    ours = count_flops(config, length, share=look, kv_share=kept)
    whole = count_flops(full_attention(config), length)
    scores = ours.by_operator.get("attention scores", 0.0) / whole.by_operator["attention scores"]
    return {"scores": scores, "cache": ours.numbers_kept / whole.numbers_kept}


# ---- comparing ---------------------------------------------------------------------------------------------


class Variants:
    """The variants of a task that have a figure.

    Args:
        task: the sweep.
        found: of `gather`.

    """

    def __init__(self, task: Task, found: Mapping[str, Mapping[str, Any]]) -> None:
        self.task = task
        self.found = {name: runs for name, runs in found.items() if runs}
        self.missing = [name for name, runs in found.items() if not runs and not name.endswith(UNFINISHED)]

    @property
    def names(self) -> list[str]:
        """In the order of the sweep."""
        return list(self.found)

    def estimate(self, name: str, key: str) -> Estimate:
        """A figure's mean over the seeds."""
        return estimate([run[key] for run in self.found[name].values()])

    def best(self, names: list[str], metric: Metric) -> str | None:
        """The best of some variants."""
        order = sorted(names, key=lambda name: self.placed(name, metric).mean, reverse=metric.rises)
        return order[0] if order else None

    def of(self, name: str) -> list[str]:
        """The variants of a family."""
        return [each for each in self.names if family(each) == name]

    @property
    def baseline(self) -> str | None:
        """The best model of full attention, without convolutions."""
        names, metric = self.of(BASELINE), self.task.metrics[0]
        seeds = set.intersection(*(set(self.found[name]) for name in names)) if names else set()
        if not seeds:
            return names[0] if names else None

        def mean_over_seeds(name: str) -> float:
            return estimate([self.found[name][seed][metric.key] for seed in sorted(seeds)]).mean

        return (max if metric.rises else min)(names, key=mean_over_seeds)

    def placed(self, name: str, metric: Metric) -> Estimate:
        """A figure that can be compared with others'.

        Where a variant has other seeds than the baseline: the baseline's mean, changed as the seeds that both have say.
        """
        own, baseline = self.estimate(name, metric.key), self.baseline
        if baseline is None or set(self.found[name]) == set(self.found[baseline]):
            return own
        found, whole = self.against(name, baseline, metric), self.estimate(baseline, metric.key).mean
        if found is None:
            return own
        return Estimate(found.count, whole + found.mean if metric.rises else whole * found.mean)

    def against(self, name: str, baseline: str, metric: Metric) -> Estimate | None:
        """The ratio of perplexities, or the difference of accuracies, over the seeds that both have."""
        seeds = [seed for seed in self.found[name] if seed in self.found[baseline]]
        ours, theirs = ([self.found[each][seed][metric.key] for seed in seeds] for each in (name, baseline))
        if not seeds:
            return None
        return compare(ours, theirs) if metric.rises else compare_ratios(ours, theirs)

    def spread(self, name: str, metric: Metric) -> float:
        """The standard deviation over seeds of a figure's difference from the baseline's; 0 for one seed."""
        baseline = self.baseline
        found = None if baseline is None or name == baseline else self.against(name, baseline, metric)
        if found is None or found.sd is None:
            return 0.0
        return found.sd if metric.rises else found.sd * self.placed(name, metric).mean

    def fronts(self, metric: Metric) -> dict[str, list[str]]:
        """The front by each cost."""
        return {cost: self.front(metric, cost) for cost in COSTS}

    def front(self, metric: Metric, cost: str) -> list[str]:
        """The variants than which no other is both cheaper, or as cheap, and better."""
        sign = 1 if metric.rises else -1
        at = {n: (self.estimate(n, cost).mean, sign * self.placed(n, metric).mean) for n in self.names}
        return [
            name
            for name, (price, worth) in at.items()
            if not any(p <= price and w >= worth and (p, w) != (price, worth) for p, w in at.values())
        ]


def family(name: str) -> str:
    """What a variant has in common with others: its name up to the comma."""
    return name.partition(",")[0]


def points(variants: Variants, metric: Metric) -> list[Point]:
    """What the picture shows."""
    fronts = variants.fronts(metric)
    found = []
    for name in variants.names:
        value = variants.placed(name, metric)
        found.append(
            Point(
                name=name,
                family=family(name),
                costs={cost: variants.estimate(name, cost).mean for cost in fronts},
                value=value.mean,
                spread=variants.spread(name, metric),
                best={cost: name in front for cost, front in fronts.items()},
            )
        )
    return found


# ---- the page ----------------------------------------------------------------------------------------------

INTRODUCTION = """# Near and far: the study

Written by `python -m chiaroscuro.studies.near_and_far` from `experiments/results/near-and-far/`; do not edit.

In a layer whose tokens all see their [window](concepts/near-and-far.md), some **look** beyond it, or some are **kept**
to be seen from beyond it, or both, a quarter of them each. Who does is decided by chance (`random`), by the spectral
entropy (`H`), by a score that is trained along (`learned`), or by one that was [fitted](how-to/fit.md) on the
full-attention model before (`fitted`). *Afterwards* the finished model is routed as it is. The other
routed models begin with the weights of a full-attention model that has seen a part of the tokens, and so does what is
*trained on*; in the first half of the rest their shares fall from 1 to a quarter.

The controls: full attention, from the start to the end and trained on from the same weights; **local** attention alone;
**static** hybrids, in which some layers have full attention and the others see their window; a
**convolution** over four tokens in every layer, or in the place of attention; and the paper's choice of dct or
attention. All of a task have the same depth and width and see the same number of tokens.

*Scores* are the products of queries and keys, *cache* the numbers kept after a row, both as parts of full
attention's, counted at the shares measured, which are means over all layers. A mean of several seeds has its standard
deviation; the differences from the best full attention without convolutions are paired by seed, with their 95%
interval. Rows with other seeds can't be compared by their means: their differences can, and fronts, pictures and
verdicts go by these: where the seeds differ, a verdict gives the baseline's mean plus the paired difference. Two
variants *can't be told apart* where the interval of their differences holds 0, or where there is but one seed. Bold
names are on a front: no other variant is better at the same or a lower cost, in scores (s) or in cache (c).

Chance draws for each side by itself: who is kept does not depend on who looks.
"""


def page(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The page, as Markdown."""
    parts = [INTRODUCTION]
    for task in TASKS:
        parts += [f"## {task.title}", "", task.question, "", f"`chiaroscuro sweep {task.sweep}`", ""]
        parts += section(Variants(task, found[task.name]))
    return "\n".join(parts)


def section(variants: Variants) -> list[str]:
    """The table of a task, its pictures, and what it says of the goal."""
    baseline = variants.baseline
    if baseline is None:
        return ["Not measured yet.", ""]
    metrics = variants.task.metrics
    fronts = variants.fronts(metrics[0])
    head = ["", *(title for metric in metrics for title in (metric.title, f"against {baseline}"))]
    head += [*COSTS, "look", "kept", "seeds"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in variants.names:
        where = "".join(cost[0] for cost, front in fronts.items() if name in front)
        cells = [f"**{name}** ({where})" if where else name]
        for metric in metrics:
            cells += [metric.shown(variants.estimate(name, metric.key)), _against(variants, name, baseline, metric)]
        cells += [f"{variants.estimate(name, cost).mean:.2f}" for cost in COSTS]
        runs = list(variants.found[name].values())
        cells += [
            f"{mean(r[side] for r in runs):.2f}" if runs[0][side] is not None else "" for side in ("look", "kept")
        ]
        lines.append(_row([*cells, str(len(runs))]))
    pictures = [
        f"![{variants.task.title}: {m.title} over cost](../{RESULTS / _picture(variants.task, m)})" for m in metrics
    ]
    missing = [f"Not run yet: {'; '.join(variants.missing)}.", ""] if variants.missing else []
    shown = [line for picture in pictures for line in (picture, "")]
    return [*lines, "", *missing, *shown, *verdicts(variants, baseline), ""]


def verdicts(variants: Variants, baseline: str) -> list[str]:
    """Whether the goal is reached, and how a quarter on both sides stands against static hybrids.

    It is better than one where its mean is, and where the whole interval of their differences is.
    """
    metric = variants.task.metrics[0]
    ours = variants.best(variants.of("both"), metric)
    if ours is None:
        return ["A quarter on both sides is not measured yet."]
    value, whole = (variants.placed(name, metric).mean for name in (ours, baseline))
    if metric.rises:
        part = value / whole if whole else 1.0  # of nothing, nothing is lost
        reached = "reached" if part >= LEAST_KEPT else "**not reached**"
        goal = f"at least {LEAST_KEPT:.0%} of full attention's accuracy: {part:.1%} of it ({ours}), {reached}"
    else:
        more = value / whole - 1
        reached = "reached" if more <= MOST_LOST else "**not reached**"
        goal = f"at most {MOST_LOST:.0%} more perplexity than full attention: {more:+.1%} ({ours}), {reached}"
    lines = [f"- The goal at a quarter on both sides, {goal}."]
    for name in variants.of("static"):
        theirs = variants.placed(name, metric).mean
        better = value > theirs if metric.rises else value < theirs
        found = variants.against(ours, name, metric)
        nothing = 0.0 if metric.rises else 1.0
        if not better:
            verdict = "**no better**"
        elif found is None or found.low is None or found.high is None:
            verdict = "**can't be told apart** by one seed"
        else:
            apart = found.low > nothing if metric.rises else found.high < nothing
            verdict = "better" if apart else "**can't be told apart**"
        difference = "" if found is None or found.low is None else f", by {_difference(found, metric)}"
        shown = " against ".join(metric.shown(variants.placed(each, metric)) for each in (ours, name))
        price = " against ".join(_price(variants, each) for each in (ours, name))
        lines.append(f"- Against {name}: {verdict}, {shown}{difference}, with {price}.")
    chance = re.sub("H|learned|fitted( and distilled)?", "random", ours)
    found = variants.against(ours, chance, metric) if chance in variants.of("both") and chance != ours else None
    if found is not None:
        lines.append(f"- Against chance ({chance}): {_difference(found, metric)}.")
    return lines


def _price(variants: Variants, name: str) -> str:
    return " and ".join(f"{variants.estimate(name, cost).mean:.2f} of the {cost}" for cost in COSTS)


def _against(variants: Variants, name: str, baseline: str, metric: Metric) -> str:
    if name == baseline:
        return "–"
    found = variants.against(name, baseline, metric)
    return "" if found is None else _difference(found, metric)


def _difference(found: Estimate, metric: Metric) -> str:
    """A difference of accuracies in points, or the part by which a perplexity is higher."""
    shift = 0.0 if metric.rises else 1.0
    middle, *ends = (None if x is None else 100 * (x - shift) for x in (found.mean, found.low, found.high))
    unit = " points" if metric.rises else "%"
    interval = "" if ends[0] is None else f" ({ends[0]:+.1f} to {ends[1]:+.1f})"
    return f"{middle:+.1f}{unit}{interval}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _picture(task: Task, metric: Metric) -> str:
    return f"{task.name}{'' if metric is task.metrics[0] else '-recall'}.png"


if __name__ == "__main__":
    sys.exit(main())
