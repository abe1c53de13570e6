"""The recipes read nothing outside the clone but data sets of the Hub."""

from pathlib import Path

import pytest

from chiaroscuro.data.corpora import HUB_NAME
from chiaroscuro.studies.sweep import Sweep
from chiaroscuro.training import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
# A recipe that heals reads the folder of a retrofitted model: see tests/cli/test_cli_heal.py.
OTHER = ("heal", "evidence")  # these name a checkpoint, or ask a question: tested where they are read
FILES = sorted(path.relative_to(RECIPES) for path in RECIPES.rglob("*.yaml") if path.parent.name not in OTHER)


def sources(recipe: Recipe) -> list[str]:
    sections = [recipe.data, *(recipe.mixture.tasks.values() if recipe.mixture else [])]
    return [section.options["source"] for section in sections if "source" in section.options]


@pytest.mark.parametrize("name", FILES, ids=str)
def test_a_recipe_reads_nothing_outside_the_clone(name: Path) -> None:
    path = RECIPES / name
    recipes = [run.recipe for run in Sweep.load(path).runs] if name.parts[0] == "sweeps" else [Recipe.load(path)]
    found = [source for recipe in recipes for source in sources(recipe)]
    assert all(source == "python-docs" or HUB_NAME.fullmatch(source) for source in found), found
    assert not any((Path(__file__).parents[2] / source).exists() for source in found)
