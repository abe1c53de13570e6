"""What an import brings: the Auto classes, no more than is needed, and what is said where the laboratory is missing."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import chiaroscuro
from chiaroscuro.errors import LabMissing, UserError

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, where nothing of ours was imported before."""
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)


def test_every_name_is_there() -> None:
    assert sorted({*chain(*chiaroscuro._MODULES.values()), "UserError"}) == chiaroscuro.__all__
    for name in chiaroscuro.__all__:
        assert getattr(chiaroscuro, name).__name__ == name
    assert set(chiaroscuro.__all__) <= set(dir(chiaroscuro))
    assert chiaroscuro.layers.RoutedBlock is not None
    with pytest.raises(AttributeError, match="'Chiar'"):
        chiaroscuro.Chiar  # noqa: B018


@pytest.mark.parametrize("room", ["ops", "layers"])
def test_ops_and_layers_bring_neither_transformers_nor_the_compiler(room: str) -> None:
    run = python(f"import sys, chiaroscuro.{room}; print(*sys.modules)")
    assert run.returncode == 0, run.stderr
    assert not {"transformers", "torch._dynamo", "scipy", "chiaroscuro.model"} & set(run.stdout.split())


def test_the_model_brings_no_laboratory() -> None:
    run = python("import sys, chiaroscuro.analysis, chiaroscuro.convert; print(*sys.modules)")
    assert run.returncode == 0, run.stderr
    rooms = {"data", "training", "studies", "report", "cli", "lab"}
    assert not {"datasets", "pydantic", *(f"chiaroscuro.{room}" for room in rooms)} & set(run.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--help", ""),
        ("trian x", "error: No such command 'trian'"),
        ("info nowhere/at/all", "error: no such checkpoint: nowhere/at/all"),
        ("generate nowhere/at/all hello", "error: no such checkpoint: nowhere/at/all"),
        ("train nowhere.yaml", "error: recipe nowhere.yaml can't be read: No such file or directory"),
        ("sweep nowhere.yaml", "error: sweep nowhere.yaml can't be read: No such file or directory"),
        ("collapse nowhere", "error: nowhere: not the folder of a run: it has no metrics.jsonl with records in it"),
    ],
)
def test_help_and_a_wrong_name_wait_for_no_import(arguments: str, message: str) -> None:
    leave = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    run = python(f"{leave}from chiaroscuro.__main__ import main; sys.argv[1:] = {arguments.split()}; main()")
    assert run.returncode == (2 if message else 0)
    assert run.stderr.startswith(message) and run.stdout.endswith("False\n"), run.stderr + run.stdout


CONFIG = "config = AutoConfig.for_model('chiar', vocab_size=9, hidden_size=8, num_attention_heads=2)"
MODELS = "AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification"
BUILT = f"{CONFIG}; print(*(type(auto.from_config(config)).__name__ for auto in ({MODELS})))"


@pytest.mark.parametrize(
    "code",
    [
        f"import chiaroscuro; from transformers import AutoConfig, {MODELS}; {BUILT}",
        f"from transformers import AutoConfig, {MODELS}; import chiaroscuro; {BUILT}",
        f"import chiaroscuro; from transformers import AutoConfig; {CONFIG}; from transformers import {MODELS}; "
        + BUILT,
        f"from transformers import AutoConfig; import chiaroscuro; from transformers import {MODELS}; {BUILT}",
        f"import chiaroscuro; from transformers import GenerationMixin, AutoConfig, {MODELS}; {BUILT}",
        f"from chiaroscuro import ChiarModel; from transformers import AutoConfig, {MODELS}; {BUILT}",
    ],
)
def test_the_auto_classes_know_the_models_whatever_is_imported_first(code: str) -> None:
    run = python(code)
    assert run.stdout.split() == ["ChiarModel", "ChiarForCausalLM", "ChiarForSequenceClassification"], run.stderr


def test_the_tables_know_the_class_of_a_config() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    assert chiaroscuro.ChiarConfig in MODEL_FOR_CAUSAL_LM_MAPPING
    assert MODEL_FOR_CAUSAL_LM_MAPPING[chiaroscuro.ChiarConfig] is chiaroscuro.ChiarForCausalLM


# Without the laboratory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that `pip install chiaroscuro` brings, and no others."""
    folder = tmp_path_factory.mktemp("base")
    waiting = [Requirement(line) for line in PROJECT["dependencies"]]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        package = metadata.distribution(requirement.name)
        waiting += map(Requirement, package.requires or [])
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (folder / top).is_symlink():  # the packages of CUDA share one folder
                (folder / top).symlink_to(str(package.locate_file(top)))
    return folder


def run_in(base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages of that folder, and without those of the environment (`-S`)."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SRC), str(base)])}
    command = [sys.executable, "-S", "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


WORK = """
import sys, torch
from chiaroscuro import ChiarConfig, ChiarForCausalLM, calibrate
from chiaroscuro.analysis.flops import count_flops
from chiaroscuro.model import MoveThresholds
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
config = ChiarConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
model = ChiarForCausalLM(config)
tokens = torch.randint(40, (2, 12))
calibrate(model, [tokens])
model(tokens, labels=tokens).loss.backward()
torch.optim.AdamW(model.parameters()).step()
MoveThresholds().on_optimizer_step(None, None, None, model=model)
model.save_pretrained(sys.argv[1])
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)
assert loaded.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 16)
assert count_flops(config, 64).total > 0
"""


def test_the_model_needs_the_base_packages_alone(base: Path, tmp_path: Path) -> None:
    run = run_in(base, "-c", WORK, str(tmp_path / "model"))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("room", ["data", "training", "studies", "report", "data.tasks", "training.recipe"])
def test_a_room_of_the_laboratory_says_how_to_install_it(base: Path, room: str) -> None:
    run = run_in(base, "-c", f"import chiaroscuro.{room}")
    last = run.stderr.splitlines()[-1]
    assert last.startswith("chiaroscuro.errors.LabMissing: ") and last.endswith("pip install 'chiaroscuro[lab]'"), last
    assert "datasets" in last


def test_the_command_says_in_one_line_how_to_install_it(base: Path) -> None:
    run = run_in(base, "-m", "chiaroscuro", "--help")
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith("pip install 'chiaroscuro[lab]'")


def test_the_error_is_a_user_error_and_an_import_error() -> None:
    assert issubclass(LabMissing, UserError) and issubclass(LabMissing, ImportError)


def test_a_closed_standard_input_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from chiaroscuro import __main__, cli

    read: list[str] = []
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(cli, "main", lambda: read.append(sys.stdin.read()))
    __main__.main()
    assert read == [""]
    sys.stdin.close()
