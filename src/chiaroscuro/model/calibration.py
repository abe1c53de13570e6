"""Where the thresholds stand: calibration from data, and the paper's from a baseline's embeddings.

The running calibration, which follows the data while a model trains, is the model's own
(`ChiarForCausalLM.step_calibration`); the trainer calls it once an optimizer step.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chiaroscuro.errors import UserError
from chiaroscuro.layers import Context, ScoreRouter
from chiaroscuro.layers.thresholds import Thresholds
from chiaroscuro.model.batches import Batch, check_some_tokens, checked_batches, fields_of
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.model.modeling import ChiarPreTrainedModel, document_positions
from chiaroscuro.ops import spectral_entropy
from chiaroscuro.ops.spectral import Spectrum

State = tuple[Tensor, Context, Tensor | None]
"""The tokens of a batch between two layers, their context, and the MetaRouter's gate."""

PAPER_ROWS = 200
PAPER_LENGTH = 256
PAPER_PERCENTILES = (33.0, 67.0)


@torch.no_grad()
def calibrate(
    model: ChiarPreTrainedModel,
    batches: Iterable[Batch],
    share: float | None = None,
    kv_share: float | None = None,
) -> dict[int, list[float]]:
    """Set the thresholds of a model from data: each routed layer sends `share` of these tokens to its last operator.

    Where the key side decides who is kept, `kv_share` of them are.

    Layer after layer, each on what the routed layers before it produce with the thresholds that they have just got:
    the input of a layer depends on the routing before it, so all layers at once would miss. The table of quantiles is
    set too, so that `model.set_attention_share` works from these data afterwards.

    Tokens of one score go the same way. Where H depends on the token's id alone (a routed first layer; dct before it
    and no MetaRouter), the share is met only to within the share of the token at the threshold.

    Args:
        model: any CHIAR-Former that routes by a score, calibrated or not. Changed in place.
        batches: `input_ids` (B, T), or mappings with `input_ids` and optionally `attention_mask`, as a data loader
            gives them. All are held in memory at once, as d floats a token.
        share: ρ from 0 to 1; the config's `attention_share` unless given.
        kv_share: the share that is kept; the config's `kv_share` unless given.

    Returns:
        The thresholds of the look side by layer number.

    Raises:
        UserError: another model or one whose weights are offloaded, no batch, no real token, no layer that routes by a
            score, a score that was not fitted yet or is not finite, or an impossible share. The model is then as it
            was.

    """
    if not isinstance(model, ChiarPreTrainedModel):
        raise UserError(
            f"calibrate takes a CHIAR-Former, or as chiaroscuro.calibrate a retrofitted model, not a "
            f"{type(model).__name__}; a RoutedBlock has calibrate(x)"
        )
    if model.device.type == "meta":
        raise UserError("the model's weights are offloaded: load it whole, calibrate it, and save it")
    layers, keeping = model.thresholds(), model.kv_thresholds()
    with evaluation_mode(model):
        checked = checked_batches(batches)
        states = [embed_batch(model, batch) for batch in checked]
        check_some_tokens(checked)
        for block in model.trunk.blocks:
            for router in (block.router, block.kv_router):
                if isinstance(router, ScoreRouter) and (reason := router.unready()):
                    raise UserError(reason)
        with _or_as_it_was(model):
            # Checks the share and the model; the thresholds that it sets are replaced below.
            given = model.config.attention_share if share is None else share
            kept = model.config.kv_share if kv_share is None else kv_share
            model.set_attention_share(
                given if layers or share is not None or not keeping else None,
                kv_share=kept if keeping or kv_share is not None else None,
            )
            set_thresholds(
                model,
                states,
                {i: one for i, one in model.config.layer_shares("attention_share").items() if i in layers},
                model.config.layer_shares("kv_share"),
            )
    return {i: thresholds.values.tolist() for i, thresholds in layers.items()}


@contextmanager
def _or_as_it_was(model: ChiarPreTrainedModel) -> Iterator[None]:
    """If the block fails, the thresholds and the shares are what they were."""
    fields = ("attention_share", "kv_share", "calibration", "entropy_thresholds")
    said = {name: getattr(model.config, name) for name in fields}
    with thresholds_or_as_they_were([*model.thresholds().values(), *model.kv_thresholds().values()]):
        try:
            yield
        except BaseException:
            for name, value in said.items():
                setattr(model.config, name, value)
            raise


