"""A file is there whole, or as it was before; a place that can't be written to is one line."""

import os

import pytest

from chiaroscuro.errors import UserError
from chiaroscuro.files import write_bytes, write_text


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "page.html"
    write_text(path, "first")
    write_text(path, "ζεύτερο\n")
    assert path.read_bytes() == "ζεύτερο\n".encode()
    assert os.listdir(tmp_path) == ["page.html"]


def test_it_is_readable_by_whom_the_umask_says(tmp_path):
    (tmp_path / "plain").touch()
    write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize(
    "name, message",
    [("missing/page.html", "does not exist"), (".", "is a folder"), ("x" * 300, "cannot write")],
)
def test_a_wrong_place_is_one_line(tmp_path, name, message):
    with pytest.raises(UserError, match=message) as error:
        write_text(tmp_path / name, "text")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
