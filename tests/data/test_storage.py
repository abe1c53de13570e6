"""The cache: files whole or not at all, names by content, a full disk in one line."""

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiaroscuro.data import default_cache_dir
from chiaroscuro.data.storage import cached_file, fingerprint, writing_to
from chiaroscuro.errors import UserError

PARTS = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.one_of(st.none(), st.integers(), st.text()))


@given(parts=PARTS, other=PARTS)
def test_fingerprints_differ_where_parts_do(parts, other) -> None:
    assert (fingerprint(**parts) == fingerprint(**other)) == (parts == other)
    assert fingerprint(**parts) == fingerprint(**dict(reversed(parts.items())))
    assert len(fingerprint(**parts)) == 24


def test_the_folder_and_its_variable(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("CHIAROSCURO_CACHE", "~/elsewhere")
    assert default_cache_dir() == Path("/home/someone/elsewhere")
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("CHIAROSCURO_CACHE")
        else:
            monkeypatch.setenv("CHIAROSCURO_CACHE", unset)
        assert default_cache_dir() == Path("/home/someone/.cache/chiaroscuro")


def test_a_file_appears_when_it_is_whole(tmp_path) -> None:
    target = tmp_path / "new" / "file"
    with cached_file(target) as temporary:
        temporary.write_text("half")
        assert temporary.parent == target.parent and not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(tmp_path, error) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(type(error)), cached_file(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_in_one_line(tmp_path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(UserError, match=r"cache folder .*No space left on device; make room"),
        cached_file(tmp_path / "f"),
    ):
        raise full
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="No space left"), writing_to(tmp_path):
        raise RuntimeError("a library's own error") from full


@pytest.mark.parametrize("error", [UserError("mine"), OSError("a broken file, says a library"), KeyError("x")])
def test_other_errors_pass(tmp_path, error) -> None:
    with pytest.raises(type(error)) as caught, writing_to(tmp_path):
        raise error
    assert caught.value is error
