"""Blocks: every token but the first is predicted exactly once, up to the tail that fills no block."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from chiaroscuro.data import TokenBlocks, TokenFile
from chiaroscuro.errors import UserError


def token_file(path: Path, count: int, dtype: type = np.uint16) -> TokenFile:
    """Write the tokens 0, 1, 2, …, so that each token is its own position."""
    np.arange(count).astype(dtype).tofile(path)
    return TokenFile("the train split of a test", path, count, np.dtype(dtype).str, 2 * count)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks") / "tokens.bin"


@given(count=st.integers(2, 300), length=st.integers(1, 60))
def test_every_token_is_predicted_once(path, count, length) -> None:
    if count < length + 1:
        length = count - 1
    blocks = TokenBlocks(token_file(path, count), length)
    assert {value.shape for i in range(len(blocks)) for value in blocks[i].values()} == {(length,)}
    read = torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))])
    predicted = torch.cat([blocks[i]["shift_labels"] for i in range(len(blocks))])
    assert read.tolist() == list(range(len(predicted)))
    assert predicted.tolist() == list(range(1, len(predicted) + 1))
    assert 0 <= count - 1 - len(predicted) < length


@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 2**16 - 1), (np.uint32, 2**32 - 1)])
def test_ids_are_int64_and_none_turns_negative(path, dtype, top) -> None:
    np.full(9, top, dtype).tofile(path)
    block = TokenBlocks(TokenFile("x", path, 9, np.dtype(dtype).str, 9), 8)[0]
    for value in block.values():
        assert (value.dtype, value.shape) == (torch.int64, (8,))
        assert (value == top).all()


def test_labels_are_the_inputs(path) -> None:
    block = TokenBlocks(token_file(path, 11), 4)[1]
    assert block["labels"].tolist() == block["input_ids"].tolist() == [4, 5, 6, 7]
    assert block["shift_labels"].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("index", [-1, 2, 100])
def test_no_block_outside(path, index) -> None:
    blocks = TokenBlocks(token_file(path, 11), 4)
    assert len(blocks) == 2
    with pytest.raises(IndexError, match=f"block {index} of 2"):
        blocks[index]


def test_changing_a_block_leaves_the_file(path) -> None:
    blocks = TokenBlocks(token_file(path, 11), 4)
    blocks[0]["input_ids"].fill_(9)
    assert blocks[0]["input_ids"].tolist() == [0, 1, 2, 3]


def test_pickle_before_and_after_use(path) -> None:
    blocks = TokenBlocks(token_file(path, 5000), 16)
    for _ in range(2):
        again = pickle.loads(pickle.dumps(blocks))
        assert len(pickle.dumps(blocks)) < 1000
        assert again[7]["input_ids"].tolist() == blocks[7]["input_ids"].tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_loader_with_workers(path) -> None:
    blocks = TokenBlocks(token_file(path, 321), 16)
    batches = list(DataLoader(blocks, batch_size=4, num_workers=2))
    assert torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist() == list(range(320))


@pytest.mark.parametrize("count", [0, 1, 16])
def test_a_split_shorter_than_a_block(tmp_path, count) -> None:
    with pytest.raises(UserError, match=rf"^the train split of a test has {count} tokens, too few .* 16 \+ 1"):
        TokenBlocks(token_file(tmp_path / "t", count), 16)


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_that_is_none(path, length) -> None:
    with pytest.raises(UserError, match=f"length is {length}"):
        TokenBlocks(token_file(path, 9), length)


@given(count=st.integers(2, 60), length=st.integers(1, 12), stride=st.integers(1, 12))
def test_strided_blocks_predict_each_token_once_with_enough_before_it(path, count, length, stride) -> None:
    assume(stride <= length < count)
    blocks = TokenBlocks(token_file(path, count), length, stride)
    predicted = []
    for index in range(len(blocks)):
        block = blocks[index]
        for place, token in enumerate(block["shift_labels"].tolist()):
            if token != -100:
                predicted.append(token)
                assert block["input_ids"][place] == token - 1
                assert index == 0 or place >= length - stride
    assert predicted == list(range(1, len(predicted) + 1))
    assert count - 1 - len(predicted) < stride


@pytest.mark.parametrize("stride", [0, -1, 5])
def test_a_stride_outside_the_block_is_refused(path, stride) -> None:
    with pytest.raises(UserError, match=f"stride is {stride}.*from 1 to the block's length, 4"):
        TokenBlocks(token_file(path, 9), 4, stride)
