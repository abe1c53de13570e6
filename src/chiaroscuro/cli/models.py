"""Commands on a trained model: evaluate, needles, generate, chat, calibrate, fit, route, import-reference."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from chiaroscuro.cli.application import (
    LARGEST,
    AsJson,
    Checkpoint,
    Device,
    History,
    KVShare,
    Png,
    Share,
    Source,
    command,
    numbers,
    percentage,
    print_json,
    refuse_bad_place,
    refuse_empty,
)
from chiaroscuro.errors import UserError

Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token each time.", min=0)]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 for all.", min=0, max=LARGEST)]
SamplingSeed = Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**32 - 1)]


@command()
def evaluate(
    checkpoint: Checkpoint,
    data: Source = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    length: Annotated[
        int | None,
        typer.Option(
            help="T, tokens that the model reads at once. By default the recipe's data.sequence_length or, without a "
            "recipe, the model's max_position_embeddings."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Move the window by this many tokens and count only the new ones: more context for every token, at "
            "T/stride times the work. By default the paper's blocks, which overlap by one token."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Recall tokens end a pair of tokens that stood before, more than this many tokens ago. By default the "
            "model's window or, if it has none, 64.",
            max=LARGEST,
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="For a mixed run: measure this task of its recipe instead of the text.")
    ] = None,
    share: Share = None,
    kv_share: KVShare = None,
    history: History = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.", min=1, max=2**20)] = 8,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Of a text, measure only the first windows, as few as hold this many tokens; all unless given.", min=1
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: loss, perplexity and bits per byte on a text; for a classifier, loss and accuracy on its task.

    On a text, the perplexity is also given by position, and on recall tokens and the rest. On a task of recall (mqar,
    passkey), the accuracy is also given by depth.

    Example: chiaroscuro evaluate runs/small --split test --stride 64
    """
    from chiaroscuro.report.tables import evaluation_tables
    from chiaroscuro.studies.evaluation import evaluate
    from chiaroscuro.studies.workspace import Workspace

    workspace = Workspace(checkpoint, device=device, share=share, kv_share=kv_share, history=history, task=task)
    figures = evaluate(
        workspace,
        source=data,
        split=split,
        length=length,
        stride=stride,
        window=window,
        batch_size=batch_size,
        tokens=tokens,
    )
    if as_json:
        print_json(figures)
    else:
        Console().print(*evaluation_tables(figures), sep="\n")


