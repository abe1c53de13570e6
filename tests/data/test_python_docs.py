"""python-docs: real prose, the same every time, and no document in two splits."""

import inspect
import subprocess
import sys
import textwrap
import types

import pytest

from chiaroscuro.data import corpora, load_corpus, python_docs
from chiaroscuro.data.python_docs import python_documents
from chiaroscuro.errors import UserError


@pytest.fixture
def uncached(monkeypatch):
    """Read the documents anew, and leave what other tests have read."""
    monkeypatch.setattr(corpora, "python_documents", python_documents.__wrapped__)


def test_about_two_megabytes_of_topics_and_modules() -> None:
    documents = python_documents()
    assert 1.6e6 < sum(map(len, documents.values())) < 2.6e6
    topics = [name for name in documents if name.startswith("topic:")]
    assert len(topics) > 50
    assert len(documents) - len(topics) > 200
    assert all(len(text) >= python_docs.SHORTEST_DOCSTRING for text in documents.values())


def test_a_document_holds_docstrings_and_no_code() -> None:
    document = python_documents()["module:textwrap"]
    assert inspect.cleandoc(textwrap.TextWrapper.__doc__ or "") in document
    assert "def fill" not in document


def test_neither_tests_nor_installed_packages_are_prose() -> None:
    names = [name.removeprefix("module:").split(".") for name in python_documents()]
    assert not any(python_docs.SKIPPED_FOLDERS.intersection(parts) for parts in names)
    assert not any(parts[0] in ("numpy", "torch", "pytest") for parts in names)


def prose(word: str) -> str:
    return f"The {word} docstring is long enough to count as prose."


def test_docstrings_come_in_source_order_without_indentation_or_labels(tmp_path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        f'"""{prose("1st")}"""\n'
        "class A:\n"
        '    """Label."""\n'
        "    def f(self):\n"
        f'        """{prose("2nd")}\n\n        More.\n        """\n'
        "async def g():\n"
        f'    """{prose("3rd")}"""\n'
        '    return "\\d"\n'
    )
    assert list(python_docs._docstrings(path)) == [prose("1st"), prose("2nd") + "\n\nMore.", prose("3rd")]


def test_a_source_file_that_does_not_parse_is_passed_over(tmp_path) -> None:
    (tmp_path / "template.py").write_text("def {name}():\n")
    assert list(python_docs._docstrings(tmp_path / "template.py")) == []


def test_a_library_made_up(uncached, monkeypatch, tmp_path) -> None:
    sources = {
        "b.py": f'"""{prose("b")}"""\ndef f():\n    """{prose("shared")}"""\n',
        "a/__init__.py": f'"""{prose("shared")}"""\nclass A:\n    """{prose("shared")}"""\n',
        "a/x.py": f'"""{prose("x")}"""\n',
        "a/only_copies.py": f'"""{prose("x")}"""\n',
        "a/test/test_x.py": f'"""{prose("test")}"""\n',
        "site-packages/c.py": f'"""{prose("c")}"""\n',
        "a/broken.py": "def",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(python_docs, "sysconfig", types.SimpleNamespace(get_path=lambda _: str(tmp_path)))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics={"if": " The if.\n"}))
    assert corpora.python_documents() == {
        "topic:if": "The if.",
        "module:a": prose("shared"),
        "module:a.only_copies": prose("x"),
        "module:b": prose("b"),
    }


def test_splits_share_no_document_and_lose_none() -> None:
    corpus = load_corpus("python-docs")
    texts = [text for split in corpus.splits.values() for text in split["text"]]
    assert sorted(texts) == sorted(python_documents().values())
    train, validation, test = (set(corpus.splits[split]["text"]) for split in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test
    sizes = {split: sum(map(len, rows["text"])) for split, rows in corpus.splits.items()}
    assert sizes["train"] > 1.4e6
    assert min(sizes["validation"], sizes["test"]) > 50_000


def test_the_corpus_says_which_python_it_is() -> None:
    corpus = load_corpus("python-docs")
    assert ".".join(map(str, sys.version_info[:3])) in corpus.description
    assert corpus.separator == "eos"


def test_another_process_finds_the_same_corpus() -> None:
    script = "from chiaroscuro.data import load_corpus; print(load_corpus('python-docs').fingerprint)"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == load_corpus("python-docs").fingerprint


def test_a_python_without_topics_is_an_error(uncached, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"pydoc_data\.topics.*use a full Python"):
        load_corpus("python-docs")


def test_a_python_without_sources_is_an_error(uncached, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(python_docs, "sysconfig", types.SimpleNamespace(get_path=lambda _: str(tmp_path)))
    with pytest.raises(UserError, match="source files of Python's library"):
        load_corpus("python-docs")
