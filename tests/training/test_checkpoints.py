"""A folder is there whole or not at all, and a flaw that comes later is found.

The oracle is the damage itself: whatever one byte, one length or one name is changed, the folder is passed
over.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiaroscuro.errors import UserError
from chiaroscuro.files import whole_folder
from chiaroscuro.training.checkpoints import (
    MANIFEST,
    OURS,
    Facts,
    Interval,
    checkpoints,
    make_way,
    newest_complete,
    prune,
    scratch_in,
    seal,
)

FILES = {"model.safetensors": 400, "optimizer.pt": 900, "inner/rng.pth": 33, "empty": 0}


def facts(step: int) -> Facts:
    return Facts(tokens="text", processes=1, seconds=step, interval=Interval(step=step, beside=[("a", {"loss": 0.1})]))


def write_checkpoint(run: Path, step: int) -> Path:
    target = run / f"checkpoint-{step}"
    with whole_folder(target) as partial:
        for name, size in FILES.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(bytes((step + i) % 251 for i in range(size)))
        seal(partial, facts(step))
    return target


def cut(path: Path, where: int) -> None:
    path.write_bytes(path.read_bytes()[:where])


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def remove(path: Path, where: int) -> None:
    path.unlink()


@settings(max_examples=40)  # each forces some files to the disk
@given(
    st.sampled_from([name for name, size in FILES.items() if size]),
    st.sampled_from([cut, flip, remove]),
    st.integers(0, 32),
)
def test_any_flaw_is_found_and_the_one_before_taken(
    tmp_path_factory: pytest.TempPathFactory, name: str, damage: Callable[[Path, int], None], where: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run, 5)
    damage(write_checkpoint(run, 10) / name, where)
    lines: list[str] = []
    found = newest_complete(run, lines.append)
    assert found is not None
    assert (found.step, found.facts) == (5, facts(5))
    assert len(lines) == 1
    assert "checkpoint-10" in lines[0]
    assert name in lines[0]


@pytest.mark.parametrize("damage", [remove, cut])
def test_without_a_manifest_nothing_is_sure(tmp_path: Path, damage: Callable[[Path, int], None]) -> None:
    damage(write_checkpoint(tmp_path, 10) / MANIFEST, 40)
    lines: list[str] = []
    assert newest_complete(tmp_path, lines.append) is None
    assert len(lines) == 1


def test_newest_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    found = newest_complete(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 100
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 10, 100]


def test_pruning_spares_what_a_broken_later_one_would_push_out(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 10):
        write_checkpoint(tmp_path, step)
    shutil.rmtree(tmp_path / "checkpoint-10" / "inner")
    prune(tmp_path, newest_step=4, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 4, 10]


def test_only_what_a_run_sealed_is_deleted(tmp_path: Path) -> None:
    for step in (3, 4, 5):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-1").write_text("mine")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / MANIFEST).write_text("{}")
    prune(tmp_path, newest_step=5, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-5"]
    assert make_way(tmp_path / "checkpoint-5") is None and make_way(tmp_path / "checkpoint-9") is None
    for number in (1, 2):
        (tmp_path / "checkpoint-1").write_text("mine")
        assert make_way(tmp_path / "checkpoint-1") == tmp_path / f"checkpoint-1.aside-{number}"


def test_a_scratch_folder_is_the_run_s_own(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), scratch_in(tmp_path) as scratch:
        (scratch / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    scratch.mkdir()
    (scratch / "half").touch()
    with pytest.raises(UserError, match="is in the way and no run wrote it"), scratch_in(tmp_path):
        pass
    (scratch / OURS).touch()  # as a killed run leaves it
    with scratch_in(tmp_path) as scratch:
        assert [path.name for path in scratch.iterdir()] == [OURS]
    scratch.mkdir()  # as one leaves it that was killed before it left its mark
    with scratch_in(tmp_path) as scratch:
        assert [path.name for path in scratch.iterdir()] == [OURS]


def test_the_mark_of_a_scratch_folder_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch_in(tmp_path) as scratch:
        (scratch / "half").mkdir()
        (scratch / "rest").touch()
        removed, rmtree = [], shutil.rmtree

        def remove(folder: Path, **options: Any) -> None:
            removed.append((folder.name, {path.name for path in scratch.iterdir()}))
            rmtree(folder, **options)

        monkeypatch.setattr(shutil, "rmtree", remove)
    assert removed[-1] == (scratch.name, {OURS}) and all(OURS in left for _, left in removed)
