"""What a recipe's run needs on GPUs that are not here: memory and time, by counts and stated assumptions.

Operations are counted exactly (`count_flops`), and activations are those that a forward on this machine keeps for its
backward. What a GPU makes of them is an assumption, and named in the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chiaroscuro.analysis.facts import count_parameters, refuse_beyond_memory
from chiaroscuro.analysis.flops import count_flops, full_attention
from chiaroscuro.data.corpora import find_folder
from chiaroscuro.data.tasks import TextTask
from chiaroscuro.data.tokenizers import WANTED_TOKENIZERS, load_from_folder, vocabulary_of
from chiaroscuro.errors import UserError, suggest
from chiaroscuro.model import ChiarForCausalLM
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.training import Recipe

PROBED = 512
"""Tokens that activations are counted on, at most; they grow with the tokens."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's data sheet.

    Attributes:
        memory: bytes.
        bf16: operations a second of matrix products, without sparsity.
        fp32: likewise. Training does not round float32 to TF32, so this is the rate without it.
        link: bytes a second to the other GPUs of its machine, in one direction.

    """

    memory: float
    bf16: float
    fp32: float
    link: float


GPUS = {
    "a100": Gpu(80e9, 312e12, 19.5e12, 300e9),
    "h100": Gpu(80e9, 989e12, 67e12, 450e9),
    "h200": Gpu(141e9, 989e12, 67e12, 450e9),
    "b200": Gpu(180e9, 2250e12, 75e12, 900e9),
    "l40s": Gpu(48e9, 362e12, 91.6e12, 32e9),
    "rtx4090": Gpu(24e9, 165e12, 82.6e12, 32e9),
}
"""By name: SXM modules, where there are several kinds."""

A_MACHINE, BETWEEN = 8, 50e9
"""GPUs of a machine, and bytes a second of each to other machines (a network port of 400 Gb/s)."""

USED, SPARE = 0.4, 0.9
"""The part of the peak that a training step reaches, and the part of the memory that is to be filled."""


def plan_run(
    recipe: Recipe, gpus: int, gpu: str, *, vocabulary: int | None = None, used: float = USED
) -> dict[str, Any]:
    """Memory and time of a recipe's run.

    Args:
        recipe: of a CHIAR-Former that models a text. Its `batch_size` is that of one GPU, and its `tokens` or `steps`
            those of the run.
        gpus: how many.
        gpu: which, by the name in `GPUS`.
        vocabulary: of the tokenizer; by default that of `bpe:N`, of a tokenizer in a folder, or of the preset.
        used: the part of the peak that is assumed.

    Returns:
        Figures ready for JSON: `"memory"` by part for `"ddp"` and `"fsdp"`, in bytes a GPU; `"step"`, in seconds; the
        `"run"`; with `calibration: paper` the same of the `"baseline"`, which is trained first; and `"assumptions"`,
        in words.

    Raises:
        UserError: an unknown GPU, an impossible number, or a recipe of another kind of model or of another task.

    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: no such GPU; {suggest(gpu, GPUS)}")
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give one GPU or more")
    if not 0 < used <= 1:
        raise UserError(f"--used {used:g}: give a part of the peak, above 0 and at most 1")
    if recipe.mixture is not None or not isinstance(recipe.data.build_task(), TextTask):
        raise UserError("plan counts a model that learns a text alone, and this recipe has tasks")
    trainer, length, device = recipe.trainer, recipe.data.sequence_length, GPUS[gpu]
    thresholds = (0.0, 1.0) if recipe.uses_baseline else None
    config = recipe.build_config(vocabulary or _vocabulary(recipe), thresholds)
    if not isinstance(config, ChiarConfig):
        raise UserError(f"plan counts a CHIAR-Former, and this recipe's model is a {config.model_type}")
    half = trainer.precision == "bf16"
    parameters = count_parameters(config) or 0
    refuse_beyond_memory(6 * parameters, "a forward of the model, on which activations are counted,")
    kept, layer = count_activations(config, min(length, PROBED), half, trainer.gradient_checkpointing)
    tokens = trainer.batch_size * length
    activations = kept * tokens + (layer * tokens if trainer.gradient_checkpointing else 0)
    state = {"weights": 4.0, "gradients": 4.0, "AdamW": 8.0}
    memory = {}
    sharded = trainer.ema is None  # whose averages need whole weights
    for kind, parts in (("ddp", 1), *((("fsdp", gpus),) if sharded else ())):
        memory[kind] = {name: each * parameters / parts for name, each in state.items()}
        memory[kind]["weights in bf16"] = 2.0 * parameters if half else 0.0
        if trainer.ema is not None:
            memory[kind]["averaged weights"] = 4.0 * parameters
        memory[kind]["activations"] = activations
        memory[kind]["total"] = sum(memory[kind].values())
    row = count_flops(config, length, training=True).total
    part = row / count_flops(full_attention(config), length, training=True).total
    if trainer.gradient_checkpointing:  # the layers, and not the head, are computed again
        row += count_flops(config, length, head=False).total
    if recipe.distill is not None:  # the teacher is the model itself, whose forward has full attention
        row += count_flops(full_attention(config), length).total
    flops = row * trainer.batch_size * trainer.gradient_accumulation
    peak = device.bf16 if half else device.fp32
    compute = flops / (peak * used)
    link = device.link if gpus <= A_MACHINE else min(device.link, BETWEEN)
    exchange = 2 * (gpus - 1) / gpus * 4 * parameters / link
    step = max(compute, exchange)
    figures: dict[str, Any] = {
        "gpu": gpu,
        "gpus": gpus,
        "parameters": parameters,
        "memory": memory,
        "memory of the GPU": device.memory,
        "fits": {kind: parts["total"] <= SPARE * device.memory for kind, parts in memory.items()},
        "step": {
            "compute": compute,
            "exchange of gradients": exchange,
            "seconds": step,
            "tokens": recipe.tokens_per_step(gpus),
            "tokens_per_second": recipe.tokens_per_step(gpus) / step,
            "of full attention's operations": part,
        },
        "assumptions": [
            f"a step reaches {used:.0%} of the peak of {peak / 1e12:,.0f} TFLOP/s in "
            + ("bfloat16" if half else "float32"),
            f"the tokenizer has {config.vocab_size:,} tokens",
            f"activations are those that this machine's operators keep, counted at T = {min(length, PROBED)}, and grow "
            "with the tokens",
            f"gradients of 4 bytes go around a ring at {link / 1e9:,.0f} GB/s, while the backward goes on",
            "with fsdp the exchange is taken to be as long as DDP's, which it is at least",
            *(["shares are those at the end of the schedule"] if recipe.schedule else []),
            "the data are there in time, and saving and validation are not counted",
        ],
    }
    if trainer.epochs is None:
        steps = recipe.steps(gpus)
        figures["run"] = {"steps": steps, "tokens": steps * recipe.tokens_per_step(gpus), "seconds": steps * step}
    if recipe.uses_baseline:
        figures["baseline"] = plan_run(recipe.baseline(), gpus, gpu, vocabulary=config.vocab_size, used=used)
    return figures


