"""Commands that count, time and list: flops, plan, benchmark, presets, task."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from chiaroscuro.cli.application import LARGEST, AsJson, command, print_json, refuse_empty, refuse_missing
from chiaroscuro.errors import UserError
from chiaroscuro.hub import find_checkpoint


@command()
def flops(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|CHECKPOINT", help="The model to count; no weights are read.", callback=refuse_empty
        ),
    ],
    length: Annotated[int, typer.Option(help="T, tokens of a sequence.", min=1, max=LARGEST)] = 256,
    share: Annotated[
        float | None, typer.Option(help="ρ; by default the model's own attention_share.", min=0, max=1)
    ] = None,
    kv_share: Annotated[
        float | None, typer.Option(help="The share that is kept; by default the model's own kv_share.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="all, routed or kept; by default the model's own.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="V; by default the model's own.", min=1, max=LARGEST)] = None,
    as_json: AsJson = False,
) -> None:
    """Count the operations of a model and of full attention, and say from which length on routing saves any.

    Under three protocols: exact counts every matrix product and transform that is executed, of causal attention;
    no-head leaves out the product that makes the logits; paper is the formula of the author's code. Nothing is run.

    Example: chiaroscuro flops v2-400m --length 8192 --share 0.25 --context routed
    """
    from chiaroscuro.analysis.savings import describe_flops
    from chiaroscuro.report.flops_terminal import print_flops

    config = _config_of(model)
    if context is not None:
        if context not in ("all", "routed", "kept"):
            raise UserError(f"--context {context}: choose all, routed or kept")
        if not any(hasattr(options, "attention_context") for menu in config.entries for _, options in menu):
            raise UserError(f"--context {context}: no operator of {model} has a context; drop it")
        config.attention_context = context
    if share is not None and not config.routed_layers:
        raise UserError(f"--share {share}: no layer of {model} has a choice; drop it")
    if kv_share is not None:
        if not config.keeping_layers:
            raise UserError(
                f"--kv-share {kv_share}: no layer of {model} decides who is kept; give --context kept too, or drop it"
            )
        if not 0 <= kv_share <= 1:
            raise UserError(f"--kv-share {kv_share}: must be from 0 to 1")
        config.kv_share = kv_share
    config.vocab_size = vocabulary or config.vocab_size
    config.use_cache = False  # nothing is generated, so a model that can't be cached can be counted, too
    config.check()
    figures = {"model": model, **describe_flops(config, length, share)}
    if as_json:
        print_json(figures)
    else:
        print_flops(figures, Console())


def _config_of(model: str) -> Any:
    """The configuration of a preset or a checkpoint."""
    from chiaroscuro.model.config import ChiarConfig

    if model in ChiarConfig.presets():
        return ChiarConfig.preset(model)
    try:
        find_checkpoint(model)
    except UserError:
        raise UserError(
            f"{model} is not a preset (chiaroscuro presets lists them), and no checkpoint is there"
        ) from None
    from chiaroscuro.model.loading import load_checkpoint_config  # with transformers' model classes: seconds

    config = load_checkpoint_config(model)
    if not isinstance(config, ChiarConfig):
        raise UserError(f"{model} is a {config.model_type}, not a CHIAR-Former: its operations are not counted here")
    return config


@command()
def plan(
    recipe: Annotated[
        str, typer.Argument(help="A YAML recipe, such as recipes/paper/400m.yaml.", callback=refuse_missing("recipe"))
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to change: trainer.batch_size=32 data.sequence_length=1024 …")
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs.", min=1, max=2**20)] = 8,
    gpu: Annotated[str, typer.Option(help="Which: a100, h100, h200, b200, l40s or rtx4090.")] = "h200",
    vocabulary: Annotated[
        int | None,
        typer.Option(help="V; by default that of the tokenizer bpe:N, or of the preset.", min=2, max=2**24),
    ] = None,
    used: Annotated[float, typer.Option(help="The part of the GPU's peak that a step is assumed to reach.")] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe's run would need on GPUs that are not here: memory by part, time a step, and time in all.

    Operations are counted, and activations are those that one forward on this machine keeps. The rest is assumed, and
    said. The batch size of the recipe is that of one GPU.

    Example: chiaroscuro plan recipes/paper/400m.yaml --gpus 64 --gpu h200
    """
    from chiaroscuro.report.plan_terminal import print_plan
    from chiaroscuro.studies.plan import plan_run
    from chiaroscuro.training import Recipe

    figures = plan_run(Recipe.load(recipe, overrides or []), gpus, gpu, vocabulary=vocabulary, used=used)
    if as_json:
        print_json(figures)
    else:
        print_plan(figures, Console())


