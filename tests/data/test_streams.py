"""A streamed text: the blocks of the stored one, whoever reads them, and from wherever one goes on."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiaroscuro.data import TextStream, TokenBlocks, load_corpus, load_tokenizer, stream_corpus, tokenize_corpus
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
        lines = "".join(json.dumps({"text": row, "number": 1}) + "\n" for row in rows)
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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lanes=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    shuffle=st.integers(1, 20),
    broken=st.integers(1, 12),
    ahead=st.integers(0, 2),
    documents=st.booleans(),
)
def test_a_resumed_run_reads_on_where_it_was(
    folder, cache, tokenizer, lanes, batch_size, shuffle, broken, ahead, documents
) -> None:
    corpus = stream_corpus(folder, cache, separator="eos" if documents else "newline")
    step = lanes * batch_size
    stream = TextStream([corpus], [], tokenizer, 16, shuffle, 3)
    whole = stream.rows(14 * step, batch_size, lanes)
    expected = rows_of(whole, range(broken * step, 14 * step))

    first = stream.rows(14 * step, batch_size, lanes)
    rows_of(first, range(min(len(first), (broken + ahead) * step)))  # a loader fetches ahead of the step
    again = stream.rows(14 * step, batch_size, lanes)
    again.notes = json.loads(json.dumps(first.notes))
    assert rows_of(again, range(broken * step, 14 * step)) == expected

    without_notes = stream.rows(14 * step, batch_size, lanes)
    assert rows_of(without_notes, [broken * step]) == expected[:1]


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


def test_parts_of_every_window(cache, folder, tokenizer) -> None:
    other = write(cache / "other", "jsonl", [[" sun" * 40] * 50])
    corpora = [stream_corpus(folder, cache), stream_corpus(other, cache, ("train",))]
    stream = TextStream(corpora, [0.25], tokenizer, 16, 8, 0)
    rows = rows_of(stream.rows(64, 4, 2), range(64))
    theirs = ["sun" in tokenizer.decode(row) for row in rows]
    assert sum(theirs) == 16
    assert theirs[:8] != sorted(theirs[:8])  # they are mixed, not one after the other


def test_orders_differ_by_seed_window_and_lane(folder, cache, tokenizer) -> None:
    corpus = stream_corpus(folder, cache)
    one, other = (TextStream([corpus], [], tokenizer, 16, 16, seed).rows(32, 4, 1) for seed in (0, 1))
    first, second = (rows_of(rows, range(16)) for rows in (one, other))
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "python-docs"}, "python-docs is not streamed"),
        ({"source": "./nowhere"}, "no such folder"),
        ({"source": "no such/name of/anything"}, "no such folder"),
        ({"column": "words"}, "has no column 'words', only"),
        ({"column": "number"}, "holds int64; it must hold strings"),
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
    with pytest.raises(UserError, match=r"can't be (read further: .*; if a file is damaged|streamed: )") as raised:
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
    rows = TextStream([stream_corpus(tmp_path, cache)], [], tokenizer, 16, 4, 0).rows(8, 4, 1)
    with pytest.raises(UserError, match=r"has a row without text \(null\)"):
        rows[0]
    train.write_text('{"text": "light"}\n')
    rows = TextStream([stream_corpus(tmp_path, cache)], [], tokenizer, 16, 4, 0).rows(8, 2, 2)
    assert len(rows[0]["input_ids"]) == 16  # lane 0 has the row, and reads it again and again
    with pytest.raises(UserError, match=r"has no text for batch 2 of the 2 of a step"):
        rows[2]
    with pytest.raises(UserError, match=r"data\.shuffle=4: a window of so few blocks has none of"):
        TextStream([stream_corpus(tmp_path, cache)] * 2, [0.1], tokenizer, 16, 4, 0)


def test_its_identity_is_that_of_the_files(folder, cache, tmp_path) -> None:
    """A folder may be moved; other text is another corpus."""
    same = write(tmp_path / "moved", "jsonl.zst", [texts(i, 60) for i in range(4)])
    longer = write(tmp_path / "longer", "jsonl.zst", [texts(i, 61) for i in range(4)])
    one, moved, other = (stream_corpus(f, cache).fingerprint for f in (folder, same, longer))
    assert one == moved != other
    (same / "validation.txt").write_text("dark\n" * 40)
    assert stream_corpus(same, cache).fingerprint != one


class Builder:
    """A data set of the Hub, as `load_dataset_builder` gives it."""

    config_id, hash = "default", "revision-1"

    def as_streaming_dataset(self) -> dict[str, datasets.IterableDataset]:
        rows = {"train": texts(0, 30), "validation": texts(1, 9)}
        return {s: datasets.Dataset.from_dict({"body": r}).to_iterable_dataset(2) for s, r in rows.items()}


def test_a_data_set_of_the_hub(cache, tokenizer, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *name: asked.append(name) or Builder())
    corpus = stream_corpus("owner/name:config", cache, column="body")
    assert asked == [("owner/name", "config")]
    assert corpus.splits["validation"]["text"][:] == texts(1, 9)
    rows = TextStream([corpus], [], tokenizer, 16, 4, 0).rows(8, 2, 2)
    assert len(rows_of(rows, range(8))) == 8
    monkeypatch.setattr(Builder, "hash", "revision-2")
    assert stream_corpus("owner/name:config", cache, column="body").fingerprint != corpus.fingerprint
    with pytest.raises(UserError, match="has no test split, only"):
        stream_corpus("owner/name", cache, ("train", "test"), "body")
