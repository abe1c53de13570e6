"""A small corpus in a folder, its cache, and corpora without files."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from corpus_samples import TEXTS

from chiaroscuro.data import Corpus, load_corpus


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    for split, text in TEXTS.items():
        (folder / f"{split}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def corpus(folder: Path, cache: Path) -> Corpus:
    return load_corpus(folder, cache)


@pytest.fixture(scope="session")
def corpus_of() -> Callable[..., Corpus]:
    """Return a function that makes a corpus of rows without any file."""

    def make(rows: list[str], separator: str = "newline", fingerprint: str = "made up") -> Corpus:
        splits = {split: datasets.Dataset.from_dict({"text": rows}) for split in ("train", "validation")}
        return Corpus("rows", "made by a test", splits, separator, fingerprint)  # type: ignore[arg-type]

    return make
