"""What is routed where: by the kind of a token, by its place, by layer; and whether seeds agree."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from chiaroscuro.analysis.routing import part_of_heads
from chiaroscuro.data import TokenBlocks, load_corpus, tokenize_corpus
from chiaroscuro.errors import UserError
from chiaroscuro.report.evidence_figure import draw_classes
from chiaroscuro.retrofitting.inside import noting_decisions
from chiaroscuro.retrofitting.routed_model import RoutedModel
from chiaroscuro.studies.statistics import estimate
from chiaroscuro.studies.workspace import Workspace

FIELDS = ("rows", "length", "models")
MODEL = {"checkpoint": True} | dict.fromkeys(("seeds", "data", "rows"), False)
"""Fields of a model, and whether they are needed."""

QUESTION = "What is routed where, and do seeds agree?"
CLASSES = ("word start", "continuation", "digit", "punctuation", "newline", "unknown word", "other")
SIDES = {"look": "who looks", "kept": "who is kept"}
PARTS = 8
"""Of a row, for the shares by position."""

PART = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer of bytes shows of a token that is a part of a character."""

UNKNOWN = "<unk>"
"""WikiText-2's own mark of a rare word."""


def token_class(text: str) -> str:
    """The class of a token, by its text; a part of a character and spaces alone are of none of the others."""
    if UNKNOWN in text:
        return "unknown word"
    if "\n" in text:
        return "newline"
    if any(c.isdigit() for c in text):
        return "digit"
    if PART in text or not text.strip():
        return "other"
    if not any(c.isalpha() for c in text):
        return "punctuation"
    return "word start" if text[0].isspace() else "continuation"


