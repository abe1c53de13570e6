"""Tokenizers: lossless, of the size asked for, the same every time, and found again."""

import json

import datasets
import pytest
from corpus_samples import shared
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from chiaroscuro.data import load_corpus, load_tokenizer, tokenizers
from chiaroscuro.data.tokenizers import END_OF_TEXT
from chiaroscuro.errors import UserError
from chiaroscuro.files import whole_folder


@pytest.fixture(scope="module")
def small(corpus, cache) -> PreTrainedTokenizerFast:
    return load_tokenizer("bpe:300", corpus, cache)


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_survives(small, text) -> None:
    ids = small(text, add_special_tokens=False).input_ids
    assert small.decode(ids) == text
    assert all(0 <= id_ < len(small) for id_ in ids)


def test_size_and_special_tokens(small) -> None:
    assert isinstance(small, PreTrainedTokenizerFast)
    assert len(small) == 300
    assert small.bos_token == small.eos_token == small.pad_token == END_OF_TEXT
    assert small(END_OF_TEXT).input_ids == [small.eos_token_id]
    assert len(small("The quick brown fox").input_ids) < len("The quick brown fox")


def test_a_text_with_few_repetitions_gives_fewer_tokens_and_a_warning(corpus_of, tmp_path, caplog) -> None:
    for _ in ("trained", "found in the cache"):
        tokenizer = load_tokenizer("bpe:5000", corpus_of(["abab", "abab"]), tmp_path)
        assert set(tokenizer.get_vocab()) > {"ab", "abab", "Ċ"}
        assert len(tokenizer) == 256 + 1 + 2
        (record,) = caplog.records
        assert record.message == "the tokenizer bpe:5000 has only 259 tokens: the text has too few repetitions for more"
        caplog.clear()
    load_tokenizer("bpe:259", corpus_of(["abab", "abab"]), tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("room", [0, 1000])
def test_a_disk_that_is_full_at_the_tokenizer(small, corpus, tmp_path, room, files_no_larger_than) -> None:
    with files_no_larger_than(room), pytest.raises(UserError, match=r"cannot write .*: File too large; ") as caught:
        load_tokenizer("bpe:300", corpus, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*/*"))
    with (
        files_no_larger_than(room),
        pytest.raises(UserError, match=r"cannot write .*/model: File too large; ") as caught,
        whole_folder(tmp_path / "model") as folder,
    ):
        small.save_pretrained(folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()


def test_8192_tokens_from_the_documentation(cache) -> None:
    corpus = load_corpus("python-docs")
    tokenizer = load_tokenizer("bpe:8192", corpus, cache)
    assert len(tokenizer) == 8192
    text = corpus.splits["validation"]["text"][0]
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(text.encode()) / len(ids) > 3


def test_training_twice_gives_the_same(corpus) -> None:
    assert tokenizers._train(400, corpus).to_str() == tokenizers._train(400, corpus).to_str()


def test_it_learns_from_the_train_split_alone(corpus_of, tmp_path) -> None:
    corpus = corpus_of(["plain words"] * 5)
    corpus.splits["validation"] = datasets.Dataset.from_dict({"text": ["zzzz" * 50]})
    assert not any("z" in token and len(token) > 1 for token in load_tokenizer("bpe:300", corpus, tmp_path).get_vocab())


def test_it_is_trained_once(corpus, tmp_path, monkeypatch) -> None:
    first = load_tokenizer("bpe:300", corpus, tmp_path)
    monkeypatch.setattr(tokenizers, "_train", None)
    assert load_tokenizer("bpe:300", corpus, tmp_path).get_vocab() == first.get_vocab()
    assert load_tokenizer("bpe:0300", corpus, tmp_path).get_vocab() == first.get_vocab()


def test_another_corpus_or_size_is_another_tokenizer(corpus_of, tmp_path) -> None:
    for rows, fingerprint in ((["aaaa"] * 9, "a"), (["bbbb"] * 9, "b")):
        load_tokenizer("bpe:300", corpus_of(rows, fingerprint=fingerprint), tmp_path)
        load_tokenizer("bpe:301", corpus_of(rows, fingerprint=fingerprint), tmp_path)
    assert len(list(tmp_path.glob("tokenizers/*"))) == 4


@pytest.mark.parametrize("rest", ["", "{", '{"version": "1.0"}'])
def test_a_damaged_cache_is_made_again_with_one_line(corpus, tmp_path, caplog, rest) -> None:
    first = load_tokenizer("bpe:300", corpus, tmp_path)
    (path,) = tmp_path.glob("tokenizers/*")
    whole = path.read_text()
    path.write_text(rest)
    assert load_tokenizer("bpe:300", corpus, tmp_path).get_vocab() == first.get_vocab()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["training again"]
    assert path.read_text() == whole


def test_saved_and_found_by_auto_tokenizer(small, corpus, tmp_path) -> None:
    small.save_pretrained(tmp_path)
    text = "  The Größe 🙂 <|endoftext|>\n"
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, corpus)):
        assert isinstance(again, PreTrainedTokenizerFast)
        assert again(text).input_ids == small(text).input_ids
        assert again.decode(again(text).input_ids) == text
        assert (again.eos_token, again.bos_token, again.pad_token) == (END_OF_TEXT,) * 3


