"""A streamed text: the blocks of the stored one, whoever reads them, and from wherever one goes on."""

import json
import math
import random
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from chiaroscuro.data import (
    StreamedCorpus,
    TextStream,
    TokenBlocks,
    load_corpus,
    load_tokenizer,
    stream_corpus,
    tokenize_corpus,
)
from chiaroscuro.errors import UserError


def texts(seed: int, rows: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(["light", "falls", "on", "a", "wall", "and", "dark", "stays"], k=draw.randint(0, 30)))
        for _ in range(rows)
    ]


def write(folder: Path, format: str, parts: list[list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(parts):
        file = folder / f"train-{i}.{format}"
        lines = "".join(json.dumps({"text": row, "number": 1, "pair": ["a", "b"]}) + "\n" for row in rows)
        if format == "parquet":
            pq.write_table(pa.table({"number": [1] * len(rows), "text": rows}), file, row_group_size=7)
        elif format == "jsonl.zst":
            file.write_bytes(zstandard.compress(lines.encode()))
        else:
            file.write_text(lines if format == "jsonl" else "".join(row + "\n" for row in rows))
    (folder / "validation.txt").write_text("light falls\n" * 40)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return write(cache / "four", "jsonl.zst", [texts(i, 60) for i in range(4)])


@pytest.fixture(scope="module")
def other(cache: Path) -> Path:
    folder = cache / "other"
    folder.mkdir()
    for i in range(2):
        rows = [{"body": " sun" * n, "number": n} for n in range(3, 60)]
        (folder / f"train-{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path, cache: Path) -> Any:
    return load_tokenizer("bpe:280", stream_corpus(folder, cache), cache)


def rows_of(rows: Any, indices: Any) -> list[list[int]]:
    return [rows[i]["input_ids"].tolist() for i in indices]


@pytest.mark.parametrize("format", ["txt", "parquet", "jsonl", "jsonl.zst"])
@pytest.mark.parametrize("separator", ["newline", "eos"])
def test_a_stream_has_the_blocks_of_the_stored_text(format, separator, cache, tokenizer) -> None:
    folder = write(cache / f"{format}", format, [texts(5, 300), texts(6, 200)])
    stored = load_corpus(folder, cache, separator=separator)
    tokens = tokenize_corpus(stored, tokenizer, cache)["train"]
    end = tokenizer.eos_token_id if separator == "eos" else None
    blocks = TokenBlocks(tokens, 32, end=end)
    stream = TextStream([stream_corpus(folder, cache, separator=separator)], [], tokenizer, 32, 1, 0)
    rows = stream.rows(len(blocks), 4, 1)
    for i in range(len(blocks)):
        assert rows[i].keys() == blocks[i].keys()
        assert all(torch.equal(rows[i][name], blocks[i][name]) for name in blocks[i])
    # At its end the text begins again.
    longer = stream.rows(len(blocks) + 3, 4, 1)
    ids = torch.cat([longer[i]["input_ids"] for i in range(len(longer))]).tolist()
    whole = tokens.tokens.tolist()
    assert ids == (whole + whole)[: len(ids)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lanes=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    shuffle=st.integers(1, 20),
    broken=st.lists(st.integers(1, 13), min_size=1, max_size=4, unique=True).map(sorted),
    ahead=st.integers(0, 2),
    documents=st.booleans(),
    part=st.sampled_from([None, 0.3]),
)
def test_a_resumed_run_reads_on_where_it_was(
    folder, other, cache, tokenizer, monkeypatch, lanes, batch_size, shuffle, broken, ahead, documents, part
) -> None:
    """However often: each time from what was noted, and from nowhere else."""
    monkeypatch.setattr("chiaroscuro.data.corpora.PIECE_CHARACTERS", 200)
    separator = "eos" if documents else "newline"
    corpora = [stream_corpus(folder, cache, separator=separator)]
    opened: list[Any] = []
    if part is not None and part * shuffle >= 1:
        corpora.append(stream_corpus(other, cache, ("train",), "body", separator))
    corpora = [watched(corpus, opened) for corpus in corpora]
    stream = TextStream(corpora, [part] * (len(corpora) - 1), tokenizer, 16, shuffle, 3)
    step = lanes * batch_size
    count = 14 * step
    expected = rows_of(stream.rows(count, batch_size, lanes), range(count))

    notes, begun, got = {}, 0, []
    for end in [*broken, 14]:
        run = stream.rows(count, batch_size, lanes)
        run.notes = json.loads(json.dumps(notes))
        opened.clear()
        got += rows_of(run, range(begun * step, end * step))
        rows_of(run, range(end * step, min(count, (end + ahead) * step)))  # a loader fetches ahead of the step
        # A lane is opened where the window of its first row begins, unless its text came to its end.
        if begun * batch_size // shuffle > 0:
            assert opened[0] is not None
        notes, begun = run.notes, end
    assert got == expected

    without_notes = stream.rows(count, batch_size, lanes)
    assert rows_of(without_notes, [broken[0] * step]) == [expected[broken[0] * step]]


def watched(corpus: StreamedCorpus, opened: list[Any]) -> StreamedCorpus:
    """The same corpus, which notes the states that it is opened at."""

    class Watched(StreamedCorpus):
        def rows(self, part: int = 0, parts: int = 1, state: Any = None) -> Any:
            opened.append(state)
            return super().rows(part, parts, state)

    return Watched(**{field.name: getattr(corpus, field.name) for field in fields(corpus)})


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_process_reads_its_own_lanes(folder, cache, tokenizer, processes) -> None:
    """Four batches a step, as accelerate gives them out: of P processes, p has the batches p, P + p, 2 P + p, …"""
    stream = TextStream([stream_corpus(folder, cache)], [], tokenizer, 16, 8, 0)
    alone = stream.rows(160, 2, 4)
    expected = rows_of(alone, range(160))
    got: dict[int, list[int]] = {}
    for p in range(processes):
        own = stream.rows(160, 2, 4)
        indices = [i for i in range(160) if (i // 2) % processes == p]
        got |= dict(zip(indices, rows_of(own, indices), strict=True))
        assert own.lanes_read == {lane for lane in range(4) if lane % processes == p}
    assert [got[i] for i in range(160)] == expected


def test_what_is_read_does_not_depend_on_how_much_there_is(folder, cache, tokenizer, monkeypatch) -> None:
    """The first blocks take the first rows, and a resumed lane takes none of those before its window."""
    corpus = stream_corpus(folder, cache, separator="eos")
    read: list[str] = []
    watched = replace(corpus, open_train=lambda: corpus.open_train().map(lambda row: read.append(row["text"]) or row))
    monkeypatch.setattr("chiaroscuro.data.streams.BATCH", 1)
    stream = TextStream([watched], [], tokenizer, 16, 4, 0)
    first = stream.rows(400, 2, 1)
    first[0]
    assert 0 < len(read) < 30
    rows_of(first, range(90))
    assert len(first.notes["0"]) < 8
    read.clear()
    again = stream.rows(400, 2, 1)
    again.notes = first.notes
    again[88]
    assert len(read) < 60 < 240


def test_lanes_share_the_text_out(folder, cache, tokenizer) -> None:
    """Four files and four lanes: a file each. Three lanes: every third row each, and no row twice."""
    corpus = stream_corpus(folder, cache, separator="eos")
    files = [texts(i, 60) for i in range(4)]
    for lanes, parts in ((4, files), (3, [[row for file in files for row in file][i::3] for i in range(3)])):
        rows = TextStream([corpus], [], tokenizer, 16, 1, 0).rows(4 * lanes, 1, lanes)
        for lane, own in enumerate(parts):
            ids = [t for step in range(4) for t in rows[step * lanes + lane]["input_ids"].tolist()]
            text = tokenizer.eos_token.join(own)
            assert text.startswith(tokenizer.decode(ids))


@pytest.mark.parametrize(("part", "shuffle"), [(0.25, 8), (0.25, 6), (0.3, 7), (0.11, 10)])
def test_parts(folder, other, cache, tokenizer, part, shuffle) -> None:
    """Over many windows to the block, and mixed within each."""
    corpora = [stream_corpus(folder, cache), stream_corpus(other, cache, ("train",), "body")]
    stream = TextStream(corpora, [part], tokenizer, 16, shuffle, 0)
    rows = rows_of(stream.rows(40 * shuffle, shuffle, 1), range(40 * shuffle))
    theirs = ["sun" in tokenizer.decode(row) for row in rows]
    assert sum(theirs) == math.floor(40 * shuffle * part)
    orders = {tuple(theirs[i : i + shuffle]) for i in range(0, 40 * shuffle, shuffle)}
    assert len(orders) > 3


@given(st.lists(st.floats(0.01, 0.3), min_size=1, max_size=3), st.integers(1, 400), st.integers(0, 10**6))
def test_windows_are_full(folder, cache, tokenizer, parts, shuffle, window) -> None:
    try:
        stream = TextStream([stream_corpus(folder, cache)] * (1 + len(parts)), parts, tokenizer, 16, shuffle, 0)
    except UserError:
        assert min((1 - sum(parts)) / len(parts), *parts) * shuffle < 1
        return
    counts = stream.counts(window)
    assert sum(counts) == shuffle and min(counts) >= 0
    assert all(abs(count - part * shuffle) <= 1 for count, part in zip(counts[1:], parts, strict=True))


def test_orders_differ_by_seed_window_and_lane(folder, cache, tokenizer) -> None:
    """Of blocks that are known by what they begin with, in a text of one row that is given to every lane."""
    corpus = stream_corpus(folder, cache)
    plain = rows_of(TextStream([corpus], [], tokenizer, 16, 1, 0).rows(96, 4, 2), range(96))
    orders = set()
    for seed in (0, 1):
        mixed = rows_of(TextStream([corpus], [], tokenizer, 16, 16, seed).rows(96, 4, 2), range(96))
        for lane in (0, 1):
            of_lane = [i for i in range(96) if i // 4 % 2 == lane]
            for window in range(3):
                held = of_lane[16 * window : 16 * (window + 1)]
                before, after = [plain[i] for i in held], [mixed[i] for i in held]
                assert sorted(before) == sorted(after)
                orders.add(tuple(before.index(row) for row in after))
    assert len(orders) == 12


def test_what_is_read_again(folder, cache, tokenizer, monkeypatch) -> None:
    """A row of an earlier window, and then one of the newest: from their notes, and not all that lies between."""
    read: list[int] = []
    original = TextStream.counts
    monkeypatch.setattr(TextStream, "counts", lambda self, window: read.append(window) or original(self, window))
    rows = TextStream([stream_corpus(folder, cache)], [], tokenizer, 16, 2, 0).rows(200, 2, 1)
    rows_of(rows, range(80))
    read.clear()
    first, again = rows_of(rows, [0, 80])
    assert read == [0, 40]
    assert [first, again] == rows_of(rows, [0, 80])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "python-docs"}, "python-docs is not streamed"),
        ({"source": "./nowhere"}, "no such folder"),
        ({"source": "no such/name of/anything"}, "no such folder"),
        ({"column": "words"}, "has no column 'words', only"),
        ({"column": "number"}, r"train-0.jsonl.zst can't be read at row 1 \(its column 'number' holds number\)"),
        ({"column": "pair"}, r"train-0.jsonl.zst can't be read at row 1 \(its column 'pair' holds array\)"),
    ],
)
def test_what_cant_be_streamed(change, said, folder, cache) -> None:
    with pytest.raises(UserError, match=said) as raised:
        stream_corpus(**{"source": folder, "cache_dir": cache} | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("format", ["parquet", "jsonl", "jsonl.zst"])
def test_files_that_are_broken(format, cache, tokenizer, tmp_path) -> None:
    write(tmp_path, format, [texts(0, 400), texts(1, 400)])
    second = tmp_path / f"train-1.{format}"
    whole = second.read_bytes()
    second.write_bytes(whole[:-200] if format != "jsonl.zst" else whole[:100] + b"?" + whole[101:])
    with pytest.raises(UserError, match=rf"train-1.{format} can't be read.*; it must be a {format} file") as raised:
        rows_of(TextStream([stream_corpus(tmp_path, cache)], [], tokenizer, 16, 4, 0).rows(4000, 4, 1), range(4000))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=re.escape(str(raised.value))):  # a tokenizer's training says the same
        load_tokenizer("bpe:280", stream_corpus(tmp_path, cache), cache)
    second.write_bytes(b"")
    with pytest.raises(UserError, match=f"train-1.{format} is empty"):
        stream_corpus(tmp_path, cache)
    second.unlink()
    second.mkdir()
    with pytest.raises(UserError, match="it is no file, but a folder"):
        stream_corpus(tmp_path, cache)


def test_rows_that_lack_text(cache, tokenizer, tmp_path) -> None:
    (tmp_path / "validation.txt").write_text("light\n" * 40)
    train = tmp_path / "train.jsonl"
    train.write_text('{"text": "light"}\n{"text": null}\n')
    with pytest.raises(
        UserError, match=r"train.jsonl has a row without text: row 2 is null in the column 'text'; remove"
    ):
        TextStream([stream_corpus(tmp_path, cache)], [], tokenizer, 16, 4, 0).rows(8, 4, 1)[0]
    train.write_text('{"text": "light"}\n')
    rows = TextStream([stream_corpus(tmp_path, cache)], [], tokenizer, 16, 4, 0).rows(8, 2, 2)
    assert len(rows[0]["input_ids"]) == 16  # lane 0 has the row, and reads it again and again
    with pytest.raises(UserError, match=r"has no text for batch 2 of the 2 of a step"):
        rows[2]
    with pytest.raises(UserError, match=r"data\.shuffle=4: windows of so few blocks may have none of"):
        TextStream([stream_corpus(tmp_path, cache)] * 2, [0.1], tokenizer, 16, 4, 0)


@pytest.mark.parametrize("separator", ["newline", "eos"])
def test_empty_rows_alone_are_no_text(separator, cache, tokenizer, tmp_path) -> None:
    (tmp_path / "validation.txt").write_text("light\n" * 40)
    (tmp_path / "train.txt").write_text("\n\n \n")
    rows = TextStream([stream_corpus(tmp_path, cache, separator=separator)], [], tokenizer, 4, 1, 0).rows(8, 1, 1)
    with pytest.raises(UserError, match="has no text for batch 1 of the 1 of a step"):
        rows_of(rows, range(8))


def test_text_that_the_tokenizer_has_no_token_for(cache, tmp_path) -> None:
    (tmp_path / "validation.txt").write_text("light\n" * 40)
    (tmp_path / "train.txt").write_text("σκιά\n" * 40)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE({letter: i for i, letter in enumerate("ghilt")}, []))
    )
    rows = TextStream([stream_corpus(tmp_path, cache)], [], words, 4, 1, 0).rows(8, 1, 1)
    with pytest.raises(UserError, match="has no token of this tokenizer for batch 1 of the 1 of a step"):
        rows_of(rows, range(8))
    with pytest.raises(UserError, match="longer than can be counted"):
        TextStream([stream_corpus(tmp_path, cache)], [], words, 4, 1, 0).rows(2**63, 1, 1)


