"""The two comparisons on WikiText-2 that docs/results.md reports, trained, measured and written by one command.

    python -m chiaroscuro.studies.wikitext2

1. `small` against `small-baseline`: 5.1 M tokens each, `bpe:8192`, two seeds.
2. The model with attention alone on every menu, with its own feed-forward and with Llama's, against Hugging Face's
   `LlamaForCausalLM` of its size: is it an ordinary transformer? 2.5 M tokens each, `bpe:4096`, two seeds; also for
   fewer and more steps, and at other learning rates.

A run that is finished is neither trained nor measured again, one that was interrupted goes on. Five hours on one
core; figures go to experiments/results/wikitext2.json, tables to docs/results.md.
"""

import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.analysis.routing_summary import describe_routing
from chiaroscuro.files import write_text
from chiaroscuro.report.tables import shares, three
from chiaroscuro.studies.command import exit_code
from chiaroscuro.studies.workspace import Workspace
from chiaroscuro.training import Recipe, train

SEEDS = (0, 1)
VARIANTS: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "": ([], SEEDS),
    "-short": (["trainer.steps=600"], SEEDS),
    "-long": (["trainer.steps=2800"], (0,)),
    "-lr1e-3": (["trainer.learning_rate=1e-3"], (0,)),
    "-lr4e-3": (["trainer.learning_rate=4e-3"], (0,)),
}
"""How the second comparison was run: as the recipes say, for fewer and for more steps, at two more learning rates."""
SIDES: dict[str, tuple[str, list[str]]] = {
    "ordinary": ("recipes/wikitext2-ordinary.yaml", []),
    "swiglu": ("recipes/wikitext2-ordinary.yaml", ["model.feed_forward=swiglu"]),
    "llama": ("recipes/wikitext2-llama.yaml", []),
}
"""What the second comparison compares."""
RUNS: dict[str, tuple[str, list[str], tuple[int, ...]]] = {
    "small": ("recipes/wikitext2-small.yaml", [], SEEDS),
    "small-baseline": ("recipes/wikitext2-small.yaml", ["model.preset=small-baseline"], SEEDS),
} | {
    f"{name}{variant}": (path, [*own, *overrides], seeds)
    for name, (path, own) in SIDES.items()
    for variant, (overrides, seeds) in VARIANTS.items()
}
RESULTS = Path("experiments/results/wikitext2.json")
PAGE = Path("docs/results.md")


def main() -> None:
    """Train what is missing, measure everything, and write both files."""
    console = Console()
    figures = [run_one(name, seed, console) for name, (_, _, seeds) in RUNS.items() for seed in seeds]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS, json.dumps(figures, indent=1) + "\n")
    write_text(PAGE, page(figures))
    console.print(f"wrote {RESULTS} and {PAGE}")


def run_one(name: str, seed: int, console: Console) -> dict[str, Any]:
    """Train one model unless it is trained already, and measure it on validation and test."""
    path, overrides, _ = RUNS[name]
    folder = Path(f"runs/wikitext2-{name}-{seed}")
    recipe = Recipe.load(path, [*overrides, f"trainer.seed={seed}", f"trainer.output_dir={folder}"])
    measured = folder / "measured.json"
    if (folder / "recipe.yaml").is_file():
        recipe.refuse_to_resume(Recipe.load(folder / "recipe.yaml"))
    if measured.is_file():
        return json.loads(measured.read_text(encoding="utf-8"))
    if not (folder / "model").is_dir():
        train(recipe, resume=any(folder.glob("checkpoint-*")), console=console)
    workspace = Workspace(str(folder), device="cpu")
    model = workspace.model
    figures: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "tokens": recipe.steps() * recipe.tokens_per_step(),
        "steps": recipe.steps(),
    }
    for split in ("validation", "test"):
        _, blocks = workspace.blocks(split)
        evaluation = evaluate_blocks(model, blocks, output_routing=workspace.routes)
        figures[split] = evaluation.figures()
        if workspace.routes:
            figures[split] |= describe_routing(evaluation.routings, model.config.hidden_size, model.config.spectrum)
        console.print(f"{folder} {split}: perplexity {evaluation.perplexity:.2f}")
    write_text(measured, json.dumps(figures))
    return figures


