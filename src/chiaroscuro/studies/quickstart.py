"""The first minutes: two CHIAR-Formers and full attention of the same size, trained alike and compared."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chiaroscuro.analysis.routing import trace_routing
from chiaroscuro.analysis.sampling import continue_text
from chiaroscuro.errors import UserError
from chiaroscuro.files import refuse_file, write_text
from chiaroscuro.report.routing_figure import save_png
from chiaroscuro.report.routing_html import render_html
from chiaroscuro.report.routing_terminal import print_routing
from chiaroscuro.report.visible import harmless
from chiaroscuro.studies.workspace import Workspace
from chiaroscuro.training import Recipe, read_records, train
from chiaroscuro.training.recipe import read_yaml, set_field

RECIPES = {name: Path(f"recipes/{name}.yaml") for name in ("small", "reach-small", "small-baseline")}
PROMPT = "Return a copy of the string with"
TEXT = (
    "Return a list of the words in the string, using sep as the delimiter string. If maxsplit is given, at most "
    "maxsplit splits are done, and the remainder of the string is returned as the final element of the list."
)


def run_quickstart(output: Path, console: Console) -> dict[str, Any]:
    """Train the models on the same tokens, print a comparison, and write the pictures.

    Args:
        output: the folder; an interrupted run in it is resumed, a finished one is shown again.
        console: where progress and results go.

    Returns:
        The figures of the runs and the paths of the pictures.

    Raises:
        UserError: the folder is a file, the recipes are missing, or a run fails.

    """
    output = output.expanduser()
    refuse_file(output, f"--output {output}")
    missing = [str(path) for path in RECIPES.values() if not path.is_file()]
    if missing:
        raise UserError(f"no {missing[0]} here: run quickstart from the top of a clone of the repository")
    figures: dict[str, Any] = {}
    for name, path in RECIPES.items():
        folder = output / name
        content = read_yaml(path, "recipe", "model")
        set_field(content, "trainer.output_dir", str(folder))
        recipe = Recipe.from_dict(content)
        begun = any(folder.glob("checkpoint-*"))
        figures[name] = train(recipe, resume=begun, console=console).as_dict()
    console.print(_comparison(figures))
    console.print(
        "One seed and a short run: docs/results.md has the comparison on WikiText-2, over two seeds. At 256 tokens a "
        "sequence attention is a small part of the work; docs/performance.md has what routing saves at which length.\n",
        style="dim",
    )
    routed = str(output / "small")
    workspace = Workspace(routed)
    sample = continue_text(workspace.model, workspace.tokenizer, PROMPT, max_new_tokens=60)
    console.print(f"A sample of {routed}:", markup=False)
    console.print(f"  {PROMPT}{harmless(sample.text)}\n", markup=False, highlight=False)
    trace = trace_routing(workspace.model, workspace.tokenizer, TEXT)
    print_routing(trace, console)
    page, picture = output / "routing.html", output / "routing.png"
    write_text(page, render_html(trace))
    save_png(trace, picture)
    where = f"{page} (hover it) and {picture}"
    console.print(f"\nWhere attention fell in that text: {where}", markup=False, highlight=False)
    return {**figures, "sample": PROMPT + sample.text, "page": str(page), "picture": str(picture)}


def _comparison(figures: dict[str, Any]) -> Table:
    tokens = {f"{run['tokens']:,}" for run in figures.values()}
    table = Table(
        *("model", "parameters", "attention", "val. ppl", "bits/byte", "training", "tokens/s"),
        title=f"{' and '.join(tokens)} tokens each; attention: of all tokens in all layers",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name, run in figures.items():
        table.add_row(
            name,
            f"{run['parameters']:,}",
            f"{_attention(Path(run['folder'])):.0%}",
            f"{run['perplexity']:.2f}",
            f"{run['bits_per_byte']:.4f}",
            f"{run['seconds']:.0f} s",
            f"{run['tokens_per_second']:,.0f}",
        )
    return table


def _attention(run: Path) -> float:
    """The share of tokens that went to attention in the last validation, mean over all layers."""
    last = [record for record in read_records(run / "metrics.jsonl") if record["kind"] == "validation"][-1]
    layers = last["layers"]
    sent = [s for layer in layers for n, s in zip(layer["operators"], layer["share"], strict=True) if n == "attention"]
    return sum(sent) / len(layers)
