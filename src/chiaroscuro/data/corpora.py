"""Text to train on, by name: `python-docs`, a folder, or a data set of the Hugging Face Hub.

Every corpus has the same form, wherever it came from: splits named train, validation and perhaps test, each a
`datasets.Dataset` with one column "text".
"""

import hashlib
import io
import logging
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import datasets
from datasets.distributed import split_dataset_by_node

from chiaroscuro.data.python_docs import python_documents
from chiaroscuro.data.storage import default_cache_dir, root_cause, writing_to
from chiaroscuro.data.text_files import FORMATS, STRINGS, TextFiles
from chiaroscuro.errors import UserError, one_line, suggest
from chiaroscuro.hub import cache_if_unreachable

# It logs what it also raises, and what is then said here in one line.
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)

SPLITS = ("train", "validation", "test")

# How many characters of rows are tokenised as one text. Long enough that the boundaries, which no token crosses, don't
# matter (one in about ten thousand tokens); short enough to give work to all cores.
PIECE_CHARACTERS = 65_536

# How many characters of a streamed corpus, the first ones, a tokenizer is trained on.
SAMPLED_CHARACTERS = 2**27

# Changes with how the rows of streamed files are counted, which a run that goes on relies on.
READ_AS = "columns"

# How much of the beginning of each streamed file tells it from another one of its name and size.
IDENTIFYING_BYTES = 2**16

# Where each split of python-docs ends, in percent of the documents.
SHARES = {"train": 90, "validation": 95, "test": 100}

# For fewer bytes of text than this, datasets' progress bars would only flash.
SMALL = 20_000_000

FILE_NAME = re.compile(
    rf"(?P<split>train|validation|valid|val|test)(?P<part>-.+)?\.(?P<format>{'|'.join(map(re.escape, FORMATS))})"
)
SPLIT_OF = {"valid": "validation", "val": "validation"}
WANTED_FILES = (
    "train.txt, validation.txt (or valid.txt, val.txt) and test.txt, each also as .parquet, .jsonl or .jsonl.zst "
    "with a column 'text', or in parts like train-0.txt"
)
WANTED_SOURCES = (
    "a corpus is 'python-docs', a folder with train, validation and test files, "
    "or a Hub name like 'Salesforce/wikitext:wikitext-103-v1'"
)
PYTHON_DOCS = "python-docs"
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")

Separator = Literal["newline", "eos"]


@dataclass(frozen=True)
class Corpus:
    """Splits of text, and how their rows are joined.

    Attributes:
        name: what the user called it.
        description: where the text is from, in one line.
        splits: "train", "validation" and perhaps "test", with the column "text".
        separator: what joins the rows. "newline": the rows are lines, joined by newlines, as the paper does with
            WikiText. "eos": the rows are independent documents, each followed by the tokenizer's end-of-sequence token.
        fingerprint: changes with any row of any split, and with the separator.

    """

    name: str
    description: str
    splits: dict[str, datasets.Dataset]
    separator: Separator
    fingerprint: str

    def pieces(self, split: str) -> Iterator[str]:
        """Yield a split's text in pieces, each of which is tokenised as one text.

        With separator "eos", a piece is a document. With "newline", it is whole rows, each followed by a newline, with
        at least `PIECE_CHARACTERS` characters in all; the pieces of a text file, joined, are the file (with a newline
        at its end).
        """
        rows = (row for batch in self.splits[split].iter(batch_size=1000) for row in batch["text"])
        yield from (piece for _, piece in pieces_of(((None, row) for row in rows), self.separator))

    def sample(self) -> tuple[Iterator[str], int]:
        """What a tokenizer is trained on: pieces of the train split, and about how many characters they have."""
        return self.pieces("train"), self.splits["train"].data.nbytes


