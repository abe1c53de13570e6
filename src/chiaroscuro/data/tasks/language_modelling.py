"""Language modelling: predict every next token of a text."""

from dataclasses import dataclass
from pathlib import Path

from chiaroscuro.data.corpora import Corpus, load_corpus
from chiaroscuro.data.tasks.task import TextTask


@dataclass(frozen=True)
class LanguageModelling(TextTask):
    """A corpus.

    Args:
        source: `python-docs`, a folder with train and validation files, or a Hub name: see `load_corpus`.

    """

    source: str = "python-docs"

    def load(self, cache_dir: Path) -> Corpus:
        """The corpus of that name."""
        return load_corpus(self.source, cache_dir)
