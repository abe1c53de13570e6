"""Who should look far, and who should be kept to be seen from far: a trained full-attention model, routed afterwards.

    chiaroscuro train FULL.yaml && python -m chiaroscuro.studies.near_and_far RUN [--window 64] [--out RESULTS.json]

The model of the run, of full attention in every layer, is given a window and sinks, and nothing is trained any more. In
every layer a share of its tokens looks beyond the window, or is kept to be seen from beyond it, or both, as routers of
each kind decide: by chance, by the spectral entropy, by the norm, and by scores that are fitted on the training split.
Measured is the loss of each on the validation split against the full model's, on all tokens and on recall tokens, or of
a task the accuracy; and the attention operations and the cache that are left of full attention's, by count.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from chiaroscuro import ChiarConfig, ChiarForCausalLM, fit
from chiaroscuro.analysis.classification import evaluate_targets
from chiaroscuro.analysis.flops import count_flops
from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.data.tasks import PadToLongest
from chiaroscuro.errors import UserError
from chiaroscuro.files import write_text
from chiaroscuro.model.calibration import calibrate
from chiaroscuro.studies.workspace import Workspace

ROUTERS = ("random", "threshold", "norm", "fitted")
BATCHES, BATCH = 16, 4
"""What scores are fitted and thresholds set on: batches of so many sequences of the training split."""


def main(arguments: list[str] | None = None) -> int:
    """Route the model in every way, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m chiaroscuro.studies.near_and_far", description=__doc__)
    parser.add_argument("run", help="the folder of a run whose model has full attention in every layer")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.25, help="that looks, and that is kept")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/near-and-far.json"))
    options = parser.parse_args(arguments)
    try:
        figures = study(options.run, options.window, options.sinks, options.share)
        write_text(options.out, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def study(run: str, window: int, sinks: int, share: float) -> dict[str, Any]:
    """The full model and every routed one.

    Raises:
        UserError: no such run, or its model has something else than full attention in a layer.

    """
    workspace, console = Workspace(run, device="cpu"), Console()
    full = workspace.model
    if not isinstance(full, ChiarForCausalLM) or any(menu != ["attention"] for menu in full.config.menus):
        raise UserError(f"{run}: the study routes a model that has full attention in every layer")
    batches = list(_batches(workspace))
    figures: dict[str, Any] = {"run": run, "window": window, "sinks": sinks, "share": share, "models": []}
    length = workspace.length()
    whole = count_flops(full.config, length)
    for sides, router in _variants():
        model = full if router is None and sides == "full" else route(full, sides, router, window, sinks)
        if model is not full:
            look = {"look": share, "both": share, "kept": 1.0, "nobody": 0.0}[sides]
            kept = {"look": 1.0, "both": share, "kept": share, "nobody": 0.0}[sides]
            if router == "fitted":
                model.set_attention_share(look)
                fit(model, batches, look=None if sides == "kept" else look, kept=None if sides == "look" else kept)
            else:
                calibrate(model, batches, look, kv_share=kept if model.kv_thresholds() else None)
        counted = count_flops(model.config, length)
        found = {
            "sides": sides,
            "router": router,
            "attention_scores": counted.by_operator["attention scores"] / whole.by_operator["attention scores"],
            "cache": counted.numbers_kept / whole.numbers_kept,
            **_measure(workspace, model, window),
        }
        figures["models"].append(found)
        console.print({name: value for name, value in found.items() if not isinstance(value, list)})
    return figures


def route(full: ChiarForCausalLM, sides: str, router: str | None, window: int, sinks: int) -> ChiarForCausalLM:
    """The same weights, with the far part routed on the given sides."""
    fields = full.config.to_dict() | {
        "operators": [["local", "attention"]] * len(full.config.menus),
        "window": window,
        "sinks": sinks,
        "attention_context": "all" if sides == "look" else "kept",
        "router": router if router is not None and sides in ("look", "both") else "random",
        "kv_router": router if router is not None and sides in ("kept", "both") else "random",
    }
    model = ChiarForCausalLM(ChiarConfig.from_dict(fields))
    lacking = model.load_state_dict(full.state_dict(), strict=False)
    assert not lacking.unexpected_keys and all("router" in name for name in lacking.missing_keys)
    return model.eval()


def _variants() -> Iterator[tuple[str, str | None]]:
    yield "full", None
    yield "nobody", None
    for sides in ("look", "kept", "both"):
        for router in ROUTERS:
            yield sides, router


def _batches(workspace: Workspace) -> Iterator[dict[str, Tensor]]:
    """Sequences of the training split."""
    if workspace.has_targets:
        _, rows = workspace.target_rows("train")
        collate = PadToLongest(workspace.tokenizer.pad_token_id)
        for first in range(0, BATCHES * BATCH * 4, BATCH * 4):
            batch = collate([rows[i] for i in range(first, first + BATCH * 4)])
            yield {name: batch[name] for name in ("input_ids", "attention_mask")}
    else:
        _, blocks = workspace.blocks("train")
        chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[: BATCHES * BATCH]
        for some in chosen.split(BATCH):
            yield {"input_ids": torch.stack([blocks[int(i)]["input_ids"] for i in some])}


def _measure(workspace: Workspace, model: ChiarForCausalLM, window: int) -> dict[str, Any]:
    if workspace.has_targets:
        _, rows = workspace.target_rows("validation")
        return evaluate_targets(model, rows, PadToLongest(workspace.tokenizer.pad_token_id), batch_size=32).figures()
    _, blocks = workspace.blocks("validation")
    return evaluate_blocks(model, blocks, batch_size=4, window=window).figures()


if __name__ == "__main__":
    sys.exit(main())