@dataclass(frozen=True)
class StreamedCorpus(Corpus):
    """A corpus whose train split is read while a model learns from it; the others are as ever.

    Its fingerprint changes with the names, the sizes and the beginnings of the train split's files, or the revision of
    a data set of the Hub, and with any row of the other splits.

    Attributes:
        open_train: opens the train split anew, with the column "text". Streams that come of one another, as parts of
            one do, would share the state of their reading.

    """

    open_train: Callable[[], datasets.IterableDataset]

    def sample(self) -> tuple[Iterator[str], int]:
        """The first characters of the train split."""
        return self._beginning(), SAMPLED_CHARACTERS

    def rows(self, part: int = 0, parts: int = 1, state: dict[str, Any] | None = None) -> Iterator[tuple[Any, str]]:
        """The texts of the train split, or of one of several parts, each with the state of the stream before it.

        Args:
            part: which one. If the files can be shared out evenly a part is some of them, and otherwise every so many
                rows one.
            parts: how many there are.
            state: where to begin; at the first row by default.

        Raises:
            UserError: a row has no text, or one can't be read.

        """
        try:
            rows = split_dataset_by_node(self.open_train(), part, parts)
            if state is not None:
                rows.load_state_dict(state)
            before = rows.state_dict() if state is None else state  # what is loaded is not yet what is given
            for row in rows:
                if not isinstance(text := row.get("text"), str):
                    raise UserError(
                        f"the train split of {self.name!r} has a row without text, but with {type(text).__name__} in "
                        "its column; remove such rows, or name another column by data.column"
                    )
                yield before, text
                before = rows.state_dict()
        except UserError:
            raise
        except Exception as error:  # a damaged file, or the network, raises errors of many kinds
            raise UserError(
                f"the train split of {self.name!r} can't be read further: {one_line(root_cause(error))}; if a file is "
                "damaged, mend it and start anew, and otherwise resume"
            ) from error

    def _beginning(self) -> Iterator[str]:
        characters = 0
        for _, piece in pieces_of(self.rows(), self.separator):
            yield piece
            characters += len(piece)
            if characters >= SAMPLED_CHARACTERS:
                return


Mark = TypeVar("Mark")


def pieces_of(rows: Iterable[tuple[Mark, str]], separator: Separator) -> Iterator[tuple[Mark, str]]:
    """Join rows into pieces, each of which is tokenised as one text: see [`Corpus.pieces`][].

    Args:
        rows: each with a mark of its place.
        separator: what joins them.

    Yields:
        The mark of the first row of a piece, and the piece.

    """
    if separator == "eos":
        yield from rows
        return
    piece: list[str] = []
    begin: Mark | None = None
    characters = 0
    for mark, row in rows:
        begin = begin if piece else mark
        piece.append(row + "\n")
        characters += len(row) + 1
        if characters >= PIECE_CHARACTERS:
            yield cast(Mark, begin), "".join(piece)
            piece, characters = [], 0
    if piece:
        yield cast(Mark, begin), "".join(piece)


def _refuse_other_separators(separator: str | None) -> None:
    if separator is not None and separator not in get_args(Separator):
        raise UserError(f"separator={separator!r}: {suggest(str(separator), get_args(Separator))}")


def load_corpus(
    source: str | Path,
    cache_dir: Path | None = None,
    needed: Sequence[str] = ("train", "validation"),
    column: str = "text",
    separator: Separator | None = None,
) -> Corpus:
    """Load a corpus.

    Args:
        source: one of

            - `python-docs`: the documentation of the running Python (`python_documents`), split by
              document;
            - a folder: `train.txt`, `validation.txt` (or `valid.txt`, `val.txt`) and optionally `test.txt`. Each line
              is a row. `.parquet` and `.jsonl` files with a column "text" work too, and so do parts (`train-0.txt`,
              `train-1.txt`, in the order of their names);
            - `owner/name` or `owner/name:config`: a data set of the Hugging Face Hub with a column "text". Its rows
              are left as they are: WikiText's end in a newline, and joining adds another.
        cache_dir: where the files of a folder are kept as Arrow tables; [`default_cache_dir`][] by default. A Hub data
            set goes to the Hugging Face cache, which other programs share.
        needed: the splits that must be there, by default those that training needs.
        column: the column of the texts, where the source has columns.
        separator: what joins the rows: see [`Corpus`][]. By default "eos" for `python-docs`, and "newline" for others.

    Returns:
        The corpus, memory-mapped if it came from files.

    Raises:
        UserError: there is no such source, or it lacks a split, the column "text", or any text.

    """
    name = str(source)
    _refuse_other_separators(separator)
    if name == PYTHON_DOCS:
        splits, separator = _python_docs_splits(), separator or "eos"
        description = f"the documentation of Python {platform.python_version()}, by document"
    else:
        columns = {column: STRINGS}
        splits, origin = read_splits(name, cache_dir or default_cache_dir(), WANTED_SOURCES, columns, needed)
        description = f"{origin}, by row"
    separator = separator or "newline"
    splits = _checked(name, splits, needed, column)
    return Corpus(name, description, splits, separator, hash_rows(name, splits, separator))