@contextmanager
def thresholds_or_as_they_were(thresholds: Iterable[Thresholds]) -> Iterator[None]:
    """If the block fails, these are what they were, with their tables and their shares."""
    before = [(one, one.running, one.share, [buffer.clone() for buffer in one.buffers()]) for one in thresholds]
    try:
        yield
    except BaseException:
        for one, running, share, buffers in before:
            one.running, one.share = running, share
            for buffer, value in zip(one.buffers(), buffers, strict=True):
                buffer.copy_(value)
        raise


def embed_batch(model: ChiarPreTrainedModel, batch: Batch) -> State:
    """The input of layer 0 for one batch: tokens, what the layers know about them, and the MetaRouter's gate.

    Raises:
        UserError: its `input_ids` are such that the model can't read.

    """
    fields = fields_of(batch)
    given = {name: fields.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise UserError(f"{name} of a batch is a {type(value).__name__}: give a tensor, one number for each token")
    ids, mask, places = (None if one is None else one.to(model.device) for one in given.values())
    base = model.trunk
    x = base.embed(ids)
    if places is None and fields.get("cu_seq_lens_q") is not None:
        places = document_positions(fields["cu_seq_lens_q"], x)
    context = base.prepare(x, mask, places, input_ids=ids)
    return x, context, base.gate(x, context)


def set_thresholds(
    model: ChiarPreTrainedModel,
    states: list[State],
    shares: Mapping[int, float],
    kv_shares: Mapping[int, float],
) -> None:
    """Set the thresholds of some layers to shares of their own, each on what the layers before it then produce.

    Args:
        model: in evaluation mode.
        states: of `embed_batch`.
        shares: of the tokens that go to a layer's last operator, by layer; the thresholds of other layers stay.
        kv_shares: of the tokens that are kept, by layer.

    Raises:
        UserError: a score is not finite.

    """
    for i in range(len(model.trunk.layers)):
        states = calibrate_layer(model, i, states, shares, kv_shares)


def calibrate_layer(
    model: ChiarPreTrainedModel,
    i: int,
    states: list[State],
    shares: Mapping[int, float],
    kv_shares: Mapping[int, float],
) -> list[State]:
    """Set the thresholds of layer i, if the shares name it, and run it; arguments and errors as of `set_thresholds`."""
    base = model.trunk
    if i in shares or i in kv_shares:
        routings = [(base.blocks[i].route(x, c), c.attention_mask) for x, c, _ in states]
    if i in shares:
        scores = [_real(routing.score, mask) for routing, mask in routings]
        model.thresholds()[i].set_from(torch.cat(scores), shares[i])
    if i in kv_shares:
        scores = [_real(routing.kept_score, mask) for routing, mask in routings]
        model.kv_thresholds()[i].set_from(torch.cat(scores), kv_shares[i])
    return [(base.run_layer(i, x, gate, context)[0], context, gate) for x, context, gate in states]


@torch.no_grad()
def paper_thresholds(
    model: PreTrainedModel,
    rows: Iterable[Sequence[int]],
    percentiles: tuple[float, float] = PAPER_PERCENTILES,
    max_length: int = PAPER_LENGTH,
    spectrum: Spectrum = "orthonormal",
) -> tuple[float, float]:
    """The paper's thresholds: percentiles of H over the embedding rows of a trained baseline.

    No layer is run: H is of the bare embeddings, which are not what a routed layer sees. It is published so;
    `calibrate` does it on the layers' own input.

    Args:
        model: the trained full-attention baseline.
        rows: token ids of the validation rows; the first 200 are taken, each cut at max_length tokens.
        percentiles: those that become τ_low and τ_high.
        max_length: where a row is cut.
        spectrum: of the H that will be held against them.

    Returns:
        (τ_low, τ_high).

    Raises:
        UserError: the rows hold no token, or one that the model does not know.

    Source: the paper, calibration; the published code: 200 rows, 256 tokens, 33rd and 67th percentile.

    """
    tokens = [token for row in islice(rows, PAPER_ROWS) for token in row[:max_length]]
    if not tokens:
        raise UserError("the rows to calibrate on hold no tokens: give some text")
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight
    if not 0 <= min(tokens) <= max(tokens) < len(embeddings):
        raise UserError(f"a token outside the vocabulary, vocab_size={len(embeddings)}: use the model's own tokenizer")
    entropy = spectral_entropy(embeddings[torch.tensor(tokens, device=embeddings.device)], spectrum).double()
    low, high = torch.quantile(entropy, torch.tensor(percentiles, dtype=torch.float64, device=entropy.device) / 100)
    return float(low), float(high)


def _real(score: Tensor | None, mask: Tensor | None) -> Tensor:
    assert score is not None
    return (score if mask is None else score[mask]).flatten()