@command()
def benchmark(
    output: Annotated[Path, typer.Option(help="Folder for speed.json, performance.md and performance.png.")] = Path(
        "runs/benchmark"
    ),
    length: Annotated[
        list[int] | None, typer.Option(help="T; repeat for several (256, 1024, 4096, 8192, 16384).", max=2**24)
    ] = None,
    share: Annotated[list[float] | None, typer.Option(help="ρ; repeat for several (0.5, 0.25, 0.125).")] = None,
    context: Annotated[list[str] | None, typer.Option(help="all or routed; repeat for several (both).")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="train, forward, decode, memory, router or profile; repeat for several (all six)."),
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of every model.", min=3, max=1024)] = 12,
    width: Annotated[int, typer.Option(help="d.", min=2, max=2**17)] = 256,
    heads: Annotated[int, typer.Option(help="h.", min=1, max=2**16)] = 4,
    vocabulary: Annotated[int, typer.Option(help="V.", min=2, max=2**24)] = 8192,
    tokens: Annotated[
        int, typer.Option(help="B·T, tokens of a step; a single sequence if T is larger.", min=1, max=2**24)
    ] = 8192,
    seconds: Annotated[
        float, typer.Option(help="Time for each task and length, in which the models take turns.", min=0, max=10**6)
    ] = 20.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Time our model against full attention and a Hugging Face Llama of the same size, on this machine.

    Training step, prefill, decoding and peak memory, at several lengths, shares and contexts; beside every ratio
    stands the one that the operation counts predict. An interrupted benchmark goes on where it stopped.

    Example: chiaroscuro benchmark --length 1024 --length 4096 --share 0.25 --task train
    """
    from chiaroscuro.files import refuse_file
    from chiaroscuro.report.performance_terminal import print_performance
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
        **cast(Any, {name: tuple(values) for name, values in given.items() if values}),
    )
    console = Console(stderr=as_json)
    found = run_benchmark(plan, output / "speed.json", output / "performance.md", console)
    if as_json:
        print_json(found)
    else:
        print_performance(found, console)


@command()
def presets(as_json: AsJson = False) -> None:
    """List the presets: names for `model.preset` in a recipe and for `ChiarConfig.preset`."""
    from chiaroscuro.analysis.facts import count_parameters
    from chiaroscuro.model.config import ChiarConfig
    from chiaroscuro.report.tables import presets_table

    found = {name: (description, ChiarConfig.preset(name)) for name, description in ChiarConfig.presets().items()}
    if as_json:
        print_json({name: config.to_dict() for name, (_, config) in found.items()})
        return
    rows = {name: (description, count_parameters(config) or 0) for name, (description, config) in found.items()}
    Console().print(presets_table(rows))


@command()
def task(
    name: Annotated[str, typer.Argument(help="imdb, listops-flat, listops-nested, mqar, passkey, or a task of yours.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="The task's options, as a recipe's data section has them: max_length=40 …"),
    ] = None,
    source: Annotated[str | None, typer.Option(help="imdb: a folder with train and test files, or a Hub name.")] = None,
    length: Annotated[
        int | None, typer.Option(help="listops-nested: the longest expression, in tokens.", max=LARGEST)
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Generated tasks: rows to train on.", min=1, max=2**26)] = None,
    heldout: Annotated[
        int | None,
        typer.Option(help="Likewise: rows to validate on, and to test on.", min=1, max=2**26),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Likewise: seed of the rows.", min=0, max=2**63 - 1)] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer that measures the lengths: words, bpe:N, a folder or a Hub name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a task: its splits, how its labels are spread, how long its rows are, and some of them.

    What is loaded or generated here is what `data.task` in a recipe trains on, and is kept for it.

    Example: chiaroscuro task listops-nested max_length=40
    """
    from chiaroscuro.data import Corpus
    from chiaroscuro.data.tasks import load_task, task_options
    from chiaroscuro.report.task_terminal import print_task
    from chiaroscuro.studies.tasks import describe_task
    from chiaroscuro.training.recipe import override_field

    given: dict[str, Any] = {
        "source": source,
        "length" if "length" in task_options(name) else "max_length": length,
        "train_examples": examples,
        "heldout_examples": heldout,
        "seed": seed,
    }
    for option in options or []:
        field = option.partition("=")[0]
        if given.get(field) is not None:
            raise UserError(f"{option} and the option that sets {field} to {given[field]}: give one of them")
        override_field(given, option)
    data = load_task(name, **given)
    if isinstance(data, Corpus):
        raise UserError(f"{name}: a running text has no rows to show; evaluate measures a model on it")
    figures = describe_task(data, tokenizer)
    if as_json:
        print_json(figures)
    else:
        print_task(figures, Console())
