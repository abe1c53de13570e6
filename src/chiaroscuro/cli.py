"""The command line: one function a command, each a few lines around a function of the library.

A `UserError`, whoever raises it, becomes one line on standard error and exit code 2. With `--json` standard output
holds one JSON object and nothing else.
"""

import json
import os
import sys
from collections.abc import Iterable
from importlib import metadata
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
from chiaroscuro.errors import UserError
from chiaroscuro.model import (
    ChiarForCausalLM,
    ChiarForMixedTasks,
    ChiarForSequenceClassification,
    ChiarPreTrainedModel,
)
from chiaroscuro.model.config import ChiarConfig

if TYPE_CHECKING:
    from chiaroscuro.data import Corpus

app = typer.Typer(
    name="chiaroscuro",
    help="Language models that spend attention only where a token needs it (CHIAR-Former, arXiv 2606.08327).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _refuse_empty(name: str) -> str:
    if not name:
        raise UserError("the name is empty: give that of a file, a folder or a model")
    return name


Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A model's folder, a run's folder (its model/ is meant), or a Hub name owner/name.",
        callback=_refuse_empty,
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="python-docs, a folder with train/validation/test text or parquet files, or a Hub name "
        "owner/name:config. Unless given: what the run's recipe says.",
    ),
]


def _refuse_place(file: Path | None) -> Path | None:
    from chiaroscuro.files import refuse_place

    if file is not None:
        refuse_place(file)
    return file


def _refuse_other_than_png(file: Path | None) -> Path | None:
    if file is not None and file.suffix.lower() != ".png":
        raise UserError(f"--png {file}: the figure is a PNG file; give it a name that ends in .png")
    return _refuse_place(file)