def page(figures: list[dict[str, Any]]) -> str:
    """The tables, as Markdown."""
    rows = {(f["model"], f["seed"]): f for f in figures}
    small = [_row(rows[name, seed]) for name in ("small", "small-baseline") for seed in SEEDS]
    routed = [line for seed in SEEDS for line in _routing_rows(rows["small", seed])]
    ordinary = [
        _row(rows[f"{name}{variant}", seed])
        for variant, (_, seeds) in VARIANTS.items()
        for name in SIDES
        for seed in seeds
    ]
    ratios = [
        (
            name,
            variant,
            [_perplexity(rows[f"{name}{variant}", s]) / _perplexity(rows[f"llama{variant}", s]) for s in seeds],
        )
        for name in SIDES
        if name != "llama"
        for variant, (_, seeds) in VARIANTS.items()
    ]
    costs = [_perplexity(rows["small", s]) / _perplexity(rows["small-baseline", s]) for s in SEEDS]
    null = " / ".join(f"{h:.3f}" for h in rows["small", SEEDS[0]]["validation"]["null_entropy"])
    header = "| model | seed | parameters | tokens | val. ppl | test ppl | val. bits/byte | test bits/byte |"
    rule = "|---|---|---|---|---|---|---|---|"
    return "\n".join(
        [
            "# Results on WikiText-2",
            "",
            "Written by `python -m chiaroscuro.studies.wikitext2` from `experiments/results/wikitext2.json`.",
            "Perplexity over the paper's blocks (T + 1 tokens that overlap by one, no context across blocks), per",
            "token of the model's own tokenizer: compare only within a table. Bits per byte compare everywhere.",
            "CPU, one thread, float32. The runs shared a machine with other work, so no times are reported.",
            "",
            "## `small` against `small-baseline`",
            "",
            "`recipes/wikitext2-small.yaml`: the same tokens in the same order, steps, learning rate and tokenizer",
            "(`bpe:8192`), T = 256; the embedding norm is on in both. `small` sends a quarter of the tokens of four of",
            "its six layers to attention. Its first layer sends none (so it has 3% fewer parameters), its last all,",
            "and it has a MetaRouter.",
            "",
            header,
            rule,
            *small,
            "",
            f"Routing costs {_percent(costs)} in validation perplexity (per seed: {_each(costs)}).",
            "That is the cost in quality. For the savings in time and memory see [performance.md](performance.md).",
            "",
            "Where attention went, on the validation split. H is the spectral entropy at the layer's input, as",
            f"5 / 50 / 95 percentiles; white noise of the same width has {null}.",
            "",
            "| seed | layer | share per operator | H |",
            "|---|---|---|---|",
            *routed,
            "",
            "The MetaRouter's gate g (causal), mean over the validation tokens: "
            + ", ".join(f"{rows['small', s]['validation']['gate']:.3f} (seed {s})" for s in SEEDS)
            + "; it started at 0.881. The paper's settles near 0.22.",
            "",
            "## Is the model with attention alone an ordinary transformer?",
            "",
            "`recipes/wikitext2-ordinary.yaml` against `recipes/wikitext2-llama.yaml`: `operators: [[attention]] × 5`",
            "without the embedding norm, against Hugging Face's `LlamaForCausalLM` of the same size, tokens, steps,",
            "learning rate, tied head and initialisation; `bpe:4096`, T = 128. They differ in the norm (LayerNorm,",
            "RMSNorm), the biases (all, none) and the feed-forward: GELU, which is the paper's, against SwiGLU.",
            "`swiglu` is our model with `model.feed_forward=swiglu`: then only norm and biases differ.",
            "",
            header,
            rule,
            *ordinary,
            "",
            "Our validation perplexity against Llama's:",
            "",
            "| model | run | mean | per seed | Llama no more than 3% better, in every seed? |",
            "|---|---|---|---|---|",
            *(
                f"| `{name}` | {_variant(variant)} | {_percent(each)} | {_each(each)} "
                f"| {'yes' if max(each) <= 1.03 else 'no'} |"
                for name, variant, each in ratios
            ),
            "",
            "The paper's feed-forward against the gated one, `ordinary` against `swiglu`, as the recipes say: "
            + _each([_perplexity(rows["ordinary", s]) / _perplexity(rows["swiglu", s]) for s in SEEDS])
            + ".",
            "",
            "What we compute *is* an ordinary transformer: with our weights copied into it, Hugging Face's",
            "`GPTNeoXForCausalLM` (LayerNorm, GELU, biases) gives the same logits, loss and gradients, and with",
            '`feed_forward="swiglu"` its Llama does, given LayerNorms and biases (`tests/model/test_ordinary.py`).',
            "The tables therefore compare those parts.",
            "",
        ]
    )


def _variant(variant: str) -> str:
    return f"`{' '.join(VARIANTS[variant][0])}`" if variant else "as the recipes say"


def _perplexity(figures: dict[str, Any]) -> float:
    return figures["validation"]["perplexity"]


def _row(f: dict[str, Any]) -> str:
    cells = [f"`{f['model']}`", f"{f['seed']}", f"{f['parameters']:,}", f"{f['tokens']:,}"]
    cells += [f"{f[split]['perplexity']:.2f}" for split in ("validation", "test")]
    cells += [f"{f[split]['bits_per_byte']:.4f}" for split in ("validation", "test")]
    return "| " + " | ".join(cells) + " |"


def _routing_rows(f: dict[str, Any]) -> list[str]:
    return [
        f"| {f['seed']} | {layer['layer']} | {shares(layer['operators'], layer['share'])} | {three(layer['entropy'])} |"
        for layer in f["validation"]["layers"]
    ]


def _percent(ratios: list[float]) -> str:
    excess = [100 * (ratio - 1) for ratio in ratios]
    spread = f" ± {stdev(excess) / math.sqrt(len(excess)):.1f} (standard error)" if len(excess) > 1 else " (one seed)"
    return f"{mean(excess):+.1f}%{spread}"


def _each(ratios: list[float]) -> str:
    return ", ".join(f"{100 * (ratio - 1):+.1f}%" for ratio in ratios)


if __name__ == "__main__":
    sys.exit(exit_code(main))
