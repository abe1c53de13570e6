"""The published rbf operator, without and with a causal mask: how close A is to the identity, and whether it leaks.

    chiaroscuro sweep recipes/sweeps/rbf.yaml && python -m chiaroscuro.studies.rbf

Measures the models that the sweep trained, on the validation split of WikiText-2: the weight that a token gives itself
in every layer, before training and after; itself and its copies; later tokens that are no copies; and the perplexity of
each model with its own mask and with the other one. A model that learned to read the future is lost without it. Figures
go to experiments/results/rbf/identity.json. In that sweep no operator before rbf mixes tokens; so the same weights in
the three-operator models of recipes/sweeps/wikitext2.yaml, if they were trained, go to three-operators.json beside it.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chiaroscuro import ChiarForCausalLM
from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.analysis.rbf import self_weights
from chiaroscuro.data import TokenBlocks
from chiaroscuro.errors import UserError
from chiaroscuro.files import write_text
from chiaroscuro.layers import RBFMixing
from chiaroscuro.studies.command import exit_code
from chiaroscuro.studies.workspace import Workspace
from chiaroscuro.training import Recipe

RUNS = Path("runs/sweeps/rbf")
THREE_OPERATORS = Path("runs/sweeps/wikitext2")
RESULTS = Path("experiments/results/rbf/identity.json")
BLOCKS = 128


def main() -> None:
    """Measure every run of the sweep, and write the results."""
    console = Console()
    folders = sorted(path.parent for path in RUNS.glob("*/seed-*/model"))
    if not folders:
        raise UserError(f"{RUNS} holds no trained model: run chiaroscuro sweep recipes/sweeps/rbf.yaml first")
    figures = [measure(folder) for folder in folders]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS, json.dumps(figures, indent=1) + "\n")
    for f in figures:
        console.print(
            f"{f['variant']} seed {f['seed']}: perplexity {f['perplexity']:.2f}, with the other mask "
            f"{f['perplexity_with_the_other_mask']:.2f}; weights {f['trained']}"
        )
    chosen = sorted(path.parent for path in THREE_OPERATORS.glob("three operators*/seed-*/model"))
    if chosen:
        weights = [measure_weights(folder) for folder in chosen]
        write_text(RESULTS.with_name("three-operators.json"), json.dumps(weights, indent=1) + "\n")


def measure_weights(folder: Path) -> dict[str, Any]:
    """One trained model with three operators to choose from."""
    recipe, model, _, batches = load(folder)
    return {
        "variant": folder.parent.name,
        "seed": recipe.trainer.seed,
        "trained": self_weights(model, batches),
    }


def load(folder: Path) -> tuple[Recipe, ChiarForCausalLM, TokenBlocks, list[torch.Tensor]]:
    """A run's recipe, its trained model, its validation split, and the first blocks of that."""
    workspace = Workspace(str(folder), device="cpu")
    recipe, model = workspace.recipe, workspace.model
    assert recipe is not None and isinstance(model, ChiarForCausalLM)
    _, blocks = workspace.blocks("validation")
    return recipe, model, blocks, [blocks[i]["input_ids"][None] for i in range(min(BLOCKS, len(blocks)))]


@torch.no_grad()
def measure(folder: Path) -> dict[str, Any]:
    """One trained model."""
    recipe, model, blocks, batches = load(folder)
    torch.manual_seed(recipe.trainer.seed)
    untrained = ChiarForCausalLM(model.config).eval()
    own = evaluate_blocks(model, blocks).perplexity
    trained, causal = self_weights(model, batches), model.config.rbf_causal
    set_mask(model, not causal)
    return {
        "variant": folder.parent.name,
        "seed": recipe.trainer.seed,
        "causal": causal,
        "perplexity": own,
        "perplexity_with_the_other_mask": evaluate_blocks(model, blocks).perplexity,
        "untrained": self_weights(untrained, batches),
        "trained": trained,
    }


def set_mask(model: ChiarForCausalLM, causal: bool) -> None:
    """Set whether rbf is causal."""
    for module in model.modules():
        if isinstance(module, RBFMixing):
            module.options = replace(module.options, rbf_causal=causal)


if __name__ == "__main__":
    sys.exit(exit_code(main))
