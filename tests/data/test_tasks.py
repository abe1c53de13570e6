"""Tasks: right labels, disjoint splits, reproducible rows, and tokenised rows.

Oracle: `value_of`, which reads an expression of ListOps back by recursion and knows nothing of how it was drawn.
"""

import hashlib
import math
import pickle
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from corpus_samples import shared
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from chiaroscuro.data import load_tokenizer
from chiaroscuro.data.tasks import (
    TASKS,
    GeneratedTask,
    LabelledRows,
    LabelledTexts,
    PadToLongest,
    TokenTask,
    generated,
    listops,
    load_task,
    make_task,
    register_task,
    task_options,
    tokenize_targets,
    tokenize_task,
)
from chiaroscuro.errors import UserError

MEANING = {
    "MAX": max,
    "MIN": min,
    "MEAN": lambda values: math.floor(statistics.fmean(values)),
    "MEDIAN": lambda values: math.floor(statistics.median(values)),
    "MED": lambda values: math.floor(statistics.median(values)),
    "SUM_MOD": lambda values: sum(values) % 10,
}
KINDS = ["listops-flat", "listops-nested"]


def value_of(text: str) -> tuple[int, int]:
    """The value and the depth of an expression."""
    words = text.split(" ")

    def read(place: int) -> tuple[int, int, int]:
        word = words[place]
        if not word.startswith("["):
            assert len(word) == 1
            return int(word), 1, place + 1
        values, depths, place = [], [], place + 1
        while words[place] != "]":
            value, depth, place = read(place)
            values.append(value)
            depths.append(depth)
        assert len(values) <= 10
        return MEANING[word[1:]](values), 1 + max(depths), place + 1

    value, depth, end = read(0)
    assert end == len(words)
    return value, depth


@settings(max_examples=8)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), limit=st.sampled_from([8, 30, 64, 256]))
def test_the_label_is_the_value(tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, limit: int) -> None:
    nested = {"max_length": limit} if kind == "listops-nested" else {}
    task = load_task(kind, tmp_path_factory.mktemp("c"), train_examples=60, heldout_examples=20, seed=seed, **nested)
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 60, "validation": 20, "test": 20}
    texts = [text for rows in task.splits.values() for text in rows["text"]]
    assert len(set(texts)) == 100
    for rows in task.splits.values():
        for row in rows:
            value, depth = value_of(row["text"])
            assert task.labels[row["label"]] == str(value)
            words = row["text"].split(" ")
            if nested:
                assert limit // 4 <= len(words) <= limit
                assert 2 <= depth <= 10
            else:
                assert depth == 2 and 4 <= len(words) - 2 <= 8
    assert sum(task.label_counts("train")) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_says_it_all(kind: str, tmp_path: Path) -> None:
    def texts(place: str, **options: int) -> dict[str, list[str]]:
        task = load_task(kind, tmp_path / place, **{"train_examples": 50, "heldout_examples": 10} | options)
        return {split: rows["text"][:] for split, rows in task.splits.items()}

    first = texts("a")
    assert texts("b") == first
    assert texts("a") == first
    longer = texts("a", train_examples=70)
    assert longer["train"][:50] == first["train"]
    assert (longer["validation"], longer["test"]) == (first["validation"], first["test"])
    assert not set(texts("a", seed=1)["train"]) & set(first["train"])


def test_known_expressions() -> None:
    assert value_of("[MAX 2 9 [MIN 4 7 ] 0 ]") == (9, 3)
    assert value_of("[SUM_MOD 9 9 [MED 1 2 3 9 ] ]") == (0, 3)
    assert value_of("[MEAN 1 2 2 2 ]") == (1, 2)
    assert value_of("[MEDIAN 0 9 1 9 8 2 ]") == (5, 2)


