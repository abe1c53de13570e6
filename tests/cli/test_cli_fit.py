"""`fit` on the command line: what it writes, and one line and exit code 2 for each mistake.

Oracle: `chiaroscuro.fit` on the same rows, tested elsewhere.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.image import imread

from chiaroscuro import ChiarForCausalLM, fit
from chiaroscuro.data.tasks import PadToLongest
from chiaroscuro.studies.workspace import Workspace
from small_runs import recipe_content, write_corpus

Run = Callable[..., tuple[int, str, str]]

MODEL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "operators": [["local", "attention"]] * 2,
    "window": 4,
    "attention_context": "kept",
    "router": "random",
    "kv_router": "random",
}
MQAR = {"task": "mqar", "length": 32, "pairs": 4, "vocabulary": 16, "train_examples": 128, "heldout_examples": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit")


def trained(run: Run, folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """The folder of a run of a few steps, which is trained once."""
    if not (folder / name / "model").is_dir():
        recipe = recipe_content(write_corpus(folder), folder / name)
        recipe["data"]["sequence_length"] = 32
        recipe["trainer"] |= {"steps": 2, "warmup_steps": 1, "save_every": 2, "evaluate_every": 2}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe | changes))
        code, _, err = run("train", folder / f"{name}.yaml", "--json")
        assert code == 0, err
    return folder / name


@pytest.fixture
def near(run: Run, folder: Path) -> Path:
    return trained(run, folder, "near", {"model": MODEL})


@pytest.fixture
def recall(run: Run, folder: Path) -> Path:
    data = MQAR | {"sequence_length": 32}
    return trained(run, folder, "recall", {"model": MODEL, "data": data, "tokenizer": "words"})


def test_it_writes_the_model_the_figures_and_a_picture(run: Run, near: Path, tmp_path: Path) -> None:
    before = (near / "model/model.safetensors").read_bytes()
    arguments = ["fit", near, "--look", 0.25, "--kept", 0.4]
    code, out, err = run(*arguments, "--output", tmp_path / "fitted", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert json.loads((tmp_path / "fitted/fit.json").read_text()) == {k: found[k] for k in found if k != "output"}
    picture = imread(io.BytesIO((tmp_path / "fitted/fit.png").read_bytes()))
    assert picture.shape[1] > 800 and len({*map(tuple, picture[..., :3].reshape(-1, 3).tolist())}) > 20
    assert (near / "model/model.safetensors").read_bytes() == before

    workspace = Workspace(str(near))
    _, blocks = workspace.blocks("train")
    rows = [blocks[i] for i in range(len(blocks))]
    ids, predicted = (torch.stack([row[name] for row in rows]).split(4) for name in ("input_ids", "shift_labels"))
    batches = [{"input_ids": a, "shift_labels": b} for a, b in zip(ids, predicted, strict=True)]
    assert isinstance(workspace.model, ChiarForCausalLM)
    wanted = fit(workspace.model, batches, look=0.25, kept=0.4)
    assert found["layers"] == wanted.figures()["layers"]
    loaded = ChiarForCausalLM.from_pretrained(tmp_path / "fitted")
    assert (loaded.config.router, loaded.config.attention_share, loaded.config.kv_share) == ("fitted", 0.25, 0.4)
    for name, tensor in workspace.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert json.loads(run("evaluate", tmp_path / "fitted", "--json")[1])["length"] == 32
    code, out, _ = run(*arguments, "--hidden", 4, "--output", tmp_path / "wide")
    assert code == 0 and "rank correlation" in out and "40.0%" in out
    assert ChiarForCausalLM.from_pretrained(tmp_path / "wide").config.kv_router == {"fitted": {"hidden": 4}}


def test_a_model_of_a_task_is_fitted_on_its_task(run: Run, recall: Path, tmp_path: Path) -> None:
    code, out, err = run("fit", recall, "--look", 0.25, "--tokens", 2048, "--output", tmp_path / "fitted", "--json")
    assert (code, err) == (0, "")
    workspace = Workspace(str(recall))
    _, rows = workspace.target_rows("train")
    pad = PadToLongest(workspace.tokenizer.pad_token_id)
    batches = [pad([rows[i] for i in range(n, n + 4)]) for n in range(0, 2048 // 32, 4)]
    assert isinstance(workspace.model, ChiarForCausalLM)
    wanted = fit(workspace.model, batches, look=0.25)
    assert json.loads(out)["layers"] == wanted.figures()["layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "near"], "Missing option '--output'"),
        (["fit", "near", "--output", "NEW"], "nothing to fit: give look"),
        (["fit", "near", "--output", "TAKEN", "--look", "0.2"], "exists already"),
        (["fit", "near", "--output", "NEW", "--look", "2"], "look=2.0: must be a share"),
        (["fit", "near", "--output", "NEW", "--kept", "0"], "kept=0.0: must be a share"),
        (["fit", "near", "--output", "NEW", "--look", "0.2", "--budget", "0.2"], "drop look and kept"),
        (["fit", "near", "--output", "NEW", "--look", "0.2", "--hidden", "0"], "Invalid value for '--hidden'"),
        (["fit", "near", "--output", "NEW", "--look", "0.2", "--split", "dev"], "--split dev"),
        (
            ["fit", "near", "--output", "NEW", "--look", "0.2", "--length", "4"],
            "--length 4: all of a row",
        ),
        (["fit", "near", "--output", "NEW", "--look", "0.2", "--length", "4000"], "max_position_embeddings"),
        (
            ["fit", "near", "--output", "NEW", "--look", "0.2", "--tokens", "32"],
            "--tokens 32: they make less",
        ),
        (["fit", "near", "--output", "NEW", "--look", "0.2", "--data", "./nowhere"], "nowhere"),
        (["fit", "near", "--output", f"{__file__}/x", "--look", "0.2"], "is a file; name a folder"),
        (["fit", "plain", "--output", "NEW", "--look", "0.2"], "no layer chooses who looks far"),
        (["fit", "plain", "--output", "NEW", "--kept", "0.2"], "no layer decides who is kept"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, folder: Path, near: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    plain = {"hidden_size": 16, "num_attention_heads": 2, "operators": [["attention"]]}
    places: dict[str, Path] = {"near": near, "plain": trained(run, folder, "plain", {"model": plain})}
    places |= {"NEW": tmp_path / "new", "TAKEN": tmp_path}
    code, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and message in err
    assert not (tmp_path / "new").exists()


def test_info_tells_near_and_far(run: Run, near: Path) -> None:
    facts = json.loads(run("info", near, "--json")[1])
    config = Workspace(str(near)).config
    for name in ("window", "sinks", "attention_context", "kv_router", "kv_share"):
        assert facts[name] == getattr(config, name)
    assert all(len(layer["kept_thresholds"]) == 1 for layer in facts["layers"])
    code, out, _ = run("info", near)
    assert code == 0 and "who is kept" in " ".join(out.split())
