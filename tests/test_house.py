"""The house around the code: its papers agree, its rooms keep their order, its recipes are valid."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path

import pytest
import yaml

from chiaroscuro.studies.sweep import Sweep
from chiaroscuro.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# The text as its publisher serves it, to the byte: a licence with one changed word is another licence.
APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"

# Put together from halves, so that this file passes its own search. The home of "someone" is an example.
FORBIDDEN = {
    "a path of someone's machine": re.compile(r"(?<![\w.~/-])" + "/" + r"(work|root|home|Users)/(?!someone\b)\w"),
    "the host of a package index": re.compile("py" + r"pi\.org|python" + "hosted|download\\.py" + "torch"),
    "a package index on a command line": re.compile("index" + "-url|find" + "-links"),
    "who typed it": re.compile("Cl" + "aude|helper " + "session", re.IGNORECASE),
}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# The papers at the root


def test_one_version_everywhere() -> None:
    released_or_next = re.search(r"^## \[(\d+\.\d+\.\d+)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert released_or_next is not None
    found = {
        "pyproject.toml": PROJECT["version"],
        "CITATION.cff": yaml.safe_load(text_of("CITATION.cff"))["version"],
        "CHANGELOG.md": released_or_next[1],
        "the installed package": version("chiaroscuro"),
    }
    assert len(set(found.values())) == 1, found


def test_the_licence_is_apache_2_to_the_byte() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256


def test_the_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]
    assert citation["title"] == PROJECT["name"]
    (paper,) = citation["references"]
    assert paper["title"] == "Chiaroscuro Attention: Spending Compute in the Dark"
    assert paper["identifiers"][0]["value"] == "arXiv:2606.08327"
    for work in (citation, paper):  # the keys that the CFF schema requires, of a work and of its authors
        assert work["title"] and all(author["name"] for author in work["authors"])
    assert citation["message"]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_betrays_where_it_was_made(what: str) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git clone: which files belong to the project can't be told")
    # Another user may own the clone, as in a container, and then git refuses unless told that it is safe.
    listing = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert Path(__file__).resolve() in files
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in files
        for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), start=1)
        if FORBIDDEN[what].search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of someone's machine", "reads " + "/" + "home/ada/text.txt"),
        ("the host of a package index", "https://" + "py" + "pi.org/project/torch"),
        ("a package index on a command line", "pip install --extra" + "-index" + "-url URL torch"),
        ("who typed it", "written by " + "cl" + "aude"),
    ],
)
def test_the_search_finds_what_it_seeks(what: str, line: str) -> None:
    assert FORBIDDEN[what].search(line)
    assert not FORBIDDEN[what].search("see ../shared/data, docs/home/page.md and https://arxiv.org/abs/1")


# The rooms


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the package in `root`, which shadows the installed one."""
    run = "import sys, importlinter.cli as cli; sys.exit(cli.lint_imports(no_cache=True, no_logo=True))"
    return subprocess.run(
        [sys.executable, "-c", run],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
    )


def test_imports_go_one_way() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_that_climbs_is_caught(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src")
    (tmp_path / "src/chiaroscuro/ops/climber.py").write_text("import chiaroscuro.training\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "chiaroscuro.ops.climber -> chiaroscuro.training" in result.stdout


# What the recipes promise


def test_every_recipe_is_valid() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert ROOT / "recipes/wikitext2-small.yaml" in recipes
    for recipe in recipes:
        Recipe.load(recipe).steps()  # raises where a section, the model or the schedule is impossible


def test_every_sweep_is_valid() -> None:
    sweeps = sorted((ROOT / "recipes/sweeps").glob("*.yaml"))
    assert sweeps
    for sweep in sweeps:
        Sweep.load(sweep)  # raises where the recipe of one of its runs is impossible


# The picture of the rooms


def rooms_in_the_picture() -> set[tuple[str, str]]:
    """The arrows of the mermaid picture in CONTRIBUTING: (importing room, imported room)."""
    (picture,) = re.findall(r"^```mermaid\n(.*?)^```", text_of("CONTRIBUTING.md"), re.DOTALL | re.MULTILINE)
    arrows: set[tuple[str, str]] = set()
    for line in picture.splitlines():
        stations = [station.split(" & ") for station in line.strip().split(" --> ")]
        arrows |= {pair for above, below in pairwise(stations) for pair in product(above, below)}
    return arrows


def test_the_picture_of_the_rooms_is_the_contract_and_the_folders() -> None:
    (contract,) = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = [[name.removeprefix("chiaroscuro.") for name in layer.split(" | ")] for layer in contract["layers"]]
    assert rooms_in_the_picture() == {pair for above, below in pairwise(layers) for pair in product(above, below)}
    rooms = {room for layer in layers for room in layer}
    folders = {init.parent.name for init in (ROOT / "src/chiaroscuro").glob("*/__init__.py")}
    assert folders <= rooms
    assert set(re.findall(r"^\| `(\w+)` \|", text_of("CONTRIBUTING.md"), re.MULTILINE)) == rooms


def test_the_readme_stays_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 120


@pytest.mark.parametrize("room", ["experiments", "benchmarks"])
def test_what_scripts_import_is_there(room: str) -> None:
    """They are run by hand, and would miss a name that has moved only then."""
    files = sorted((ROOT / room).glob("*.py"))
    imports = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if _of_ours(node)]
    assert len(imports) > 10
    for node in imports:
        module = import_module(str(node.module))
        missing = [name.name for name in node.names if not hasattr(module, name.name)]
        missing = [name for name in missing if find_spec(f"{node.module}.{name}") is None]
        assert not missing, f"{node.module} has no {missing}"


def _of_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "chiaroscuro"
