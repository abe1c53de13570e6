"""A file or folder is there whole, or as it was before; a failed write is one line; a folder has one holder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from chiaroscuro import files
from chiaroscuro.errors import UserError
from chiaroscuro.files import alone_in, whole_file, whole_folder, write_bytes, write_text

# Whole files


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


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        write_text(pipe, "page")
        assert reader.communicate()[0] == b"page"
    assert pipe.is_fifo()
    found = subprocess.run(
        [sys.executable, "-c", "from chiaroscuro.files import write_text; write_text('/dev/stdout', 'page')"],
        capture_output=True,
        check=True,
    )
    assert found.stdout == b"page"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_failing_block_leaves_the_old_file(tmp_path):
    (tmp_path / "old").write_text("old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "old") as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


# Whole folders


def test_an_older_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale").touch()
    with whole_folder(target) as unfinished:
        assert (target / "stale").exists()
        (unfinished / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


@pytest.mark.parametrize("swaps", [True, False])
def test_an_older_folder_is_never_missing_where_the_system_can_swap_two(tmp_path, monkeypatch, swaps):
    target = tmp_path / "model"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    if swaps and not files._exchange(tmp_path / "first", tmp_path / "second"):
        pytest.skip("this file system can't")
    missing = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (replace(*names), missing.append(not target.exists())))
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda *folders: False)
    for name in ("first", "second"):
        (tmp_path / name / name).touch()
        files.move_whole(tmp_path / name, target)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "second"]
    assert missing == ([False] if swaps else [False, True, False])


def test_a_new_folder_never_replaces_one_that_was_made_meanwhile(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(UserError) as refused, whole_folder(target, new=True) as unfinished:
        (unfinished / "ours").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [path.name for path in target.iterdir()] == ["theirs"]
    spare = next(path for path in tmp_path.iterdir() if path != target)
    assert str(refused.value).endswith(f"what was to go there is in {spare}") and (spare / "ours").exists()
    with pytest.raises(UserError, match="exists already: name another folder"), whole_folder(target, new=True):
        pytest.fail("nothing is to be done for it")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "stale").touch()
    link = tmp_path / "link"
    link.symlink_to("real")
    with whole_folder(link) as unfinished:
        (unfinished / "new").touch()
    assert link.is_symlink() and [path.name for path in link.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_folder(tmp_path, error):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(error), whole_folder(target) as unfinished:
        (unfinished / "half").touch()
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


WORDS = Tokenizer(WordLevel({str(number): number for number in range(10_000)}, unk_token="0"))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "x.txt").write_text("x" * 50_000),
        lambda folder: torch.save({"x": torch.ones(50_000)}, folder / "x.pt"),
        lambda folder: save_file({"x": torch.ones(50_000)}, folder / "x.safetensors"),
        lambda folder: WORDS.save(str(folder / "tokenizer.json")),
    ],
    ids=["plain", "torch", "safetensors", "tokenizers"],
)
def test_a_full_disk_is_one_line(tmp_path, write, files_no_larger_than):
    target = tmp_path / "model"
    with files_no_larger_than(20_000), pytest.raises(UserError) as caught, whole_folder(target) as unfinished:
        write(unfinished)
    line = str(caught.value)
    assert line.startswith(
        (f"cannot write {target}: File too large; choose", f"cannot write {target}: torch could not")
    )
    assert "\n" not in line
    assert os.listdir(tmp_path) == []


def test_a_full_disk_on_which_a_small_file_of_torch_is_written(tmp_path, files_no_larger_than):
    with files_no_larger_than(0), pytest.raises(UserError, match="torch could not"), whole_folder(tmp_path / "x") as to:
        torch.save({"step": 1}, to / "x.pt")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="a bug") as caught, whole_folder(tmp_path / "model"):
        raise ValueError("a bug")
    assert not isinstance(caught.value, UserError)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "here" / "model"):  # a read that failed is no write
        (tmp_path / "data.txt").read_text()


# One holder


def test_a_folder_has_one_holder_even_if_that_was_killed_and_left_a_child(tmp_path):
    folder = tmp_path / "runs" / "sweep"
    with alone_in(folder) as lock:
        with pytest.raises(UserError, match=rf"in use: .*process {os.getpid()}; wait"), alone_in(folder):
            pass
        left_behind = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        with pytest.raises(UserError, match="is in use"), alone_in(folder):
            pass
    finally:
        left_behind.kill()
        left_behind.wait()
    with alone_in(folder):  # the dead hold nothing
        (folder / "result").touch()
    assert os.listdir(folder) == ["result"]


def test_a_lock_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), alone_in(tmp_path / "runs" / "mine"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_many_that_want_a_folder_at_once_have_it_one_after_the_other(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from chiaroscuro.errors import UserError
from chiaroscuro.files import alone_in
inside, done = Path(sys.argv[1]) / "inside", 0
while done < 200:
    try:
        with alone_in(Path(sys.argv[1])):
            inside.open("x").close()  # fails where another process is inside
            inside.unlink()
            done += 1
    except UserError:
        time.sleep(0)
"""
    racers = [subprocess.Popen([sys.executable, "-c", script, tmp_path]) for _ in range(3)]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0, 0]
