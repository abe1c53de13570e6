"""Models whose tokens look far by a fitted score, of either kind, and what far context is in them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from chiaroscuro import retrofit
from chiaroscuro.analysis.far_context import FarContext, FarLayer, far_part
from chiaroscuro.data import TokenBlocks, load_corpus, tokenize_corpus
from chiaroscuro.data.needles import Haystack
from chiaroscuro.errors import UserError
from chiaroscuro.layers import SelfAttention
from chiaroscuro.layers.permuted_router import PermutedRouter
from chiaroscuro.model import ChiarForCausalLM
from chiaroscuro.model.calibration import embed_batch
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.full_attention import full_attention
from chiaroscuro.ops import spectral_entropy
from chiaroscuro.retrofitting.fitting import fit
from chiaroscuro.retrofitting.inside import noting_inputs, projections
from chiaroscuro.retrofitting.routed_model import RoutedModel
from chiaroscuro.studies.fitting import batches_of
from chiaroscuro.studies.workspace import Workspace

TEXT = 2**22
"""Tokens of the training text, from its beginning, that token frequencies are counted in."""


@dataclass(frozen=True)
class FarModel:
    """A model, text that it was not fitted on, and text whose tokens are counted.

    Attributes:
        model: a `ChiarForCausalLM` or a `RoutedModel`, whose look side has a fitted score.
        tokenizer: its own.
        rows: held out.
        counted: tokens of the training text.
        window: w.
        sinks: s.

    """

    model: Any
    tokenizer: Any
    rows: list[Int[Tensor, " time"]]
    counted: Int[Tensor, " tokens"]
    window: int
    sinks: int


def load_far_model(
    checkpoint: str,
    *,
    window: int,
    sinks: int,
    share: float,
    rows: int,
    length: int,
    data: str | None = None,
    fit_rows: int = 64,
) -> FarModel:
    """A model of full attention, whose tokens from now on look far by a score that is fitted here.

    Args:
        checkpoint: a language model of this library with full attention, or any other decoder: see `load_checkpoint`.
        window: w.
        sinks: s.
        share: of the tokens that look.
        rows: held out, to measure on, of the validation split.
        length: T.
        data: a corpus; by default that of the checkpoint's recipe, which only models of this library have.
        fit_rows: rows of the training split to fit on.

    Raises:
        UserError: the checkpoint or its text can't be used.

    """
    model: Any
    workspace = Workspace(checkpoint, device="cpu")
    before: Any = workspace.config
    tokenizer = workspace.tokenizer
    own = isinstance(before, ChiarConfig)
    if not own:
        if data is None:
            raise UserError(f"models: {checkpoint} was trained by no recipe that names a text: give it data")
        model = workspace.model
        retrofit(model, window=window, sinks=sinks, attention_share=share, kv_share=1.0, router="fitted")
        tokens = tokenize_corpus(load_corpus(data, needed=("train", "validation")), tokenizer)
        counted = torch.from_numpy(tokens["train"].tokens[:TEXT].astype("int64"))
        text = Haystack(tokenizer, counted)
        fit(model, [text.passage(length, i).input_ids[None] for i in range(fit_rows)], look=share, spread=False)
        blocks = TokenBlocks(tokens["validation"], length)
    else:
        menus = [["local", "attention"]] * before.num_hidden_layers
        model = ChiarForCausalLM.from_pretrained(
            workspace.path, operators=menus, window=window, sinks=sinks, router="random", attention_share=share
        )
        _, batches = batches_of(workspace, length=length, source=data, tokens=fit_rows * length)
        fit(model, batches, look=share)
        corpus, blocks = workspace.blocks("validation", length=length, source=data)
        train = tokenize_corpus(corpus, tokenizer)["train"]
        counted = torch.from_numpy(train.tokens[:TEXT].astype("int64"))
    held_out = [blocks[i]["input_ids"] for i in range(min(rows, len(blocks)))]
    return FarModel(model.eval(), tokenizer, held_out, counted, window, sinks)


@torch.no_grad()
def far_context(far: FarModel, ids: Int[Tensor, " time"]) -> FarContext:
    """What far context is worth to each token of a row, and what a router could go by."""
    with evaluation_mode(far.model):
        layers = dict(_retrofitted(far, ids) if isinstance(far.model, RoutedModel) else _own(far, ids))
        with _everybody(far.model, looks=True):
            whole = _losses(far.model, ids)
        with _everybody(far.model, looks=False):
            near = _losses(far.model, ids)
    return FarContext(ids, near - whole, whole, layers, far.window + far.sinks)


def _losses(model: Any, ids: Tensor) -> Float[Tensor, " predicted"]:
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), ids[1:], reduction="none")


@contextmanager
def _everybody(model: Any, looks: bool) -> Iterator[None]:
    """Inside the block all tokens look far, or none."""
    with ExitStack() as stack:
        if isinstance(model, RoutedModel):
            for reach in model.reaches.values():
                stack.enter_context(reach.as_whole(look=looks, kept=True))
            yield
            return
        stack.enter_context(full_attention(model))
        if not looks:
            for calibration in model.thresholds().values():  # `full_attention` puts them back
                calibration.values.fill_(torch.inf)
        yield


def _own(far: FarModel, ids: Tensor) -> Iterator[tuple[int, FarLayer]]:
    """The layers of a model of this library."""
    model = far.model
    with full_attention(model):
        x, context, gate = embed_batch(model, ids[None])
        for i, block in enumerate(model.trunk.blocks):
            source = block.operator_input(x, context)
            attention = next(unit.operator for unit in block.units if isinstance(unit.operator, SelfAttention))
            query, key, value = attention.projected(source, context)
            score = block.router.score(source, source.new_zeros(source.shape[:2]), context)
            yield i, FarLayer(far_part(query[0], key[0], value[0], far.window, far.sinks), _scores(source[0], score[0]))
            x, _ = model.trunk.run_layer(i, x, gate, context)


def _retrofitted(far: FarModel, ids: Tensor) -> Iterator[tuple[int, FarLayer]]:
    """The layers of another library's decoder."""
    model: RoutedModel = far.model
    with noting_inputs(model) as given, _everybody(model, looks=True):
        parts = projections(model, ids[None])
    for i, (query, key, value, softcap) in parts.items():
        source = given[i]
        score = model.reaches[i].look(source, source.new_zeros(source.shape[:2])).score
        assert score is not None
        part = far_part(query, key, value, far.window, far.sinks, softcap)
        yield i, FarLayer(part, _scores(source[0], score[0]))


def _scores(source: Float[Tensor, "time width"], fitted: Float[Tensor, "time *heads"]) -> Mapping[str, Tensor]:
    """What could tell, from the layer's input alone, whether a token needs what is far; of heads the highest score."""
    order = PermutedRouter(source.shape[-1], ("near", "far")).permutation
    return {
        "H": spectral_entropy(source),
        "permuted H": spectral_entropy(source[..., order]),
        "norm": source.norm(dim=-1),
        "fitted": fitted.reshape(len(source), -1).amax(-1),
    }