Png = Annotated[Path | None, typer.Option(help="Write a figure.", callback=_refuse_other_than_png)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Share = Annotated[
    float | None,
    typer.Option(help="Turn the dial first: route this share of tokens (0 to 1) to attention."),
]

Device = Annotated[
    str | None, typer.Option(help="Where the model runs: cpu or cuda. Unless given: cuda where PyTorch sees a GPU.")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe, such as recipes/small.yaml.", callback=_refuse_empty)],
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
    length: Annotated[
        int | None,
        typer.Option(
            help="T, tokens that the model reads at once. Unless given: the recipe's data.sequence_length or, without "
            "a recipe, the model's max_position_embeddings."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Move the window by so many tokens and count only what is new: more context for every token, at "
            "T/stride times the work. Unless given: the paper's blocks, which overlap by one."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Of a mixed run, one of its recipe's tasks instead of the text.")
    ] = None,
    share: Share = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.", min=1)] = 8,
    as_json: AsJson = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on a text; of a classifier, loss and accuracy on its task.

    Example: chiaroscuro evaluate runs/small --split test --stride 64
    """
    from chiaroscuro.analysis.classification import evaluate_rows, evaluate_targets
    from chiaroscuro.analysis.perplexity import evaluate_blocks
    from chiaroscuro.analysis.routing_summary import describe_routing
    from chiaroscuro.data import TokenBlocks, tokenize_corpus
    from chiaroscuro.data.tasks import PadToLongest, TokenTask, tokenize_targets, tokenize_task

    model, tokenizer = _load(checkpoint, device, share)
    recipe = _recipe_of(checkpoint) if task is None else _recipe_of_task(checkpoint, task)
    head = task if isinstance(model, ChiarForMixedTasks) and task is not None and task in model.heads else None
    classifies = isinstance(model, ChiarForSequenceClassification) or head is not None
    # A model that was trained to predict targets is a language model too: --data measures it on a text.
    has_targets = data is None and recipe is not None and isinstance(recipe.data.build_task(), TokenTask)
    if (classifies or has_targets) and stride is not None:
        raise UserError(f"--stride {stride}: a stride goes with a text, and this checkpoint is measured row by row")
    if length is None:
        length = recipe.data.sequence_length if recipe else model.config.max_position_embeddings
    if length > model.config.max_position_embeddings:
        raise UserError(
            f"--length {length} is more than the model's max_position_embeddings="
            f"{model.config.max_position_embeddings}: take a shorter one"
        )
    routes = isinstance(model.config, ChiarConfig)
    figures: dict[str, Any] = {"checkpoint": checkpoint, "data": "", "split": split, "length": length}
    result: Any
    if classifies:
        texts = _task(data, recipe, split)
        rows = tokenize_task(texts, tokenizer, length)[split]
        with _bar("evaluating", len(rows), as_json) as bar:
            result = evaluate_rows(
                model,
                rows,
                PadToLongest(tokenizer.pad_token_id),
                batch_size=batch_size,
                output_routing=routes,
                progress=lambda n: bar.advance(TaskID(0), n),
                inputs=None if head is None else {"task": head},
            )
        figures |= {"data": texts.name, **result.figures()}
    elif has_targets:
        sequences = _task(None, recipe, split)
        targets = tokenize_targets(sequences, tokenizer, length)[split]
        with _bar("evaluating", len(targets), as_json) as bar:
            result = evaluate_targets(
                model,
                targets,
                PadToLongest(tokenizer.pad_token_id),
                batch_size=batch_size,
                output_routing=routes,
                progress=lambda n: bar.advance(TaskID(0), n),
            )
        figures |= {"data": sequences.name, **result.figures()}
    else:
        corpus = _corpus(data, recipe, split)
        blocks = TokenBlocks(tokenize_corpus(corpus, tokenizer)[split], length, stride)
        with _bar("evaluating", len(blocks), as_json) as bar:
            result = evaluate_blocks(
                model,
                blocks,
                batch_size=batch_size,
                output_routing=routes,
                progress=lambda n: bar.advance(TaskID(0), n),
            )
        figures |= {"data": corpus.name, "stride": stride or length, **result.figures()}
    if routes:
        figures |= describe_routing(result.routings, model.config.hidden_size)
    if as_json:
        _print_json(figures)
        return
    console = Console()
    shown = {k: v for k, v in figures.items() if k not in ("layers", "null_entropy")}
    if classifies:
        shown["accuracy_interval"] = "{:.4f} to {:.4f}".format(*result.interval)
    console.print(_figures_table(shown))
    if routes:
        console.print(_routing_table(figures["layers"], figures["null_entropy"]))


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to add at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0 for all.", min=0)] = 50,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**32 - 1)] = 0,
    share: Share = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text.

    Example: chiaroscuro generate runs/small "The function returns" --max-new-tokens 60
    """
    from chiaroscuro.analysis.sampling import continue_text

    model, tokenizer = _load(checkpoint, device, share)
    _refuse_classifier(model, "generate")
    text = _text(prompt)
    result = continue_text(
        model, tokenizer, text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    if as_json:
        _print_json({"prompt": text, "continuation": result.text, **result.figures()})
        return
    Console(highlight=False).print(f"[bold]{_escape(text)}[/bold]{_escape(result.text)}", soft_wrap=True)
    if result.full:
        longest = model.config.max_position_embeddings
        print(f"stopped: the model reads at most {longest} tokens, prompt included", file=sys.stderr)


@app.command()
def calibrate(
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the calibrated copy of the model. Not needed for --method paper."),
    ] = None,
    share: Annotated[float | None, typer.Option(help="ρ; the model's own attention_share unless given.")] = None,
    data: Source = None,
    split: Annotated[str | None, typer.Option(help="The split to calibrate on; train unless given.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="How many tokens to take, from the split's beginning; 65536 unless given. A sequence is as long as "
            "the recipe's, or without a recipe 256 tokens at most.",
            min=1,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="data: thresholds of every layer at quantiles of the entropies that it sees. paper: the 33rd and 67th "
            "percentile of the entropy of a trained baseline's embeddings, printed to put into a recipe."
        ),
    ] = "data",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Set a model's thresholds from data, so that each layer routes the share of tokens that you ask for.

    Example: chiaroscuro calibrate runs/small --share 0.1 --output runs/small-10
    """
    from torch.utils.data import DataLoader, Subset

    from chiaroscuro.analysis.routing_summary import measure_routing
    from chiaroscuro.data import TokenBlocks, tokenize_corpus
    from chiaroscuro.model.calibration import calibrate as set_thresholds
    from chiaroscuro.model.calibration import paper_thresholds
    from chiaroscuro.training import save_whole

    if method not in ("data", "paper"):
        raise UserError(f"--method {method}: choose data or paper")
    if method == "data" and output is None:
        raise UserError("--output is missing: name a folder for the calibrated copy of the model")
    if method == "paper":
        given = {"--output": output, "--share": share, "--split": split, "--tokens": tokens}
        for option, value in given.items():
            if value is not None:
                raise UserError(
                    f"{option} {value} goes with --method data: paper takes the percentiles and the rows as published, "
                    "and prints the thresholds"
                )
    if output is not None and output.exists():
        raise UserError(f"--output {output} exists already: name another folder")
    model, tokenizer = _load(checkpoint, device)
    _refuse_classifier(model, "calibrate")
    recipe = _recipe_of(checkpoint)
    if method == "paper":
        corpus = _corpus(data, recipe, "validation")
        rows = (tokenizer(row, add_special_tokens=False)["input_ids"] for row in corpus.splits["validation"]["text"])
        spectrum = model.config.spectrum if isinstance(model.config, ChiarConfig) else "orthonormal"
        low, high = paper_thresholds(model, rows, spectrum=spectrum)
        if as_json:
            _print_json({"entropy_thresholds": [low, high]})
        else:
            print(f"calibration: {{method: fixed, thresholds: [{low:.4f}, {high:.4f}]}}")
        return
    model = _chiar(model, "calibrate")
    assert output is not None  # checked above, for this method
    split, tokens = split or "train", tokens or 65536
    corpus = _corpus(data, recipe, split)
    length = recipe.data.sequence_length if recipe else min(256, model.config.max_position_embeddings)
    blocks = TokenBlocks(tokenize_corpus(corpus, tokenizer)[split], length)
    taken = Subset(blocks, range(min(len(blocks), max(1, tokens // length))))
    batches = [batch["input_ids"] for batch in DataLoader(taken, batch_size=8)]
    set_thresholds(model, batches, share)
    save_whole(output, model, tokenizer, recipe)
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
    html: Annotated[Path | None, typer.Option(help="Write a page that one can hover.", callback=_refuse_place)] = None,
    png: Png = None,
    share: Share = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show which tokens of a text went to which operator, and their spectral entropy.

    Example: chiaroscuro route runs/small "Return a list of the words in the string." --html page.html
    """
    from chiaroscuro.analysis.routing import trace_routing
    from chiaroscuro.files import write_text
    from chiaroscuro.report.routing_figure import save_png
    from chiaroscuro.report.routing_html import render_html
    from chiaroscuro.report.routing_terminal import print_routing

    model, tokenizer = _load(checkpoint, device, share)
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
        str,
        typer.Argument(
            metavar="PRESET|CHECKPOINT", help="What to count; of a checkpoint, its shape.", callback=_refuse_empty
        ),
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
    from chiaroscuro.analysis.savings import describe_flops
    from chiaroscuro.report.flops_terminal import print_flops

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
    length: Annotated[
        list[int] | None, typer.Option(help="T; several times for several (256, 1024, 4096, 8192, 16384).")
    ] = None,
    share: Annotated[list[float] | None, typer.Option(help="ρ; likewise (0.5, 0.25, 0.125).")] = None,
    context: Annotated[list[str] | None, typer.Option(help="all or routed; likewise (both).")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="train, forward, decode, memory, router or profile; likewise (all six).")
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
    from chiaroscuro.files import refuse_file
    from chiaroscuro.studies.benchmark import Plan, run_benchmark

    refuse_file(output, f"--output {output}")
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
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A YAML file, such as recipes/sweeps/NAME.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="section.field=value …", help="Fields of the recipe that all runs have in common."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at once, one thread each (one per GPU or, without one, per core).", min=1)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train many variants of a recipe with several seeds each, and hold them side by side.

    The file names a recipe, an output_dir, seeds, a baseline, and variants (fields that differ from the recipe) or a
    grid of values; docs/sweeps.md explains it. What is done is not done again and what was interrupted goes on, so the
    same command resumes; a run that fails stops no other. After every run results.json, table.md, table.csv and
    two plots are written anew: mean, standard deviation, 95% interval, a paired test against the baseline, operations
    (exact protocol), time of a step.

    Example: chiaroscuro sweep recipes/sweeps/wikitext2.yaml data.source=Salesforce/wikitext:wikitext-2-v1 --jobs 2
    """
    from chiaroscuro.report.sweep_table import print_sweep
    from chiaroscuro.studies.run_sweep import run_sweep

    console = Console(stderr=as_json)
    found = run_sweep(file, console, overrides=overrides or [], jobs=jobs)
    if as_json:
        _print_json(found)
    else:
        print_sweep(found, console)
    if found["failed"]:
        raise UserError(f"{len(found['failed'])} failed: {'; '.join(found['failed'])}")


@app.command()
def collapse(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    floor: Annotated[float, typer.Option(help="An operator below this share has collapsed.", min=0, max=1)] = 0.01,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Show what share of the tokens each operator got over training, and which menu survived.

    Example: chiaroscuro collapse runs/three-operators --png collapse.png
    """
    from chiaroscuro.analysis.collapse import trace_collapse
    from chiaroscuro.files import write_bytes
    from chiaroscuro.report.collapse_figure import draw_collapse
    from chiaroscuro.training.records import read_run

    try:
        trace = trace_collapse(read_run(folder), floor)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if png is not None:
        write_bytes(png, draw_collapse(trace))
    if as_json:
        _print_json(trace.to_dict())
        return
    console = Console()
    table = Table("layer", "share at the beginning", "share at the end", "utilisation", "surviving menu", box=None)
    for layer in trace.layers:
        first, last = (_shares(layer.operators, shares) for shares in (layer.share[0], layer.final_share))
        used = f"{layer.utilisation[0]:.3f} to {layer.utilisation[-1]:.3f}"
        table.add_row(str(layer.layer), first, last, used, " · ".join(layer.surviving))
    console.print(table)
    overall = _shares(trace.operators, trace.final_share)
    console.print(f"all routed layers: {overall}; collapsed: {', '.join(trace.collapsed) or 'none'}", highlight=False)


@app.command()
def task(
    name: Annotated[str, typer.Argument(help="imdb, listops-flat, listops-nested, or a task of yours.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="The task's options, as a recipe's data section has them: max_length=40 …"),
    ] = None,
    source: Annotated[str | None, typer.Option(help="imdb: a folder with train and test files, or a Hub name.")] = None,
    length: Annotated[int | None, typer.Option(help="listops-nested: the longest expression, in tokens.")] = None,
    examples: Annotated[int | None, typer.Option(help="listops: rows of the train split.", min=1)] = None,
    heldout: Annotated[
        int | None, typer.Option(help="listops: rows of the validation split, and of the test split.", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="listops: of the expressions.", min=0)] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="What lengths are measured in: words, bpe:N, a folder or a Hub name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a task: its splits, how its labels are spread, how long its rows are, and some of them.

    What is loaded or generated here is what `data.task` in a recipe trains on, and is kept for it.

    Example: chiaroscuro task listops-nested max_length=40
    """
    from chiaroscuro.data import Corpus
    from chiaroscuro.data.tasks import load_task
    from chiaroscuro.report.task_terminal import print_task
    from chiaroscuro.studies.tasks import describe_task
    from chiaroscuro.training.recipe import override_field

    given: dict[str, Any] = {
        "source": source,
        "max_length": length,
        "train_examples": examples,
        "heldout_examples": heldout,
        "seed": seed,
    }
    for option in options or []:
        override_field(given, option)
    data = load_task(name, **given)
    if isinstance(data, Corpus):
        raise UserError(f"{name}: a running text has no rows to show; evaluate measures a model on it")
    figures = describe_task(data, tokenizer)
    if as_json:
        _print_json(figures)
    else:
        print_task(figures, Console())


@app.command()
def gates(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Show where the MetaRouter's gate went over training, task by task.

    Example: chiaroscuro gates runs/mixed --png gates.png
    """
    from chiaroscuro.analysis.gates import gates_as_dict, trace_gates
    from chiaroscuro.files import write_bytes
    from chiaroscuro.report.gate_figure import draw_gates
    from chiaroscuro.training.records import read_run

    try:
        traced = trace_gates(read_run(folder))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if png is not None:
        write_bytes(png, draw_gates(traced))
    if as_json:
        _print_json(gates_as_dict(traced))
        return
    table = Table("task", "g at the beginning", "g at the end", "looks", box=None)
    for task, gate in traced.items():
        table.add_row(task, f"{gate.gate[0]:.3f}", f"{gate.final:.3f}", str(len(gate.gate)))
    Console().print(table)


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
    from chiaroscuro.model.loading import load_checkpoint

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
    console.print(_figures_table(facts | ({} if recipe is None else _training_of(recipe))))
    table = Table("layer", "menu", "parameters", "thresholds", "calibrated on steps", box=None)
    for layer in layers:
        stand = ", ".join(f"{t:.4f}" if t is not None else "∞" for t in layer["thresholds"]) or "–"
        steps = "–" if layer["calibration_steps"] is None else str(layer["calibration_steps"])
        table.add_row(str(layer["layer"]), " · ".join(layer["operators"]), f"{layer['parameters']:,}", stand, steps)
    console.print(table)


@app.command("import-reference")
def import_reference(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt", help="A checkpoint of the author's code.")],
    output: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the model; must not exist.")],
    heads: Annotated[int | None, typer.Option(help="h, where the file does not tell.")] = None,
    thresholds: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Of the entropy, where the file does not say by which it routes."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint of the author's code (hackie123/CHIAR-former) into a folder for from_pretrained, exactly.

    CHIAR-Formers, baselines, mixed training and classifiers; threshold, soft and hard routing. Code in the file is not
    run. The file brings no tokenizer: the author's models use GPT-2's.

    Example: chiaroscuro import-reference chiar_dct_attn_400M_best.pt runs/author --thresholds 0.8935 0.8973
    """
    from chiaroscuro.convert import import_reference as convert
    from chiaroscuro.files import whole_folder

    if output.exists():
        raise UserError(f"{output} exists already: name another folder")
    imported = convert(file, heads=heads, thresholds=thresholds)
    model = imported.model
    with whole_folder(output) as partial:
        model.save_pretrained(partial)
    facts: dict[str, Any] = {
        "output": str(output),
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "router": model.config.router if model.config.routed_layers else None,
        "entropy_thresholds": model.config.entropy_thresholds,
        "remarks": list(imported.remarks),
    }
    if as_json:
        _print_json(facts)
        return
    console = Console()
    for remark in facts.pop("remarks"):
        console.print(_escape(remark), soft_wrap=True)
    console.print(_figures_table({name: value for name, value in facts.items() if value is not None}))


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for both runs and the pictures.")] = Path("runs/quickstart"),
    as_json: AsJson = False,
) -> None:
    """Train `small` and `small-baseline` on Python's documentation, and hold them side by side.

    Run it from a clone (it takes recipes/small.yaml and recipes/small-baseline.yaml). Interrupted, it goes on where it
    was; done, it shows the results again.
    """
    from chiaroscuro.studies.quickstart import run_quickstart

    figures = run_quickstart(output, Console(stderr=as_json))
    if as_json:
        _print_json(figures)


def _print_version(asked: bool) -> None:
    if asked:
        print(metadata.version("chiaroscuro"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


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
    try:
        return sys.stdin.read() if argument == "-" else argument
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 at byte {error.start}; give it as UTF-8") from None


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _print_json(figures: dict[str, Any]) -> None:
    print(json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False))


def _recipe_of(checkpoint: str) -> Any:
    """The recipe that a checkpoint was trained by, if it lies in a run's folder or is a copy of one; else None."""
    from chiaroscuro.model.loading import find_checkpoint
    from chiaroscuro.training import Recipe

    folder = Path(find_checkpoint(checkpoint))
    # A copy that calibrate makes has it inside; what lies around such a copy is not ours.
    in_a_run = folder.name == "model" or folder.name.startswith("checkpoint-")
    places = [place / "recipe.yaml" for place in (folder, *([folder.parent] if in_a_run else []))]
    found = next((place for place in places if place.is_file()), None)
    try:
        return None if found is None else Recipe.load(found)
    except UserError as error:
        line = str(error)
        raise UserError(line if line.startswith(str(found)) else f"{found}: {line}") from None


def _training_of(recipe: Any) -> dict[str, Any]:
    """What a model was trained on, how long and by which seed: lines of `info`."""
    lines = {
        "task": recipe.data.task,
        "mixed with": None if recipe.mixture is None else ", ".join(recipe.mixture.tasks),
        "data": recipe.data.options.get("source"),
        "tokenizer": recipe.tokenizer,
        "steps": recipe.trainer.steps,
        "training tokens": recipe.trainer.tokens,
        "epochs": recipe.trainer.epochs,
        "seed": recipe.trainer.seed,
    }
    return {name: value for name, value in lines.items() if value is not None}


def _recipe_of_task(checkpoint: str, task: str) -> Any:
    """The recipe that a mixed checkpoint was trained by, with one of its tasks in the text's place."""
    recipe = _recipe_of(checkpoint)
    tasks = {} if recipe is None or recipe.mixture is None else recipe.mixture.tasks
    if task not in tasks:
        known = f"it has {', '.join(tasks)}" if tasks else "no recipe beside it mixes tasks"
        raise UserError(f"--task {task}: {checkpoint} has no such task; {known}")
    return recipe.model_copy(update={"data": tasks[task], "mixture": None})


def _corpus(data: str | None, recipe: Any, split: str) -> "Corpus":
    """The text that the user named, or else that of the recipe; checked to have the split."""
    from chiaroscuro.data import load_corpus
    from chiaroscuro.data.tasks import TextTask

    if data is None and recipe is None:
        raise UserError("no recipe beside this checkpoint says what text it was trained on: name one with --data")
    if data is None and not isinstance(recipe.data.build_task(), TextTask):
        raise UserError(f"this checkpoint was trained on the task {recipe.data.task}: name a text with --data")
    corpus = load_corpus(recipe.data.options["source"] if data is None else data, needed=())
    if split not in corpus.splits:
        raise UserError(f"--split {split}: {corpus.name} has {', '.join(corpus.splits)}")
    return corpus


def _task(data: str | None, recipe: Any, split: str) -> Any:
    """The recipe's task, from the source that the user named or else the recipe's; checked to have the split."""
    from chiaroscuro.data.tasks import TextTask, load_task

    if recipe is None or isinstance(recipe.data.build_task(), TextTask):
        raise UserError("no recipe beside this classifier says what task it was trained on: give a run's folder")
    task = load_task(recipe.data.task, **recipe.data.options | ({} if data is None else {"source": data}))
    if split not in task.splits:
        raise UserError(f"--split {split}: {task.name} has {', '.join(task.splits)}")
    return task


def _config_of(model: str) -> ChiarConfig:
    """The config of a preset, or of a checkpoint, whose weights are left alone."""
    from transformers import AutoConfig

    from chiaroscuro.model.loading import find_checkpoint

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


def _load(
    checkpoint: str, device: str | None, share: float | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A checkpoint's model where it is to run, its dial turned where a share is given, and its tokenizer."""
    from chiaroscuro.model.loading import load_checkpoint, load_checkpoint_tokenizer

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; leave it out to run on the CPU")
    model, tokenizer = load_checkpoint(checkpoint), load_checkpoint_tokenizer(checkpoint)
    if share is not None:
        _chiar(model, "--share").set_attention_share(share)
    # Its own annotation of `to` takes no name of a device.
    cast(Any, model).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, tokenizer


def _chiar(model: PreTrainedModel, what: str) -> ChiarPreTrainedModel:
    if not isinstance(model, ChiarPreTrainedModel):
        raise UserError(f"{what} needs a CHIAR-Former, and this checkpoint is a {type(model).__name__}")
    return model


def _refuse_classifier(model: PreTrainedModel, what: str) -> None:
    if isinstance(model, ChiarForSequenceClassification):
        raise UserError(f"{what} needs a language model, and this checkpoint is a classifier of texts")


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
        if value is None:
            value = "–"
        if isinstance(value, bool):
            value = "yes" if value else "no"
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), _escape(shown))
    return table


def _shares(operators: Iterable[str], shares: Iterable[float]) -> str:
    return " · ".join(f"{name} {share:.1%}" for name, share in zip(operators, shares, strict=True))


def _routing_table(layers: list[dict[str, Any]], null: list[float]) -> Table:
    table = Table("layer", "share per operator", "H 5 / 50 / 95 %", box=None)
    for layer in layers:
        shares = _shares(layer["operators"], layer["share"])
        table.add_row(str(layer["layer"]), shares, " / ".join(f"{h:.3f}" for h in layer["entropy"]))
    table.add_row("null", "white noise of the same width", " / ".join(f"{h:.3f}" for h in null), style="dim")
    return table


if __name__ == "__main__":
    main()
