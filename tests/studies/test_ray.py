"""A sweep on a Ray cluster of two nodes, both on this machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chiaroscuro import UserError
from chiaroscuro.studies.ray_runs import RayCluster, _train
from small_runs import recipe_content, write_corpus

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes with a core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def sweep_file(folder: Path, **variants: dict[str, Any]) -> Path:
    (folder / "text").mkdir()
    content = recipe_content(write_corpus(folder / "text"), folder / "unused")
    content["trainer"] |= {"steps": 4, "warmup_steps": 1, "save_every": 2, "evaluate_every": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    sweep = {
        **{"recipe": "recipe.yaml", "output_dir": str(folder / "runs"), "results": str(folder / "results")},
        **{"seeds": [0], "baseline": "one", "variants": {"one": {}} | variants},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder / "sweep.yaml"


@pytest.mark.slow
def test_the_runs_are_those_of_one_machine(address: str, tmp_path: Path) -> None:
    """By the command: both runs are done, one that fails is told, and nothing is done twice."""
    file = sweep_file(tmp_path, two={"model.attention_share": 0.5}, broken={"tokenizer": "nobody/nothing"})
    command = [sys.executable, "-m", "chiaroscuro", "sweep", str(file), "--ray", address, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: 1 failed: broken seed 0")
    assert [line.partition(":")[0] for line in json.loads(done.stdout)["failed"]] == ["broken seed 0"]
    for name in ("one", "two"):
        folder = tmp_path / "runs" / name / "seed-0"
        assert (folder / "model/model.safetensors").is_file()
        assert (folder / "log.txt").read_text().startswith("$ chiaroscuro train")
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "3 runs, 2 of them done" in again.stderr


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("127.0.0.1:1", "no cluster answers"),
        ("ray://127.0.0.1:1", "no cluster answers"),
        ("nowhere", "give auto, host:port, or ray://host:port"),
        ("nowhere:x", "give auto, host:port"),
        ("", "give auto"),
    ],
)
def test_no_cluster_is_one_line(address: str, complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        RayCluster(address)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    said = _train(["--help"], {}, str(tmp_path / "elsewhere/log.txt"), str(tmp_path))
    assert isinstance(said, str) and "must lie on a file system that all machines share" in said
    (tmp_path / "log.txt").touch()
    assert _train(["--version"], {}, str(tmp_path / "log.txt"), str(tmp_path)) == 0
    assert (tmp_path / "log.txt").read_text().strip()
