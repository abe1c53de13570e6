"""The recipe that the sweeps of these tests vary."""

from pathlib import Path
from typing import Any

import pytest

from small_runs import recipe_content, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def content(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe, as YAML would give it: 12 steps, a checkpoint every 4."""
    return recipe_content(corpus, tmp_path / "run")