def _vocabulary(recipe: Recipe) -> int:
    if recipe.tokenizer.startswith("bpe:"):
        return vocabulary_of(recipe.tokenizer)
    if folder := find_folder(recipe.tokenizer, WANTED_TOKENIZERS):
        return len(load_from_folder(recipe.tokenizer, folder))
    preset = getattr(recipe.model, "preset", None)
    if preset is None:
        raise UserError(f"tokenizer={recipe.tokenizer!r} does not say how many tokens it has: give --vocabulary")
    return int(ChiarConfig.preset(preset).vocab_size)


def count_activations(config: ChiarConfig, length: int, half: bool, checkpointing: bool) -> tuple[float, float]:
    """Bytes a token that a forward keeps for its backward, and those of one layer that is computed again.

    Args:
        config: of the model.
        length: T, of the row that they are counted on.
        half: whether products are in bfloat16.
        checkpointing: whether only the layers' inputs are kept.

    """
    torch.manual_seed(0)
    model: Any = ChiarForCausalLM(config).train()
    ids = torch.randint(config.vocab_size, (2, length))

    def of_rows(rows: Tensor) -> int:
        return _kept(model, lambda: model(input_ids=rows, labels=rows, use_cache=False), half)

    def run() -> float:
        # What a second row adds. The gradient of the head, which the loss computes on the way, is as large for both.
        return (of_rows(ids) - of_rows(ids[:1])) / length

    whole = run()
    if not checkpointing:
        return whole, 0.0
    # Newer versions of transformers have another name for it, and warn of the old one.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    inputs = run()
    return inputs, (whole - inputs) / (config.num_hidden_layers or 1)


def _kept(model: torch.nn.Module, forward: Callable[[], Any], half: bool) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, tuple[int, Tensor]] = {}  # the tensors too, or a storage that is freed would be counted once

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = forward()
    total = sum(size for size, _ in found.values())
    del output
    return total