@command()
def needles(
    checkpoint: Checkpoint,
    lengths: Annotated[str, typer.Option(help="Tokens of the rows.")] = "1024",
    keys: Annotated[str, typer.Option(help="Needles in a row, of which one is asked for.")] = "1,4",
    tries: Annotated[int, typer.Option(help="Rows of each depth.", min=1, max=10_000)] = 4,
    share: Share = None,
    kv_share: KVShare = None,
    history: History = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Count the needles that a model finds: a number hidden in noise, at five depths, and asked for at the end.

    Example: chiaroscuro needles runs/smollm2-routed --lengths 1024,2048 --tries 10
    """
    from chiaroscuro.report.tables import needles_table
    from chiaroscuro.studies.needles import find_needles
    from chiaroscuro.studies.workspace import Workspace

    workspace = Workspace(checkpoint, device=device, share=share, kv_share=kv_share, history=history)
    rows, number = numbers("--lengths", lengths), numbers("--keys", keys)
    figures = find_needles(workspace, rows, keys=number, tries=tries)
    if as_json:
        print_json(figures)
    else:
        Console().print(needles_table(figures))


@command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.", min=1)] = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    seed: SamplingSeed = 0,
    share: Share = None,
    kv_share: KVShare = None,
    history: History = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text.

    The model reads at most max_position_embeddings tokens, prompt included; generation stops there. Control characters
    in the text are shown as pictures (␛), since a terminal would obey them; --json has them as they are, escaped.

    Example: chiaroscuro generate runs/small "The function returns" --max-new-tokens 60
    """
    from chiaroscuro.analysis.sampling import continue_text
    from chiaroscuro.report.visible import harmless
    from chiaroscuro.studies.workspace import Workspace

    workspace = Workspace(checkpoint, device=device, share=share, kv_share=kv_share, history=history)
    model, text = workspace.language_model("generate"), _text(prompt)
    result = continue_text(
        model,
        workspace.tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    if as_json:
        print_json({"prompt": text, "continuation": result.text, **result.figures()})
        return
    shown = f"[bold]{escape(harmless(text))}[/bold]{escape(harmless(result.text))}"
    Console(highlight=False).print(shown, soft_wrap=True)
    if result.full:
        from chiaroscuro.model.loading import longest_sequence

        longest = longest_sequence(model.config)
        print(f"stopped: the model reads at most {longest} tokens, prompt included", file=sys.stderr)


@command()
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str, typer.Option(help="What the model is told beforehand.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Of a reply, at most.", min=1, max=LARGEST)] = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 50,
    seed: SamplingSeed = 0,
    share: Share = None,
    kv_share: KVShare = None,
    history: History = None,
    device: Device = None,
) -> None:
    """Talk to a model whose tokenizer has a chat template; the replies appear as they are written.

    Every line is a message. /clear begins a new conversation, and /exit or the end of the input leaves.

    Example: chiaroscuro chat runs/smollm2-routed --kv-share 0.25
    """
    from chiaroscuro.analysis.chatting import Conversation
    from chiaroscuro.report.visible import harmless
    from chiaroscuro.studies.workspace import Workspace

    workspace = Workspace(checkpoint, device=device, share=share, kv_share=kv_share, history=history)
    conversation = Conversation(
        workspace.language_model("chat"),
        workspace.tokenizer,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )

    def show(piece: str) -> None:
        print(harmless(piece), end="", flush=True)

    by_hand = sys.stdin.isatty()
    while True:
        print("> " if by_hand else "", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"the standard input is not UTF-8: {error}; convert it with iconv") from None
        text = line.strip()
        if not line or text == "/exit":
            break
        if text == "/clear":
            conversation.clear()
        elif text:
            try:
                conversation.reply(text, show)
            except UserError as error:
                if not by_hand:
                    raise
                print(f"error: {error} (/clear)", file=sys.stderr)
            print()


