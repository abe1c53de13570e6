"""What all tests share: a quiet, offline process with a cache of its own, and annotations that are checked.

The environment is set before anything imports torch or transformers, which read it on import. Each process of
`pytest -n` gets its own throwaway cache; the processes that a test starts inherit it.
"""

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

_CACHE = tempfile.TemporaryDirectory(prefix="chiaroscuro-tests-", ignore_cleanup_errors=True)
os.environ["CHIAROSCURO_CACHE"] = _CACHE.name
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)
# Ignored where a shell began the tests in the background: what is to be interrupted would then go on forever.
signal.signal(signal.SIGINT, signal.default_int_handler)

from jaxtyping import config as jaxtyping_config  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# From here on `import chiaroscuro` compiles the annotations of these rooms into checks: a wrong shape or type in
# a checked call, or in what it returns, is an error (see `pytest_runtest_setup`). The library itself checks nothing at
# run time. The rooms above take duck-typed models in their tests, and transformers, pydantic and typer build the
# config, the recipe and the commands from their annotations, which a checked class breaks.
UNCHECKED = {"config", "calibration", "loading"}  # built from annotations, or given duck-typed models
_MODEL = Path(__file__).resolve().parents[1] / "src/chiaroscuro/model"
CHECKED = [
    "chiaroscuro.ops",
    "chiaroscuro.layers",
    *(f"chiaroscuro.model.{file.stem}" for file in sorted(_MODEL.glob("[a-z]*.py")) if file.stem not in UNCHECKED),
]
install_import_hook(CHECKED, "beartype.beartype")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Derandomised in CI, so that a red build is red again; elsewhere every run draws anew.
settings.register_profile("dev", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check annotations in all tests of `ops` and `layers`, and in the first case of each of a model.

    A small model takes up to twice as long where all of its calls are checked, and the commands, runs and studies make
    the same calls.
    """
    case, room = getattr(item, "callspec", None), item.path.parent.name
    first = case is None or not any(case.indices.values())
    checked = room in ("ops", "layers") or (first and room in ("model", "retrofitting"))
    jaxtyping_config.update("jaxtyping_disable", not checked)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared beside the checkout, vectors and real data; without it the test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared, which is not beside this checkout")
    return folder


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the annotations' checks off, as they are for users: to see the library's own error messages."""
    before = jaxtyping_config.jaxtyping_disable
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: its exit code, and what it printed on standard output and error."""
    from chiaroscuro.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chiaroscuro", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def files_no_larger_than() -> Callable[[int], AbstractContextManager[None]]:
    """As good as a full disk: within `files_no_larger_than(size)` a write beyond that fails."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def registries_as_before() -> Iterator[None]:
    """What a test registers is gone after it."""
    from chiaroscuro.layers.registry import OPERATORS, ROUTERS

    kept = dict(OPERATORS), dict(ROUTERS)
    yield
    for registry, before in zip((OPERATORS, ROUTERS), kept, strict=True):
        registry.clear()
        registry.update(before)
