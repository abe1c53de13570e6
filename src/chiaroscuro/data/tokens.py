"""A tokenised corpus: each split is tokenised once, into one flat file that is mapped into memory.

The file holds nothing but the ids, one after the other, 2 bytes each (4 if the vocabulary needs them): WikiText-103
takes 240 MB, which all processes of a run share. A small JSON file beside it says how many ids there are, and how many
bytes of text they stand for, which turns a loss into bits per byte.

Not a table of `datasets.map`: blocks run across the rows of a text, and `map`, which sees a batch of rows at a time,
would drop the tokens at the end of each batch.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from chiaroscuro.data.corpora import Corpus
from chiaroscuro.data.progress import patient_bar
from chiaroscuro.data.storage import cached_file, default_cache_dir, fingerprint
from chiaroscuro.data.tokenizers import all_cores, bare_backend
from chiaroscuro.errors import UserError

logger = logging.getLogger(__name__)

# To be raised when the files, or the way a text is cut into pieces, change.
FORMAT = 1

# Pieces that are tokenised at once. More would only cost memory: an encoding takes fifty times the memory of its ids.
BATCH = 32


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split, on disk.

    Attributes:
        name: which split of which corpus, in words.
        path: the file of ids.
        count: the number of ids.
        dtype: their type, "<u2" or "<u4" on most machines.
        bytes: the number of UTF-8 bytes of text that they stand for, which for a part of a split is an estimate; an
            end-of-sequence token between documents stands for none.

    """

    name: str
    path: Path
    count: int
    dtype: str
    bytes: float

    @cached_property
    def tokens(self) -> UInt[np.ndarray, " count"]:
        """The ids, mapped from the file on first use."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    def __getstate__(self) -> dict[str, object]:
        # A memory map is pickled as a copy of its content; a DataLoader's worker gets the path instead.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


def tokenize_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, cache_dir: Path | None = None
) -> dict[str, TokenFile]:
    """Tokenise each split of a corpus, or take it from the cache.

    Each of the corpus' pieces ([`Corpus.pieces`][]) is tokenised as one text, without special tokens; if the corpus'
    separator is "eos", the tokenizer's end-of-sequence token follows each. With a byte-level tokenizer the ids decode
    to exactly the text.

    Args:
        corpus: the text.
        tokenizer: the tokenizer; its settings for length, padding and truncation have no effect here.
        cache_dir: where the files are kept, under a fingerprint of text, tokenizer and separator;
            [`default_cache_dir`][] by default.

    Returns:
        A token file for each split.

    Raises:
        UserError: documents need an end-of-sequence token and the tokenizer has none; it gives ids beyond its own size;
            the cache folder can't be written, or the disk is full.

    """
    backend = bare_backend(tokenizer)
    end = tokenizer.eos_token_id if corpus.separator == "eos" else None
    if corpus.separator == "eos" and end is None:
        raise UserError(
            f"the corpus {corpus.name!r} has documents, and the tokenizer has no end-of-sequence token to put "
            "between them; choose another tokenizer, such as 'bpe:8192'"
        )
    serialised = backend.to_str()
    folder = (cache_dir or default_cache_dir()) / "tokens"
    files = {}
    for split in corpus.splits:
        key = fingerprint(corpus=corpus.fingerprint, split=split, tokenizer=serialised, end=end, format=FORMAT)
        path = folder / f"{split}-{key}.bin"
        name = f"the {split} split of {corpus.name}"
        files[split] = _find(name, path) or _write(name, path, corpus, split, backend, end, len(tokenizer))
    return files


def _find(name: str, path: Path) -> TokenFile | None:
    """Return the file of an earlier run, unless it is incomplete, as after an interrupted copy."""
    sidecar = path.with_suffix(".json")
    if not sidecar.exists():
        return None
    try:
        facts = json.loads(sidecar.read_text())
        file = TokenFile(name, path, int(facts["tokens"]), str(facts["dtype"]), int(facts["bytes"]))
        if path.stat().st_size == file.count * np.dtype(file.dtype).itemsize:
            return file
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.warning("tokenising again: the cached %s is incomplete", path)
    return None


def _write(
    name: str, path: Path, corpus: Corpus, split: str, backend: Tokenizer, end: int | None, vocab_size: int
) -> TokenFile:
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    count = size = 0
    bar = patient_bar(f"tokenising {name}", corpus.splits[split].data.nbytes)
    with cached_file(path) as temporary, temporary.open("wb") as stream, bar as advance:
        for ids, text_bytes in _encode(corpus, split, backend, end):
            refuse_unknown_ids(int(ids.max()) if ids.size else 0, vocab_size)
            stream.write(ids.astype(dtype).data)
            count += ids.size
            size += text_bytes
            advance(text_bytes)
    facts = {
        "corpus": corpus.name,
        "split": split,
        "tokens": count,
        "dtype": dtype.str,
        "bytes": size,
        "vocab_size": vocab_size,
    }
    with cached_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    return TokenFile(name, path, count, dtype.str, size)


def refuse_unknown_ids(largest: int, vocab_size: int) -> None:
    """Raise a UserError if a tokenizer gives an id beyond its own size."""
    if largest >= vocab_size:
        raise UserError(f"the tokenizer gives the id {largest} and has only {vocab_size} tokens; repair it")


def _encode(
    corpus: Corpus, split: str, backend: Tokenizer, end: int | None
) -> Iterator[tuple[UInt[np.ndarray, " tokens"], int]]:
    """Yield the ids of a batch of pieces, and the number of UTF-8 bytes of their text."""
    pieces = corpus.pieces(split)
    while batch := list(islice(pieces, BATCH)):
        with all_cores():
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
        ids = [piece.ids if end is None else [*piece.ids, end] for piece in encoded]
        yield (
            np.concatenate([np.array(some, np.uint32) for some in ids]),
            sum(len(text.encode()) for text in batch),
        )