@command()
def calibrate(
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the calibrated copy of the model. Not needed for --method paper."),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="ρ; by default the model's own attention_share.", min=0, max=1)
    ] = None,
    kv_share: Annotated[
        float | None, typer.Option(help="The share that is kept; by default the model's own kv_share.", min=0, max=1)
    ] = None,
    data: Source = None,
    split: Annotated[str | None, typer.Option(help="The split to calibrate on; by default train.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Use this many tokens from the beginning of the split; by default 65536. Sequences are as long as the "
            "recipe's; without a recipe at most 256 tokens, or 1024 for a retrofitted model.",
            min=1,
            max=LARGEST,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="data: sets the thresholds of every layer at quantiles of the entropies that it sees. paper: prints "
            "the 33rd and 67th percentile of the entropy of a trained baseline's embeddings, to put into a recipe."
        ),
    ] = "data",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Set a model's thresholds from data, so that each layer sends the share of tokens that you ask for to attention.

    Of a retrofitted model: so that these shares look far, and are kept.

    Example: chiaroscuro calibrate runs/small --share 0.1 --output runs/small-10
    """
    from chiaroscuro.report.tables import figures_table, routed_shares, routing_table
    from chiaroscuro.studies.calibration import calibrate_copy, published_thresholds
    from chiaroscuro.studies.workspace import Workspace

    if method not in ("data", "paper"):
        raise UserError(f"--method {method}: choose data or paper")
    if method == "paper":
        given = {"--output": output, "--share": share, "--kv-share": kv_share, "--split": split, "--tokens": tokens}
        for option, value in given.items():
            if value is not None:
                raise UserError(
                    f"{option} {value} goes with --method data: paper takes the percentiles and the rows as published, "
                    "and prints the thresholds"
                )
        low, high = published_thresholds(Workspace(checkpoint, device=device), source=data)
        if as_json:
            print_json({"entropy_thresholds": [low, high]})
        else:
            print(f"calibration: {{method: fixed, thresholds: [{low:.4f}, {high:.4f}]}}")
        return
    if output is None:
        raise UserError("--output is missing: name a folder for the calibrated copy of the model")
    if output.exists():
        raise UserError(f"--output {output} exists already: name another folder")
    found = calibrate_copy(
        Workspace(checkpoint, device=device),
        output,
        share=share,
        kv_share=kv_share,
        source=data,
        split=split or "train",
        tokens=tokens or 65536,
    )
    if as_json:
        print_json({"output": str(output), **found})
        return
    console = Console()
    console.print(f"calibrated to a share of {found['attention_share']:g}, saved as {escape(str(output))}")
    if "layers" in found:
        console.print(routing_table(found["layers"], found["null_entropy"]))
    else:
        console.print(figures_table({"kept share": found["kv_share"], **routed_shares(found)}))


@command()
def fit(
    checkpoint: Checkpoint,
    output: Annotated[
        Path, typer.Option(help="Folder for the fitted copy of the model, with fit.json and fit.png; must not exist.")
    ],
    look: Annotated[
        float | None,
        typer.Option(
            help="Fit who looks far, for this share (0 to 1) of the tokens. Left out, that is left unchanged, except "
            "in a retrofitted model, where fitted scores are fitted anew."
        ),
    ] = None,
    kept: Annotated[
        float | None,
        typer.Option(help="Fit who is kept to be seen from far, for this share of the tokens; likewise."),
    ] = None,
    hidden: Annotated[
        int | None,
        typer.Option(help="Fit scores of two layers, so wide in between; linear ones by default.", min=1, max=2**16),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Instead of --look and --kept, fit both for this mean share, spread over the layers by the harm that "
            "each does alone."
        ),
    ] = None,
    data: Source = None,
    split: Annotated[str, typer.Option(help="The split to fit on.")] = "train",
    tokens: Annotated[
        int, typer.Option(help="Use this many tokens from the beginning of the split.", min=1, max=LARGEST)
    ] = 65536,
    length: Annotated[
        int | None,
        typer.Option(
            help="T, tokens that the model reads at once: several times its window. By default the recipe's "
            "data.sequence_length or, without a recipe, 1024, or as many as the model reads.",
            min=1,
            max=LARGEST,
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Fit the scores by which a trained model's tokens look far, and by which they are kept to be seen from far.

    The routers of the copy are "fitted", and calibrated at the shares. The last fifth of the tokens is held out: on it,
    the table shows for each layer how well a score ranks the tokens, and how many of the true top share it finds. A
    retrofitted model is fitted on passages of the text, copies and needles, for its own shares unless others are given.

    Example: chiaroscuro fit runs/reach-small --look 0.25 --kept 0.25 --output runs/reach-small-fitted
    """
    from chiaroscuro.report.tables import fit_table
    from chiaroscuro.studies.fitting import fit_copy
    from chiaroscuro.studies.workspace import Workspace

    found = fit_copy(
        Workspace(checkpoint, device=device),
        output,
        look=look,
        kept=kept,
        hidden=hidden,
        budget=budget,
        source=data,
        split=split,
        tokens=tokens,
        length=length,
    )
    if as_json:
        print_json({"output": str(output), **found})
        return
    console = Console()
    console.print(f"fitted, calibrated and saved as {escape(str(output))}")
    console.print(fit_table(found))


