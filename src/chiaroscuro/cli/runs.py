"""Commands that train, and that look at runs: train, sweep, quickstart, collapse, gates."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from chiaroscuro.cli.application import AsJson, Png, Run, command, print_json, refuse_missing
from chiaroscuro.errors import UserError

if TYPE_CHECKING:
    from chiaroscuro.training import Recipe


@command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A YAML recipe, such as recipes/small.yaml.", callback=refuse_missing("recipe"))
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Fields to change: model.attention_share=0.1 trainer.seed=1 …"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model by a recipe, or resume a run that was interrupted.

    The run's folder (trainer.output_dir) gets the recipe, metrics.jsonl, TensorBoard files, checkpoints, and at the end
    model/, which every other command takes. A resumed run ends with the same weights as one that was never interrupted.

    Example: chiaroscuro train recipes/small.yaml model.attention_share=0.5 trainer.output_dir=runs/half
    """
    from chiaroscuro.training import Recipe

    _run(Recipe.load(recipe, overrides or []), resume, as_json)


def _run(recipe: "Recipe", resume: bool, as_json: bool) -> None:
    """Train, and print how it ended; of several processes the main one speaks."""
    from accelerate import PartialState

    from chiaroscuro.report.tables import figures_table
    from chiaroscuro.training import train as train_by

    console = Console(stderr=as_json)
    result = train_by(recipe, resume=resume, console=console).as_dict()
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(result)
    else:
        console.print(figures_table(result))


@command()
def heal(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML recipe whose model is a retrofitted one, such as recipes/heal/smollm2.yaml.",
            callback=refuse_missing("recipe"),
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to change: trainer.steps=100 model.lora=8 …")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a retrofitted model a little, to say what its full-attention self says.

    The loss is the divergence from the model with everything looked at and kept (KL on the logits). By default LoRA on
    the attention learns, on rows of text, needles and copies, and is merged into the weights at the end; with
    model.lora=null all weights learn, and the loss has the text's cross-entropy, too. The run is one of chiaroscuro
    train: its folder, its records, and how it is resumed.

    Example: chiaroscuro heal recipes/heal/smollm2.yaml model.checkpoint=runs/smollm2-routed
    """
    from chiaroscuro.training import Recipe
    from chiaroscuro.training.recipe import RetrofitSection

    read = Recipe.load(recipe, overrides or [])
    if not isinstance(read.model, RetrofitSection):
        raise UserError(f"{recipe} trains another model: set model.architecture: retrofit and model.checkpoint")
    _run(read, resume, as_json)


@command()
def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="SWEEP",
            help="A YAML file, such as recipes/sweeps/NAME.yaml.",
            callback=refuse_missing("sweep"),
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="section.field=value …", help="Fields to change in the recipe that all runs share."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at once, one thread each (one per GPU or, without one, per core).", min=1, max=4096),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Do the runs on the machines of a Ray cluster (auto, host:port or ray://host:port) that share the "
            "sweep's folder.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train variants of a recipe, each with several seeds, and compare them.

    The file names a recipe, an output_dir, seeds, a baseline, and variants (fields that differ from the recipe) or a
    grid of values; docs/sweeps.md explains it. Finished runs are kept and interrupted ones resumed, so the same command
    continues a sweep; a run that fails does not stop the others. After every run results.json, table.md, table.csv and
    two plots are written again: mean, standard deviation, 95% interval, a paired test against the baseline, operations
    (exact protocol), time per step.

    Example: chiaroscuro sweep recipes/sweeps/wikitext2.yaml data.source=Salesforce/wikitext:wikitext-2-v1 --jobs 2
    """
    from chiaroscuro.report.sweep_table import print_sweep
    from chiaroscuro.studies.run_sweep import run_sweep

    console = Console(stderr=as_json)
    found = run_sweep(file, console, overrides=overrides or [], jobs=jobs, ray=ray)
    if as_json:
        print_json(found)
    else:
        print_sweep(found, console)
    if found["failed"]:
        raise UserError(f"{len(found['failed'])} failed: {'; '.join(found['failed'])}")


@command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the runs and the pictures.")] = Path("runs/quickstart"),
    as_json: AsJson = False,
) -> None:
    """Train `small`, `reach-small` and `small-baseline` on Python's documentation, and compare them.

    Run it from a clone: it reads their recipes in recipes/. If it is interrupted, the same command resumes; when it is
    done, the same command shows the results again.
    """
    from chiaroscuro.studies.quickstart import run_quickstart

    figures = run_quickstart(output, Console(stderr=as_json))
    if as_json:
        print_json(figures)


@command()
def collapse(
    folder: Run,
    floor: Annotated[float, typer.Option(help="An operator below this share has collapsed.", min=0, max=1)] = 0.01,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Show what share of the tokens each operator got over training, and which operators survived.

    Example: chiaroscuro collapse runs/three-operators --png collapse.png
    """
    from chiaroscuro.analysis.collapse import trace_collapse
    from chiaroscuro.files import write_bytes
    from chiaroscuro.report.tables import collapse_table, shares
    from chiaroscuro.training.records import read_run

    try:
        trace = trace_collapse(read_run(folder), floor)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if png is not None:
        from chiaroscuro.report.collapse_figure import draw_collapse

        write_bytes(png, draw_collapse(trace))
    if as_json:
        print_json(trace.to_dict())
        return
    console = Console(highlight=False)
    console.print(collapse_table(trace))
    console.print(f"all routed layers: {shares(trace.operators, trace.final_share)}")
    console.print(f"collapsed: {', '.join(trace.collapsed) or 'none'}")


@command()
def gates(folder: Run, png: Png = None, as_json: AsJson = False) -> None:
    """Show how the MetaRouter's gate moved over training, task by task.

    Example: chiaroscuro gates runs/mixed --png gates.png
    """
    from chiaroscuro.analysis.gates import gates_as_dict, trace_gates
    from chiaroscuro.files import write_bytes
    from chiaroscuro.report.tables import gates_table
    from chiaroscuro.training.records import read_run

    try:
        traced = trace_gates(read_run(folder))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if png is not None:
        from chiaroscuro.report.gate_figure import draw_gates

        write_bytes(png, draw_gates(traced))
    if as_json:
        print_json(gates_as_dict(traced))
    else:
        Console().print(gates_table(traced))
