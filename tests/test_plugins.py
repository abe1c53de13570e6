"""Modules of a user's that register parts: named on the command line, or declared by an installed package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chiaroscuro import plugins
from chiaroscuro.errors import UserError

OPERATOR = """
from torch import nn
from chiaroscuro import register_router
from chiaroscuro.layers import ScoreRouter


class Loudness(ScoreRouter):
    def score(self, x, entropy, context):
        return x.detach().abs().amax(-1).float()


register_router("loudness", Loudness)
"""
RECIPE = """
model: {hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 3, router: loudness}
data: {source: text, sequence_length: 16}
tokenizer: bpe:300
trainer: {output_dir: run, steps: 4, warmup_steps: 1, batch_size: 2}
"""
SWEEP = "{recipe: recipe.yaml, output_dir: runs, seeds: [0], baseline: a, variants: {a: {}}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_runs import write_corpus

    folder = tmp_path_factory.mktemp("plugins")
    (folder / "text").mkdir()
    write_corpus(folder / "text")
    (folder / "my_router.py").write_text(OPERATOR)
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


def chiaroscuro(folder: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, which has no working directory among the places of modules."""
    start = "import sys; sys.path.remove('') if '' in sys.path else None; from chiaroscuro.cli import main; main()"
    places = [str(Path(plugins.__file__).parents[1]), *([str(path)] if path else [])]
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
    )


def test_a_module_that_is_named_is_known_to_every_command(folder: Path) -> None:
    unknown = chiaroscuro(folder, "train", "recipe.yaml")
    assert unknown.returncode == 2 and "loudness" in unknown.stderr
    trained = chiaroscuro(folder, "--import", "my_router", "train", "recipe.yaml")
    assert trained.returncode == 0, trained.stderr
    found = chiaroscuro(folder, "info", "run", "--import", "my_router")
    assert found.returncode == 0, found.stderr


def test_the_runs_of_a_sweep_know_it_too(folder: Path) -> None:
    found = chiaroscuro(folder, "sweep", "sweep.yaml", "--import", "my_router", "--jobs", "1")
    assert found.returncode == 0, found.stderr
    assert (folder / "runs/a/seed-0/log.txt").read_text().splitlines()[0].endswith("--import my_router")


@pytest.mark.parametrize(
    ("module", "reason"),
    [("nowhere.at.all", "there is no such module"), ("broken", "ZeroDivisionError: division by zero")],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_module_that_can_t_be_imported_is_one_line(folder: Path, module: str, reason: str, before: bool) -> None:
    option = ["--import", module]
    found = chiaroscuro(folder, *(option if before else []), "presets", *([] if before else option))
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"error: --import {module} can't be imported: {reason}\n"


def test_an_installed_package_declares_its_modules(folder: Path, tmp_path: Path) -> None:
    installed = tmp_path / "mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[chiaroscuro.plugins]\nmine = mine_registers\n")
    (tmp_path / "mine_registers.py").write_text(OPERATOR)
    (folder / "recipe2.yaml").write_text(RECIPE.replace("output_dir: run", "output_dir: run2"))
    found = chiaroscuro(folder, "train", "recipe2.yaml", path=tmp_path)
    assert found.returncode == 0, found.stderr
    (tmp_path / "mine_registers.py").write_text("1 / 0")
    found = chiaroscuro(folder, "presets", path=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("error: the plugin mine (mine_registers) can't be imported: ZeroDivisionError")


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noted_once.py").write_text("import builtins\nbuiltins.noted = getattr(builtins, 'noted', 0) + 1\n")
    plugins.import_modules(["noted_once"])
    plugins.import_modules(["noted_once"])
    import builtins

    assert builtins.noted == 1 and "noted_once" in plugins.named()  # type: ignore[attr-defined]
    monkeypatch.setattr(plugins, "_named", [])
    with pytest.raises(UserError, match="no such module"):
        plugins.import_modules(["noted_never"])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "--import '': give the name of a module"),
        ("my_router.py", "--import 'my_router.py': give the name of a module, my_router"),
        ("./mine/router.py", "--import './mine/router.py': give the name of a module, mine.router"),
    ],
)
def test_a_file_is_no_module(name: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        plugins.import_modules([name])
    assert str(error.value) == complaint
