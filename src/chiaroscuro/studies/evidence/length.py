"""Models that were trained at T, read at 2T and 4T: perplexity by position, and whether thresholds hold."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.analysis.routing_summary import describe_routing
from chiaroscuro.data import TokenBlocks, tokenize_corpus
from chiaroscuro.model import ChiarForCausalLM
from chiaroscuro.report.evidence_figure import draw_length
from chiaroscuro.studies.evaluation import first_blocks
from chiaroscuro.studies.statistics import compare_ratios
from chiaroscuro.studies.workspace import Workspace

FIELDS = ("tokens", "lengths", "seeds", "models")
QUESTION = "What happens at two and four times the length of training?"


def measure(recipe: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """All models of the recipe, by seed and length, on the same tokens."""
    found: dict[str, Any] = {}
    for name, checkpoint in recipe["models"].items():
        found[name] = {}
        for seed in recipe["seeds"]:
            found[name][str(seed)] = _by_length(checkpoint.format(seed=seed), recipe["lengths"], recipe["tokens"])
            console.print(f"{name}, seed {seed}", highlight=False)
    return found


def _by_length(checkpoint: str, lengths: Sequence[int], count: int) -> dict[str, Any]:
    workspace = Workspace(checkpoint, device="cpu")
    model = ChiarForCausalLM.from_pretrained(workspace.path, max_position_embeddings=max(lengths))
    tokens = tokenize_corpus(workspace.corpus("validation"), workspace.tokenizer)["validation"]
    found = {}
    for length in lengths:
        blocks = first_blocks(TokenBlocks(tokens, length), count // length)
        seen = evaluate_blocks(model.eval(), blocks, batch_size=1, window=1, output_routing=True)
        layers = describe_routing(seen.routings, model.config.hidden_size, model.config.spectrum)["layers"]
        look = [layer["share"][-1] for layer in layers if len(layer["operators"]) > 1]
        kept = [layer["kept"] for layer in layers if layer.get("kept") is not None]
        figures = seen.figures()
        found[str(length)] = {
            "perplexity": figures["perplexity"],
            "positions": figures["positions"],
            "look": sum(look) / len(look) if look else None,
            "kept": sum(kept) / len(kept) if kept else None,
        }
    return found


# ---- what follows from it ------------------------------------------------------------------------------------


def draw(found: Mapping[str, Any]) -> bytes:
    """The picture: perplexity by position, of the longest rows, the mean over seeds."""
    lines = {}
    for name, seeds in found.items():
        longest = [each[max(each, key=int)]["positions"] for each in seeds.values()]
        lines[name] = [(same[0]["last"], _mean(same, "perplexity")) for same in zip(*longest, strict=True)]
    trained = min(int(length) for seeds in found.values() for each in seeds.values() for length in each)
    return draw_length(lines, trained)


def answer(found: Mapping[str, Any]) -> list[str]:
    """The answer and its figures, as Markdown."""
    seeds = list(next(iter(found.values())).values())
    lengths = sorted(seeds[0], key=int)
    first, last = lengths[0], lengths[-1]
    rises = {
        name: compare_ratios(*([each[length]["perplexity"] for each in own.values()] for length in (last, first)))
        for name, own in found.items()
    }
    least, most = min(rises, key=lambda name: rises[name].mean), max(rises, key=lambda name: rises[name].mean)
    lines = [
        f"From T = {int(first):,} to {int(last):,} the perplexity on the same tokens changes by "
        f"{rises[least].mean - 1:+.1%} ({least}) to {rises[most].mean - 1:+.1%} ({most}), the mean over {len(seeds)} "
        f"{'seed' if len(seeds) == 1 else 'seeds'}; in brackets, the 95% interval of the change. Shares are what the "
        "thresholds of training let through.",
        "",
        "| | " + " | ".join(f"T = {int(length):,}" for length in lengths) + " | change | look | kept |",
        "| --- |" + " --- |" * (len(lengths) + 3),
    ]
    for name, own in found.items():
        of = {length: [each[length] for each in own.values()] for length in lengths}
        cells = [f"{_mean(of[length], 'perplexity'):.2f}" for length in lengths]
        rise = rises[name]
        interval = "" if rise.low is None or rise.high is None else f" ({rise.low - 1:+.1%} to {rise.high - 1:+.1%})"
        cells.append(f"{rise.mean - 1:+.1%}{interval}")
        for side in ("look", "kept"):
            chosen = of[first][0][side] is not None
            cells.append(" → ".join(f"{_mean(of[length], side):.1%}" for length in lengths) if chosen else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _mean(of: Sequence[Mapping[str, Any]], key: str) -> float:
    return fmean(one[key] for one in of)