def stream_corpus(
    source: str | Path,
    cache_dir: Path | None = None,
    needed: Sequence[str] = ("train", "validation"),
    column: str = "text",
    separator: Separator | None = None,
) -> StreamedCorpus:
    """Load a corpus, except for its train split, which is streamed: none of it is stored, or held in memory.

    Args:
        source: a folder, or a data set of the Hugging Face Hub, as for [`load_corpus`][].
        cache_dir: likewise, for the other splits.
        needed: likewise. Of a data set of the Hub no others are loaded.
        column: likewise.
        separator: likewise.

    Raises:
        UserError: there is no such source, it is `python-docs`, which is small, or it lacks a split or the column.

    """
    _refuse_other_separators(separator)
    name, separator = str(source), separator or "newline"
    others = [split for split in needed if split != "train"]
    cache_dir = cache_dir or default_cache_dir()
    if name == "python-docs":
        raise UserError("python-docs is not streamed: it is small; leave out data.streaming")
    if folder := find_folder(name, WANTED_SOURCES):
        files = _files_of_splits(name, folder, ("train",))
        format, paths = files.pop("train")
        identity = f"{READ_AS} {_identify(paths)}"
        with writing_to(cache_dir):
            rows = _text_files("train", format, paths, {column: STRINGS}, cache_dir / "corpora")
        open_rows: Callable[[], datasets.IterableDataset] = partial(rows.streamed, "train")
        next(iter(rows.streamed("train")), None)  # or an error, now
        splits = _read_files(files, {column: STRINGS}, cache_dir)
        origin = f"the files in {folder}"
    elif match := HUB_NAME.fullmatch(name):
        open_rows, splits, identity = _hub_stream(name, match["name"], match["config"], others, column, cache_dir)
        origin = f"{name} from the Hugging Face Hub"
    else:
        raise UserError(f"no such corpus: {name!r}; {WANTED_SOURCES}")
    open_train = partial(_texts_of, name, open_rows, column)
    open_train()  # or an error, now
    splits = _checked(name, splits, others, column, streamed=["train"])
    parts = (identity, column, PIECE_CHARACTERS, hash_rows(name, splits, separator))
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    return StreamedCorpus(name, f"{origin}, by row, streamed", splits, separator, fingerprint, open_train)


def _identify(paths: Sequence[Path]) -> str:
    """What tells these files from others: names, sizes and beginnings."""
    digest = hashlib.sha256()
    for path in paths:
        with _opened(path) as stream:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + stream.read(IDENTIFYING_BYTES))
    return digest.hexdigest()


def _hub_stream(
    name: str, hub_name: str, config: str | None, others: Sequence[str], column: str, cache_dir: Path
) -> tuple[Callable[[], datasets.IterableDataset], dict[str, datasets.Dataset], str]:
    """What opens the train split of a data set of the Hub, its other splits, and what identifies it."""
    with cache_if_unreachable(hub_name) as unreachable:
        try:
            builder = datasets.load_dataset_builder(hub_name, config)
            streams = builder.as_streaming_dataset()
        except Exception as error:  # the network, the Hub and the data raise errors of many kinds
            raise UserError(_not_loaded(name, unreachable or one_line(error))) from error
    identity = f"{hub_name} {builder.config_id} {builder.hash}"
    splits = {}
    for split in ("train", *others):
        if split not in streams:
            raise UserError(f"the corpus {name!r} has no {split} split, only {', '.join(streams) or 'unknown ones'}")
    for split in others:
        rows = partial(_texts_of, name, partial(streams.__getitem__, split), column, split)
        rows()  # or an error, now
        key = hashlib.sha256(f"{identity} {split} {column}".encode()).hexdigest()[:24]
        with writing_to(cache_dir), _quiet_datasets(True):
            texts = datasets.Dataset.from_generator(
                _each, cache_dir=str(cache_dir / "corpora"), gen_kwargs={"open_rows": rows}, fingerprint=key
            )
            splits[split] = texts if column == "text" else texts.rename_column("text", column)
    return lambda: builder.as_streaming_dataset()["train"], splits, identity


def _each(open_rows: Callable[[], datasets.IterableDataset]) -> Iterator[dict[str, Any]]:
    yield from open_rows()


