"""What users install: a wheel and a source distribution, used where the repository is not."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CHIAROSCURO"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the source distribution, as a user's pip makes it, and both files in a folder."""
    folder = tmp_path_factory.mktemp("built")
    code = "from setuptools import build_meta as b; import sys; print(b.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", code, folder, cwd=ROOT).strip().splitlines()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    code = "from setuptools import build_meta as b; import sys; print(b.build_wheel(sys.argv[1]))"
    run(sys.executable, "-c", code, folder, cwd=source)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel; its dependencies are those of this environment, ours is not."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    theirs = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"{theirs}\n")
    return folder / "bin" / "python"


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    source = ROOT / "src" / "chiaroscuro"
    wanted = {
        path.relative_to(ROOT / "src").as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("chiaroscuro/")} == wanted  # data files and py.typed too
    others = {name.split("/")[0] for name in names} - {"chiaroscuro"}
    assert len(others) == 1 and others.pop().endswith(".dist-info")
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_it_is_the_wheel_that_is_used(installed: Path, tmp_path: Path) -> None:
    code = "import chiaroscuro, importlib.metadata as m; print(chiaroscuro.__file__, m.version('chiaroscuro'))"
    place, version = run(installed, "-c", code, cwd=tmp_path).split()
    assert Path(place).is_relative_to(installed.parents[1])
    import chiaroscuro

    assert version == chiaroscuro.__version__


def test_a_model_is_trained_looked_at_and_continued(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "text" / f"{split}.txt").write_text("the light falls on a wall and stays until the sun\n" * 200)
    (tmp_path / "mine.yaml").write_text(
        "model: {preset: small, hidden_size: 32, num_hidden_layers: 3}\n"
        "data: {source: text, sequence_length: 32}\ntokenizer: bpe:300\n"
        "trainer: {output_dir: run, steps: 2, warmup_steps: 1, batch_size: 4}\n"
    )
    command = [installed, "-m", "chiaroscuro"]
    cache = {"CHIAROSCURO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run(*command, "train", "mine.yaml", cwd=tmp_path, **cache)
    assert "perplexity" in run(*command, "evaluate", "run", cwd=tmp_path, **cache)
    assert run(*command, "generate", "run", "the light", "--max-new-tokens", "4", cwd=tmp_path, **cache)
    run(*command, "route", "run", "the light falls", "--html", "map.html", cwd=tmp_path, **cache)  # package data
    assert "<html" in (tmp_path / "map.html").read_text()


def test_a_user_s_file_is_type_checked_against_it(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mine.py").write_text(
        "from chiaroscuro import ChiarConfig, ChiarForCausalLM, retrofit\n"
        "model = ChiarForCausalLM(ChiarConfig.preset('small'))\n"
        "reveal_type(ChiarConfig.preset('small'))\n"
        "retrofit(model, window='wide')\n"
    )
    (tmp_path / "mypy.ini").write_text(  # our types are what is asked for; to read those of torch takes minutes
        f"[mypy]\npython_executable = {installed}\nfollow_imports = silent\n"
        "[mypy-torch.*,transformers.*]\nfollow_imports = skip\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "mine.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert 'Revealed type is "chiaroscuro.model.config.ChiarConfig"' in done.stdout, done.stdout + done.stderr
    assert 'Argument "window" to "retrofit" has incompatible type "str"; expected "int"' in done.stdout
