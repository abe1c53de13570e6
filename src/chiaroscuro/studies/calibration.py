"""Thresholds for a trained model: a calibrated copy, or the two numbers that the paper takes from a baseline."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from chiaroscuro.analysis.routing_summary import measure_routing
from chiaroscuro.errors import UserError
from chiaroscuro.files import refuse_unwritable
from chiaroscuro.model import ChiarPreTrainedModel
from chiaroscuro.model.calibration import paper_thresholds
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.retrofitting.calibration import calibrate
from chiaroscuro.retrofitting.inside import watching
from chiaroscuro.retrofitting.routed_model import FIELD, RoutedModel
from chiaroscuro.studies.workspace import Workspace
from chiaroscuro.training import save_whole

LONGEST = 256
"""T where no recipe says one: enough for the entropies, and quick."""

LONGEST_RETROFITTED = 1024
"""T likewise of a retrofitted model, whose scores read what a layer's tokens have seen from far."""


def calibrate_copy(
    workspace: Workspace,
    output: Path,
    *,
    share: float | None = None,
    kv_share: float | None = None,
    source: str | None = None,
    split: str = "train",
    tokens: int = 65536,
) -> dict[str, Any]:
    """Save a copy of a model whose layers send a share of the tokens of its text to attention.

    Args:
        workspace: the model.
        output: the folder of the copy; it must not exist.
        share: ρ; the model's own unless given.
        kv_share: the share that is kept; the model's own unless given.
        source: another text than the recipe's.
        split: the split to calibrate on.
        tokens: how many to take, from the split's beginning.

    Returns:
        The share, and the routing of the same tokens by the new thresholds, ready for JSON; of a retrofitted model the
        shares that looked and that were kept, by layer.

    Raises:
        UserError: the folder exists, or the model or its text can't be calibrated.

    """
    if output.exists():
        raise UserError(f"--output {output} exists already: name another folder")
    refuse_unwritable(output)
    model: Any = workspace.language_model("calibrate")
    retrofitted = isinstance(model, RoutedModel)
    if not retrofitted and not isinstance(model, ChiarPreTrainedModel):
        raise UserError(
            f"calibrate needs a CHIAR-Former or a retrofitted model, and {workspace.name} is a {type(model).__name__}"
        )
    length = workspace.length(most=LONGEST_RETROFITTED if retrofitted else LONGEST)
    _, blocks = workspace.blocks(split, length=length, source=source)
    taken = Subset(blocks, range(min(len(blocks), max(1, tokens // length))))
    batches = [
        {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        for batch in DataLoader(taken, batch_size=1 if retrofitted else 8)
    ]
    calibrate(model, batches, share, kv_share)
    save_whole(output, model, workspace.tokenizer, workspace.recipe)
    if not retrofitted:
        return {"attention_share": model.config.attention_share, **measure_routing(model, batches)}
    with watching(model) as seen, torch.no_grad():
        for batch in batches:
            on_device = {name: value.to(model.device) for name, value in batch.items()}
            model(**on_device, use_cache=False, logits_to_keep=1)
    said = getattr(model.config, FIELD)
    shares = {name: said[name] for name in ("attention_share", "kv_share")}
    return {**shares, "looked": seen.look, "kept": seen.kept}


def published_thresholds(workspace: Workspace, *, source: str | None = None) -> tuple[float, float]:
    """The paper's (τ_low, τ_high), from the embeddings of a trained baseline: see `paper_thresholds`."""
    model = workspace.language_model("calibrate")
    texts = workspace.corpus("validation", source).splits["validation"]["text"]
    rows = (workspace.tokenizer(row, add_special_tokens=False)["input_ids"] for row in texts)
    spectrum = model.config.spectrum if isinstance(model.config, ChiarConfig) else "orthonormal"
    return paper_thresholds(model, rows, spectrum=spectrum)