@command()
def retrofit(
    model: Annotated[
        str,
        typer.Argument(
            help="A decoder's folder, a GGUF file, a Hub name owner/name, or smollm2, which the extra of that name "
            "brings."
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(help="Folder for the routed copy, with a report; must not exist, or be of an interrupted call."),
    ],
    kv_share: Annotated[
        float | None,
        typer.Option("--kv-share", help="The share of tokens kept to be seen from far; by default 0.25."),
    ] = None,
    look: Annotated[float, typer.Option(help="The share of the tokens that look far.")] = 1.0,
    window: Annotated[int, typer.Option(help="w, how many tokens each token sees in any case.")] = 128,
    sinks: Annotated[int, typer.Option(help="s, how many tokens at the beginning all see.")] = 4,
    layers: Annotated[
        str | None,
        typer.Option(help="Which layers to route, counted from 0, such as 2-9,12. By default all that can be."),
    ] = None,
    one_head: Annotated[
        bool, typer.Option("--one-head", help="Choose who looks and who is kept alike for all key-value heads.")
    ] = False,
    history: Annotated[
        int,
        typer.Option(
            help="Let thresholds follow so many tokens of each row, which brings the shares nearer to what is asked "
            "for on any text; 0 for thresholds that stand still.",
            min=0,
            max=LARGEST,
        ),
    ] = 2048,
    target: Annotated[
        str | None, typer.Option(help="Instead of --kv-share: keep as few as cost at most this perplexity, such as 1%.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="The text to fit and to measure on: python-docs, a folder, or a Hub name.")
    ] = "python-docs",
    rows: Annotated[int, typer.Option(help="Rows to fit on.", min=1, max=LARGEST)] = 48,
    length: Annotated[
        int | None,
        typer.Option(
            help="Their length; by default 1024 tokens. All defaults are shorter for a model that reads fewer.",
            min=1,
            max=LARGEST,
        ),
    ] = None,
    needles: Annotated[
        str | None, typer.Option(help="Lengths of the rows in which needles are looked for; by default 1024,2048.")
    ] = None,
    costs: Annotated[
        str | None, typer.Option(help="Lengths at which cache and speed are measured; by default 1024,2048.")
    ] = None,
    text_rows: Annotated[int, typer.Option(help="Rows of text to measure on.", min=1, max=LARGEST)] = 8,
    text_length: Annotated[
        int | None, typer.Option(help="Their length; by default 2048 tokens.", min=1, max=LARGEST)
    ] = None,
    tries: Annotated[int, typer.Option(help="Needles of each depth and length.", min=1, max=LARGEST)] = 4,
    seconds: Annotated[float, typer.Option(help="Seconds for each speed; 0 measures none.", min=0)] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Route the attention of a decoder: fit its scores, save a copy, and report what it saves and what it costs.

    Perplexity by position, needles by depth, cache, and the speed of prefill and decoding, each beside the original's.
    If it is interrupted after the fit, the same command goes on with the report.

    Example: chiaroscuro retrofit smollm2 runs/smollm2-routed --kv-share 0.25
    """
    from chiaroscuro.studies.retrofitting import PAGE, Measured, retrofit_copy

    if target is not None and kv_share is not None:
        raise UserError("--target finds the share that is kept: leave out --kv-share")
    found = retrofit_copy(
        model,
        output,
        window=window,
        sinks=sinks,
        look=look,
        kept=0.25 if kv_share is None else kv_share,
        heads=not one_head,
        history=history,
        layers=None if layers is None else numbers("--layers", layers),
        data=data,
        rows=rows,
        length=length,
        target=None if target is None else percentage("--target", target),
        measured=Measured(
            text_length,
            text_rows,
            None if needles is None else tuple(numbers("--needles", needles)),
            None if costs is None else tuple(numbers("--costs", costs)),
            tries,
            seconds,
        ),
    )
    if as_json:
        print_json({"output": str(output), **found})
        return
    print((output / PAGE).read_text("utf-8"))


@command()
def route(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Argument(help="The text to look at; - reads standard input.")],
    html: Annotated[
        Path | None, typer.Option(help="Write an interactive page to this file.", callback=refuse_bad_place)
    ] = None,
    png: Png = None,
    share: Share = None,
    kv_share: KVShare = None,
    history: History = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show which tokens of a text went to which operator, which are kept, and their spectral entropy.

    Of a retrofitted model: who looks far, by any of the key-value heads, and by how many of them each token is kept.

    Example: chiaroscuro route runs/small "Return a list of the words in the string." --html page.html
    """
    from chiaroscuro.files import write_text
    from chiaroscuro.report.routing_figure import save_png
    from chiaroscuro.report.routing_html import render_html
    from chiaroscuro.report.routing_terminal import print_routing
    from chiaroscuro.studies.routing_trace import trace_text
    from chiaroscuro.studies.workspace import Workspace

    workspace = Workspace(checkpoint, device=device, share=share, kv_share=kv_share, history=history)
    trace = trace_text(workspace, _text(text))
    if html is not None:
        write_text(html, render_html(trace))
    if png is not None:
        save_png(trace, png)
    if as_json:
        print_json(trace.to_dict())
    else:
        print_routing(trace, Console(), per_token=True)


@command()
def app(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="A model; without one the quickstart's, or SmolLM2 where the extra is installed."),
    ] = None,
    port: Annotated[int, typer.Option(help="Of 127.0.0.1; no other machine can reach it.")] = 7860,
) -> None:
    """Look into a model in the browser: what is routed where, what it costs, and what it writes.

    Example: chiaroscuro app runs/quickstart/small --port 7861
    """
    from chiaroscuro.app.page import HOST, free_port, launch
    from chiaroscuro.app.served import serve

    free_port(port)
    served = serve(None if checkpoint is None else refuse_empty(checkpoint))
    Console(stderr=True).print(
        f"http://{HOST}:{port} shows {served.name}; Ctrl+C ends it", highlight=False, markup=False
    )
    launch(served, port)


@command()
def info(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Describe a checkpoint: its size, its menus, its thresholds, and how it was trained."""
    from chiaroscuro.analysis.facts import describe_checkpoint
    from chiaroscuro.report.tables import checkpoint_tables
    from chiaroscuro.studies.workspace import Workspace

    workspace = Workspace(checkpoint, device="cpu")
    facts = describe_checkpoint(workspace.model)
    if workspace.recipe is not None:
        facts["recipe"] = workspace.recipe.model_dump(mode="json", exclude_none=True)
    if as_json:
        print_json(facts)
    else:
        Console().print(*checkpoint_tables(facts), sep="\n")


@command("import-reference")
def import_reference(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt", help="A checkpoint of the author's code.")],
    output: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the model; must not exist.")],
    heads: Annotated[int | None, typer.Option(help="h, if the file does not say it.", min=1, max=LARGEST)] = None,
    thresholds: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Thresholds of the entropy, if the file does not say them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint of the author's code (hackie123/CHIAR-former) into a folder for from_pretrained, exactly.

    CHIAR-Formers, baselines, mixed training and classifiers; threshold, soft and hard routing. Code in the file is not
    run. The file has no tokenizer: the author's models use GPT-2's.

    Example: chiaroscuro import-reference chiar_dct_attn_400M_best.pt runs/author --thresholds 0.8935 0.8973
    """
    from chiaroscuro.convert import import_reference as convert
    from chiaroscuro.files import whole_folder
    from chiaroscuro.report.tables import figures_table

    if output.exists():
        raise UserError(f"{output} exists already: name another folder")
    imported = convert(file, heads=heads, thresholds=thresholds)
    model = imported.model
    with whole_folder(output, new=True) as partial:
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
        print_json(facts)
        return
    console = Console()
    for remark in facts.pop("remarks"):
        console.print(escape(remark), soft_wrap=True)
    console.print(figures_table({name: value for name, value in facts.items() if value is not None}))


def _text(argument: str) -> str:
    try:
        return sys.stdin.read() if argument == "-" else argument
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 at byte {error.start}; give it as UTF-8") from None
