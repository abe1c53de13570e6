"""A saved model in a process that has not imported chiaroscuro: `trust_remote_code=True` finds its classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import build, shrunk, tokens

from byte_tokenizer import byte_tokenizer
from chiaroscuro import ChiarConfig, ChiarForCausalLM, ChiarForMixedTasks, ChiarForSequenceClassification, calibrate

HEAD = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
assert "chiaroscuro" not in sys.modules
folder, ids = Path(sys.argv[1]), torch.arange(10)[None]
"""


def run_elsewhere(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", HEAD + code, str(folder)], env=environment, capture_output=True, text=True, check=False
    )


def test_loaded_saved_and_loaded_again_in_new_processes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tokenizer = byte_tokenizer()
    model = build(shrunk("small", vocab_size=len(tokenizer)))
    calibrate(model, [tokens(0)])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(model(torch.arange(10)[None]).logits, folder / "logits.pt")
    code = """
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__name__ == "ChiarConfig"
logits = torch.load(folder / "logits.pt")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__ == "chiaroscuro.model.modeling"
torch.testing.assert_close(model(ids).logits, logits)
trunk = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(trunk(ids).last_hidden_state, model.model(ids).last_hidden_state)
pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
assert pipe("light and", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("light and")
model.save_pretrained(folder / "again")
"""
    done = run_elsewhere(code, folder)
    assert done.returncode == 0, done.stderr
    again = folder / "again"
    assert {file.name for file in again.iterdir()} == {
        "README.md", "chiaroscuro_hub.py", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert (again / "chiaroscuro_hub.py").read_text() == (folder / "chiaroscuro_hub.py").read_text()
    logits = ChiarForCausalLM.from_pretrained(again)(torch.arange(10)[None]).logits
    torch.testing.assert_close(logits, torch.load(folder / "logits.pt"))


def test_a_bare_pipeline_and_every_head(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = shrunk("small", vocab_size=len(tokenizer), num_labels=3, task_labels={"sums": 2})
    for kind in (ChiarForSequenceClassification, ChiarForMixedTasks):
        kind(config).save_pretrained(tmp_path / kind.__name__)
        tokenizer.save_pretrained(tmp_path / kind.__name__)
    code = """
classifier = str(folder / "ChiarForSequenceClassification")
pipe = pipeline("text-classification", classifier, trust_remote_code=True, device="cpu")
assert type(pipe.model).__name__ == "ChiarForSequenceClassification"
assert pipe("light and dark")[0]["label"].startswith("LABEL_")
model = AutoModelForCausalLM.from_pretrained(folder / "ChiarForMixedTasks", trust_remote_code=True)
assert type(model).__name__ == "ChiarForCausalLM" and model(ids).logits.isfinite().all()
"""
    done = run_elsewhere(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_the_package_it_is_named(tmp_path: Path) -> None:
    build(shrunk("small")).save_pretrained(tmp_path / "model")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hides:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'chiaroscuro':\n"
        "            raise ModuleNotFoundError('No module named ' + repr(name))\n"
        "sys.meta_path.insert(0, Hides())\n"
    )
    code = "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    done = run_elsewhere(code, tmp_path / "model", PYTHONPATH=str(hidden))
    assert done.returncode != 0
    assert "pip install chiaroscuro" in done.stderr


@pytest.mark.parametrize(
    "given", [None, {"AutoConfig": "own/name--chiaroscuro_hub.ChiarConfig", "AutoTokenizer": "x.Y"}]
)
def test_the_map_of_a_config(tmp_path: Path, given: dict[str, str] | None) -> None:
    """What came from the Hub points there; what is saved points to the module beside it."""
    config = shrunk("small") if given is None else shrunk("small", auto_map=given)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved.pop("AutoTokenizer", None) == (None if given is None else "x.Y")
    assert saved == {
        "AutoConfig": "chiaroscuro_hub.ChiarConfig",
        "AutoModel": "chiaroscuro_hub.ChiarModel",
        "AutoModelForCausalLM": "chiaroscuro_hub.ChiarForCausalLM",
        "AutoModelForSequenceClassification": "chiaroscuro_hub.ChiarForSequenceClassification",
    }
    names: dict[str, object] = {}
    exec((tmp_path / "chiaroscuro_hub.py").read_text(), names)
    assert all(place.split(".")[1] in names for place in saved.values())
    assert ChiarConfig.from_pretrained(tmp_path).auto_map == config.auto_map
