"""Corpora: the text is kept byte for byte, and whatever is missing is an error of one line."""

import json
import os
import threading
from pathlib import Path

import datasets
import pytest
import zstandard
from corpus_samples import LINES, TEXTS, shared
from hypothesis import given
from hypothesis import strategies as st

from chiaroscuro.data import corpora, load_corpus, stream_corpus
from chiaroscuro.errors import UserError

ROWS = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=60)


@given(rows=ROWS, length=st.integers(1, 50))
def test_pieces_are_whole_rows_and_nothing_else(corpus_of, rows, length) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_CHARACTERS", length)
        pieces = list(corpus_of(rows).pieces("train"))
    assert "".join(pieces) == "".join(row + "\n" for row in rows)
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(len(piece) >= length for piece in pieces[:-1])


@given(rows=ROWS)
def test_documents_are_pieces_as_they_are(corpus_of, rows) -> None:
    assert list(corpus_of(rows, "eos").pieces("train")) == rows


@given(rows=ROWS, other=ROWS)
def test_the_fingerprint_tells_texts_apart(corpus_of, rows, other) -> None:
    def fingerprint(rows: list[str], separator: str = "newline") -> str:
        return corpora.hash_rows("rows", corpus_of(["x", *rows]).splits, separator)

    assert (fingerprint(rows) == fingerprint(other)) == (rows == other)
    assert fingerprint(rows) != fingerprint(rows, "eos")


