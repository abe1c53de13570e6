"""Thresholds for a trained model: a calibrated copy, or the two numbers that the paper takes from a baseline."""

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Subset

from chiaroscuro.analysis.routing_summary import measure_routing
from chiaroscuro.errors import UserError
from chiaroscuro.model.calibration import calibrate, paper_thresholds
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.studies.workspace import Workspace
from chiaroscuro.training import save_whole

LONGEST = 256
"""T where no recipe says one: enough for the entropies, and quick."""


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
        The share, and the routing of the same tokens by the new thresholds, ready for JSON.

    Raises:
        UserError: the folder exists, or the model or its text can't be calibrated.

    """
    if output.exists():
        raise UserError(f"--output {output} exists already: name another folder")
    workspace.language_model("calibrate")
    model = workspace.chiar("calibrate")
    length = workspace.length(most=LONGEST)
    _, blocks = workspace.blocks(split, length=length, source=source)
    taken = Subset(blocks, range(min(len(blocks), max(1, tokens // length))))
    batches = [
        {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        for batch in DataLoader(taken, batch_size=8)
    ]
    calibrate(model, batches, share, kv_share)
    save_whole(output, model, workspace.tokenizer, workspace.recipe)
    return {"attention_share": model.config.attention_share, **measure_routing(model, batches)}


def published_thresholds(workspace: Workspace, *, source: str | None = None) -> tuple[float, float]:
    """The paper's (τ_low, τ_high), from the embeddings of a trained baseline: see `paper_thresholds`."""
    model = workspace.language_model("calibrate")
    texts = workspace.corpus("validation", source).splits["validation"]["text"]
    rows = (workspace.tokenizer(row, add_special_tokens=False)["input_ids"] for row in texts)
    spectrum = model.config.spectrum if isinstance(model.config, ChiarConfig) else "orthonormal"
    return paper_thresholds(model, rows, spectrum=spectrum)
