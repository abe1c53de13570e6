"""Models that were trained at T, read at 2T and 4T: perplexity by position, and whether thresholds hold."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.analysis.routing_summary import describe_routing
from chiaroscuro.data import TokenBlocks, tokenize_corpus
from chiaroscuro.model import ChiarForCausalLM
from chiaroscuro.report.evidence_figure import draw_length
from chiaroscuro.studies.evaluation import first_blocks
from chiaroscuro.studies.workspace import Workspace

FIELDS = ("tokens", "lengths", "models")
QUESTION = "What happens at two and four times the length of training?"


def measure(recipe: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """All models of the recipe, on the same tokens."""
    found: dict[str, Any] = {}
    for name, checkpoint in recipe["models"].items():
        workspace = Workspace(checkpoint, device="cpu")
        model = ChiarForCausalLM.from_pretrained(workspace.path, max_position_embeddings=max(recipe["lengths"]))
        tokens = tokenize_corpus(workspace.corpus("validation"), workspace.tokenizer)["validation"]
        found[name] = {}
        for length in recipe["lengths"]:
            blocks = first_blocks(TokenBlocks(tokens, length), recipe["tokens"] // length)
            seen = evaluate_blocks(model.eval(), blocks, batch_size=1, window=1, output_routing=True)
            layers = describe_routing(seen.routings, model.config.hidden_size)["layers"]
            look = [layer["share"][-1] for layer in layers if len(layer["operators"]) > 1]
            kept = [layer["kept"] for layer in layers if layer.get("kept") is not None]
            figures = seen.figures()
            found[name][str(length)] = {
                "perplexity": figures["perplexity"],
                "positions": figures["positions"],
                "look": sum(look) / len(look) if look else None,
                "kept": sum(kept) / len(kept) if kept else None,
            }
            console.print(f"{name}, T = {length}: {figures['perplexity']:.2f}", highlight=False)
    return found


# ---- what follows from it ------------------------------------------------------------------------------------


def draw(found: Mapping[str, Any]) -> bytes:
    """The picture: perplexity by position, of the longest rows."""
    lines = {}
    for name, lengths in found.items():
        longest = lengths[max(lengths, key=int)]
        lines[name] = [(place["last"], place["perplexity"]) for place in longest["positions"]]
    trained = min(map(int, next(iter(found.values()))))
    return draw_length(lines, trained)


def answer(found: Mapping[str, Any]) -> list[str]:
    """The answer and its figures, as Markdown."""
    lengths = sorted(next(iter(found.values())), key=int)
    first, last = lengths[0], lengths[-1]
    rises = {name: each[last]["perplexity"] / each[first]["perplexity"] - 1 for name, each in found.items()}
    least, most = min(rises, key=lambda name: rises[name]), max(rises, key=lambda name: rises[name])
    lines = [
        f"From T = {int(first):,} to {int(last):,} the perplexity on the same tokens changes by {rises[least]:+.1%} "
        f"({least}) to {rises[most]:+.1%} ({most}). Shares are what the thresholds of training let through.",
        "",
        "| | " + " | ".join(f"T = {int(length):,}" for length in lengths) + " | look | kept |",
        "| --- |" + " --- |" * (len(lengths) + 2),
    ]
    for name, each in found.items():
        cells = [f"{each[length]['perplexity']:.2f}" for length in lengths]
        for side in ("look", "kept"):
            shares = [each[length][side] for length in lengths]
            cells.append("" if shares[0] is None else " → ".join(f"{share:.1%}" for share in shares))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]
