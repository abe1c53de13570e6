"""The page that lies beside saved weights, and that the Hugging Face Hub shows: what a model is, and how it is loaded.

It says nothing that the configuration does not: what the model was trained on, and how well, its author adds.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from chiaroscuro.layers.registry import Entry, split_entry

CARD = "README.md"

_SEAL = "<!-- as chiaroscuro wrote it, SHA-256 of what stands above: {} -->\n"
"""Its last line, by which a page that its author has changed is told from one that may be written anew."""


def write_model_card(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the card of a model into a folder, unless one is there that is not as it was written: it is the author's.

    Args:
        model: a CHIAR-Former, or a retrofitted model.
        folder: where it is saved.

    """
    place = Path(folder) / CARD
    if place.exists() and not place.is_file():
        return
    if not place.exists() or _is_as_written(place.read_text(encoding="utf-8", errors="replace")):
        card = model_card(model)
        place.write_text(card + _seal(card), encoding="utf-8")


def _seal(card: str) -> str:
    return _SEAL.format(hashlib.sha256(card.encode()).hexdigest())


def _is_as_written(text: str) -> bool:
    *lines, last = text.splitlines(keepends=True) or [""]
    return last == _seal("".join(lines))


def model_card(model: Any) -> str:
    """The card of a model, in Markdown with the fields that the Hub reads."""
    config, kind = model.config, type(model).__name__
    task = "text-classification" if kind.endswith("SequenceClassification") else "text-generation"
    retrofitted = getattr(config, "chiaroscuro", None)
    facts = {"class": f"`{kind}`", "parameters": f"{model.num_parameters():,}", "layers": config.num_hidden_layers}
    facts |= _of_a_retrofit(retrofitted) if retrofitted else _of_a_chiar_former(config)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"pipeline_tag: {task}",
            "tags: [chiaroscuro, routed-attention]",
            "---",
            "",
            f"# A {config.num_hidden_layers}-layer model with routed attention",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "",
            "```python",
            *_loading(model, task, retrofitted),
            "```",
            "",
            "What it was trained on, and how well it does, is not known to the library that wrote this page.",
            "",
        ]
    )


def _loading(model: Any, task: str, retrofitted: Any) -> list[str]:
    """How the model is loaded: by an Auto class, or by its own if it has parts that no Auto class knows."""
    auto = "AutoModelForCausalLM" if task == "text-generation" else "AutoModelForSequenceClassification"
    if retrofitted or type(model).__name__.endswith(auto.removeprefix("AutoModel")):
        return [
            "import chiaroscuro  # pip install chiaroscuro",
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("this/folder")',
        ]
    own = type(model).__name__
    return [
        f"from chiaroscuro import {own}  # pip install chiaroscuro",
        "",
        f'model = {own}.from_pretrained("this/folder")',
    ]


def _of_a_retrofit(said: dict[str, Any]) -> dict[str, Any]:
    return {
        "routed layers": len(said["layers"]),
        "window, sinks": f"{said['window']}, {said['sinks']}",
        "look beyond the window": f"{said['attention_share']:.0%}",
        "kept to be seen from there": f"{said['kv_share']:.0%}",
        **{side: _router(said[name]) for side, name in (("who looks", "router"), ("who is kept", "kv_router"))},
    }


def _router(entry: Entry) -> str:
    name, options = split_entry(entry)
    history = options.get("history")
    return f"`{name}`" + ("" if history is None else f", whose thresholds follow {history:,} tokens of a row")


def _of_a_chiar_former(config: Any) -> dict[str, Any]:
    menus = dict.fromkeys(" · ".join(split_entry(entry)[0] for entry in menu) for menu in config.operators)
    facts = {"menus": ", ".join(f"`{menu}`" for menu in menus), "router": _router(config.router)}
    if config.routed_layers and config.follows_share:
        facts["share of the costliest operator"] = f"{config.attention_share:.0%}"
    if config.keeping_layers:
        facts["kept to be seen from beyond the window"] = f"{config.kv_share:.0%}"
    return facts