def write(folder: Path, **texts: str) -> Path:
    """Write a text file for each split."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_a_folder_of_text_is_the_files_byte_for_byte(corpus, folder) -> None:
    assert list(corpus.splits) == ["train", "validation", "test"]
    for split, text in TEXTS.items():
        assert "".join(corpus.pieces(split)) == text
        assert corpus.splits[split].column_names == ["text"]
    assert corpus.splits["train"]["text"][:6] == LINES
    assert corpus.name == str(folder)
    assert corpus.separator == "newline"


def test_no_newline_at_the_end_counts_as_one(tmp_path, cache) -> None:
    with_, without = (
        write(tmp_path / "a", train="one\ntwo\n", val="x\n"),
        write(tmp_path / "b", train="one\ntwo", val="x"),
    )
    assert load_corpus(with_, cache).fingerprint == load_corpus(without, cache).fingerprint


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_names_of_the_validation_file_and_no_test_file(tmp_path, cache, name) -> None:
    corpus = load_corpus(write(tmp_path, **{"train": "one\n", name: "two\n"}), cache)
    assert {split: rows["text"][:] for split, rows in corpus.splits.items()} == {
        "train": ["one"],
        "validation": ["two"],
    }


def test_parts_in_the_order_of_their_names(tmp_path, cache) -> None:
    for part, text in {
        "train-1.txt": "b\n",
        "train-0.txt": "a\n",
        "train-2.txt": "c\n",
        "val.txt": "v\n",
    }.items():
        (tmp_path / part).write_text(text)
    (tmp_path / "README.md").write_text("not text to train on")
    assert load_corpus(tmp_path, cache).splits["train"]["text"][:] == ["a", "b", "c"]


def test_parquet_and_jsonl_hold_the_same_corpus_as_text(tmp_path, cache, corpus) -> None:
    for split, text in TEXTS.items():
        rows = text.removesuffix("\n").split("\n")
        if split == "train":
            datasets.Dataset.from_dict({"label": range(len(rows)), "text": rows}).to_parquet(tmp_path / "train.parquet")
        else:
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert load_corpus(tmp_path, cache).fingerprint == corpus.fingerprint


def test_a_changed_file_is_read_again_even_if_its_time_is_not(tmp_path, cache) -> None:
    write(tmp_path, train="one\n", val="v\n")
    before = load_corpus(tmp_path, cache)
    times = (tmp_path / "train.txt").stat()
    write(tmp_path, train="two\n")
    os.utime(tmp_path / "train.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    after = load_corpus(tmp_path, cache)
    assert after.splits["train"]["text"][:] == ["two"]
    assert after.fingerprint != before.fingerprint


def test_a_home_folder_and_a_relative_one(monkeypatch, folder, cache, corpus) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    assert load_corpus(f"~/{folder.name}", cache).fingerprint == corpus.fingerprint
    assert load_corpus(folder.name, cache).fingerprint == corpus.fingerprint


def test_small_work_is_silent(tmp_path, capfd) -> None:
    load_corpus(write(tmp_path / "c", train="one\n", val="v\n"), tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_a_hub_name_loads_its_configuration(monkeypatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        rows = datasets.Dataset.from_dict({"text": ["", " = A = \n"], "id": [0, 1]})
        return datasets.DatasetDict(train=rows, validation=rows, test=rows, other=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus("Salesforce/wikitext:wikitext-103-v1")
    assert corpus.name == "Salesforce/wikitext:wikitext-103-v1"
    assert list(corpus.splits) == ["train", "validation", "test"]
    assert corpus.splits["train"].column_names == ["text"]
    load_corpus("owner/name")
    assert asked == [("Salesforce/wikitext", "wikitext-103-v1"), ("owner/name", None)]


def test_wikitext_2_is_its_files(cache) -> None:
    source = shared("wikitext-2")
    corpus = load_corpus(source, cache)
    for split in ("train", "validation", "test"):
        assert "".join(corpus.pieces(split)) == (source / f"{split}.txt").read_text()


def test_reviews_in_parquet(cache, tmp_path) -> None:
    (tmp_path / "train.parquet").symlink_to(shared("imdb") / "test.parquet")
    write(tmp_path, val="v\n")
    rows = load_corpus(tmp_path, cache).splits["train"]
    assert (len(rows), rows.column_names) == (25_000, ["text"])


def refuse(source: str | Path, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_corpus(source, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_separator_is_one_of_two(cache, tmp_path) -> None:
    write(tmp_path, train="a\n", val="v\n")
    for load in (load_corpus, stream_corpus):
        with pytest.raises(UserError, match=r"separator='EOS': .*known are eos, newline"):
            load(tmp_path, cache, separator="EOS")


@pytest.mark.parametrize(
    "source", ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "~nobody/x", "a/b/c", ".hidden"]
)
def test_what_looks_like_a_path_must_be_there(source, cache, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in refuse(source, cache)


@pytest.mark.parametrize("source", ["", "wikitext", "python_docs", "owner/name:a:b", "owner name/x", "x" * 5000])
def test_a_name_of_nothing(source, cache, monkeypatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    message = refuse(source, cache)
    assert "no such corpus" in message and "'python-docs'" in message and "Hub name" in message


def test_a_file_in_place_of_a_folder(folder, cache) -> None:
    assert "is a file, not a folder" in refuse(folder / "train.txt", cache)


@pytest.mark.parametrize("name", ["train.txt", "train.parquet"])
def test_a_pipe_in_place_of_a_file_or_a_folder(tmp_path, cache, name) -> None:
    os.mkfifo(tmp_path / name)
    # Without the check, the reader would get an end of file from this thread instead of waiting for ever.
    threading.Thread(target=lambda: (tmp_path / name).open("wb").close(), daemon=True).start()
    assert f"{name} can't be read: it is no file, but a folder, a pipe or a device" in refuse(tmp_path, cache)
    assert "is a pipe or a device, not a folder" in refuse(tmp_path / name, cache)
    assert "is a pipe or a device, not a folder" in refuse("/dev/null", cache)


def test_a_folder_without_a_train_split(tmp_path, cache) -> None:
    assert "it holds nothing; wanted: train.txt" in refuse(tmp_path, cache)
    write(tmp_path, validation="v\n", traim="t\n")
    assert "no train split: it holds traim.txt, validation.txt; wanted: train.txt" in refuse(tmp_path, cache)


def test_a_folder_without_a_validation_split(tmp_path, cache) -> None:
    message = refuse(write(tmp_path, train="t\n", test="t\n"), cache)
    assert "has no validation split, only train, test" in message


@pytest.mark.parametrize("second", ["val.txt", "validation.jsonl", "validation-0.txt"])
def test_two_files_for_one_split(tmp_path, cache, second) -> None:
    write(tmp_path, train="t\n", validation="v\n")
    (tmp_path / second).write_text("w\n")
    message = refuse(tmp_path, cache)
    assert "more than one validation split" in message and second in message and "validation.txt" in message


def test_an_empty_file_and_a_file_of_empty_lines(tmp_path, cache) -> None:
    assert "train.txt is empty" in refuse(write(tmp_path, train="", val="v\n"), cache)
    assert "the validation split of" in refuse(write(tmp_path, train="t\n", val="\n\n"), cache)


def test_bytes_that_are_not_utf_8(tmp_path, cache) -> None:
    write(tmp_path, val="v\n")
    (tmp_path / "train.txt").write_bytes("Größe\n".encode("latin-1"))
    message = refuse(tmp_path, cache)
    assert "train.txt can't be read" in message and "UTF-8" in message


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, cache, format) -> None:
    write(tmp_path, val="v\n")
    (tmp_path / f"train.{format}").write_text("plain text\n" * 10)
    message = refuse(tmp_path, cache)
    assert f"train.{format} can't be read" in message and "column 'text'" in message


def test_a_text_of_other_values_among_strings(tmp_path, cache) -> None:
    (write(tmp_path, val="v\n") / "train.jsonl").write_text('{"text": "a"}\n{"text": 5}\n{"text": "b"}\n')
    assert "train.jsonl can't be read at row 2 (its column 'text' holds number); it must be" in refuse(tmp_path, cache)


def test_a_link_to_nothing(tmp_path, cache) -> None:
    (write(tmp_path, val="v\n") / "train.txt").symlink_to(tmp_path / "gone")
    assert "train.txt is a link to a file that is not there; mend or remove the link" in refuse(tmp_path, cache)


def test_a_compressed_file_that_ends_too_early(tmp_path, cache) -> None:
    lines = "".join(f'{{"text": "{i} {i * i}"}}\n' for i in range(9999)).encode()
    whole = zstandard.ZstdCompressor().compress(lines)
    (write(tmp_path, val="v\n") / "train.jsonl.zst").write_bytes(whole[:100])
    assert "can't be read (Truncated compressed stream)" in refuse(tmp_path, cache)


def test_a_folder_in_place_of_a_file(tmp_path, cache) -> None:
    (tmp_path / "train.txt").mkdir()
    assert "train.txt can't be read" in refuse(tmp_path, cache)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"review": ["a"], "label": [1]}, "has no column 'text', only review, label"),
        ({"text": [1, 2]}, "holds int64; it must hold strings"),
        ({"text": [["a", "b"]]}, "holds lists; it must hold strings"),
        ({"text": ["a", None]}, "has a row without text"),
    ],
)
def test_a_table_without_text(tmp_path, cache, columns, complaint) -> None:
    datasets.Dataset.from_dict(columns).to_parquet(write(tmp_path, val="v\n") / "train.parquet")
    assert complaint in refuse(tmp_path, cache)


def test_a_cache_folder_that_cannot_be_written(tmp_path, folder) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refuse(folder, tmp_path / "file" / "cache")
    assert "cannot write to the cache folder" in message and "CHIAROSCURO_CACHE" in message


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'owner/name' on the Hub (offline)\nand a second line"),
        ValueError("BuilderConfig 'x' not found. Available: ['y']"),
        RuntimeError(""),
    ],
)
def test_a_hub_that_fails(monkeypatch, cache, error) -> None:
    def load_dataset(*_: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refuse("owner/name", cache)
    assert "could not load the corpus 'owner/name' from the Hugging Face Hub" in message
    assert (str(error).splitlines() or ["RuntimeError"])[0] in message


def test_a_hub_data_set_without_validation_or_text(monkeypatch, cache) -> None:
    rows = datasets.Dataset.from_dict({"sentence": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=rows))
    assert "has no validation split, only train" in refuse("owner/name", cache)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=rows, validation=rows))
    assert "has no column 'text', only sentence" in refuse("owner/name", cache)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(all=rows))
    assert "has no train split" in refuse("owner/name", cache)
