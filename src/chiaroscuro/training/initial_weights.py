"""Start a run from the weights of a trained model, whose routing may be another, with scores fitted beforehand."""

import warnings
from collections.abc import Callable, Mapping, Sized
from dataclasses import asdict
from statistics import mean
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from chiaroscuro.errors import UserError
from chiaroscuro.layers import RoutedBlock, Router, ScoreRouter
from chiaroscuro.layers.fitted_router import UNFITTED
from chiaroscuro.layers.operator import hosts
from chiaroscuro.model import ChiarForCausalLM, ChiarPreTrainedModel
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.fitting import FittedSide, fit
from chiaroscuro.model.loading import (
    find_checkpoint,
    load_checkpoint,
    load_checkpoint_config,
    load_checkpoint_tokenizer,
)

MAY_DIFFER = frozenset(
    {
        # who looks, who is kept, and how far
        "operators",
        "router",
        "kv_router",
        "router_seed",
        "spectrum",
        "attention_share",
        "attention_spread",
        "kv_share",
        "kv_spread",
        "attention_context",
        "window",
        "sinks",
        "calibration",
        "entropy_thresholds",
        "execution",
        "collapse_penalty",
        # how long sequences are, and what is dropped
        "max_position_embeddings",
        "hidden_dropout",
        "attention_dropout",
        "use_cache",
        # what the tensors or the tokenizer say
        "task_labels",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)
"""Fields that may have changed since the weights were trained. With another value of any other one, the same tensors
would compute something else, or be others."""


def load_weights(model: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give an untrained model the weights of a trained one.

    Every tensor must be in both and have one shape, but for those of the routers. A router that is the saved one's
    equal takes over its weights and its calibration, set to the model's own share; another one begins untrained.

    Args:
        model: Changed in place.
        name: As in `find_checkpoint`.
        tokenizer: Of the run.

    Raises:
        UserError: if the checkpoint can't be read, is of another kind of model or was trained with another tokenizer,
            or if its configuration or its tensors don't fit.
    """
    place = f"trainer.init_from={name}"
    try:
        saved = load_checkpoint(name)
        theirs = load_checkpoint_tokenizer(name)
    except UserError as error:
        raise UserError(f"trainer.init_from: {error}") from None
    if type(saved) is not type(model):
        raise UserError(f"{place} is a {type(saved).__name__}, and the recipe's model a {type(model).__name__}")
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{place} was trained with another tokenizer; set tokenizer: {find_checkpoint(name)}")
    for field in _fields(model):
        then, now = getattr(saved.config, field), getattr(model.config, field)
        if then != now:
            raise UserError(f"{place} was trained with model.{field}={then!r}, and the recipe has {now!r}; put it back")
    _copy(saved, model, place)
    for path, router in _routers(model).items():
        if (other := _routers(saved).get(path)) is not None and _are_equal(router, other):
            _take_over(router, other)


def _fields(model: PreTrainedModel) -> list[str]:
    fields = model.config.fields() if isinstance(model.config, ChiarConfig) else LLAMA
    return [field for field in fields if field not in MAY_DIFFER]


LLAMA = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rope_parameters")
"""The fields of a Llama that must agree."""


def _copy(saved: PreTrainedModel, model: PreTrainedModel, place: str) -> None:
    """All tensors but the routers'."""
    source, target = _without_routers(saved, model), _without_routers(model, saved)
    both = source.keys() & target.keys()
    misfits = (source.keys() ^ target.keys()) | {name for name in both if source[name].shape != target[name].shape}
    for name in sorted(misfits):
        had, has = (tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (source, target))
        raise UserError(
            f"{place} does not fit the model: {name} is {had} in it and {has} in the model; only routers may differ"
        )
    for name in both:
        target[name].copy_(source[name])


def _routers(model: PreTrainedModel) -> dict[str, Router]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Router)}