def _texts_of(
    name: str, open_rows: Callable[[], datasets.IterableDataset], column: str, split: str = "train"
) -> datasets.IterableDataset:
    """Open a stream: the column of the texts alone, under the name "text"."""
    try:
        rows = open_rows()
        known = rows.column_names or list(next(iter(rows), {}))
    except UserError:
        raise
    except Exception as error:  # a damaged file, or the Hub, raises errors of many kinds
        raise UserError(
            f"the {split} split of {name!r} can't be streamed: {one_line(root_cause(error))}; mend or remove what is "
            "damaged"
        ) from error
    if column not in known:
        raise UserError(
            f"the {split} split of {name!r} has no column {column!r}, only {', '.join(known) or 'empty rows'}; name "
            "that of the texts by data.column"
        )
    rows = rows.select_columns(column)
    if column != "text":
        rows = rows.rename_column(column, "text")
    if rows.features is not None:
        _refuse_no_strings(name, split, rows.features["text"], column)
    return rows


def check_source(name: str | None) -> None:
    """Raise a UserError if there is no folder of that name and it can be nothing else; nothing is loaded."""
    if name is None or name == PYTHON_DOCS or find_folder(name, WANTED_SOURCES) or HUB_NAME.fullmatch(name):
        return
    raise UserError(f"no such corpus: {name!r}; {WANTED_SOURCES}")


def read_splits(
    name: str, cache_dir: Path, wanted: str, columns: Mapping[str, str], needed: Sequence[str] = ("train",)
) -> tuple[dict[str, datasets.Dataset], str]:
    """Read the splits of a folder or of a Hub data set, and say where they are from.

    Args:
        name: a folder, or `owner/name` or `owner/name:config`.
        cache_dir: where the files of a folder are kept as Arrow tables.
        wanted: what the name should be, for the end of an error message.
        columns: those to read of a folder's files, and what they hold: see [`TextFiles`][]. Of a Hub data set all are
            read.
        needed: splits that a folder must have.

    Raises:
        UserError: there is no such source, it can't be read, or a folder lacks a needed split.

    """
    if folder := find_folder(name, wanted):
        files = _files_of_splits(name, folder, needed)
        return _read_files(files, columns, cache_dir), f"the files in {folder}"
    if match := HUB_NAME.fullmatch(name):
        return _hub_splits(name, match["name"], match["config"]), f"{name} from the Hugging Face Hub"
    raise UserError(f"no such corpus: {name!r}; {wanted}")


def find_folder(name: str, wanted: str) -> Path | None:
    """Return the folder of that name, or None if there is none and the name may mean something else.

    Raises:
        UserError: it is a file, or it can only be a path and does not exist; the message ends in `wanted`.

    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        kind = "file" if os.path.isfile(path) else "pipe or a device"
        raise UserError(f"{name!r} is a {kind}, not a folder; {wanted}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no such folder: {name!r}; {wanted}")
    return None


def _python_docs_splits() -> dict[str, datasets.Dataset]:
    """Split by a hash of each document's name: a document stays in its split when others are added or removed."""
    rows: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, text in python_documents().items():
        place = int.from_bytes(hashlib.sha256(f"python-docs/{name}".encode()).digest()[:8]) % 100
        split = next(split for split, end in SHARES.items() if place < end)
        rows[split].append(text)
    return {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in rows.items()}


def _files_of_splits(name: str, folder: Path, needed: Sequence[str]) -> dict[str, tuple[str, list[Path]]]:
    """The format and the files of each split in a folder, in the order of their names."""
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"the corpus folder {name!r} can't be read: {one_line(error)}") from error
    matches = [match for file in found if (match := FILE_NAME.fullmatch(file))]
    splits = {}
    for split in SPLITS:
        own = [match for match in matches if SPLIT_OF.get(match["split"], match["split"]) == split]
        if not own:
            continue
        if len({(match["split"], match["part"] is None, match["format"]) for match in own}) > 1:
            listed = ", ".join(match.string for match in own)
            raise UserError(f"the corpus folder {name!r} has more than one {split} split: {listed}; keep one of them")
        splits[split] = own[0]["format"], [folder / match.string for match in own]
    if not splits or ("train" in needed and "train" not in splits):
        listed = ", ".join(found[:8]) + (", …" if len(found) > 8 else "") if found else "nothing"
        raise UserError(f"the corpus folder {name!r} has no train split: it holds {listed}; wanted: {WANTED_FILES}")
    return splits


@contextmanager
def _opened(file: Path) -> Iterator[io.BufferedReader]:
    """A file that there is something in, to be read."""
    if file.is_symlink() and not file.exists():
        raise UserError(f"{file} is a link to a file that is not there; mend or remove the link")
    if file.exists() and not file.is_file():  # to read a pipe would wait for whoever writes to it
        raise UserError(f"{file} can't be read: it is no file, but a folder, a pipe or a device; use a file")
    try:
        with file.open("rb") as stream:
            if file.stat().st_size == 0:
                raise UserError(f"{file} is empty; put text into it or remove it")
            yield stream
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror or one_line(error)}") from error


