"""What a task is, and the three kinds of data that a task can give.

A task is a frozen dataclass. Its fields are its options, which a recipe sets in its `data` section: their types are
checked by their annotations, all else by `__post_init__`. `load` reads or generates the data. The kind of task decides
which model learns from the data, and by which figures it is measured:

- [`TextTask`][]: predict every next token of a running text. Loss, perplexity, bits per byte.
- [`ClassificationTask`][]: predict the label of a text. Loss and accuracy over texts.
- [`TokenTask`][]: predict a token at some positions of a sequence. Loss and accuracy over these positions.
- [`RecallTask`][]: the same, where each target stood earlier in the sequence. Accuracy also by how far back.
"""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
from torch.utils.data import Dataset

from chiaroscuro.data.blocks import TokenBlocks
from chiaroscuro.data.corpora import Corpus
from chiaroscuro.data.tokens import TokenFile
from chiaroscuro.errors import UserError


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with labels, in three splits.

    Attributes:
        name: the task's.
        description: where the texts and the validation split come from, in one line.
        labels: the name of each label; a row's label is an index into it.
        splits: "train", "validation" and "test", with the columns "text" and "label".
        fingerprint: changes with any row or label of any split.
        tokenizer: the tokenizer that suits the texts.

    """

    name: str
    description: str
    labels: tuple[str, ...]
    splits: dict[str, datasets.Dataset]
    fingerprint: str
    tokenizer: str

    @property
    def corpus(self) -> Corpus:
        """The texts alone, as documents: what a tokenizer is trained on."""
        texts = {split: rows.select_columns("text") for split, rows in self.splits.items()}
        return Corpus(self.name, self.description, texts, "eos", self.fingerprint)

    def label_counts(self, split: str) -> list[int]:
        """The number of rows of a split with each label, in the order of `labels`."""
        counts = Counter(self.splits[split]["label"][:])
        return [counts[label] for label in range(len(self.labels))]


@dataclass(frozen=True)
class TokenTargets:
    """Sequences of words, some positions of which have a target, in three splits.

    Attributes:
        name: the task's.
        description: what the sequences are, in one line.
        splits: "train", "validation" and "test", with the columns "words" and "targets": two lists of the same length,
            the word that the model reads at a position, and the word that it is to predict there (None: nothing).
        fingerprint: changes with any row of any split.
        tokenizer: the tokenizer that suits the words.
        depths: what each depth is called. Where there are some, the rows also have a column "depths": for each
            position with a target the index of its depth, else None.

    """

    name: str
    description: str
    splits: dict[str, datasets.Dataset]
    fingerprint: str
    tokenizer: str
    depths: tuple[str, ...] = ()

    @property
    def corpus(self) -> Corpus:
        """The words and the targets, as documents: what a tokenizer is trained on."""
        texts = {
            split: datasets.Dataset.from_dict({"text": [_text(row) for row in rows]})
            for split, rows in self.splits.items()
        }
        return Corpus(self.name, self.description, texts, "eos", self.fingerprint)


def _text(row: dict[str, Any]) -> str:
    return " ".join([*row["words"], *(target for target in row["targets"] if target is not None)])


@dataclass(frozen=True)
class Task(ABC):
    """Something to learn, under a name that recipes and commands know: see the module.

    Attributes:
        name: set by `register_task`.
        tokenizer: the tokenizer that suits it, for a user who has no preference.
        columns: of the rows that `data` takes.

    """

    name: ClassVar[str]
    tokenizer: ClassVar[str] = "bpe:8192"
    columns: ClassVar[datasets.Features]

    @abstractmethod
    def load(self, cache_dir: Path) -> Any:
        """Read or generate the data: `Corpus`, `LabelledTexts` or `TokenTargets`, by the kind of task.

        Args:
            cache_dir: where to keep what takes long to make.

        Raises:
            UserError: the data can't be read or made.

        """

    @abstractmethod
    def data(self, description: str, splits: dict[str, datasets.Dataset], fingerprint: str) -> Any:
        """What `load` returns, made from rows with the kind's `columns`."""

    def refuse_tokenizer(self, tokenizer: str) -> None:  # noqa: B027  # most tasks take any
        """Raise a UserError if a tokenizer, as a recipe names it, can't be used for this task."""


class TextTask(Task):
    """Predict every next token of a running text: `load` returns a [`Corpus`][]."""

    columns = datasets.Features({"text": datasets.Value("string")})

    def blocks(self, tokens: TokenFile, tokenizer: Any, length: int, stride: int | None = None) -> TokenBlocks:
        """What is evaluated on, of the text's tokens: its blocks, unless overridden."""
        return TokenBlocks(tokens, length, stride)

    def train_rows(self, tokens: TokenFile, tokenizer: Any, length: int) -> Dataset[Any]:
        """What is trained on, likewise."""
        return self.blocks(tokens, tokenizer, length)

    def data(self, description: str, splits: dict[str, datasets.Dataset], fingerprint: str) -> Corpus:
        """Rows are documents."""
        return Corpus(self.name, description, splits, "eos", fingerprint)

    def refuse_tokenizer(self, tokenizer: str) -> None:
        """A perplexity is one of the text only where the tokens give back the text."""
        if tokenizer == "words":
            raise UserError(
                "tokenizer='words' loses the spaces of a text and the words it has not seen, so its perplexity would "
                "not be that of the text: take bpe:8192"
            )


class ClassificationTask(Task):
    """Predict the label of a text: `load` returns [`LabelledTexts`][].

    Attributes:
        labels: the names of the labels.

    """

    columns = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("uint8")})
    labels: ClassVar[tuple[str, ...]]

    def data(self, description: str, splits: dict[str, datasets.Dataset], fingerprint: str) -> LabelledTexts:
        """Rows with a text and the index of its label."""
        return LabelledTexts(self.name, description, self.labels, splits, fingerprint, self.tokenizer)


class TokenTask(Task):
    """Predict a word at some positions of a sequence: `load` returns [`TokenTargets`][].

    Words are whatever the task makes of them; each is one token, so that positions are words.
    """

    tokenizer = "words"
    columns = datasets.Features(
        {"words": datasets.List(datasets.Value("string")), "targets": datasets.List(datasets.Value("string"))}
    )

    def data(self, description: str, splits: dict[str, datasets.Dataset], fingerprint: str) -> TokenTargets:
        """Rows with a word and a target, or None, for each position."""
        return TokenTargets(self.name, description, splits, fingerprint, self.tokenizer)

    def refuse_tokenizer(self, tokenizer: str) -> None:
        """Positions are words, so every word must be one token: no BPE, but also the tokenizer of an earlier run."""
        if tokenizer.startswith("bpe:"):
            raise UserError(
                f"tokenizer={tokenizer!r} with the task {self.name}, where each word is one token: set tokenizer=words"
            )


class RecallTask(TokenTask):
    """Predict words that stood earlier in the sequence: a [`TokenTask`][] whose accuracy is also measured by depth.

    What a depth is, and how it is divided, the task says: how far back the word stood, or where in the sequence.
    """

    columns = datasets.Features({**TokenTask.columns, "depths": datasets.List(datasets.Value("int32"))})

    @property
    @abstractmethod
    def depths(self) -> tuple[str, ...]:
        """What each depth is called, in order; the column "depths" holds indices into it."""

    def data(self, description: str, splits: dict[str, datasets.Dataset], fingerprint: str) -> TokenTargets:
        """Rows with a word, and a target and its depth, or None, for each position."""
        return replace(super().data(description, splits, fingerprint), depths=self.depths)
