"""What all commands share: the application, its options, and how results reach the terminal.

Nothing here imports PyTorch or transformers, which take seconds: help and a mistake in the arguments should not wait
for them. So every command imports what it uses when it runs.
"""

import inspect
import json
import re
from collections.abc import Callable
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from chiaroscuro import plugins
from chiaroscuro.errors import UserError
from chiaroscuro.files import refuse_place
from chiaroscuro.hub import find_checkpoint

app = typer.Typer(
    name="chiaroscuro",
    help="Language models that spend attention only where a token needs it (CHIAR-Former, arXiv 2606.08327).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="First import this module, which registers operators, routers or tasks of yours. Can be repeated.",
    ),
]


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function: it takes `--import` too, and knows all plugins when it runs."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, modules: list[str] | None, **kwargs: Any) -> None:
            plugins.import_installed()
            plugins.import_modules(modules or [])
            from transformers.utils import logging

            logging.disable_progress_bar()  # of loading a few files, which would stand between the lines of ours
            function(*args, **kwargs)

        own = inspect.signature(function)
        added = inspect.Parameter("modules", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Modules)
        cast(Any, run).__signature__ = own.replace(parameters=[*own.parameters.values(), added])
        run.__annotations__ = {**function.__annotations__, "modules": Modules}
        app.command(name)(run)
        return function

    return register


def _print_version(asked: bool) -> None:
    if asked:
        print(metadata.version("chiaroscuro"))
        raise typer.Exit


@app.callback()
def _root(
    modules: Modules = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    plugins.import_modules(modules or [])


# ---- options that several commands have ------------------------------------------------------------------------


def refuse_empty(name: str) -> str:
    """Refuse an empty name of a file, a folder or a model."""
    if not name:
        raise UserError("the name is empty: give that of a file, a folder or a model")
    return name


def _refuse_missing_checkpoint(name: str) -> str:
    find_checkpoint(refuse_empty(name))
    return name


def numbers(option: str, given: str) -> list[int]:
    """Whole numbers and ranges of them: "2-4,9" as 2, 3, 4, 9."""
    found: list[int] = []
    for part in given.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})(?:\s*-\s*(\d{1,7}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"{option} {given}: give numbers and ranges, such as 2-4,9")
        found += range(first, last + 1)
    return found


def percentage(option: str, given: str) -> float:
    """A part of the whole: "1.5%" or "0.015"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", given)
    if not match:
        raise UserError(f"{option} {given}: give a percentage, such as 1%")
    return float(match[1]) / (100 if match[2] else 1)


def refuse_missing(kind: str) -> Callable[[Any], Any]:
    """A callback that refuses a file that doesn't exist, before seconds of imports."""

    def refuse(name: str | Path) -> str | Path:
        if not Path(refuse_empty(str(name))).exists():
            raise UserError(f"{kind} {name} can't be read: No such file or directory")
        return name

    return refuse


def refuse_bad_place(file: Path | None) -> Path | None:
    """Refuse a file that can't be written, before the work for it is done."""
    if file is not None:
        refuse_place(file)
    return file


def _refuse_other_than_png(file: Path | None) -> Path | None:
    if file is not None and file.suffix.lower() != ".png":
        raise UserError(f"--png {file}: the figure is a PNG file; give it a name that ends in .png")
    return refuse_bad_place(file)


LARGEST = 2**31 - 1
"""Of sizes and counts. Nothing here is as large, and what is larger overflows somewhere."""

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A model's folder, a run's folder (its model/ is taken), a GGUF file, a Hub name owner/name, or smollm2, "
        "which the extra of that name brings.",
        callback=_refuse_missing_checkpoint,
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="python-docs, a folder with train/validation/test text or parquet files, or a Hub name "
        "owner/name:config. By default the data of the run's recipe.",
    ),
]
Png = Annotated[Path | None, typer.Option(help="Write a picture to this file.", callback=_refuse_other_than_png)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Share = Annotated[
    float | None,
    typer.Option(help="First set the share of tokens (0 to 1) that goes to attention.", min=0, max=1),
]
KVShare = Annotated[
    float | None,
    typer.Option(
        help="First set the share of tokens (0 to 1) that is kept, to be seen from beyond the window.", min=0, max=1
    ),
]
History = Annotated[
    int | None,
    typer.Option(
        help="First let thresholds follow so many tokens of each row, which brings the shares nearer to what is asked "
        "for on any text; 0 for thresholds that stand still.",
        min=0,
        max=LARGEST,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where the model runs: cpu or cuda. By default cuda if PyTorch sees a GPU.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]


# ---- results ---------------------------------------------------------------------------------------------------


def print_json(figures: dict[str, Any]) -> None:
    """Print strict JSON. Control characters are escaped, the C1 ones too: terminals obey some of them."""
    text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
    print(re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text))