def test_gpt_2_from_its_two_files(corpus, tmp_path) -> None:
    tokenizer = load_tokenizer(shared("gpt2"), corpus, tmp_path)
    assert tokenizer("Hello world").input_ids == [15496, 995]
    ids = [15496, 11, 331, 6, 439, 0, 1374, 389, 345, 30325, 223, 5633]
    assert tokenizer("Hello, y'all! How are you 😁 ?").input_ids == ids
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 50256
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello world").input_ids == [15496, 995]


def test_a_hub_name_goes_to_auto_tokenizer(corpus, small, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: asked.append(name) or small)
    assert load_tokenizer("owner/name", corpus) is small
    load_tokenizer("gpt2", corpus)
    assert asked == ["owner/name", "gpt2"]


def refuse(source: object, corpus, cache) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(source, corpus, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "source", ["bpe:", "bpe", "bpe:257", "bpe:0", "bpe:-5", "bpe:8k", "bpe:1e4", "bpe:8192.0", "bpe:²", "bpe:1048577"]
)
def test_a_size_that_is_none(source, corpus, tmp_path) -> None:
    assert f"the tokenizer {source!r} needs a whole number from 258 to" in refuse(source, corpus, tmp_path)


def test_the_smallest_size_works(corpus, tmp_path) -> None:
    assert len(load_tokenizer("bpe:258", corpus, tmp_path)) == 258


@pytest.mark.parametrize(
    ("source", "complaint"),
    [("/no/where", "no such folder"), ("word:8192", "no such tokenizer"), ("", "no such")],
)
def test_a_name_of_nothing(source, complaint, corpus, tmp_path) -> None:
    message = refuse(source, corpus, tmp_path)
    assert complaint in message and "'bpe:8192'" in message


def test_a_folder_without_a_tokenizer(corpus, tmp_path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    assert "holds no tokenizer: wanted tokenizer.json, or vocab.json and merges.txt" in refuse(
        tmp_path, corpus, tmp_path
    )


def test_files_that_are_no_tokenizer(corpus, tmp_path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("nonsense")
    assert "can't be read" in refuse(tmp_path, corpus, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    assert "can't be read" in refuse(tmp_path, corpus, tmp_path)


def test_a_hub_that_fails(corpus, tmp_path, monkeypatch) -> None:
    def fail(name: str) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    message = refuse("owner/name", corpus, tmp_path)
    assert "could not load the tokenizer 'owner/name' from the Hugging Face Hub (We couldn't connect" in message


def test_a_tokenizer_without_a_fast_version(corpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: ByT5Tokenizer())
    assert "has no fast version" in refuse("owner/name", corpus, tmp_path)


def test_a_cache_folder_that_cannot_be_written(corpus, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot write to the cache folder" in refuse("bpe:300", corpus, tmp_path / "file")
