"""Runs of about a second each."""

import gc
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chiaroscuro.training import Recipe, TrainResult, train
from small_runs import recipe_content, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Every run collects garbage: half a second, unless all that is imported is set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def content(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe, as YAML would give it: 12 steps with dropout, a checkpoint every 4."""
    return recipe_content(corpus, tmp_path / "run")


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run of `content`, never interrupted."""
    return train(changed(recipe_content(corpus, tmp_path_factory.mktemp("whole"))), console=Console(quiet=True))


@pytest.fixture
def run(content: dict[str, Any]) -> Callable[..., tuple[TrainResult, str]]:
    """Trains `content` with changes `section__field=value`; gives the result and what was printed."""

    def go(resume: bool = False, console: Console | None = None, **changes: Any) -> tuple[TrainResult, str]:
        printed = io.StringIO()
        console = console or Console(file=printed)
        return train(changed(content, **changes), resume=resume, console=console), printed.getvalue()

    return go


def changed(content: dict[str, Any], **changes: Any) -> Recipe:
    sections = {name: dict(value) if isinstance(value, dict) else value for name, value in content.items()}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            sections[section] = {**sections.get(section, {}), field: value}
        else:
            sections[section] = value
    return Recipe.from_dict(sections)