def test_every_operator_and_digit_comes_up(tmp_path: Path) -> None:
    for kind, operators in (("listops-flat", listops.FLAT_OPERATORS), ("listops-nested", listops.NESTED_OPERATORS)):
        task = load_task(kind, tmp_path, train_examples=600, heldout_examples=1)
        words = Counter(word for text in task.splits["train"]["text"] for word in text.split(" "))
        assert set(words) == {"]", *map(str, range(10)), *(f"[{name}" for name, _ in operators)}
        digits = [words[str(digit)] for digit in range(10)]
        assert max(digits) < 1.3 * min(digits)
        assert min(task.label_counts("train")) > 0


def test_what_is_generated_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> list[str]:
        task = load_task("listops-flat", tmp_path, train_examples=20, heldout_examples=5)
        return [text for rows in task.splits.values() for text in rows["text"]]

    first = texts()
    with monkeypatch.context() as patch:
        patch.setattr(GeneratedTask, "_different_rows", None)
        assert texts() == first
    (table,) = tmp_path.rglob("*.arrow")
    table.unlink()  # what is mapped into memory must not change under it
    table.write_bytes(b"broken off")
    assert texts() == first


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        ({"text": "[MAX 1 2 ]", "lable": 1}, "gave the columns text, lable"),
        ("[MAX 1 2 ]", "gave str"),
        (None, "hardly more"),
    ],
)
def test_what_a_task_of_one_s_own_draws_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any, said: str
) -> None:
    monkeypatch.setattr(TASKS["listops-flat"], "draw", lambda self, random: drawn)
    with pytest.raises(UserError, match=f"listops-flat.*{said}") as caught:
        load_task("listops-flat", tmp_path, train_examples=2, heldout_examples=1)
    assert "\n" not in str(caught.value)


def test_more_expressions_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "PATIENCE", 50)
    monkeypatch.setattr(listops, "FLAT_DIGITS", (1, 1))
    with pytest.raises(UserError, match=r"^listops-flat has hardly more than \d+ different rows"):
        load_task("listops-flat", tmp_path, train_examples=100, heldout_examples=1)
    assert not list(tmp_path.rglob("*.arrow"))


# IMDB


