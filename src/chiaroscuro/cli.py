"""The command line: one function a command, each a few lines around a function of the library.

A `UserError`, whoever raises it, becomes one line on standard error and exit code 2. With `--json` standard output
holds one JSON object and nothing else.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

# Before anything of Hugging Face is imported, which reads them once: nothing phones home.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from chiaroscuro.allocator import keep_freed_memory
from chiaroscuro.config import ChiarConfig
from chiaroscuro.errors import UserError
from chiaroscuro.model import ChiarForCausalLM

if TYPE_CHECKING:
    from chiaroscuro.data import Corpus

app = typer.Typer(
    name="chiaroscuro",
    help="Language models that spend attention only where a token needs it (CHIAR-Former, arXiv 2606.08327).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[
    str,
    typer.Argument(help="A model's folder, a run's folder (its model/ is meant), or a Hub name owner/name."),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="python-docs, a folder with train/validation/test text or parquet files, or a Hub name "
        "owner/name:config. Unless given: what the run's recipe says.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Share = Annotated[
    float | None,
    typer.Option(help="Turn the dial first: route this share of tokens (0 to 1) to attention."),
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, such as recipes/small.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Fields to set otherwise: model.attention_share=0.1 trainer.seed=1 …"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model by a recipe, or go on with a run that was interrupted.

    The run's folder (trainer.output_dir) gets the recipe, metrics.jsonl, TensorBoard files, checkpoints, and at the end
    model/, which every other command takes. A resumed run ends with the weights of an uninterrupted one.

    Example: chiaroscuro train recipes/small.yaml model.attention_share=0.5 trainer.output_dir=runs/half
    """
    from chiaroscuro.training import Recipe
    from chiaroscuro.training import train as run

    console = Console(stderr=as_json)
    result = run(Recipe.load(recipe, overrides or []), resume=resume, console=console).as_dict()
    if as_json:
        _print_json(result)
    else:
        console.print(_figures_table(result))


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Source = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    length: Annotated[int | None, typer.Option(help="T, tokens that the model reads at once.")] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Move the window by so many tokens and count only what is new: more context for every token, at "
            "T/stride times the work. Unless given: the paper's blocks, which overlap by one."
        ),
    ] = None,
    share: Share = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.", min=1)] = 8,
    as_json: AsJson = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on a text.

    Example: chiaroscuro evaluate runs/small --split test --stride 64
    """
    from chiaroscuro.analysis.perplexity import evaluate_blocks
    from chiaroscuro.data import TokenBlocks, tokenize_corpus
    from chiaroscuro.training import describe_routing

    model, tokenizer = _load(checkpoint, share)
    recipe = _recipe_of(checkpoint)
    if length is None:
        length = recipe.data.sequence_length if recipe else model.config.max_position_embeddings
    if length > model.config.max_position_embeddings:
        raise UserError(
            f"--length {length} is more than the model's max_position_embeddings="
            f"{model.config.max_position_embeddings}: take a shorter one"
        )
    corpus = _corpus(data, recipe, split)
    blocks = TokenBlocks(tokenize_corpus(corpus, tokenizer)[split], length, stride)
    routes = isinstance(model.config, ChiarConfig)
    with _bar("evaluating", len(blocks), as_json) as bar:
        result = evaluate_blocks(
            model, blocks, batch_size=batch_size, output_routing=routes, progress=lambda n: bar.advance(TaskID(0), n)
        )
    figures: dict[str, Any] = {
        "checkpoint": checkpoint,
        "data": corpus.name,
        "split": split,
        "length": length,
        "stride": stride or length,
        **result.figures(),
    }
    if routes:
        figures |= describe_routing(result.routings, model.config.hidden_size)
    if as_json:
        _print_json(figures)
        return
    console = Console()
    console.print(_figures_table({k: v for k, v in figures.items() if k not in ("layers", "null_entropy")}))
    if routes:
        console.print(_routing_table(figures["layers"], figures["null_entropy"]))


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to add at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0 for all.", min=0)] = 50,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    share: Share = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text.

    Example: chiaroscuro generate runs/small "The function returns" --max-new-tokens 60
    """
    from chiaroscuro.analysis.sampling import continue_text

    model, tokenizer = _load(checkpoint, share)
    text = _text(prompt)
    result = continue_text(
        model, tokenizer, text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    if as_json:
        _print_json({"prompt": text, "continuation": result.text, **result.figures()})
        return
    Console(highlight=False).print(f"[bold]{_escape(text)}[/bold]{_escape(result.text)}", soft_wrap=True)


@app.command()
def calibrate(
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the calibrated copy of the model. Not needed for --method paper."),
    ] = None,
    share: Annotated[float | None, typer.Option(help="ρ; the model's own attention_share unless given.")] = None,
    data: Source = None,
    split: Annotated[str, typer.Option(help="The split to calibrate on.")] = "train",
    tokens: Annotated[int, typer.Option(help="How many tokens to take, from the split's beginning.", min=1)] = 65536,
    method: Annotated[
        str,
        typer.Option(
            help="data: thresholds of every layer at quantiles of the entropies that it sees. paper: the 33rd and 67th "
            "percentile of the entropy of a trained baseline's embeddings, printed to put into a recipe."
        ),
    ] = "data",
    as_json: AsJson = False,
) -> None:
    """Set a model's thresholds from data, so that each layer routes the share of tokens that you ask for.

    Example: chiaroscuro calibrate runs/small --share 0.1 --output runs/small-10
    """
    from torch.utils.data import DataLoader, Subset

    from chiaroscuro.data import TokenBlocks, tokenize_corpus
    from chiaroscuro.training import measure_routing, save_whole
    from chiaroscuro.training.calibration import calibrate as set_thresholds
    from chiaroscuro.training.calibration import paper_thresholds

    if method not in ("data", "paper"):
        raise UserError(f"--method {method}: choose data or paper")
    if (method == "data") != (output is not None):
        raise UserError("--output goes with --method data: name a folder for the calibrated copy of the model")
    if output is not None and output.exists():
        raise UserError(f"--output {output} exists already: name another folder")
    model, tokenizer = _load(checkpoint)
    recipe = _recipe_of(checkpoint)
    corpus = _corpus(data, recipe, split)
    if method == "paper":
        rows = (tokenizer(row, add_special_tokens=False)["input_ids"] for row in corpus.splits["validation"]["text"])
        low, high = paper_thresholds(model, rows)
        if as_json:
            _print_json({"entropy_thresholds": [low, high]})
        else:
            print(f"calibration: {{method: fixed, thresholds: [{low:.4f}, {high:.4f}]}}")
        return
    model = _chiar(model, "calibrate")
    assert output is not None  # checked above, for this method
    length = recipe.data.sequence_length if recipe else min(256, model.config.max_position_embeddings)
    blocks = TokenBlocks(tokenize_corpus(corpus, tokenizer)[split], length)
    taken = Subset(blocks, range(min(len(blocks), max(1, tokens // length))))
    batches = [batch["input_ids"] for batch in DataLoader(taken, batch_size=8)]
    set_thresholds(model, batches, share)
    save_whole(output, model, tokenizer)
    measured = measure_routing(model, batches)
    if as_json:
        _print_json({"output": str(output), "attention_share": model.config.attention_share, **measured})
        return
    console = Console()
    console.print(f"calibrated to a share of {model.config.attention_share:g}, saved as {output}")
    console.print(_routing_table(measured["layers"], measured["null_entropy"]))


@app.command()
def route(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Argument(help="The text to look at; - reads standard input.")],
    html: Annotated[Path | None, typer.Option(help="Write a page that one can hover.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a figure.")] = None,
    share: Share = None,
    as_json: AsJson = False,
) -> None:
    """Show which tokens of a text went to which operator, and their spectral entropy.

    Example: chiaroscuro route runs/small "Return a list of the words in the string." --html page.html
    """
    from chiaroscuro.analysis.routing import trace_routing
    from chiaroscuro.report.files import write_text
    from chiaroscuro.report.routing_figure import save_png
    from chiaroscuro.report.routing_html import render_html
    from chiaroscuro.report.routing_terminal import print_routing

    model, tokenizer = _load(checkpoint, share)
    trace = trace_routing(_chiar(model, "route"), tokenizer, _text(text))
    if html is not None:
        write_text(html, render_html(trace))
    if png is not None:
        save_png(trace, png)
    if as_json:
        _print_json(trace.to_dict())
    else:
        print_routing(trace, Console(), per_token=True)


@app.command()
def flops(
    model: Annotated[
        str, typer.Argument(metavar="PRESET|CHECKPOINT", help="What to count; of a checkpoint, its shape.")
    ],
    length: Annotated[int, typer.Option(help="T, tokens of a sequence.", min=1)] = 256,
    share: Annotated[float | None, typer.Option(help="ρ; the model's own attention_share unless given.")] = None,
    context: Annotated[str | None, typer.Option(help="all or routed; the model's own unless given.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="V; the model's own unless given.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Count the operations of a model and of full attention, under three protocols, and say what can be saved when.

    exact counts every matrix product and transform that is executed, of causal attention; no-head leaves out the
    product that makes the logits; paper is the formula of the author's code. Nothing is run.

    Example: chiaroscuro flops v2-400m --length 8192 --share 0.25 --context routed
    """
    from chiaroscuro.report.flops_terminal import describe_flops, print_flops

    config = _config_of(model)
    if context is not None:
        if context not in ("all", "routed"):
            raise UserError(f"--context {context}: choose all or routed")
        config.attention_context = cast(Any, context)
    config.vocab_size = vocabulary or config.vocab_size
    config.use_cache = False  # nothing is generated, so what can't be cached can be counted
    config.check()
    figures = {"model": model, **describe_flops(config, length, share)}
    if as_json:
        _print_json(figures)
    else:
        print_flops(figures, Console())


@app.command()
def benchmark(
    output: Annotated[Path, typer.Option(help="Folder for speed.json, performance.md and performance.png.")] = Path(
        "runs/benchmark"
    ),
    length: Annotated[list[int] | None, typer.Option(help="T; several times for several. [256 … 16384]")] = None,
    share: Annotated[list[float] | None, typer.Option(help="ρ; likewise. [0.5, 0.25, 0.125]")] = None,
    context: Annotated[list[str] | None, typer.Option(help="all or routed; likewise. [both]")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="train, forward, decode, memory, router or profile; likewise. [all six]")
    ] = None,
    layers: Annotated[int, typer.Option(help="Of every model.", min=3)] = 12,
    width: Annotated[int, typer.Option(help="d.", min=2)] = 256,
    heads: Annotated[int, typer.Option(help="h.", min=1)] = 4,
    vocabulary: Annotated[int, typer.Option(help="V.", min=2)] = 8192,
    tokens: Annotated[int, typer.Option(help="B·T of a step; one sequence where T is more.", min=1)] = 8192,
    seconds: Annotated[float, typer.Option(help="To take turns at each task and length.", min=0)] = 20.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Time our model against full attention and a Hugging Face Llama of the same size, on this machine.

    Training step, prefill, decoding and peak memory, at several lengths, shares and contexts, and beside every ratio
    the one that the operation counts predict. What was measured before an interruption is kept.

    Example: chiaroscuro benchmark --length 1024 --length 4096 --share 0.25 --task train
    """
    from chiaroscuro.report.performance import Plan, run_benchmark

    given = {"lengths": length, "shares": share, "contexts": context, "tasks": task}
    plan = Plan(
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=vocabulary,
        tokens=tokens,
        seconds=seconds,
        device=device,
        dtype=dtype,
        **{name: tuple(values) for name, values in given.items() if values},  # type: ignore[arg-type]
    )
    found = run_benchmark(plan, output / "speed.json", output / "performance.md", Console(stderr=as_json))
    if as_json:
        _print_json(found)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the presets: names for `model.preset` in a recipe and for `ChiarConfig.preset`."""
    descriptions = ChiarConfig.presets()
    if as_json:
        _print_json({name: ChiarConfig.preset(name).to_dict() for name in descriptions})
        return
    table = Table("preset", "what it is", "parameters", box=None)
    for name, description in descriptions.items():
        table.add_row(name, description, f"{_parameters_of(name) / 1e6:,.2f} M")
    Console().print(table)


@app.command()
def info(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Say what a checkpoint is: its size, its menus, where its thresholds stand, and how it was trained."""
    from chiaroscuro.analysis.facts import describe_checkpoint
    from chiaroscuro.model.checkpoint import load_checkpoint

    facts = describe_checkpoint(load_checkpoint(checkpoint))
    recipe = _recipe_of(checkpoint)
    if recipe is not None:
        facts["recipe"] = recipe.model_dump(mode="json", exclude_none=True)
    if as_json:
        _print_json(facts)
        return
    console = Console()
    layers = facts.pop("layers")
    facts.pop("recipe", None)
    console.print(_figures_table(facts))
    table = Table("layer", "menu", "parameters", "thresholds", "calibrated on steps", box=None)
    for layer in layers:
        stand = ", ".join(f"{t:.4f}" if t is not None else "∞" for t in layer["thresholds"]) or "–"
        steps = "–" if layer["calibration_steps"] is None else str(layer["calibration_steps"])
        table.add_row(str(layer["layer"]), " · ".join(layer["operators"]), f"{layer['parameters']:,}", stand, steps)
    console.print(table)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for both runs and the pictures.")] = Path("runs/quickstart"),
    as_json: AsJson = False,
) -> None:
    """Train `small` and `small-baseline` on Python's documentation, and hold them side by side.

    Run it from a clone (it takes recipes/small.yaml and recipes/small-baseline.yaml). Interrupted, it goes on where it
    was; done, it shows the results again.
    """
    from chiaroscuro.report.quickstart import run_quickstart

    figures = run_quickstart(output, Console(stderr=as_json))
    if as_json:
        _print_json(figures)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    keep_freed_memory()
    logging.disable_progress_bar()  # that of loading a few files, which would stand between the lines of ours
    try:
        app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted")
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _fail(f"{error.format_message()} (see chiaroscuro --help)")
        raise


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _text(argument: str) -> str:
    return sys.stdin.read() if argument == "-" else argument


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _print_json(figures: dict[str, Any]) -> None:
    print(json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False))


def _recipe_of(checkpoint: str) -> Any:
    """The recipe that a checkpoint was trained by, if it lies in a run's folder; else None."""
    from chiaroscuro.model.checkpoint import find_checkpoint
    from chiaroscuro.training import Recipe

    beside = Path(find_checkpoint(checkpoint)).parent / "recipe.yaml"
    return Recipe.load(beside) if beside.is_file() else None


def _corpus(data: str | None, recipe: Any, split: str) -> "Corpus":
    """The text that the user named, or else that of the recipe; checked to have the split."""
    from chiaroscuro.data import load_corpus

    if data is None and recipe is None:
        raise UserError("no recipe beside this checkpoint says what text it was trained on: name one with --data")
    corpus = load_corpus(recipe.data.source if data is None else data)
    if split not in corpus.splits:
        raise UserError(f"--split {split}: {corpus.name} has {', '.join(corpus.splits)}")
    return corpus


def _config_of(model: str) -> ChiarConfig:
    """The config of a preset, or of a checkpoint, whose weights are left alone."""
    from transformers import AutoConfig

    from chiaroscuro.model.checkpoint import find_checkpoint

    if model in ChiarConfig.presets():
        return ChiarConfig.preset(model)
    try:
        path = find_checkpoint(model)
    except UserError:
        raise UserError(f"{model} is no preset (chiaroscuro presets lists them), and no checkpoint is there") from None
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/config.json can't be read: {error}") from None
    if not isinstance(config, ChiarConfig):
        raise UserError(f"{model} is a {config.model_type}, not a CHIAR-Former: its operations are not counted here")
    return config


def _load(checkpoint: str, share: float | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A checkpoint's model, its dial turned where a share is given, and its tokenizer."""
    from chiaroscuro.model.checkpoint import load_checkpoint, load_checkpoint_tokenizer

    model, tokenizer = load_checkpoint(checkpoint), load_checkpoint_tokenizer(checkpoint)
    if share is not None:
        _chiar(model, "--share").set_attention_share(share)
    return model, tokenizer


def _chiar(model: PreTrainedModel, what: str) -> ChiarForCausalLM:
    if not isinstance(model, ChiarForCausalLM):
        raise UserError(f"{what} needs a CHIAR-Former, and this checkpoint is a {type(model).__name__}")
    return model


def _parameters_of(preset: str) -> int:
    with torch.device("meta"):
        return ChiarForCausalLM(ChiarConfig.preset(preset)).num_parameters()


def _bar(what: str, total: int, quiet: bool) -> Progress:
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
    bar.add_task(what, total=total)
    return bar


def _figures_table(figures: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    for name, value in figures.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), _escape(shown))
    return table


def _routing_table(layers: list[dict[str, Any]], null: list[float]) -> Table:
    table = Table("layer", "share per operator", "H 5 / 50 / 95 %", box=None)
    for layer in layers:
        shares = " · ".join(f"{n} {s:.1%}" for n, s in zip(layer["operators"], layer["share"], strict=True))
        table.add_row(str(layer["layer"]), shares, " / ".join(f"{h:.3f}" for h in layer["entropy"]))
    table.add_row("null", "white noise of the same width", " / ".join(f"{h:.3f}" for h in null), style="dim")
    return table


if __name__ == "__main__":
    main()
