"""Blocks that tell documents apart, and texts in a column of another name."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError
from chiaroscuro.data import TokenBlocks, load_corpus
from chiaroscuro.data.tasks import make_task
from chiaroscuro.data.tasks.language_modelling import LanguageModelling
from chiaroscuro.training import Recipe, train
from small_runs import recipe_content, write_corpus

END = 2


class File:
    """Tokens as a TokenFile has them."""

    name = "some tokens"

    def __init__(self, ids: list[int]) -> None:
        self.tokens = torch.tensor(ids).numpy()
        self.count = self.bytes = len(ids)


@given(st.lists(st.integers(END, 9), min_size=9, max_size=60), st.integers(1, 8))
@settings(deadline=None)
def test_positions_restart_and_first_tokens_are_not_predicted(ids: list[int], length: int) -> None:
    blocks = TokenBlocks(File(ids), length, end=END)  # type: ignore[arg-type]
    for number, block in enumerate(blocks[i] for i in range(len(blocks))):
        own = ids[number * length : number * length + length + 1]
        place = 0
        for t in range(length):
            place = 0 if t == 0 or own[t - 1] == END else place + 1
            assert block["position_ids"][t] == place
            assert block["shift_labels"][t] == (-100 if own[t] == END else own[t + 1])
            assert block["labels"][t] == (-100 if t == 0 or own[t - 1] == END else own[t])
        assert block["input_ids"].tolist() == own[:-1]


def test_a_document_sees_nothing_of_the_one_before() -> None:
    torch.manual_seed(0)
    config = ChiarConfig(
        vocab_size=32,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        operators=[["local", "attention"]] * 2,
        window=8,
    )
    model = ChiarForCausalLM(config).eval()
    ids = [*torch.randint(3, 32, (7,)).tolist(), END, *torch.randint(3, 32, (9,)).tolist()]
    other = [*torch.randint(3, 32, (7,)).tolist(), *ids[7:]]
    logits = []
    for row in (ids, other):
        block = TokenBlocks(File(row), 16, end=END)[0]  # type: ignore[arg-type]
        logits.append(model(block["input_ids"][None], position_ids=block["position_ids"][None]).logits[0, 8:])
    torch.testing.assert_close(*logits)


def write_tables(folder: Path) -> Path:
    folder.mkdir()
    for split, rows in (("train", 60), ("validation", 30)):
        texts = [f"the light falls on wall {i} and stays until the sun has gone round" for i in range(rows)]
        datasets.Dataset.from_dict({"content": texts, "number": list(range(rows))}).to_json(folder / f"{split}.jsonl")
    return folder


def test_a_column_of_another_name(tmp_path: Path) -> None:
    folder = write_tables(tmp_path / "text")
    corpus = load_corpus(folder, tmp_path / "cache", column="content")
    assert corpus.splits["train"][3]["text"].startswith("the light falls on wall 3")
    for column in ("text", "titel"):
        with pytest.raises(UserError, match=f"no column '{column}', only content, number; rename one, or name that of"):
            load_corpus(folder, tmp_path / "cache", column=column)
    with pytest.raises(UserError, match=r"its column 'number' holds number\); it must be a jsonl file with strings"):
        load_corpus(folder, tmp_path / "cache", column="number")


@pytest.mark.parametrize("architecture", ["chiar", "llama"])
def test_documents_are_trained_and_evaluated_apart(tmp_path: Path, architecture: str) -> None:
    content: dict[str, Any] = recipe_content(write_corpus(tmp_path), tmp_path / "run")
    content["data"] |= {"source": str(write_tables(tmp_path / "text")), "column": "content", "documents": True}
    if architecture == "llama":
        content["model"] = {
            "architecture": "llama",
            **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48},
        }
    result = train(Recipe.from_dict(content))
    assert result.validation_loss < 6
    from chiaroscuro.studies.evaluation import evaluate
    from chiaroscuro.studies.workspace import Workspace

    found = evaluate(Workspace(str(tmp_path / "run")), split="validation", batch_size=4)
    assert found["loss"] == pytest.approx(result.validation_loss, rel=1e-5)


def test_a_step_of_empty_documents_says_so(tmp_path: Path) -> None:
    content: dict[str, Any] = recipe_content(write_corpus(tmp_path), tmp_path / "run")
    folder = write_tables(tmp_path / "text")
    (folder / "train.jsonl").write_text('{"content": ""}\n' * 4000 + '{"content": "the light falls"}\n')
    content["data"] |= {"source": str(folder), "column": "content", "documents": True}
    with pytest.raises(UserError, match=r"step \d+ has no token to predict, for its rows are empty documents: remove"):
        train(Recipe.from_dict(content))


def test_retrieval_has_rows_of_its_own() -> None:
    with pytest.raises(UserError, match="draws rows of its own"):
        make_task("retrieval", {"documents": True})
    assert LanguageModelling().documents is False
