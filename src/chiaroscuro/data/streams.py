"""Blocks of text that is read while a model learns from it.

A corpus of many files need not be read, tokenised and stored before the first step. Here it is tokenised on the way,
and what is held in memory does not depend on its size.

Which block comes when depends on the text alone, and not on how many processes read it or where a run was interrupted:

- **Lanes.** An optimizer step of L batches has L lanes: the first batch of every step is of lane 0, the second of lane
  1, and so on. Lane l reads its part of the files if they can be shared out evenly, and otherwise every L-th row; at
  their end it begins again. Each process reads the lanes of its own batches, and no others.
- **Windows.** A lane's tokens are cut into blocks as those of a token file are. So many of them as `shuffle` says are
  read at a time, from every source its part, and given in random order.
- **Notes.** Where a window begins in the files is noted, so that a resumed run opens them there: at that row, and at
  that token of it. Without a note a lane reads from its beginning, and gives the same blocks.

`datasets` reads the files, knows the state of a stream and shares its rows out. The lanes are what MosaicML's
`streaming` calls canonical nodes, tied to the batches of a step.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt32
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from chiaroscuro.data.blocks import row_of
from chiaroscuro.data.corpora import StreamedCorpus, pieces_of
from chiaroscuro.data.progress import patient_bar
from chiaroscuro.data.tokenizers import all_cores, bare_backend
from chiaroscuro.data.tokens import BATCH, refuse_unknown_ids
from chiaroscuro.errors import UserError

Encode = Callable[[list[str]], list[UInt32[np.ndarray, " tokens"]]]
Notes = dict[str, dict[str, list[dict[str, Any]]]]
"""By lane and window, both as text: the place of each source, ready for JSON."""


@dataclass(frozen=True)
class Place:
    """Where the next token of a lane stands in a source.

    Attributes:
        state: of the stream, before the piece that the token is of; None at the beginning.
        given: the tokens of this piece before it.

    """

    state: dict[str, Any] | None = None
    given: int = 0


class TextStream:
    """A streamed text and those mixed into it, of which a run takes its rows.

    Args:
        corpora: the text, and then others.
        parts: of all blocks, that the others give.
        tokenizer: of the model.
        length: T.
        shuffle: how many blocks a window has.
        seed: of the order in it.

    Raises:
        UserError: documents need an end-of-sequence token and the tokenizer has none, or a window is too short to have
            blocks of each text.

    """

    def __init__(
        self,
        corpora: Sequence[StreamedCorpus],
        parts: Sequence[float],
        tokenizer: Any,
        length: int,
        shuffle: int,
        seed: int,
    ) -> None:
        # In a window each other text may have a block more than its part, which is then one less of the first text.
        least = (max(1, len(parts)), *(1 for _ in parts))
        for corpus, part, blocks in zip(corpora, (1 - sum(parts), *parts), least, strict=True):
            if part * shuffle < blocks:
                raise UserError(
                    f"data.shuffle={shuffle}: windows of so few blocks may have none of {corpus.name}; raise it"
                )
            if corpus.separator == "eos" and tokenizer.eos_token_id is None:
                raise UserError(
                    f"the corpus {corpus.name!r} has documents, and the tokenizer has no end-of-sequence token to put "
                    "between them; choose another tokenizer, such as 'bpe:8192'"
                )
        self.sources = [(corpus, _encoder(corpus, tokenizer)) for corpus in corpora]
        self.parts = list(parts)
        self.end = tokenizer.eos_token_id if corpora[0].separator == "eos" else None
        self.length, self.shuffle, self.seed = length, shuffle, seed

    def counts(self, window: int) -> list[int]:
        """How many blocks of a window each source gives: over many windows its part, to the block."""
        of_others = [
            math.floor((window + 1) * self.shuffle * part) - math.floor(window * self.shuffle * part)
            for part in self.parts
        ]
        return [self.shuffle - sum(of_others), *of_others]

    def rows(self, count: int, batch_size: int, lanes: int) -> "StreamedBlocks":
        """The rows of a run: so many, in batches, of which a step has as many as there are lanes."""
        return StreamedBlocks(self, count, batch_size, lanes)


class StreamedBlocks(Dataset[dict[str, Int64[Tensor, " length"]]]):
    """The rows of a run, made as they are asked for; they are meant to be read in order.

    Row i is of batch m = ⌊i / batch_size⌋, and so of lane m mod L. It is a row as [`TokenBlocks`][] has them.

    Args:
        stream: the text.
        count: of the rows.
        batch_size: rows of a batch.
        lanes: L, the batches of a step, over all processes.

    Attributes:
        notes: where windows begin; those of a checkpoint may be put there before a row is asked for.
        shown: whether a bar is shown while a window is read, if that takes long.

    """

    def __init__(self, stream: TextStream, count: int, batch_size: int, lanes: int) -> None:
        if count > sys.maxsize:
            raise UserError(f"a run of {count:,} rows is longer than can be counted: give fewer steps, or tokens")
        self.stream, self.count, self.batch_size, self.lanes = stream, count, batch_size, lanes
        self.notes: Notes = {}
        self.shown = True
        self._open: dict[int, _Lane] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def lanes_read(self) -> set[int]:
        """The lanes that rows were asked of."""
        return set(self._open)

    def __getitem__(self, index: int) -> dict[str, Int64[Tensor, " length"]]:
        """Return a row as `TokenBlocks` does.

        Raises:
            UserError: the text can't be read further, or a lane has no text.

        """
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        batch, row = divmod(index, self.batch_size)
        step, lane = divmod(batch, self.lanes)
        window, place = divmod(step * self.batch_size + row, self.stream.shuffle)
        block = self._window(lane, window)[place]
        return row_of(torch.from_numpy(block.astype(np.int64)), end=self.stream.end)

    def _window(self, lane: int, window: int) -> UInt32[np.ndarray, "shuffle length+1"]:
        noted = self.notes.setdefault(str(lane), {})
        nearest = max((int(w) for w in noted if int(w) <= window), default=0)
        opened = self._open.get(lane)
        if opened is None or opened.window > window or opened.window < nearest - 1:
            places = [Place(**place) for place in noted.get(str(nearest), [])] or [Place()] * len(self.stream.sources)
            opened = self._open[lane] = _Lane(self.stream, lane, self.lanes, nearest, places)
        while opened.window < window:
            bar = patient_bar(f"reading {self.stream.shuffle:,} blocks", self.stream.shuffle * self.stream.length)
            with bar if self.shown else nullcontext(lambda tokens: None) as advance:
                opened.read(noted, advance)
        # What is read ahead of a step is at most a few batches, and a checkpoint is of a step.
        kept = 4 + 4 * self.batch_size // self.stream.shuffle
        for old in sorted(map(int, noted))[:-kept]:
            del noted[str(old)]
        return opened.blocks


class _Lane:
    """One lane, the window that it has read last, and this window's blocks."""

    def __init__(self, stream: TextStream, lane: int, lanes: int, window: int, places: Sequence[Place]) -> None:
        self.stream, self.lane = stream, lane
        self.readers = [_Reader(*s, lane, lanes, place) for s, place in zip(stream.sources, places, strict=True)]
        self.window = window - 1
        self.blocks = np.empty((0, stream.length + 1), np.uint32)

    def read(self, noted: dict[str, list[dict[str, Any]]], advance: Callable[[int], None]) -> None:
        """Read the next window, and note where the one after it begins; `advance` is told of tokens."""
        self.window += 1
        counts = self.stream.counts(self.window)
        length = self.stream.length
        blocks = np.concatenate([r.blocks(n, length, advance) for r, n in zip(self.readers, counts, strict=True)])
        order = np.random.default_rng([self.stream.seed, self.lane, self.window]).permutation(len(blocks))
        self.blocks = blocks[order]
        noted[str(self.window + 1)] = [asdict(reader.place) for reader in self.readers]


