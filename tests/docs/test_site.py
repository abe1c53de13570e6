"""The site: built strictly, from this repository alone, with every command and every room on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from pages import ROOT

from chiaroscuro.cli import app


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: warnings that are not printed do not count for --strict.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_command_is_on_the_site(site: Path) -> None:
    page = (site / "commands/index.html").read_text("utf-8")
    for name, command in typer.main.get_group(app).commands.items():
        assert f'id="chiaroscuro-{name}"' in page
        for parameter in command.params:
            assert parameter.opts[0] in page, (name, parameter.name)


def test_every_room_is_on_the_site(site: Path) -> None:
    rooms = [init.parent.name for init in (ROOT / "src/chiaroscuro").glob("*/__init__.py")]
    assert "layers" in rooms
    for room in set(rooms) - {"cli"}:  # its page is that of the commands
        page = site / "api" / room / "index.html"
        assert page.is_file(), f"docs/api/{room}.md is missing"
        assert f'id="chiaroscuro.{room}.' in page.read_text("utf-8"), f"docs/api/{room}.md documents nothing"


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*href=["']?(?:https?:)?//"""
    )
    assert loads.search('<script src="https://example.org/a.js">') and not loads.search(
        '<a href="https://example.org">'
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        found = loads.search(page.read_text("utf-8"))
        assert found is None, (page.relative_to(site), found)
