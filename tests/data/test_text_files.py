"""Files of text: what is needed is read as Python reads it, whatever else is in them and however it changes."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiaroscuro.data import load_corpus, stream_corpus, text_files
from chiaroscuro.data.text_files import FORMATS, STRINGS, TextFiles
from chiaroscuro.errors import UserError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.tuples(TEXT, st.dictionaries(TEXT.filter(lambda key: key != "text"), ANYTHING, max_size=3)))


def text_of(folder: Path, format: str, files: list[str]) -> TextFiles:
    return TextFiles(str(folder), format=format, files={"train": files}, columns={"text": STRINGS})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(ROWS, min_size=1, max_size=3), chunk=st.integers(1, 200), format=st.sampled_from(FORMATS))
def test_rows_are_those_that_python_reads(tmp_path_factory, monkeypatch, parts, chunk, format) -> None:
    """However the other columns look, from row to row and from file to file, and however the file is cut."""
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    monkeypatch.setattr(text_files, "ROWS", chunk)
    folder = tmp_path_factory.mktemp("rows")
    files = []
    for number, rows in enumerate(parts):
        files.append(str(folder / f"{number}.{format}"))
        if format == "parquet":
            others: dict[str, Any] = {f"column {number}": [number] * len(rows)}
            pq.write_table(pa.table(others | {"text": pa.array([text for text, _ in rows], pa.string())}), files[-1])
            continue
        if format == "txt":
            content = "".join(text + "\n" for text, _ in rows)
        else:
            content = "".join(json.dumps({**others, "text": text}, ensure_ascii=False) + "\n" for text, others in rows)
        written = content.encode()
        Path(files[-1]).write_bytes(zstandard.compress(written) if format == "jsonl.zst" else written)
    wanted = [text for rows in parts for text, _ in rows]
    assert text_of(folder / "cache", format, files).stored("train")["text"][:] == wanted
    assert [row["text"] for row in text_of(folder / "cache", format, files).streamed("train")] == wanted


DRIFT: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "null, then strings": ([{"date": None}], [{"date": "2026-01-01"}]),
    "whole numbers, then others": ([{"score": 1}], [{"score": 0.5}]),
    "a key that some have": ([{}], [{"url": "x"}]),
    "other objects": ([{"meta": {"a": 1}}], [{"meta": {"b": [1]}}]),
    "values of several types": ([{"meta": 1}, {"meta": "one"}], [{"meta": [1]}]),
}


@pytest.mark.parametrize("drift", DRIFT)
@pytest.mark.parametrize("load", [load_corpus, stream_corpus])
def test_what_nobody_trains_on_may_change(tmp_path, drift, load) -> None:
    for number, rows in enumerate(DRIFT[drift]):
        lines = [json.dumps(row | {"text": f"{number} {place}"}) for place, row in enumerate(rows)]
        (tmp_path / f"train-{number}.jsonl").write_text("\n".join(lines))
    (tmp_path / "validation.txt").write_text("light\n")
    corpus = load(tmp_path, tmp_path / "cache")
    wanted = [f"{number} {place}" for number, rows in enumerate(DRIFT[drift]) for place in range(len(rows))]
    assert "".join(corpus.sample()[0]).splitlines() == wanted


def test_files_of_no_rows(tmp_path) -> None:
    empty, full = str(tmp_path / "train-0.parquet"), str(tmp_path / "train-1.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), empty)
    pq.write_table(pa.table({"text": pa.array(["light"]).dictionary_encode(), "label": [1]}), full)
    assert text_of(tmp_path / "cache", "parquet", [empty, full]).stored("train")["text"][:] == ["light"]
    assert list(text_of(tmp_path / "cache", "parquet", [empty, full]).streamed("train")) == [{"text": "light"}]
    assert len(text_of(tmp_path / "cache", "parquet", [empty]).stored("train")) == 0
    Path(full).unlink()
    (tmp_path / "validation.txt").write_text("light\n")
    with pytest.raises(UserError, match=r"the train split of .* is empty; put text into it"):
        load_corpus(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": null}', r"has a row without text: row 3,002 is null in the column 'text'; remove such rows"),
        ('{"other": "light"}', r"has a row without text: row 3,002 is null in the column 'text'; remove such rows"),
        ('{"text": 5}', r"can't be read at row 3,002 \(its column 'text' holds number\); it must be a jsonl file with"),
        ('["light"]', r"can't be read at row 3,002 \(it is array, not object\)"),
        (
            '{"text": "li',
            r"can't be read at row 3,002 \((Missing a closing quotation mark|Invalid encoding) in string\)",
        ),
        ('{"text": "\\ud800"}', r"can't be read at row 3,002 \(The surrogate pair in string is invalid\)"),
    ],
)
def test_a_row_that_cant_be_read_is_said_with_its_number(tmp_path, monkeypatch, line, said) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 5000)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "light"}\n')
    bad.write_text('\ufeff{"text": "light"}\n' * 1 + '{"text": "light"}\n' * 3000 + line + "\n")
    files = text_of(tmp_path / "cache", "jsonl", [str(good), str(bad)])
    for read in (files.stored, lambda split: list(files.streamed(split))):
        with pytest.raises(UserError, match=f"bad.jsonl {said}") as raised:
            read("train")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('null\n{"text": "light"}\n', "a row is null, not an object"),
        ('{"text": "light"}\nnull\n', "has a row without text: row 2 is null"),
        (
            '{\n "other": "light"\n}\n',
            "has no column 'text', only other; rename one, or name that of the texts in a rec",
        ),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "can't be read"),
    ],
)
def test_what_is_odd_is_one_line(tmp_path, lines, said) -> None:
    (tmp_path / "odd.jsonl").write_text(lines)
    with pytest.raises(UserError, match=f"odd.jsonl {said}|odd.jsonl can't be read: {said}") as raised:
        text_of(tmp_path / "cache", "jsonl", [str(tmp_path / "odd.jsonl")]).stored("train")
    assert "\n" not in str(raised.value)


def test_a_column_that_is_there_twice(tmp_path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet has 2 columns 'text'; rename all but one"):
        text_of(tmp_path / "cache", "parquet", [str(tmp_path / "twice.parquet")]).stored("train")


def test_strings_that_are_not_utf_8(tmp_path) -> None:
    for name, content in (("a.jsonl", b'{"text": "Gr\xf6\xdfe"}\n'), ("a.txt", b"Gr\xf6\xdfe\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} can't be read .*; it must be"):
            text_of(tmp_path / "cache", name[2:], [str(tmp_path / name)]).stored("train")


def test_a_stream_goes_on_in_the_middle_of_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 100)
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps({"text": f"{number} {row}"}) + "\n" for row in range(50)))
    whole = list(text_of(tmp_path, "jsonl", files).streamed("train"))
    for begin in random.Random(0).sample(range(150), 12):
        stream = text_of(tmp_path, "jsonl", files).streamed("train")
        rows = iter(stream)
        assert [next(rows) for _ in range(begin)] == whole[:begin]
        again = text_of(tmp_path, "jsonl", files).streamed("train")
        again.load_state_dict(stream.state_dict())
        assert list(again) == whole[begin:]