@dataclass
class _Reader:
    """The tokens of a lane of one source, one after the other and without end, from a place on."""

    corpus: StreamedCorpus
    encode: Encode
    lane: int
    lanes: int
    place: Place
    held: deque[tuple[Any, UInt32[np.ndarray, " tokens"]]] = field(default_factory=deque)
    pieces: Iterator[tuple[Any, UInt32[np.ndarray, " tokens"]]] = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = self._endless(self.place.state)

    def blocks(self, count: int, length: int, advance: Callable[[int], None]) -> UInt32[np.ndarray, "count length+1"]:
        """The next blocks; each begins with the token that the one before it ends with."""
        if count == 0:
            return np.empty((0, length + 1), np.uint32)
        wanted = count * length
        held = sum(len(ids) for _, ids in self.held) - self.place.given
        while held < wanted + 1:
            self.held.append(next(self.pieces))
            held += len(self.held[-1][1])
            advance(len(self.held[-1][1]))
        tokens = np.concatenate([ids for _, ids in self.held])[self.place.given :]
        given = self.place.given + wanted
        while given >= len(self.held[0][1]):
            given -= len(self.held.popleft()[1])
        self.place = Place(self.held[0][0], given)
        return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length][:count]

    def _endless(self, state: dict[str, Any] | None) -> Iterator[tuple[Any, UInt32[np.ndarray, " tokens"]]]:
        while True:
            text, tokens = False, 0
            pieces = pieces_of(self.corpus.rows(self.lane, self.lanes, state), self.corpus.separator)
            while batch := list(islice(pieces, BATCH)):
                encoded = self.encode([piece for _, piece in batch])
                text = text or any(piece.strip() for _, piece in batch)
                tokens += sum(map(len, encoded))
                yield from zip((mark for mark, _ in batch), encoded, strict=True)
            if state is None and not (text and tokens):
                found = "no token of this tokenizer" if text else "no text"
                raise UserError(
                    f"the train split of {self.corpus.name!r} has {found} for batch {self.lane + 1} of the "
                    f"{self.lanes} of a step; give more rows, or take fewer and larger batches"
                )
            state = None


def _encoder(corpus: StreamedCorpus, tokenizer: Any) -> Encode:
    backend: Tokenizer = bare_backend(tokenizer)
    end = tokenizer.eos_token_id if corpus.separator == "eos" else None

    def encode(pieces: list[str]) -> list[UInt32[np.ndarray, " tokens"]]:
        with all_cores():
            encoded = backend.encode_batch_fast(pieces, add_special_tokens=False)
        given = [np.array(piece.ids if end is None else [*piece.ids, end], np.uint32) for piece in encoded]
        refuse_unknown_ids(max((int(ids.max()) for ids in given if ids.size), default=0), len(tokenizer))
        return given

    return encode
