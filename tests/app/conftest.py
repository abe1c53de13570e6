"""A small routed model that was trained, with its run."""

from pathlib import Path

import pytest

from chiaroscuro.app.served import Served, serve
from chiaroscuro.training import Recipe, train
from small_runs import recipe_content, write_corpus


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small model whose tokens look far, and are kept, by H."""
    folder = tmp_path_factory.mktemp("app")
    content = recipe_content(write_corpus(folder), folder / "runs/small")
    content["model"] = {
        "operators": [["local", "attention"]] * 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "window": 6,
        "sinks": 1,
        "attention_context": "kept",
        "router": "threshold",
        "kv_router": "threshold",
        "attention_share": 0.25,
        "kv_share": 0.25,
    }
    content["data"]["sequence_length"] = 64
    train(Recipe.from_dict(content))
    return folder / "runs/small"


@pytest.fixture(scope="session")
def served(run_folder: Path) -> Served:
    return serve(str(run_folder))
