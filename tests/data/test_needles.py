"""Rows with needles and copies, for any tokenizer."""

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from byte_tokenizer import byte_tokenizer
from chiaroscuro import UserError
from chiaroscuro.data import load_corpus, tokenize_corpus
from chiaroscuro.data.needles import NAMES, NOISE, Haystack, Row
from chiaroscuro.data.tasks import make_task
from chiaroscuro.data.tasks.retrieval import HaystackRows, Retrieval

TOKENIZER = byte_tokenizer()
TEXT = torch.tensor(TOKENIZER("light and dark, and what the light has left is dark. " * 200)["input_ids"])
HAYSTACK = Haystack(TOKENIZER, TEXT)


@given(st.integers(900, 1400), st.floats(0, 1), st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.booleans())
@settings(max_examples=40)
def test_a_needle_is_where_it_is_said_and_what_is_asked_for(
    length: int, depth: float, seed: int, keys: int, in_text: bool
) -> None:
    row = HAYSTACK.needle(length, depth, seed, keys=keys, in_text=in_text)
    assert row.input_ids.shape == (length,)
    text = TOKENIZER.decode(row.input_ids)
    answer = TOKENIZER.decode(row.input_ids[-row.answer :]).strip()
    assert re.fullmatch(r"[1-9]\d{4}", answer)
    found = re.findall(r"The pass key((?: of \w+)?) is (\d+)\. Remember it\. (\d+) is the pass key\1\.", text)
    assert len(found) == keys and all(first == second for _, first, second in found)
    assert len({number for _, number, _ in found}) == len({who for who, _, _ in found}) == keys
    question = re.search(r"What is the pass key((?: of \w+)?)\? The pass key\1 is (\d+)$", text)
    assert question is not None and (question[1], question[2], question[2]) in found and question[2] == answer
    assert torch.equal(row.input_ids, HAYSTACK.needle(length, depth, seed, keys=keys, in_text=in_text).input_ids)
    if keys == 1:  # noise is a circle of sentences, and the place a part of it
        haystack = text[: question.start()]
        before, after = haystack.split(f"The pass key is {answer}. Remember it. {answer} is the pass key.")
        skipped = 0 if in_text else 143
        assert abs((len(before) - skipped) / (len(before) + len(after) - skipped) - depth) < 0.06
        assert in_text or set(NOISE.split()) <= set(text.split())


def test_a_copy_says_a_part_of_its_passage_once_more() -> None:
    words = torch.randint(5, 250, (5000,), generator=torch.Generator().manual_seed(0))
    haystack = Haystack(TOKENIZER, words)
    for seed in range(5):
        row = haystack.copy(400, seed)
        first, again = row.input_ids[:300].tolist(), row.input_ids[300:].tolist()
        assert len(again) == 100 and any(first[i : i + 100] == again for i in range(201))


def test_the_mixture_is_of_all_kinds_and_of_its_seed() -> None:
    rows = HAYSTACK.mixture(8, 900)
    texts = [TOKENIZER.decode(row[0]) for row in rows]
    asked = ["What is the pass key" in text for text in texts]
    assert asked == [False, True, True, False, True, True, False, False]
    assert texts[5].count("Remember it") == 4 and texts[1].count("Remember it") == 1
    assert all(torch.equal(a, b) for a, b in zip(rows, HAYSTACK.mixture(8, 900), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rows, HAYSTACK.mixture(8, 900, seed=1), strict=True))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: HAYSTACK.needle(60, 0.5, 0), "60 tokens are too few for 1 needles and a question: take"),
        (lambda: HAYSTACK.needle(900, 0.5, 0, keys=0), "0 needles: must be from 1 to"),
        (lambda: HAYSTACK.needle(900, 0.5, 0, keys=len(NAMES) + 1), "needles: must be from 1 to"),
        (lambda: HAYSTACK.passage(10**6, 0), "too few for a passage of 1000000"),
        (lambda: Haystack(TOKENIZER).copy(400, 0), "0 tokens of text, too few"),
    ],
)
def test_mistakes(call: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        call()  # type: ignore[operator]


def test_of_a_training_row_with_a_needle_or_a_copy_only_what_is_far_is_predicted(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("light and dark, and what the light has left is dark. " * 2000)
    tokens = tokenize_corpus(load_corpus(str(tmp_path)), TOKENIZER)["train"]
    rows = HaystackRows(tokens, TOKENIZER, 600, 0)
    haystack = Haystack(TOKENIZER, torch.from_numpy(tokens.tokens.astype("int64")))
    kinds = set()
    for number in range(len(rows)):
        row = rows[number]
        drawn = next(d for kind in range(8) if _begins(d := haystack.row(number, 601, 0, kind), row["input_ids"]))
        kinds.add(drawn.answer)
        assert torch.equal(row["input_ids"], drawn.input_ids[:-1])
        predicted = row["shift_labels"] != -100
        assert int(predicted.sum()) == (drawn.answer or 600)
        assert torch.equal(row["shift_labels"][predicted], drawn.input_ids[-(drawn.answer or 600) :])
    assert len(kinds) > 2


def _begins(drawn: Row, ids: Tensor) -> bool:
    return torch.equal(drawn.input_ids[:-1], ids)


def test_the_name_that_is_asked_for_does_not_tell_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, int]] = []
    monkeypatch.setattr(Haystack, "needle", lambda self, length, depth, seed, **_: drawn.append((depth, seed)))
    for number in range(5, 2400, 8):
        HAYSTACK.row(number, 900)
    places: dict[str, list[float]] = {}
    for depth, seed in drawn:
        places.setdefault(Random(seed).choice(NAMES), []).append(depth)
    assert len(places) == len(NAMES)
    spans = [max(depths) - min(depths) for depths in places.values()]
    assert min(spans) > 0.5


def test_whoever_takes_every_eighth_row_gets_all_kinds(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("light and dark, and what the light has left is dark. " * 8000)
    tokens = tokenize_corpus(load_corpus(str(tmp_path)), TOKENIZER)["train"]
    rows = HaystackRows(tokens, TOKENIZER, 600, 0)
    predicted = [int((rows[i]["shift_labels"] != -100).sum()) for i in range(0, 344, 8)]
    whole, needles = predicted.count(600) / 43, sum(count < 10 for count in predicted) / 43
    assert 0.15 < whole < 0.6
    assert 0.3 < needles < 0.75


def test_another_text_beside_it_has_rows_of_its_own() -> None:
    task = make_task("retrieval", {"source": "a", "draw": 3})
    assert isinstance(task, Retrieval)
    assert task.of("b", 1) == replace(task, source="b", draw=4)