def test_text_files_have_one_column(cache, tmp_path) -> None:
    write(tmp_path, "txt", [texts(0, 30)])
    with pytest.raises(UserError, match=r"train-0.txt has no column 'body', only text"):
        stream_corpus(tmp_path, cache, column="body")


def test_ids_beyond_the_tokenizer_are_refused(folder, cache, tokenizer) -> None:
    class Short:
        """A tokenizer that says it is smaller than it is."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __len__(self) -> int:
            return 100

    rows = TextStream([stream_corpus(folder, cache)], [], Short(), 16, 4, 0).rows(8, 2, 1)
    with pytest.raises(UserError, match=r"the tokenizer gives the id \d+ and has only 100 tokens; repair it"):
        rows[0]


def test_its_identity_is_that_of_the_files(folder, cache, tmp_path) -> None:
    """A folder may be moved; other text is another corpus."""
    same = write(tmp_path / "moved", "jsonl.zst", [texts(i, 60) for i in range(4)])
    longer = write(tmp_path / "longer", "jsonl.zst", [texts(i, 61) for i in range(4)])
    one, moved, other = (stream_corpus(f, cache).fingerprint for f in (folder, same, longer))
    assert one == moved != other
    (same / "validation.txt").write_text("dark\n" * 40)
    assert stream_corpus(same, cache).fingerprint != one


class Builder:
    """A data set of the Hub, as `load_dataset_builder` gives it, and what was read of it."""

    config_id, hash = "default", "revision-1"
    read: ClassVar[list[str]] = []

    def as_streaming_dataset(self) -> dict[str, datasets.IterableDataset]:
        return {
            split: datasets.IterableDataset.from_generator(self._rows, gen_kwargs={"split": split, "shards": [0, 1]})
            for split in ("train", "validation", "test")
        }

    def _rows(self, split: str, shards: list[int]) -> Any:
        self.read.append(split)
        for row in texts(len(split) + shards[0], 30):
            yield {"body": row, "number": 1}


def test_a_data_set_of_the_hub_whose_column_is_the_usual_one(cache, monkeypatch) -> None:
    rows = lambda self, split, shards: ({"text": row} for row in texts(len(split) + shards[0], 30))  # noqa: E731
    monkeypatch.setattr(Builder, "_rows", rows)
    monkeypatch.setattr(Builder, "hash", "with texts")
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *name: Builder())
    assert stream_corpus("owner/name", cache).splits["validation"]["text"][:] == texts(10, 30) + texts(11, 30)


def test_a_data_set_of_the_hub(cache, tokenizer, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *name: asked.append(name) or Builder())
    corpus = stream_corpus("owner/name:config", cache, column="body")
    assert asked == [("owner/name", "config")]
    assert corpus.splits["validation"]["text"][:] == texts(10, 30) + texts(11, 30)
    assert "test" not in Builder.read
    rows = TextStream([corpus], [], tokenizer, 16, 4, 0).rows(8, 2, 2)
    assert len(rows_of(rows, range(8))) == 8
    Builder.read.clear()
    assert stream_corpus("owner/name:config", cache, column="body").fingerprint == corpus.fingerprint
    assert Builder.read.count("validation") <= 1  # its columns are looked at, and its rows are on the disk
    monkeypatch.setattr(Builder, "hash", "revision-2")
    assert stream_corpus("owner/name:config", cache, column="body").fingerprint != corpus.fingerprint
    with pytest.raises(UserError, match="has no other split, only"):
        stream_corpus("owner/name", cache, ("train", "other"), "body")
    with pytest.raises(UserError, match="has no column 'text', only"):
        stream_corpus("owner/name", cache)

    def fails(*name: str) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr("datasets.load_dataset_builder", fails)
    with pytest.raises(
        UserError, match=r"could not load the corpus 'my/shards' .*there is no folder of that name eith"
    ):
        stream_corpus("my/shards", cache)