def _without_routers(model: PreTrainedModel, other: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors by name, those of operators by the name that they would have if both models' menus were one."""
    routers = tuple(f"{path}." for path in _routers(model))
    theirs = dict(other.named_modules())
    renamed: dict[str, str] = {}
    for path, block in model.named_modules():
        if not isinstance(block, RoutedBlock) or not isinstance(paired := theirs.get(path), RoutedBlock):
            continue
        host = hosts({name: type(operator) for name, operator in [*block.menu, *paired.menu]})
        for part in ("operators", "operator_norms"):
            renamed |= {f"{path}.{part}.{name}.": f"{path}.{part}.{host[name]}." for name in block.operators}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(routers):
            place = next((place for place in renamed if name.startswith(place)), "")
            tensors[renamed.get(place, "") + name.removeprefix(place)] = tensor
    return tensors


def _are_equal(router: Router, other: Router) -> bool:
    """Whether two routers score alike, whatever share of the tokens they are to pick."""

    def says(of: Router) -> tuple[Any, ...]:
        aside = ("attention_share", "thresholds", "history")
        options = {k: v for k, v in asdict(of.options).items() if k not in aside}
        return type(of), of.width, of.operator_names, options

    return says(router) == says(other)


def _take_over(router: Router, other: Router) -> None:
    """Weights and calibration, and the thresholds of the router's own share."""
    router.load_state_dict(other.state_dict())
    if not isinstance(router, ScoreRouter) or not isinstance(other, ScoreRouter):
        return
    ours, theirs = router.calibration, other.calibration
    if not ours.running:
        ours.set_fixed()
    elif not theirs.running or theirs.share != ours.share:
        ours.set_share(ours.share)


def fit_scores(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    sides: Mapping[str, FittedSide],
    spread: bool = False,
) -> str:
    """Fit the scores of the sides that decide by one.

    Args:
        model: A language model with trained weights. Changed in place.
        batches: As of `fit_batches`.
        sides: Of `fitted_sides`, of the model's config as it is when its shares are those that it ends with.
        spread: See `chiaroscuro.fit`.

    Returns:
        How well they foretell, in one line.

    Raises:
        UserError: as `chiaroscuro.fit`.

    """
    if not isinstance(model, ChiarForCausalLM):
        raise UserError(f"fit needs a language model, and the recipe's is a {type(model).__name__}; remove fit")
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNFITTED)  # the other side's score, whose turn comes
        # One side at a time, since each has a width of its own.
        for name, side in sides.items():
            report = fit(model, batches, hidden=side.hidden, spread=spread, **cast(Any, {name: side.share}))
            correlation = mean(layer.rank_correlation for layer in getattr(report, name).values())
            found.append(f"{name} {correlation:.2f}")
    return f"fitted scores: mean rank correlation with their targets {', '.join(found)}"


def take_over_spread(model: PreTrainedModel, checkpoint: str) -> None:
    """Spread the model's shares over the layers as in a checkpoint, which it resumes from."""
    saved = load_checkpoint_config(checkpoint)
    if not isinstance(model, ChiarPreTrainedModel) or not isinstance(saved, ChiarConfig):
        return
    config = model.config
    if saved.attention_spread != config.attention_spread:
        config.attention_spread = saved.attention_spread
        model.set_attention_share(config.attention_share)
    if saved.kv_spread != config.kv_spread:
        config.kv_spread = saved.kv_spread
        model.set_attention_share(kv_share=config.kv_share)


FIT_ROWS = 4
"""Sequences that a score is fitted on at once."""


def fit_batches(
    rows: Dataset[Any], tokens: int, length: int, collate: Callable[[Any], dict[str, Any]] | None = None
) -> list[dict[str, Tensor]]:
    """The first rows of `length` tokens that hold so many `tokens`, one at least, as batches to fit on."""
    count = len(cast(Sized, rows))
    taken = Subset(rows, range(min(count, max(1, tokens // length))))
    fields = ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels")
    return [
        {name: batch[name] for name in fields if name in batch}
        for batch in DataLoader(taken, batch_size=FIT_ROWS, collate_fn=collate)
    ]
