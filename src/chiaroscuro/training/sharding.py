"""FSDP2: each process holds a part of the weights, of their gradients and of the optimizer's state, and saves it.

transformers shards the model, by the plan in its configuration. torch.distributed.checkpoint writes the shards, as
safetensors, and reads them for any number of processes. A checkpoint's weights are where `from_pretrained` finds them;
the optimizer's state is in a folder beside them. What the optimizer has that is no tensor is not saved: the recipe says
it, and the scheduler the learning rates.

accelerate would shard on GPUs alone, and its sharded checkpoints have an index that is a pickle, opened without
restraint.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

_OPTIMIZER = "optimizer"
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""State under the names of the parameters, which are the same for any number of processes."""


def shard(model: PreTrainedModel, processes: int) -> None:
    """Spread a model over the processes, in place; one process has nothing to spread."""
    # What is tied must be in one group. transformers leaves the embedding to the group of all that no rule names, but
    # makes another one of a head that shares its weight.
    tied = {name.rpartition(".")[0] for name in model.all_tied_weights_keys}
    plan = {module: style for module, style in model.fsdp_plan.items() if module not in tied}
    model.fsdp_plan = plan  # type: ignore[misc]  # mypy does not find its setter, which stands among those of others
    config, _, mesh = type(model).prepare_distribute_model({"fsdp_size": processes})
    type(model).maybe_distribute_model(model, config, mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process has all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights, in the memory of the main process; all processes call it."""
    weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], weights)


def unsharded_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of a model's configuration that says nothing of this run's processes."""
    config = copy.deepcopy(model.config)
    config.distributed_config = None
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    return config


def held_here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, which may be none."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_shards(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Write this process's part of a checkpoint; all processes call it."""
    # Tensors that share memory can't be written as safetensors.
    weights: dict[str, Any] = get_model_state_dict(model)
    weights |= {name: weights[name].clone() for name in model.all_tied_weights_keys}
    with _together():
        dcp.save(weights, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        place = HuggingFaceStorageWriter(str(folder / _OPTIMIZER), save_distributed=True)
        dcp.save(_tensors(get_optimizer_state_dict(model, optimizer, options=_BY_NAME)), storage_writer=place)


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Give a model, sharded or not, the weights of a checkpoint; all processes call it."""
    weights = get_model_state_dict(model)
    with _together():
        dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(folder)))
    set_model_state_dict(model, weights)


def load_optimizer(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer its state in a checkpoint; all processes call it."""
    state = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    tensors = _tensors(state)
    with _together():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / _OPTIMIZER)))
    set_optimizer_state_dict(model, optimizer, state | tensors, options=_BY_NAME)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint's weights, put together from its shards."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items() if hasattr(entry, "size")}


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@contextmanager
def _together() -> Iterator[None]:
    """Read or write shards: one process is no mistake, and an error of any process is an error of all.

    torch puts the errors into one that is not an `Exception`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first from None
