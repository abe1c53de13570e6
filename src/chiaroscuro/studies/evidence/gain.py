"""Whether H knows where far context matters.

For each token of held-out text, two things are measured: how much far context lowers the loss of what it predicts, and
how far it moves the output of each layer's attention. What a router could go by is held against both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from chiaroscuro.analysis.far_context import FarContext
from chiaroscuro.model.score_fitting import rank_correlation, top_recall
from chiaroscuro.report.evidence_figure import draw_gain
from chiaroscuro.studies.evidence.far_models import FarModel, far_context, load_far_model
from chiaroscuro.studies.statistics import Estimate, compare, estimate

FIELDS = ("share", "length", "rows", "models")
MODEL = dict.fromkeys(("checkpoint", "window", "sinks"), True) | dict.fromkeys(
    ("share", "length", "rows", "data", "fit_rows"), False
)
"""Fields of a model, and whether they are needed."""

QUESTION = "Does H know where far context matters?"
SCORES = ("H", "permuted H", "norm", "surprise", "frequency", "fitted")
TARGETS = {"gain": "gain in the loss", "moved": "move of the layer's attention"}
TOP = 0.25
BINS = 10


def measure(recipe: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """All models of the recipe."""
    common = {name: recipe[name] for name in ("share", "length", "rows")}
    found = {}
    for name, given in recipe["models"].items():
        console.print(f"{name}: fitting", highlight=False)
        far = load_far_model(**{**common, **given})
        contexts = []
        for ids in far.rows:
            contexts.append(far_context(far, ids))
            console.print(f"{name}: row {len(contexts)} of {len(far.rows)}", highlight=False)
        found[name] = summarise(far, contexts)
    return found


def summarise(far: FarModel, rows: Sequence[FarContext]) -> dict[str, Any]:
    """The rank correlations and recalls of each score, by layer, each row for itself; and H against distance."""
    counts = torch.bincount(far.counted, minlength=int(max(int(row.ids.max()) for row in rows)) + 1)
    layers = []
    for i in rows[0].layers:
        figures: dict[str, Any] = {"layer": i, "distance": _by_entropy(rows, i)}
        for target in TARGETS:
            for name in SCORES:
                pairs = [_pair(row, i, name, target, counts) for row in rows]
                figures[f"{target}, {name}"] = {
                    "correlation": [rank_correlation(score, aim) for score, aim in pairs],
                    "recall": [top_recall(score, aim, max(1, int(TOP * len(aim)))) for score, aim in pairs],
                }
        layers.append(figures)
    gains = torch.cat([row.gain[row.first :] for row in rows])
    return {
        "tokens": len(gains),
        "rows": len(rows),
        "window": far.window,
        "mean gain": float(gains.mean()),
        "half of the gain is of": _share_of_half(gains),
        "layers": layers,
    }


def _pair(
    row: FarContext, layer: int, name: str, target: str, counts: Tensor
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """A score and a target of the tokens that have something beyond their window and predict something."""
    of = slice(row.first, len(row.ids) - 1)
    aim = row.gain if target == "gain" else row.layers[layer].part.moved
    if name == "surprise":  # of the token itself: what the one before it did not expect
        score = torch.cat([row.loss.new_zeros(1), row.loss])
    elif name == "frequency":
        score = counts[row.ids].double()
    else:
        score = row.layers[layer].scores[name]
    return score[of].double(), aim[of].double()


def _by_entropy(rows: Sequence[FarContext], layer: int) -> list[dict[str, float]]:
    """The mean distance, and the mean mass beyond the window, of the tokens of each tenth of H."""
    parts = [row.layers[layer] for row in rows]
    entropy, distance, mass = (
        torch.cat([take(part)[row.first :] for part, row in zip(parts, rows, strict=True)])
        for take in (lambda x: x.scores["H"], lambda x: x.part.distance, lambda x: x.part.mass)
    )
    order = entropy.argsort()
    return [
        {"H": float(entropy[one].mean()), "distance": float(distance[one].mean()), "mass": float(mass[one].mean())}
        for one in order.tensor_split(BINS)
    ]


def _share_of_half(gains: Tensor) -> float:
    """The share of the tokens that, those who gain most first, have half of all that is gained by those who gain."""
    ordered = gains.clamp_min(0).sort(descending=True).values.cumsum(0)
    return float((ordered < ordered[-1] / 2).double().mean())


# ---- what follows from it ------------------------------------------------------------------------------------


def means(model: Mapping[str, Any], target: str, name: str, what: str = "correlation") -> list[float]:
    """By row, a figure's mean over the layers."""
    by_layer = [layer[f"{target}, {name}"][what] for layer in model["layers"]]
    return [sum(row) / len(row) for row in zip(*by_layer, strict=True)]