def reviews(folder: Path, **splits: list[tuple[str | None, int]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        texts, labels = zip(*rows, strict=True)
        datasets.Dataset.from_dict({"text": texts, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return folder


def some(kind: str, count: int, label: int) -> list[tuple[str | None, int]]:
    return [(f"a {kind} film, number {i}", label) for i in range(count)]


@pytest.fixture
def films(tmp_path: Path) -> Path:
    train = [*some("good", 40, 1), *some("bad", 40, 0), *some("strange", 7, -1)]
    return reviews(tmp_path / "films", train=train, test=[*some("fine", 9, 1), *some("dull", 11, 0)])


def test_imdb_holds_out_a_tenth_of_each_label(films: Path, tmp_path: Path) -> None:
    task = load_task("imdb", tmp_path, source=str(films))
    assert task.labels == ("negative", "positive")
    assert [task.label_counts(split) for split in ("train", "validation", "test")] == [[36, 36], [4, 4], [11, 9]]
    texts = [text for rows in task.splits.values() for text in rows["text"]]
    assert len(set(texts)) == len(texts) == 100
    assert not any("strange" in text for text in texts)
    for rows in task.splits.values():
        assert rows.column_names == ["text", "label"]
        assert all((row["label"] == 1) == (row["text"].split()[1] in ("good", "fine")) for row in rows)


def test_the_same_reviews_are_held_out_whatever_their_order(films: Path, tmp_path: Path) -> None:
    rows = [*some("bad", 40, 0), *some("good", 40, 1)][::-1]
    other = reviews(tmp_path / "other", train=rows, test=some("fine", 1, 1) + some("dull", 1, 0))
    held = [
        set(load_task("imdb", tmp_path, source=str(folder)).splits["validation"]["text"]) for folder in (films, other)
    ]
    assert held[0] == held[1]


def test_the_fingerprint_tells_labels_and_texts_apart(films: Path, tmp_path: Path) -> None:
    one = [("a", 0), ("b", 1), ("c", 0), ("d", 1)]
    tests = [("x", 0), ("y", 1)]
    tasks = [
        load_task("imdb", tmp_path, source=str(reviews(tmp_path / str(i), train=train, test=tests)))
        for i, train in enumerate([one, one, [("a", 1), ("b", 0), ("c", 0), ("d", 1)], [("e", 0), *one[1:]]])
    ]
    assert tasks[0].fingerprint == tasks[1].fingerprint
    assert len({task.fingerprint for task in tasks}) == 3


def test_a_validation_split_of_its_own(films: Path, tmp_path: Path) -> None:
    reviews(films, validation=[*some("new", 2, 1), *some("old", 3, 0)])
    task = load_task("imdb", tmp_path, source=str(films))
    assert task.label_counts("validation") == [3, 2] and task.label_counts("train") == [40, 40]


def test_labels_that_came_as_floats(films: Path, tmp_path: Path) -> None:
    whole = load_task("imdb", tmp_path, source=str(films))
    as_floats = {
        split: [(row["text"], float(row["label"])) for row in datasets.Dataset.from_parquet(str(films / name))]
        for split, name in (("train", "train.parquet"), ("test", "test.parquet"))
    }
    floats = load_task("imdb", tmp_path, source=str(reviews(tmp_path / "floats", **as_floats)))
    assert floats.fingerprint == whole.fingerprint
    for split, rows in whole.splits.items():
        assert floats.splits[split]["label"][:] == rows["label"][:]
        assert all(type(label) is int for label in floats.splits[split]["label"])
    for wrong in (0.5, 2.0, math.nan):
        folder = reviews(tmp_path / f"wrong {wrong}", train=[("a", 0.0), ("b", 1.0), ("c", wrong)], test=[("d", 0.0)])
        with pytest.raises(UserError, match=rf"has the label {wrong}: labels are 0, 1, and −1 for none"):
            load_task("imdb", tmp_path, source=str(folder))
    folder = reviews(tmp_path / "lists", train=[("a", [0]), ("b", [1])], test=[("d", [0])])
    with pytest.raises(UserError, match=r"the column 'label' holds lists; it must hold numbers"):
        load_task("imdb", tmp_path, source=str(folder))


@settings(max_examples=15)
@given(rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), min_size=1, max_size=12))
@example(rows=[("b", 0), *[("a", 0)] * 20, ("a", 1), ("b", 1)])  # b has the smaller hash, and a is in the first tenth
@example(rows=[("a", 0), ("a", 0), ("a", 1), ("b", 1)])
def test_both_sides_have_texts_of_both_labels_or_it_is_said(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("few")
    source = str(reviews(folder / "source", train=rows, test=[("x", 0), ("y", 1)]))
    distinct = [len({text for text, other in rows if other == label}) for label in (0, 1)]
    if min(distinct) > 1:
        task = load_task("imdb", folder, source=source)
        assert min(task.label_counts("train") + task.label_counts("validation")) > 0
    else:
        few = ("negative", "positive")[distinct.index(min(distinct))]
        wanted = f"has no {few} row" if 0 in distinct else f"has one {few} text"
        with pytest.raises(UserError, match=wanted) as caught:
            load_task("imdb", folder, source=source)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_imdb_itself(tmp_path: Path) -> None:
    task = load_task("imdb", tmp_path, source=str(shared("imdb")))
    assert [task.label_counts(split) for split in ("train", "validation", "test")] == [
        [11250, 11250],
        [1250, 1250],
        [12500, 12500],
    ]


# Rows


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> LabelledTexts:
    return load_task("listops-flat", tmp_path_factory.mktemp("flat"), train_examples=300, heldout_examples=20)


def test_rows_are_the_texts_cut(flat: LabelledTexts, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("words", flat.corpus, tmp_path)
    for length in (3, 8, 99):
        rows = tokenize_task(flat, tokenizer, length, tmp_path)
        assert list(rows) == ["train", "validation", "test"]
        for split, found in rows.items():
            texts = flat.splits[split]["text"][:]
            assert len(found) == len(texts)
            for row, text, label in zip(found, texts, flat.splits[split]["label"], strict=False):
                assert tokenizer.decode(row["input_ids"]) == " ".join(text.split()[:length])
                assert row["labels"] == label
            assert found.lengths.tolist() == [len(text.split()) for text in texts]
            assert found.share_cut == np.mean([len(text.split()) > length for text in texts])
    assert pickle.loads(pickle.dumps(rows["test"]))[3] == rows["test"][3]


def test_rows_are_tokenised_once_whatever_the_length(
    flat: LabelledTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer("bpe:300", flat.corpus, tmp_path)
    first = tokenize_task(flat, tokenizer, 5, tmp_path)["train"]
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    monkeypatch.setattr("chiaroscuro.data.tasks.rows._encode_texts", lambda *_: pytest.fail("tokenised again"))
    again = tokenize_task(flat, tokenizer, 4, tmp_path)["train"]
    assert again.identity == first.identity
    assert again[0]["input_ids"] == first[0]["input_ids"][:4]
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        tokenize_task(flat, load_tokenizer("words", flat.corpus, tmp_path), 4, tmp_path)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), pad=st.one_of(st.none(), st.integers(0, 50)))
def test_a_batch_is_the_rows_and_padding(sizes: list[int], pad: int | None) -> None:
    rows = [{"input_ids": list(range(60, 60 + size)), "labels": i} for i, size in enumerate(sizes)]
    batch = PadToLongest(pad)(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(sizes), max(sizes))
    assert batch["labels"].tolist() == list(range(len(sizes)))
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        assert ids[mask.bool()].tolist() == row["input_ids"]
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert set(ids[~mask.bool()].tolist()) <= {pad or 0}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_rows_in_a_loader(flat: LabelledTexts, tmp_path: Path) -> None:
    rows = tokenize_task(flat, load_tokenizer("words", flat.corpus, tmp_path), 16, tmp_path)["validation"]
    batches = list(DataLoader(rows, batch_size=8, collate_fn=PadToLongest(0)))
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]


# The tokenizer of words


def test_every_word_is_a_token(flat: LabelledTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("words", flat.corpus, tmp_path)
    words = {word for text in flat.splits["train"]["text"] for word in text.split()}
    assert set(tokenizer.get_vocab()) == words | {"<|endoftext|>", "<unk>"}
    for text in flat.splits["train"]["text"][:20]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("[MAX seven").input_ids[1] == tokenizer.unk_token_id
    monkeypatch.setattr("chiaroscuro.data.tokenizers._train_words", None)
    assert load_tokenizer("words", flat.corpus, tmp_path).get_vocab() == tokenizer.get_vocab()


def test_as_many_words_as_a_text_has(corpus_of, tmp_path: Path) -> None:
    corpus = corpus_of([" ".join(f"w{i}" for i in range(40_000))])
    assert len(load_tokenizer("words", corpus, tmp_path)) == 40_002


# Mistakes


def test_what_a_task_takes() -> None:
    own = ("language-modelling", "imdb", "listops-flat", "listops-nested", "mqar", "passkey")
    generated = ["train_examples", "heldout_examples", "seed"]
    assert {name: task_options(name) for name in own} == {
        "language-modelling": ["source", "column", "documents", "streaming", "shuffle"],
        "imdb": ["source"],
        "listops-flat": generated,
        "listops-nested": [*generated, "max_length"],
        "mqar": [*generated, "length", "pairs", "vocabulary", "power"],
        "passkey": [*generated, "noise", "keys", "queries", "digits"],
    }
    assert set(own) <= set(TASKS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("listop-flat", {}, "unknown task 'listop-flat': did you mean 'listops-flat'"),
        ("imdb", {"seed": 1}, "seed=1: the task imdb has no such option; known are source"),
        ("listops-flat", {"max_length": 9}, "has no such option; known are heldout_examples, seed, train_examples"),
        ("listops-nested", {"max_length": 2001}, "max_length=2001: an expression has from 8 to 2000 tokens"),
        ("listops-nested", {"max_length": 7}, "max_length=7"),
        ("listops-nested", {"max_lenght": 9}, "did you mean 'max_length'"),
        ("listops-flat", {"seed": -1}, "seed=-1: can't be negative"),
        ("listops-flat", {"seed": True}, "seed=True: input should be a valid integer"),
        ("listops-flat", {"train_examples": 0}, "train_examples=0: must be from 1 to 100,000,000"),
        ("listops-flat", {"heldout_examples": 10**30}, "must be from 1 to 100,000,000"),
        ("imdb", {"source": 3}, "source=3: input should be a valid string"),
        ("imdb", {"source": "./nowhere"}, "no such folder: './nowhere'; the task imdb is read from"),
    ],
)
def test_a_mistake_is_one_line(name: str, options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_task(name, tmp_path, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [("a", 0), ("b", 1)]}, "has no test split, only train"),
        ({"train": [("a", 0), ("b", 3)], "test": [("a", 0)]}, "has the label 3.0: labels are 0, 1"),
        ({"train": [("a", 0), ("b", 1)], "test": [("a", 0)]}, "the test split of .* has no positive row"),
        ({"train": [(None, 0), ("b", 1)], "test": [("a", 0), ("b", 1)]}, "has a row without text"),
    ],
)
def test_what_is_no_imdb(splits: dict[str, list[tuple[str | None, int]]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_task("imdb", tmp_path, source=str(reviews(tmp_path / "odd", **splits)))
    assert "\n" not in str(caught.value)


def test_columns_that_are_missing(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(folder / f"{split}.parquet")
    with pytest.raises(UserError, match=r"train.parquet has no column 'label', only text; rename one$"):
        load_task("imdb", tmp_path, source=str(folder))
    for split in ("train", "test"):
        (folder / f"{split}.parquet").unlink()
        (folder / f"{split}.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"train.jsonl has no column 'label', only text; rename one$"):
        load_task("imdb", tmp_path, source=str(folder))


def test_a_text_of_no_tokens(tmp_path: Path) -> None:
    rows = [("good", 1), ("  ", 0), ("bad", 0)]
    task = load_task("imdb", tmp_path, source=str(reviews(tmp_path / "odd", train=rows, validation=rows, test=rows)))
    with pytest.raises(UserError, match="row 1 of the train split of imdb has no tokens: remove such rows"):
        tokenize_task(task, load_tokenizer("words", task.corpus, tmp_path), 4, tmp_path)
    with pytest.raises(UserError, match="length is 0"):
        LabelledRows("rows", "made up", task.splits["train"], 0)


# Registered tasks


@dataclass(frozen=True)
class Echo(TokenTask, GeneratedTask):
    """Each position predicts its own word, except the first, which predicts nothing; rows of 2 to 5 words."""

    train_examples: int = 20
    heldout_examples: int = 4
    words: int = 50

    @property
    def description(self) -> str:
        return f"{self.words} words"

    def draw(self, random: Random) -> dict[str, Any]:
        words = [f"w{random.randrange(self.words)}" for _ in range(random.randint(2, 5))]
        return {"words": words, "targets": [None, *words[1:]]}


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> type[Echo]:
    monkeypatch.setattr("chiaroscuro.data.tasks.registry.TASKS", dict(TASKS))
    register_task("echo", Echo)
    return Echo


def test_targets_are_the_words_as_numbers(echo: type[Echo], tmp_path: Path) -> None:
    task = load_task("echo", tmp_path, words=9, seed=3)
    tokenizer = load_tokenizer("words", task.corpus, tmp_path)
    for split, rows in tokenize_targets(task, tokenizer, 5, tmp_path).items():
        assert len(rows) == len(task.splits[split])
        for row, drawn in zip((rows[i] for i in range(len(rows))), task.splits[split], strict=True):
            assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == drawn["words"]
            assert row["shift_labels"] == row["labels"] == [-100, *row["input_ids"][1:]]
        assert rows.predictions == sum(len(drawn["words"]) - 1 for drawn in task.splits[split])
        assert rows.lengths.tolist() == [len(drawn["words"]) for drawn in task.splits[split]]
    batch = PadToLongest(0)([rows[0], {name: values[:1] for name, values in rows[1].items()}])
    assert batch["attention_mask"][1].tolist() == [1, *[0] * (len(rows[0]["input_ids"]) - 1)]
    assert set(batch["shift_labels"][1].tolist()) == {-100}


def test_what_is_no_row_of_targets(echo: type[Echo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("echo", tmp_path)
    tokenizer = load_tokenizer("words", task.corpus, tmp_path)
    with pytest.raises(UserError, match=r"has sequences of 5 tokens, more than the 4 .* raise data.sequence_length"):
        tokenize_targets(task, tokenizer, 4, tmp_path)
    with pytest.raises(UserError, match=r"row \d+ of the train split of echo has the word 'w\d+', which the tokenizer"):
        tokenize_targets(task, load_tokenizer("words", load_task("listops-flat").corpus), 5, tmp_path)
    monkeypatch.setattr(Echo, "version", 2)
    monkeypatch.setattr(Echo, "draw", lambda self, random: {"words": [str(random.random())], "targets": []})
    with pytest.raises(UserError, match="row 0 of the train split of echo has 1 words and 0 targets"):
        tokenize_targets(load_task("echo", tmp_path), tokenizer, 5, tmp_path)


def test_its_options_and_its_version_make_other_rows(echo: type[Echo], tmp_path: Path) -> None:
    prints = [load_task("echo", tmp_path, **options).fingerprint for options in ({}, {"words": 51}, {"seed": 1})]
    assert len(set(prints)) == 3 and load_task("echo", tmp_path, words=None).fingerprint == prints[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Echo, "version", 2)
        assert load_task("echo", tmp_path).fingerprint not in prints


def test_what_is_registered_as_a_task(echo: type[Echo]) -> None:
    register_task("echo", Echo)  # twice, as by two imports
    assert make_task("echo", {"words": 7}) == Echo(words=7) and Echo.name == "echo"

    class Undecorated(Echo):
        pass

    @dataclass(frozen=True)
    class Taken(Echo):
        task: int = 0

    @dataclass(frozen=True)
    class Unfinished(TokenTask):
        pass

    for name, cls, message in (
        ("imdb", Echo, "task 'imdb' is taken by Imdb"),
        ("again", Echo, "Echo is already registered as 'echo'"),
        ("", Echo, "give a string"),
        ("other", dict, "is not a class that derives from Task"),
        ("other", Unfinished, "and has all its methods"),
        ("other", Undecorated, "Undecorated is not a dataclass"),
        ("other", Taken, "an option can't be called 'task'"),
    ):
        with pytest.raises(UserError, match=message):
            register_task(name, cls)


def test_rows_and_fingerprints_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Committed figures stay true, and runs that were begun with these rows can be resumed."""
    few = {"train_examples": 50, "heldout_examples": 10}
    flat = load_task("listops-flat", tmp_path, **few)
    nested = load_task("listops-nested", tmp_path, max_length=40, seed=3, **few)
    assert (flat.fingerprint, nested.fingerprint) == ("2c27a22c731bf084944b960d", "0dece02184511f8a85481a67")
    rows = [list(task.splits[split]) for task in (flat, nested) for split in ("train", "validation", "test")]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:24] == "39e871497f1f76ba9b2df744"


@pytest.mark.parametrize("option", ["name", "cache_dir"])
def test_an_option_called_as_an_argument_is_an_unknown_option(option: str) -> None:
    with pytest.raises(UserError, match=f"{option}='foo': the task listops-flat has no such option"):
        load_task("listops-flat", **{option: "foo"})
