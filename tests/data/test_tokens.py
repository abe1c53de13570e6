"""Token files: exactly the text, made once, whole or not at all."""

import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from corpus_samples import TEXTS, shared
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from chiaroscuro.data import corpora, load_corpus, load_tokenizer, progress, tokenize_corpus, tokens
from chiaroscuro.errors import UserError

ROWS = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def tokenizer(corpus, cache) -> PreTrainedTokenizerFast:
    return load_tokenizer("bpe:300", corpus, cache)


def encode(corpus, tokenizer, split: str = "train") -> tuple[list[int], int]:
    """Return ids and bytes as they go into the file, without the file."""
    end = tokenizer.eos_token_id if corpus.separator == "eos" else None
    batches = list(tokens._encode(corpus, split, tokenizer.backend_tokenizer, end))
    return np.concatenate([ids for ids, _ in batches]).tolist(), sum(size for _, size in batches)


@given(rows=ROWS, length=st.integers(1, 80), batch=st.integers(1, 5))
def test_rows_decode_to_the_joined_text(corpus_of, tokenizer, rows, length, batch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_CHARACTERS", length)
        patch.setattr(tokens, "BATCH", batch)
        ids, size = encode(corpus_of(rows), tokenizer)
    text = "".join(row + "\n" for row in rows)
    assert tokenizer.decode(ids) == text
    assert size == len(text.encode())


@given(rows=ROWS)
def test_an_end_of_text_follows_each_document(corpus_of, tokenizer, rows) -> None:
    ids, size = encode(corpus_of(rows, "eos"), tokenizer)
    assert tokenizer.decode(ids) == "".join(row + tokenizer.eos_token for row in rows)
    assert size == sum(len(row.encode()) for row in rows)


def test_the_file_is_the_text(corpus, tokenizer, cache) -> None:
    files = tokenize_corpus(corpus, tokenizer, cache)
    assert list(files) == ["train", "validation", "test"]
    for split, file in files.items():
        assert tokenizer.decode(file.tokens) == TEXTS[split]
        assert file.bytes == len(TEXTS[split].encode())
        assert (file.tokens.dtype, file.tokens.shape) == (np.uint16, (file.count,))
        assert isinstance(file.tokens, np.memmap) and not file.tokens.flags.writeable
        assert file.path.stat().st_size == 2 * file.count


def test_the_sidecar_says_what_it_is(corpus, tokenizer, cache) -> None:
    file = tokenize_corpus(corpus, tokenizer, cache)["validation"]
    facts = json.loads(file.path.with_suffix(".json").read_text())
    assert facts == {
        "corpus": corpus.name, "split": "validation", "tokens": file.count, "dtype": "<u2",
        "bytes": file.bytes, "vocab_size": 300,
    }  # fmt: skip


def big(vocab_size: int, ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer with made-up ids in a vocabulary of some size."""
    filler = {f"<{i}>": i for i in range(vocab_size) if i not in ids.values()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({**filler, **ids}, unk_token="<0>")))


def test_vocabularies_beyond_16_bits(corpus_of, tmp_path) -> None:
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        tokenizer = big(size, {"word\n": size - 1})
        file = tokenize_corpus(corpus_of(["word"], fingerprint=str(size)), tokenizer, tmp_path)["train"]
        assert (file.tokens.tolist(), file.tokens.dtype) == ([size - 1], dtype)


def test_an_id_beyond_the_vocabulary_is_an_error(corpus_of, tmp_path) -> None:
    with pytest.raises(UserError, match="the id 11 and has only 11 tokens"):
        tokenize_corpus(corpus_of(["word"]), big(10, {"word\n": 11}), tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_documents_need_an_end_of_sequence(corpus_of, tmp_path) -> None:
    with pytest.raises(UserError, match="no end-of-sequence token"):
        tokenize_corpus(corpus_of(["word"], "eos"), big(10, {"word": 5}), tmp_path)


def test_length_padding_and_truncation_do_not_matter(corpus, tokenizer, cache, tmp_path, caplog, capfd) -> None:
    plain = tokenize_corpus(corpus, tokenizer, cache)["train"]
    odd = load_tokenizer("bpe:300", corpus, cache)
    odd.model_max_length = 16
    odd(["a", "b c d e"], padding=True, truncation=True, max_length=3)
    assert tokenize_corpus(corpus, odd, tmp_path)["train"].path.name == plain.path.name
    assert tokenize_corpus(corpus, odd, tmp_path)["train"].tokens.tolist() == plain.tokens.tolist()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_it_is_done_once(corpus, tokenizer, tmp_path, monkeypatch) -> None:
    first = tokenize_corpus(corpus, tokenizer, tmp_path)
    monkeypatch.setattr(tokens, "_encode", None)
    assert tokenize_corpus(corpus, tokenizer, tmp_path) == first


def test_text_tokenizer_and_separator_make_the_name(corpus_of, tokenizer, tmp_path) -> None:
    plus = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    plus.add_tokens(["brown"])
    paths = {
        tokenize_corpus(corpus, other, tmp_path)["train"].path
        for corpus, other in (
            (corpus_of(["one"]), tokenizer),
            (corpus_of(["one"], fingerprint="other"), tokenizer),
            (corpus_of(["one"], "eos"), tokenizer),
            (corpus_of(["one"]), plus),
        )
    }
    assert len(paths) == 4


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def cut_sidecar(path: Path) -> None:
    sidecar = path.with_suffix(".json")
    os.truncate(sidecar, sidecar.stat().st_size // 2)


def empty_sidecar(path: Path) -> None:
    path.with_suffix(".json").write_text("{}")


@pytest.mark.parametrize("damage", [cut, cut_sidecar, empty_sidecar, Path.unlink])
def test_a_damaged_file_is_made_again_with_one_line(corpus, tokenizer, tmp_path, caplog, damage) -> None:
    path = tokenize_corpus(corpus, tokenizer, tmp_path)["train"].path
    whole = path.read_bytes()
    damage(path)
    assert tokenize_corpus(corpus, tokenizer, tmp_path)["train"].count == len(whole) // 2
    assert path.read_bytes() == whole
    assert [record.message for record in caplog.records] == [f"tokenising again: the cached {path} is incomplete"]
    tokenize_corpus(corpus, tokenizer, tmp_path)
    assert len(caplog.records) == 1


def test_interrupted_work_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch) -> None:
    def interrupted(*_: object):
        yield np.array([1, 2, 3], np.uint32), 3
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["tokens"]


def test_several_at_once_agree(corpus, tokenizer, tmp_path) -> None:
    found: list[dict[str, tokens.TokenFile]] = []
    workers = [
        threading.Thread(target=lambda: found.append(tokenize_corpus(corpus, tokenizer, tmp_path))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and all(files == found[0] for files in found)
    assert tokenizer.decode(found[0]["train"].tokens) == TEXTS["train"]
    assert sorted(path.suffix for path in (tmp_path / "tokens").iterdir()) == [".bin"] * 3 + [".json"] * 3


def test_a_pickle_holds_the_path_and_not_the_tokens(corpus, tokenizer, cache) -> None:
    file = tokenize_corpus(corpus, tokenizer, cache)["train"]
    ids = file.tokens.tolist()
    frozen = pickle.dumps(file)
    assert len(frozen) < 1000 < len(ids)
    assert pickle.loads(frozen).tokens.tolist() == ids


def test_a_fork_afterwards_is_not_warned_about(corpus, tokenizer, tmp_path, capfd) -> None:
    tokenize_corpus(corpus, tokenizer, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own word on forks and threads, from 3.12 on
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert "parallelism" not in capfd.readouterr().err


def test_a_bar_shows_when_the_work_takes_long(corpus, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    tokenize_corpus(corpus, load_tokenizer("bpe:301", corpus, tmp_path), tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and "training bpe:301" in err and "tokenising the train split of" in err


def test_a_cache_folder_that_cannot_be_written(corpus, tokenizer, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^cannot write to the cache folder .*file/tokens: .*CHIAROSCURO_CACHE$"):
        tokenize_corpus(corpus, tokenizer, tmp_path / "file")


def test_python_docs_end_to_end(cache) -> None:
    corpus = load_corpus("python-docs")
    tokenizer = load_tokenizer("bpe:8192", corpus, cache)
    for split, file in tokenize_corpus(corpus, tokenizer, cache).items():
        documents = corpus.splits[split]["text"][:]
        assert (file.tokens == tokenizer.eos_token_id).sum() == len(documents)
        assert tokenizer.decode(file.tokens) == "".join(text + "<|endoftext|>" for text in documents)
        assert file.bytes == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("name", ["bpe:8192", "gpt2"])
def test_wikitext_2_end_to_end(cache, tmp_path, name) -> None:
    (tmp_path / "train.txt").symlink_to(shared("wikitext-2") / "test.txt")
    (tmp_path / "validation.txt").symlink_to(shared("wikitext-2") / "validation.txt")
    corpus = load_corpus(tmp_path, cache)
    tokenizer = load_tokenizer(shared(name) if name == "gpt2" else name, corpus, cache)
    for split, file in tokenize_corpus(corpus, tokenizer, cache).items():
        text = (tmp_path / f"{split}.txt").read_text()
        assert file.bytes == (tmp_path / f"{split}.txt").stat().st_size
        assert tokenizer.decode(file.tokens) == text
        # Piece by piece or all at once: only a run of white space at a boundary can differ.
        whole = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))
        assert abs(file.count - whole) <= len(text) // corpora.PIECE_CHARACTERS


COUNT_THREADS = """
import os
from pathlib import Path
from chiaroscuro.data import load_corpus, load_tokenizer, tokenize_corpus

folder = Path({folder!r})
corpus = load_corpus(folder, folder)
before = set(os.listdir("/proc/self/task"))
tokenize_corpus(corpus, load_tokenizer("bpe:300", corpus, folder), folder)
print(len(set(os.listdir("/proc/self/task")) - before))  # other threads may have ended meanwhile
"""


@pytest.mark.parametrize(("users", "parallel"), [(None, True), ("false", False)])
def test_all_cores_tokenise_unless_the_user_says_otherwise(folder, tmp_path, users, parallel) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads are counted as Linux shows them")
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {"TOKENIZERS_PARALLELISM": users} if users else {}
    script = COUNT_THREADS.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) >= len(os.sched_getaffinity(0))) == parallel
