"""IMDB: film reviews, negative or positive (Maas et al. 2011).

The data set has 25,000 reviews for training and 25,000 for testing, half of them positive, and no validation split.
Ours is a tenth of the training reviews, 1,250 of each label: those whose text has the smallest hash. So the split does
not depend on the source or the order of the reviews, and a duplicated review stays on one side.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import datasets

from chiaroscuro.data.corpora import check_texts, hash_rows, read_splits
from chiaroscuro.data.storage import fingerprint
from chiaroscuro.data.tasks.task import ClassificationTask, LabelledTexts
from chiaroscuro.data.text_files import NUMBERS, STRINGS
from chiaroscuro.errors import UserError

LABELS = ("negative", "positive")
UNLABELLED = -1
HELD_OUT = 10
"""One training review in this many is held out for validation."""

WANTED = "the task imdb is read from a folder with train.parquet and test.parquet, or from a Hub name"


@dataclass(frozen=True)
class Imdb(ClassificationTask):
    """IMDB's reviews.

    Args:
        source: a folder with `train.parquet` and `test.parquet` (or `.jsonl`), the columns "text" and "label" (0
            negative, 1 positive, as floats too; rows of label −1 have none and are left out), or the Hub's name of such
            a data set.

    """

    source: str = "stanfordnlp/imdb"

    tokenizer = "bpe:4096"
    labels = LABELS

    def load(self, cache_dir: Path) -> LabelledTexts:
        """The reviews.

        Raises:
            UserError: the source can't be read, has no such splits, columns or labels, or too few texts to hold some
                out.

        """
        found, origin = read_splits(self.source, cache_dir, WANTED, {"text": STRINGS, "label": NUMBERS})
        for split in ("train", "test"):
            if split not in found:
                raise UserError(
                    f"{self.source!r} has no {split} split, only {', '.join(found) or 'unknown ones'}; {WANTED}"
                )
        check_texts(self.source, found)
        labelled = {split: _labelled(self.source, split, rows) for split, rows in found.items()}
        texts = hash_rows(self.source, labelled, "eos")
        labels = hashlib.sha256(bytes(label for rows in labelled.values() for label in rows["label"][:])).hexdigest()
        validation = "its own validation split"
        if "validation" not in labelled:
            labelled["train"], labelled["validation"] = _hold_out(self.source, labelled["train"])
            validation = "a tenth of train, by the hash of the text, for validation"
        return self.data(
            f"film reviews, negative or positive: {origin}, {validation}",
            {split: labelled[split] for split in ("train", "validation", "test")},
            fingerprint(texts=texts, labels=labels, held_out=HELD_OUT),
        )


def _labelled(source: str, split: str, rows: datasets.Dataset) -> datasets.Dataset:
    """The rows that have a label, with the columns "text" and "label"."""
    if "label" not in rows.column_names:
        raise UserError(
            f"the {split} split of {source!r} has no column 'label', only {', '.join(rows.column_names)}; rename one"
        )
    labels = rows["label"][:]
    for label in {repr(label): label for label in labels}.values():
        if label not in (UNLABELLED, *range(len(LABELS))):
            raise UserError(f"the {split} split of {source!r} has the label {label}: labels are 0, 1, and −1 for none")
    kept = [i for i, label in enumerate(labels) if label != UNLABELLED]
    for label, name in enumerate(LABELS):
        if label not in labels:
            raise UserError(f"the {split} split of {source!r} has no {name} row (label {label})")
    whole = [int(label) for label in labels]  # they are floats if the column once held a NaN
    return rows.select_columns("text").add_column("label", whole).select(kept)


def _hold_out(source: str, rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and validation rows: one in `HELD_OUT` of each label by hash, at least one text and never all of them."""
    labels = rows["label"][:]
    digests = [hashlib.sha256(text.encode()).digest() for text in rows["text"][:]]
    held: set[int] = set()
    for label, name in enumerate(LABELS):
        own = sorted((i for i, other in enumerate(labels) if other == label), key=lambda i: digests[i])
        *others, _ = sorted({digests[i] for i in own})
        if not others:
            raise UserError(
                f"the train split of {source!r} has one {name} text (label {label}) only: give two different ones, one "
                "for validation, or a validation split of its own"
            )
        last = min(digests[own[max(1, len(own) // HELD_OUT) - 1]], others[-1])
        held.update(i for i in own if digests[i] <= last)  # every row with this text, not the first alone
    kept = [i for i in range(len(rows)) if i not in held]
    return rows.select(kept), rows.select(sorted(held))
