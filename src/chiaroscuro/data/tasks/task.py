"""What every classification task is, once it is loaded."""

from collections import Counter
from dataclasses import dataclass

import datasets

from chiaroscuro.data.corpora import Corpus


@dataclass(frozen=True)
class ClassificationTask:
    """Texts with labels, in three splits.

    Attributes:
        name: what the user calls it.
        description: where the texts are from, and where the validation split is, in one line.
        labels: the name of each label; a row's label is a place in this list.
        splits: "train", "validation" and "test"; the columns "text" and "label" have a row each.
        fingerprint: changes with any row or label of any split.
        tokenizer: the tokenizer that suits the texts, for whoever has no wish of their own.

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
        """How many rows of a split have each label, in the order of `labels`."""
        counts = Counter(self.splits[split]["label"][:])
        return [counts[label] for label in range(len(self.labels))]
