"""Where to route: the harm of one layer alone, and the shares by layer that follow from it, against flat ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.model import ChiarForCausalLM
from chiaroscuro.model.fitting import fit
from chiaroscuro.report.evidence_figure import draw_layers
from chiaroscuro.studies.fitting import batches_of
from chiaroscuro.studies.workspace import Workspace

FIELDS = ("share", "length", "models", "retrofitted")
MODEL = dict.fromkeys(("checkpoint", "window", "sinks"), True)
"""Fields of a model, and whether they are needed."""

QUESTION = "Where is routing harmless?"
SIDES = ("look", "kept")


def measure(recipe: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """All models of the recipe; of a retrofitted one, what its report says."""
    found: dict[str, Any] = {}
    share, length = recipe["share"], recipe["length"]
    for name, given in recipe["models"].items():
        workspace = Workspace(given["checkpoint"], device="cpu")
        before: Any = workspace.config
        _, batches = batches_of(workspace, length=length)
        blocks = workspace.blocks("validation", length=length)[1]
        found[name] = {"full": evaluate_blocks(workspace.model, blocks).perplexity}
        for side in SIDES:
            for spread in (False, True):
                fields: Any = {"operators": [["local", "attention"]] * before.num_hidden_layers, "router": "random"}
                if side == "kept":
                    fields = {"attention_context": "kept", "kv_router": "random"}
                model = ChiarForCausalLM.from_pretrained(
                    workspace.path, window=given["window"], sinks=given["sinks"], **fields
                )
                fitted = fit(model, batches, **{side: share}, spread=spread)
                way = "spread" if spread else "flat"
                found[name][f"{side}, {way}"] = evaluate_blocks(model.eval(), blocks).perplexity
                if spread:
                    own = getattr(fitted, side)
                    found[name][side] = {i: {"harm": one.harm, "share": one.share} for i, one in own.items()}
                console.print(f"{name}, {side}, {way}: {found[name][f'{side}, {way}']:.2f}", highlight=False)
    for name, file in recipe["retrofitted"].items():
        report = json.loads(Path(file).read_text(encoding="utf-8"))
        found[name] = {"full": report["before"]["perplexity"]}
        routed = [side for side in SIDES if any(side in layer for layer in report["fit"]["layers"])]
        for side in SIDES:
            own = {layer["layer"]: layer[side] for layer in report["fit"]["layers"] if side in layer}
            if own and len(routed) == 1:  # of a copy with both sides it is the perplexity of neither
                found[name] |= {f"{side}, spread": report["after"]["perplexity"]}
            if own:
                found[name][side] = {i: {"harm": one["harm"], "share": one["share"]} for i, one in own.items()}
    return found


# ---- what follows from it ------------------------------------------------------------------------------------


def draw(found: Mapping[str, Any]) -> bytes:
    """The picture."""
    return draw_layers({name: {side: model[side] for side in SIDES if side in model} for name, model in found.items()})


def answer(found: Mapping[str, Any]) -> list[str]:
    """The answer and its figures, as Markdown."""
    lines = [
        "*Harm*: KL from the predictions of full attention to those with one side of one layer routed and all else "
        "whole, in nats a token. `--budget` gives each layer a share in proportion to the root of its harm; a *flat* "
        "share is the same everywhere.",
        "",
        "| | side | full attention | flat | spread | most harmful layers, and their shares | least harmful |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in found.items():
        for side in (side for side in SIDES if side in model):
            order = sorted(model[side].items(), key=lambda pair: -pair[1]["harm"])
            cells = [f"{model['full']:.2f}"]
            cells += [_perplexity(model, f"{side}, {way}") for way in ("flat", "spread")]
            cells += [", ".join(_layer(i, one) for i, one in part) for part in (order[:3], order[-1:])]
            lines.append(f"| {name} | {side} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _perplexity(model: Mapping[str, Any], key: str) -> str:
    return f"{model[key]:.2f} ({model[key] / model['full'] - 1:+.1%})" if key in model else "–"


def _layer(i: Any, one: Mapping[str, float]) -> str:
    return f"{i}: {one['harm']:.4f}, {one['share']:.0%}"