def against(model: Mapping[str, Any], target: str, name: str, other: str) -> Estimate:
    """How much more one score correlates than another, by row."""
    return compare(means(model, target, name), means(model, target, other))


def knows(model: Mapping[str, Any], target: str) -> bool:
    """The rule: H correlates with the target, and more than H of shuffled features does, with 95% confidence."""
    own, more = estimate(means(model, target, "H")), against(model, target, "H", "permuted H")
    return all(one.low is not None and one.low > 0 for one in (own, more))


def draw(found: Mapping[str, Any]) -> bytes:
    """The picture."""
    bars = {
        name: {
            title: {score: estimate(means(model, target, score)) for score in SCORES}
            for target, title in TARGETS.items()
        }
        for name, model in found.items()
    }
    spread = {
        name: {title: {score: _ends(one) for score, one in scores.items()} for title, scores in targets.items()}
        for name, targets in bars.items()
    }
    return draw_gain(spread, {name: [layer["distance"] for layer in model["layers"]] for name, model in found.items()})


def _ends(one: Estimate) -> tuple[float, float, float]:
    """Both ends of the interval, or the mean where there is none, and the mean between them."""
    low, high = (one.mean if end is None else end for end in (one.low, one.high))
    return low, one.mean, high


def answer(found: Mapping[str, Any]) -> list[str]:
    """The answer and its figures, as Markdown."""
    yes = [name for name, model in found.items() if knows(model, "gain")]
    verdict = "**Yes**" if len(yes) == len(found) else "**No**" if not yes else f"**Only in {', '.join(yes)}**"
    lines = [
        f"{verdict}. The rule: H correlates with the gain in the loss, and more than H of shuffled features does, with "
        "95% confidence over the rows of held-out text. *Gain*: the loss of what a token predicts where all see their "
        "window alone, less that with full attention. *Moves*: the relative change of the heads' outputs in one layer. "
        "Rank correlations (Spearman's) are means over layers, with the 95% interval over the rows; in brackets, of "
        "the quarter of the tokens that gain or move most, how many are in the quarter with the largest scores, 25% by "
        "chance. *Surprise* is the loss of the token itself, and *frequency* how often it stands in the training text: "
        "both are the same in every layer. *Fitted* is fitted to the gain, on other text.",
        "",
    ]
    for name, model in found.items():
        lines += [
            f"**{name}**, window {model['window']}: {model['tokens']:,} tokens in {model['rows']} rows; far context "
            f"gains {model['mean gain']:.3f} nats a token, and half of what is gained goes to "
            f"{model['half of the gain is of']:.1%} of the tokens.",
            "",
            "| | " + " | ".join(TARGETS.values()) + " | best layer, gain | best layer, move |",
            "| --- |" + " --- |" * 4,
        ]
        for score in SCORES:
            cells = [_cell(model, target, score) for target in TARGETS]
            cells += [_best(model, target, score) for target in TARGETS]
            lines.append(f"| {score} | " + " | ".join(cells) + " |")
        more = {other: against(model, "gain", "H", other) for other in ("permuted H", "fitted")}
        lines += [
            "",
            "H less permuted H: "
            + _interval(more["permuted H"])
            + "; H less fitted: "
            + _interval(more["fitted"])
            + ".",
            "",
        ]
    return lines


def _cell(model: Mapping[str, Any], target: str, score: str) -> str:
    recall = means(model, target, score, "recall")
    return f"{_interval(estimate(means(model, target, score)))} [{sum(recall) / len(recall):.0%}]"


def _best(model: Mapping[str, Any], target: str, score: str) -> str:
    found = [estimate(layer[f"{target}, {score}"]["correlation"]).mean for layer in model["layers"]]
    return f"{max(found, key=abs):+.2f}"


def _interval(one: Estimate) -> str:
    if one.low is None:
        return f"{one.mean:+.2f}"
    return f"{one.mean:+.2f} ({one.low:+.2f} to {one.high:+.2f})"
