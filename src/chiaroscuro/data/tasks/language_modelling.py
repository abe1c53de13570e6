"""Language modelling: predict every next token of a text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chiaroscuro.data.blocks import TokenBlocks
from chiaroscuro.data.corpora import Corpus, Separator, load_corpus, stream_corpus
from chiaroscuro.data.tasks.task import TextTask
from chiaroscuro.data.tokens import TokenFile
from chiaroscuro.errors import UserError

SHUFFLE = 1024
"""Blocks of a streamed split that are read at a time, unless another number is given."""


@dataclass(frozen=True)
class LanguageModelling(TextTask):
    """A corpus.

    Args:
        source: `python-docs`, a folder with train and validation files, or a Hub name: see `load_corpus`.
        column: the column of the texts, where the source has columns.
        documents: whether each row is a document, which ends in the tokenizer's end-of-sequence token, and sees nothing
            of those before it in its block: positions restart, and its first token is not predicted. Without, blocks
            are the paper's, a running text.
        streaming: whether the train split is read and tokenised while a model learns from it, in the order of its
            files, and neither stored nor held in memory.
        shuffle: of a streamed split, how many blocks are read at a time, for each batch of a step, and given in random
            order.

    """

    source: str = "python-docs"
    column: str = "text"
    documents: bool = False
    streaming: bool = False
    shuffle: int = SHUFFLE

    def __post_init__(self) -> None:
        if self.shuffle < 1:
            raise UserError(f"data.shuffle={self.shuffle}: must be at least 1; 1 shuffles nothing")

    def of(self, source: str, number: int) -> "LanguageModelling":
        """The same for another text to learn from, number 1, 2, … of those beside this one."""
        return replace(self, source=source)

    def load(self, cache_dir: Path, needed: Sequence[str] = ("train", "validation")) -> Corpus:
        """The corpus of that name."""
        separator: Separator | None = "eos" if self.documents else None
        load = stream_corpus if self.streaming else load_corpus
        return load(self.source, cache_dir, needed, self.column, separator)

    def blocks(self, tokens: TokenFile, tokenizer: Any, length: int, stride: int | None = None) -> TokenBlocks:
        """Blocks of the text, that say where documents begin if they are told apart."""
        return TokenBlocks(tokens, length, stride, tokenizer.eos_token_id if self.documents else None)
