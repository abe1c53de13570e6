"""Tasks of recall: every answer stood in the row, at the depth that the row says; wrong rows and options are refused.

Oracles: `looked_up` reads a row of mqar as a dictionary of pairs, `needles` finds the numbers of a passkey row; neither
knows how the rows are drawn.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiaroscuro.data import load_tokenizer
from chiaroscuro.data.tasks import (
    TASKS,
    GeneratedTask,
    RecallTask,
    load_task,
    make_task,
    register_task,
    tokenize_targets,
)
from chiaroscuro.data.tasks.passkey import HAYSTACK
from chiaroscuro.errors import UserError


def looked_up(words: list[str], pairs: int) -> dict[str, tuple[str, int]]:
    """The value of each key, and where the key stands."""
    return {words[2 * i]: (words[2 * i + 1], 2 * i) for i in range(pairs)}


def needles(words: list[str], digits: int) -> list[tuple[str, int, list[str]]]:
    """Each key that is followed by digits, with its place among the noise before it, and its number."""
    found, noise = [], 0
    for place, word in enumerate(words):
        if word.startswith("k") and word[1:].isdigit():
            found.append((word, noise, words[place + 1 : place + 1 + digits]))
        elif not word.isdigit():
            noise += 1
    return found


def holds(name: str, depth: int) -> bool:
    low, high = (int(end) for end in name.rstrip("%").split("–"))
    return low <= depth <= high


@given(data=st.data(), seed=st.integers(0, 2**31))
def test_a_query_has_one_answer_and_says_how_far_it_is(data: st.DataObject, seed: int) -> None:
    length = 2 * data.draw(st.integers(2, 40))
    pairs = data.draw(st.integers(1, length // 4))
    vocabulary = data.draw(st.integers(2 * pairs, 200))
    power = data.draw(st.sampled_from([0.01, 0.5, 1.0]))
    task: Any = make_task("mqar", {"length": length, "pairs": pairs, "vocabulary": vocabulary, "power": power})
    row = task.draw(Random(seed))
    words, asked = row["words"], [i for i, target in enumerate(row["targets"]) if target is not None]
    values = looked_up(words, pairs)
    assert len(words) == length == len(row["targets"]) == len(row["depths"])
    assert len(values) == len({value for value, _ in values.values()}) == len(asked) == pairs
    assert sorted(words[i] for i in asked) == sorted(values) and min(asked) >= 2 * pairs
    for place, (word, target, depth) in enumerate(zip(words, row["targets"], row["depths"], strict=True)):
        if target is None:
            assert depth is None and (place < 2 * pairs or word not in values), "noise would give a key another value"
        else:
            assert target == values[word][0]
            assert holds(task.depths[depth], place - values[word][1])


def test_most_queries_come_soon_unless_the_power_is_1() -> None:
    def mean_gap(power: float) -> float:
        task: Any = make_task("mqar", {"length": 256, "pairs": 4, "power": power})
        draw = Random(0)
        rows = [task.draw(draw)["targets"] for _ in range(300)]
        gaps = [(i - 8) // 2 for targets in rows for i, target in enumerate(targets) if target is not None]
        return sum(gaps) / len(gaps)

    assert 58 < mean_gap(1.0) < 66, "the mean of 0 … 123 is 61.5"
    assert mean_gap(0.5) < 50
    assert mean_gap(0.01) < 30


@given(data=st.data(), seed=st.integers(0, 2**31))
def test_the_answer_is_the_needle_of_its_key(data: st.DataObject, seed: int) -> None:
    noise, keys, digits = (data.draw(st.integers(1, most)) for most in (80, 6, 5))
    queries = data.draw(st.integers(1, keys))
    task: Any = make_task("passkey", {"noise": noise, "keys": keys, "queries": queries, "digits": digits})
    row = task.draw(Random(seed))
    words, targets = row["words"], row["targets"]
    assert len(words) == noise + keys * (1 + digits) + queries * (2 + digits) - 1 == len(targets) == len(row["depths"])
    end = noise + keys * (1 + digits)
    hidden = needles(words[:end], digits)
    assert len({key for key, _, _ in hidden}) == keys
    plain = " ".join(word for word in words[:end] if not word[-1].isdigit())
    assert plain in " ".join([HAYSTACK] * (2 + noise // 10)), "the noise goes round in its circle"
    numbers = {key: (place, number) for key, place, number in hidden}
    for i in range(queries):
        place, size = end + i * (2 + digits), 1 + digits
        assert words[place] == "?" and targets[place] is None
        depth, number = numbers[words[place + 1]]
        assert targets[place + 1 : place + size] == number
        assert words[place + 2 : place + size] == number[:-1]
        for at in row["depths"][place + 1 : place + size]:
            assert holds(task.depths[at], 100 * depth // (noise + 1))
    assert sum(target is not None for target in targets) == queries * digits
    assert [at is None for at in row["depths"]] == [target is None for target in targets]


def test_several_needles_of_which_one_is_asked_for_have_a_name_of_their_own() -> None:
    own, other = make_task("niah", {}), make_task("passkey", {"keys": 4})
    assert own.draw(Random(1)) == other.draw(Random(1)) and own.description == other.description
    assert (own.keys, own.queries) == (4, 1)


def test_needles_lie_evenly() -> None:
    task: Any = make_task("passkey", {"noise": 99, "keys": 3})
    draw = Random(1)
    depths = Counter(next(at for at in task.draw(draw)["depths"] if at is not None) for _ in range(4000))
    assert sorted(depths) == list(range(10)) and max(depths.values()) < 1.3 * min(depths.values())


@pytest.mark.parametrize("name", ["mqar", "passkey"])
def test_a_seed_says_it_all(name: str, tmp_path: Path) -> None:
    def words(place: str, **options: int) -> dict[str, list[list[str]]]:
        task = load_task(name, tmp_path / place, **{"train_examples": 40, "heldout_examples": 10} | options)
        return {split: rows["words"][:] for split, rows in task.splits.items()}

    first = words("a")
    assert words("b") == first
    assert words("a", train_examples=60)["test"] == first["test"]
    assert words("a", seed=1)["test"] != first["test"]
    rows = [str(row) for split in first.values() for row in split]
    assert len(set(rows)) == len(rows) == 60


@dataclass(frozen=True)
class Backwards(RecallTask, GeneratedTask):
    """Two words, and the same in the other order; the depth is the word."""

    train_examples: int = 20
    heldout_examples: int = 4

    description = "two words backwards"
    depths = ("second", "first")

    def draw(self, random: Random) -> dict[str, Any]:
        first, second = (f"w{random.randrange(20)}" for _ in range(2))
        return {"words": [first, second, second], "targets": [None, second, first], "depths": [None, 0, 1]}


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> type[Backwards]:
    monkeypatch.setattr("chiaroscuro.data.tasks.registry.TASKS", dict(TASKS))
    register_task("backwards", Backwards)
    return Backwards


def test_rows_know_the_depth_of_each_target(backwards: type[Backwards], tmp_path: Path) -> None:
    task = load_task("backwards", tmp_path)
    rows = tokenize_targets(task, load_tokenizer("words", task.corpus, tmp_path), 3, tmp_path)["train"]
    assert rows.depths == task.depths == ("second", "first")
    assert rows.target_depths.tolist() == [0, 1] * 20
    assert rows.first(3).target_depths.tolist() == [0, 1] * 3 and rows.first(3)[2] == rows[2]
    assert "depths" not in rows[0], "a model is not told"


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ([0, 1], "row 0 of the train split of backwards has 3 targets and 2 depths; need as many of both"),
        ([None, 0, None], "with the depth None: a target has a depth from 0 to 1"),
        ([1, 0, 1], "has the target None with the depth 1"),
        ([None, 0, 2], "with the depth 2"),
    ],
)
def test_what_is_no_depth(
    backwards: type[Backwards],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    depths: list[int | None],
    message: str,
) -> None:
    drawn = Backwards.draw
    monkeypatch.setattr(Backwards, "draw", lambda self, random: drawn(self, random) | {"depths": depths})
    task = load_task("backwards", tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        tokenize_targets(task, load_tokenizer("words", task.corpus, tmp_path), 3, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mqar", {"length": 63}, "length=63: must be an even number from 4"),
        ("mqar", {"length": 2}, "length=2: must be an even number from 4"),
        ("mqar", {"pairs": 17}, "pairs=17: must be from 1 to 16, a quarter of the length"),
        ("mqar", {"pairs": 0}, "pairs=0: must be from 1 to 16"),
        ("mqar", {"vocabulary": 31}, "vocabulary=31: must be from 32 to"),
        ("mqar", {"power": 0.0}, "power=0.0: must be above 0 and at most 1"),
        ("mqar", {"keys": 3}, "keys=3: the task mqar has no such option"),
        ("passkey", {"noise": 0}, "noise=0: must be from 1 to 1,048,576"),
        ("passkey", {"keys": 65}, "keys=65: must be from 1 to 64"),
        ("passkey", {"keys": 2, "queries": 3}, "queries=3: must be from 1 to 2, since each query asks for another key"),
        ("passkey", {"digits": 33}, "digits=33: must be from 1 to 32"),
        ("passkey", {"depth": 3}, "depth=3: the task passkey has no such option"),
    ],
)
def test_a_mistake_is_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_task(name, options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
