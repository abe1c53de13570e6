"""docs/evidence.md: each question is one recipe, and this command measures it, or writes the page.

    python -m chiaroscuro.studies.evidence recipes/evidence/gain.yaml   # likewise the others
    python -m chiaroscuro.studies.evidence

Figures and picture go to experiments/results/evidence. Without a recipe nothing is measured: the page is written from
the figures that are there.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from rich.console import Console

from chiaroscuro.errors import UserError, suggest
from chiaroscuro.files import write_bytes, write_text
from chiaroscuro.layers.operator import is_number, is_whole
from chiaroscuro.studies.command import exit_code
from chiaroscuro.studies.evidence import classes, equal_time, gain, gate, layers, length

RESULTS = Path("experiments/results/evidence")
RECIPES = Path("recipes/evidence")
PAGE = Path("docs/evidence.md")
QUESTIONS: Mapping[str, ModuleType] = {
    "gain": gain,
    "gate": gate,
    "classes": classes,
    "length": length,
    "equal_time": equal_time,
    "layers": layers,
}

INTRODUCTION = """# Evidence

Written by `python -m chiaroscuro.studies.evidence` from `experiments/results/evidence/`; do not edit.

Questions that the paper leaves open, each with its recipe, its command, its picture and its answer. A verdict is what
the rule beside it makes of the figures.
"""


def main(arguments: list[str]) -> int:
    """Measure the recipes that are named, and write the page: an exit code."""
    return exit_code(lambda: write(arguments, Console()))


def write(arguments: list[str], console: Console) -> None:
    """See `main`.

    Raises:
        UserError: a recipe or one of its models can't be used.

    """
    drawn: dict[str, bytes] = {}
    for file in arguments:
        recipe = read(Path(file))
        refuse_missing(recipe)
        name = recipe["question"]
        RESULTS.mkdir(parents=True, exist_ok=True)
        found = QUESTIONS[name].measure(recipe, console)
        drawn[name] = QUESTIONS[name].draw(found)
        QUESTIONS[name].answer(found)  # or an error, before what was there is replaced
        write_text(RESULTS / f"{name}.json", json.dumps(found, indent=1) + "\n")
    figures = measured()
    for name, found in figures.items():
        write_bytes(RESULTS / f"{name}.png", drawn.get(name) or QUESTIONS[name].draw(found))
    write_text(PAGE, page(figures))
    console.print(f"wrote {PAGE}")


def read(file: Path) -> dict[str, Any]:
    """A question's recipe.

    Raises:
        UserError: it can't be read, or asks nothing that is known.

    """
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    question = str(recipe.get("question") if isinstance(recipe, dict) else None)
    if question not in QUESTIONS:
        raise UserError(f"{file}: question: {question}; choose one of {', '.join(QUESTIONS)}")
    missing = [name for name in QUESTIONS[question].FIELDS if name not in recipe]
    unknown = [name for name in recipe if name not in (*QUESTIONS[question].FIELDS, "question")]
    if missing or unknown:
        raise UserError(f"{file}: {f'{missing[0]} is missing' if missing else f'{unknown[0]}: unknown field'}")
    try:
        _refuse_wrong(recipe, getattr(QUESTIONS[question], "MODEL", None))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return recipe


def _refuse_wrong(recipe: Mapping[str, Any], fields: Mapping[str, bool] | None) -> None:
    """Raise a UserError for values of another kind, and for models without what they need.

    Args:
        recipe: of a question.
        fields: of its models, and whether they are needed; None where a model is the name of its checkpoint.

    """
    for name in ("tokens", "rows", "length"):
        if name in recipe and not (is_whole(recipe[name]) and recipe[name] > 0):
            raise UserError(f"{name}={recipe[name]!r}: give a positive whole number")
    for name, least in (("share", 1e-9), ("seconds", 0)):
        if name in recipe and not (is_number(recipe[name]) and recipe[name] >= least):
            raise UserError(f"{name}={recipe[name]!r}: give a number above 0")
    lists = ("seeds", "tasks") if "baseline" in recipe else ("seeds", "tasks", "lengths")  # or the models of each
    for name in set(lists) & recipe.keys():
        if not (isinstance(recipe[name], list) and recipe[name]):
            raise UserError(f"{name}={recipe[name]!r}: give a list of one or more")
        if name != "tasks" and not all(is_whole(number) and number >= 0 for number in recipe[name]):
            raise UserError(f"{name}={recipe[name]!r}: give whole numbers")
    retrofitted = recipe.get("retrofitted", {})
    if not isinstance(retrofitted, dict) or not all(isinstance(file, str) for file in retrofitted.values()):
        raise UserError(f"retrofitted={retrofitted!r}: give files of results, by name, or {{}} for none")
    models = recipe.get("models", {"": ""})
    if not isinstance(models, dict) or not models:
        raise UserError(f"models={models!r}: give one or more, by name")
    for name, model in models.items():
        if fields is None and not isinstance(model, str):
            raise UserError(f"models.{name}={model!r}: give the name of its checkpoint")
        if fields is None:
            continue
        if not isinstance(model, dict):
            raise UserError(f"models.{name}={model!r}: give fields, of {', '.join(fields)}")
        if unknown := [field for field in model if field not in fields]:
            raise UserError(f"models.{name}.{unknown[0]}: unknown field; {suggest(unknown[0], fields)}")
        if missing := [field for field, needed in fields.items() if needed and field not in model]:
            raise UserError(f"models.{name}.{missing[0]} is missing")


def refuse_missing(recipe: Mapping[str, Any]) -> None:
    """Raise a UserError if a file of results that the recipe names is not there."""
    for name in (recipe.get("results"), *recipe.get("retrofitted", {}).values()):
        if name is not None and not Path(name).is_file():
            raise UserError(f"{name} can't be read: No such file or directory")


def measured() -> dict[str, Any]:
    """The figures that are there, by question."""
    files = {name: RESULTS / f"{name}.json" for name in QUESTIONS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def page(figures: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for number, (name, question) in enumerate(QUESTIONS.items(), 1):
        parts.append(f"## {number}. {question.QUESTION}\n")
        recipe = f"{RECIPES / name}.yaml"
        parts.append(
            f"`python -m chiaroscuro.studies.evidence {recipe}`, on the runs that [the recipe](../{recipe}) names\n"
        )
        if name not in figures:
            parts.append("Not measured yet.\n")
            continue
        parts.append("\n".join(question.answer(figures[name])).strip() + "\n")
        parts.append(f"![{question.QUESTION}](../{RESULTS / name}.png)\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