def _read_files(
    splits: Mapping[str, tuple[str, list[Path]]], columns: Mapping[str, str], cache_dir: Path
) -> dict[str, datasets.Dataset]:
    """Read the files of each split as a memory-mapped table, in a folder that is named by the files' content."""
    tables = {}
    for split, (format, files) in splits.items():
        digests = hashlib.sha256()
        for file in files:
            with _opened(file) as stream:
                digests.update(hashlib.file_digest(stream, "sha256").digest())
        place = cache_dir / "corpora" / digests.hexdigest()[:24]
        with writing_to(cache_dir), _quiet_datasets(sum(file.stat().st_size for file in files) < SMALL):
            tables[split] = _text_files(split, format, files, columns, place).stored(split)
    return tables


def _text_files(split: str, format: str, files: Sequence[Path], columns: Mapping[str, str], place: Path) -> TextFiles:
    return TextFiles(str(place), format=format, files={split: [str(file) for file in files]}, columns=dict(columns))


def _hub_splits(name: str, hub_name: str, config: str | None) -> dict[str, datasets.Dataset]:
    with cache_if_unreachable(hub_name) as unreachable:
        try:
            loaded = datasets.load_dataset(hub_name, config)
        except Exception as error:  # the network, the Hub and the data raise errors of many kinds
            raise UserError(_not_loaded(name, unreachable or one_line(error))) from error
    return {split: loaded[split] for split in SPLITS if split in loaded}


def _not_loaded(name: str, why: str) -> str:
    return (
        f"could not load the corpus {name!r} from the Hugging Face Hub ({why}); there is no folder of that name "
        "either; check the name and the network, or give a folder"
    )


def _checked(
    name: str, splits: dict[str, datasets.Dataset], needed: Sequence[str], column: str, streamed: Sequence[str] = ()
) -> dict[str, datasets.Dataset]:
    """Return the splits with the column "text" alone, after checking that none is missing; others are `streamed`."""
    for split in needed:
        if split not in splits:
            there = ", ".join([*streamed, *splits]) or "unknown ones"
            raise UserError(
                f"the corpus {name!r} has no {split} split, only {there}; training needs train and validation"
            )
    for split, rows in splits.items():
        if column not in rows.column_names:
            raise UserError(
                f"the {split} split of {name!r} has no column {column!r}, only {', '.join(rows.column_names)}; name "
                "that of the texts by data.column"
            )
    for split, rows in splits.items():
        _refuse_no_strings(name, split, rows.features[column], column)
    texts = {split: rows.select_columns(column) for split, rows in splits.items()}
    if column != "text":
        texts = {split: rows.rename_column(column, "text") for split, rows in texts.items()}
    return texts


def check_texts(name: str, splits: dict[str, datasets.Dataset]) -> None:
    """Raise a UserError unless every split has a column "text" of strings."""
    for split, rows in splits.items():
        columns = rows.column_names
        if "text" not in columns:
            raise UserError(
                f"the {split} split of {name!r} has no column 'text', only {', '.join(columns)}; rename one"
            )
        _refuse_no_strings(name, split, rows.features["text"])


def _refuse_no_strings(name: str, split: str, feature: Any, column: str = "text") -> None:
    kind = getattr(feature, "dtype", type(feature).__name__.lower())
    if kind not in ("string", "large_string"):
        kind = "values of several types" if kind == "json" else kind
        raise UserError(f"the column {column!r} in the {split} split of {name!r} holds {kind}; it must hold strings")


def hash_rows(name: str, splits: dict[str, datasets.Dataset], separator: str) -> str:
    """Return a fingerprint of the content: a text that is moved to another folder remains the same corpus."""
    digest = hashlib.sha256(separator.encode())
    for split, rows in splits.items():
        digest.update(f"/{split}".encode())
        characters = 0
        for batch in rows.iter(batch_size=1000):
            texts = batch["text"]
            if None in texts:
                raise UserError(f"the {split} split of {name!r} has a row without text (null); remove such rows")
            characters += sum(map(len, texts))
            digest.update(repr([len(text) for text in texts]).encode())
            digest.update("".join(texts).encode())
        if not characters:
            raise UserError(f"the {split} split of {name!r} is empty; put text into it or remove it")
    return digest.hexdigest()[:24]


@contextmanager
def _quiet_datasets(quiet: bool) -> Iterator[None]:
    """Switch off datasets' progress bars for work that takes no time."""
    quiet = quiet and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()