def measure(recipe: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """All models of the recipe."""
    found = {}
    for name, given in recipe["models"].items():
        seeds, decided = {}, {}
        for seed in given.get("seeds", [None]):
            workspace = Workspace(given["checkpoint"].format(seed=seed), device="cpu")
            rows = _rows(workspace, given.get("data"), given.get("rows", recipe["rows"]), recipe["length"])
            decided[seed] = [decisions(workspace.model, ids) for ids in rows]
            if not all(decided[seed]):
                raise UserError(f"{name}: no layer of {workspace.name} chooses who looks or who is kept")
            classes = [[token_class(str(workspace.tokenizer.decode([t]))) for t in ids.tolist()] for ids in rows]
            seeds[str(seed)] = summarise(decided[seed], classes)
            console.print(f"{name}, seed {seed}", highlight=False)
        pairs = [_agreement(decided[a], decided[b]) for a, b in combinations(decided, 2)]
        found[name] = {"seeds": seeds, "agreement": pairs}
    return found


def _rows(workspace: Workspace, data: str | None, rows: int, length: int) -> list[Int[Tensor, " time"]]:
    if data is None:
        blocks = workspace.blocks("validation", length=length)[1]
    else:
        corpus = load_corpus(data, needed=("validation",))
        blocks = TokenBlocks(tokenize_corpus(corpus, workspace.tokenizer)["validation"], length)
    return [blocks[i]["input_ids"] for i in range(min(rows, len(blocks)))]


@torch.no_grad()
def decisions(model: Any, ids: Int[Tensor, " time"]) -> dict[str, dict[int, Float[Tensor, " time"]]]:
    """By side and layer, which tokens were chosen: 1, 0, or the part of the key-value heads that chose it."""
    found: dict[str, dict[int, Tensor]] = {side: {} for side in SIDES}
    if isinstance(model, RoutedModel):
        with noting_decisions(model) as decided:
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
        for i, [(looks, kept)] in decided.items():
            found["look"][i], found["kept"][i] = part_of_heads(looks), part_of_heads(kept)
        return {side: layers for side, layers in found.items() if not _trivial(layers)}
    routing = model(input_ids=ids[None], use_cache=False, output_routing=True).routing
    for i, layer in enumerate(routing):
        if len(layer.operators) > 1:
            found["look"][i] = part_of_heads(layer.operator_index == len(layer.operators) - 1)
        if layer.kept is not None:
            found["kept"][i] = part_of_heads(layer.kept)
    return {side: layers for side, layers in found.items() if layers}


def _trivial(layers: Mapping[int, Tensor]) -> bool:
    """Whether all tokens are chosen everywhere."""
    return all(bool((chosen == 1).all()) for chosen in layers.values())


def summarise(rows: Sequence[Mapping[str, Mapping[int, Tensor]]], classes: Sequence[list[str]]) -> dict[str, Any]:
    """Shares by side: of each class, of each part of a row, of each layer."""
    flat = [name for row in classes for name in row]
    member = {name: torch.tensor([one == name for one in flat]) for name in CLASSES}
    found: dict[str, Any] = {"tokens": {name: int(mask.sum()) for name, mask in member.items()}}
    for side in rows[0]:
        layers = list(rows[0][side])
        chosen = {i: torch.cat([row[side][i] for row in rows]) for i in layers}
        mean = torch.stack(list(chosen.values())).mean(0)
        parts = torch.stack([torch.stack(list(row[side].values())).mean(0) for row in rows]).mean(0)
        found[side] = {
            "share": float(mean.mean()),
            "classes": {name: float(mean[mask].mean()) for name, mask in member.items() if bool(mask.any())},
            "positions": [float(part.mean()) for part in parts.tensor_split(PARTS)],
            "layers": {i: float(one.mean()) for i, one in chosen.items()},
            "classes by layer": {
                i: {name: float(one[mask].mean()) for name, mask in member.items() if bool(mask.any())}
                for i, one in chosen.items()
            },
        }
    return found


def _agreement(
    first: Sequence[Mapping[str, Mapping[int, Tensor]]], second: Sequence[Mapping[str, Mapping[int, Tensor]]]
) -> dict[str, float]:
    """By side, how often two seeds choose the same tokens, as a part of how often chance would: mean over layers.

    A side of which one of them chooses no token is not there.
    """
    found = {}
    for side in [side for side in first[0] if side in second[0]]:
        lifts = []
        for i in first[0][side]:
            a, b = (torch.cat([row[side][i] for row in rows]) for rows in (first, second))
            if float(a.mean() * b.mean()) > 0:
                lifts.append(float((a * b).mean() / (a.mean() * b.mean())))
        if lifts:
            found[side] = sum(lifts) / len(lifts)
    return found


# ---- what follows from it ------------------------------------------------------------------------------------


def draw(found: Mapping[str, Any]) -> bytes:
    """The picture."""
    shares: dict[str, dict[str, float | None]] = {}
    by_layer: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, model in found.items():
        for side in _sides(model):
            title, layers = f"{name}: {SIDES[side]}", _layers(model, side)
            shares[title] = {one: _mean(model, side, "classes", one) for one in CLASSES}
            by_layer[title] = {one: {i: _of_layer(model, side, i, one) for i in layers} for one in CLASSES}
    return draw_classes(shares, by_layer)


def answer(found: Mapping[str, Any]) -> list[str]:
    """The answer and its figures, as Markdown."""
    pairs = {
        (name, side): [pair[side] for pair in m["agreement"] if side in pair]
        for name, m in found.items()
        for side in _sides(m)
    }
    agreed = {place: sum(lifts) / len(lifts) for place, lifts in pairs.items() if lifts}
    said = "; ".join(f"{name}, {SIDES[side]}: {lift:.2f} times" for (name, side), lift in agreed.items())
    lines = [
        "The share of each class of tokens that is chosen, the mean over layers and seeds. "
        + (f"How often two seeds choose the same token of a layer, relative to chance: {said}." if said else "")
        + " A share of a quarter that two seeds agree on wholly would be 4 times chance. The maps in the picture "
        "have the shares by layer.",
        "",
        "| | all | " + " | ".join(CLASSES) + " | first eighth of a row | last eighth | layers, from first to last |",
        "| --- |" + " --- |" * (len(CLASSES) + 4),
    ]
    for name, model in found.items():
        for side in _sides(model):
            cells = [_percent(estimate([seed[side]["share"] for seed in model["seeds"].values()]).mean)]
            cells += [_percent(_mean(model, side, "classes", one)) for one in CLASSES]
            cells += [_percent(_mean(model, side, "positions", place)) for place in (0, PARTS - 1)]
            cells.append(" ".join(_percent(_mean(model, side, "layers", i)) for i in _layers(model, side)))
            lines.append(f"| {name}: {SIDES[side]} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _sides(model: Mapping[str, Any]) -> list[str]:
    first = next(iter(model["seeds"].values()))
    return [side for side in SIDES if side in first]


def _layers(model: Mapping[str, Any], side: str) -> list[str]:
    return list(next(iter(model["seeds"].values()))[side]["layers"])


def _of_layer(model: Mapping[str, Any], side: str, layer: str, name: str) -> float | None:
    """The share of a class in a layer, the mean over the seeds."""
    values = [seed[side]["classes by layer"][layer].get(name) for seed in model["seeds"].values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean(model: Mapping[str, Any], side: str, what: str, key: Any) -> float | None:
    seeds = [seed[side][what] for seed in model["seeds"].values()]
    values = [one[key] for one in seeds if isinstance(one, list) or key in one]
    return sum(values) / len(values) if values else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
