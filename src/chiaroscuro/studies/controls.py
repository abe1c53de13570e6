"""What would embarrass a fitted score: other ways to keep as many tokens of a retrofitted model, and its perplexity.

Some of them could not be used: they choose the best part of each row when the row is complete, and one looks at what
the row's later tokens attend to. That is in their favour.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.analysis.perplexity import evaluate_blocks
from chiaroscuro.data.needles import Haystack
from chiaroscuro.layers import Context, Decision, PackedTokens, ScoreRouter, Spectra, build_router
from chiaroscuro.layers.attend_near_and_far import attend_near_and_far
from chiaroscuro.model.evaluation_mode import evaluation_mode
from chiaroscuro.ops.attention import capped
from chiaroscuro.ops.reach_attention import reach_mask
from chiaroscuro.retrofitting.calibration import calibrate_sides
from chiaroscuro.retrofitting.in_place import retrofit
from chiaroscuro.retrofitting.inside import noting_inputs, projections
from chiaroscuro.retrofitting.routed_attention import LOOK_SIDE
from chiaroscuro.retrofitting.routed_model import key_heads
from chiaroscuro.retrofitting.whole import without_routing

GATE_STEPS, GATE_RATE, GATE_PRICE = 40, 0.05, 0.05
"""Steps that the heads' gates learn, their learning rate, and the weight of their sum: DuoAttention's loss."""

Marks = Mapping[int, Float[Tensor, "batch time heads"]]


def compare_controls(original: Any, model: Any, blocks: Any, haystack: Haystack) -> dict[str, float]:
    """The perplexity of other ways to keep as many tokens, everybody looking.

    Those that keep single tokens have the layers' shares that the fitted copy has.

    Args:
        original: the model as it was.
        model: the retrofitted one, whose window, layers and kept shares the controls have.
        blocks: the text.
        haystack: rows with needles, on which the gates of whole heads are learned.

    Returns:
        By name: `"window alone"`, nobody is kept; `"random"`, by chance; `"H"`, those of the highest spectral entropy;
        `"key norm"`, by head, those whose keys are shortest (arXiv 2406.11430); `"received attention"`, by head, those
        that later tokens attend to most from beyond their windows (arXiv 2306.14048, which sees the future here);
        `"whole heads"`, some key-value heads keep all and the others nobody (DuoAttention, arXiv 2410.10819);
        `"whole layers"`, so many layers are whole, evenly spread, that the cache is no smaller.

    """
    said = model.config.chiaroscuro
    layers: list[int] = said["layers"]
    share = said["kv_share"]
    left = whole_layers(layers, share)
    options: dict[str, Any] = {
        "window alone": {"kv_share": 0.0},
        "random": {"kv_share": share, "kv_router": "random"},
        "whole layers": {"kv_share": 0.0, "layers": [i for i in layers if i not in left]},
    }
    found = {}
    for name, own in options.items():
        if not own.get("layers", layers):
            continue
        control = _retrofitted(original, said, {"layers": layers} | own)
        if name == "random":
            control.config.chiaroscuro["kv_spread"] = said["kv_spread"]
            control.set_attention_share(kv_share=share)
        found[name] = evaluate_blocks(control, blocks, batch_size=1).perplexity
    control = _retrofitted(original, said, {"layers": layers, "kv_share": 0.5, "kv_router": "random"})
    marked = _put_marks(control)
    shares = model.layer_shares("kept")
    losses: dict[str, list[float]] = {}
    with evaluation_mode(control):
        rows = [_row(blocks[i], control.device) for i in range(len(blocks))]
        for ids, predicted in rows:
            for name, marks in published_marks(control, ids).items():
                for i, mark in marks.items():
                    marked[i].chosen = _highest(mark, shares[i])
                losses.setdefault(name, []).append(_loss(control, ids, predicted))
        gates = learn_gates(control, haystack)
        whole = _whole_heads(gates, share)
        for i, router in marked.items():
            router.chosen = whole[i]
        losses["whole heads"] = [_loss(control, ids, predicted) for ids, predicted in rows]
    return found | {name: math.exp(sum(row) / len(row)) for name, row in losses.items()}


def compare_lookers(model: Any, blocks: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The perplexity if others look, as many of each layer; who is kept is decided by the fitted scores.

    Args:
        model: the retrofitted one.
        blocks: the text. Thresholds are set on it, which is in the controls' favour.

    Returns:
        By name: `"random"`, by chance, and `"H"`, those of the highest spectral entropy.

    """
    found = {}
    for name, entry in (("random", "random"), ("H", "threshold")):
        control = copy.deepcopy(model)
        for i, reach in control.reaches.items():
            router: Any = build_router(control.config.hidden_size, LOOK_SIDE, entry, {}, i)
            reach.replace("look", router.to(control.device))
        control.config.chiaroscuro["router"] = entry
        rows = [_row(blocks[i], control.device)[0] for i in range(len(blocks))]
        calibrate_sides(control, rows, ["look"])
        found[name] = evaluate_blocks(control, cast(Any, blocks), batch_size=1).perplexity
    return found


@torch.no_grad()
def whole_layers(layers: Sequence[int], share: float) -> list[int]:
    """Of these layers, evenly spread, as many as keep the share at least."""
    count = math.ceil(share * len(layers))
    return [layers[int((n + 1) * len(layers) / count) - 1] for n in range(count)]


def published_marks(model: Any, ids: Int[Tensor, "1 time"]) -> Mapping[str, Marks]:
    """What published ways to keep tokens go by, of one row in the whole model: the higher, the sooner it is kept.

    Args:
        model: a retrofitted one.
        ids: the row.

    Returns:
        By name and layer, a number for each token and key-value head.

    """
    with without_routing(model), noting_inputs(model) as given:
        parts = projections(model, ids)
    found: dict[str, dict[int, Tensor]] = {"H": {}, "key norm": {}, "received attention": {}}
    for i, (query, key, _, softcap) in parts.items():
        reach = model.reaches[i]
        found["H"][i] = Spectra(given[i]).entropy().float()[..., None].expand(-1, -1, len(key))
        found["key norm"][i] = -key.float().norm(dim=-1).T[None]
        found["received attention"][i] = _received(query, key, reach.window, reach.sinks, softcap).T[None]
    return found


def _received(
    query: Float[Tensor, "heads time head_width"],
    key: Float[Tensor, "key_heads time head_width"],
    window: int,
    sinks: int,
    softcap: float | None,
) -> Float[Tensor, "key_heads time"]:
    """The attention that each key of each head receives from beyond the window."""
    time = query.shape[1]
    place = torch.arange(time, device=query.device)
    nobody = torch.zeros(time, dtype=torch.bool, device=query.device)
    near = reach_mask(place, place, nobody, nobody, window, sinks)
    received = []
    for q, k in zip(query.unflatten(0, (len(key), -1)), key, strict=True):
        scores = capped((q @ k.T).float() / math.sqrt(q.shape[-1]), softcap)
        weights = scores.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
        received.append(weights.masked_fill(near, 0.0).sum((0, 1)))
    return torch.stack(received)


def _highest(marks: Float[Tensor, "batch time heads"], share: float) -> Bool[Tensor, "batch time heads"]:
    """The given share of each row and head that is marked highest."""
    kept = round(share * marks.shape[1])
    chosen = torch.zeros_like(marks, dtype=torch.bool)
    return chosen.scatter(1, marks.topk(kept, dim=1).indices, value=True)


def learn_gates(
    model: Any, haystack: Haystack, steps: int = GATE_STEPS, length: int = 1024
) -> dict[int, Float[Tensor, " key_heads"]]:
    """DuoAttention's α: how much of the far part each key-value head needs to find needles.

    Each head gives α · whole + (1 − α) · window alone. The α learn, and nothing else, that the last hidden states at
    the answer are those of the whole model, at a price on their sum.

    Args:
        model: a retrofitted one.
        haystack: that draws the rows.
        steps: of one row.
        length: of the rows, or what the model reads if that is less.

    Returns:
        α, by layer.

    Source: arXiv 2410.10819.

    """
    heads = key_heads(model.config)
    gates = {i: torch.ones(heads, device=model.device, requires_grad=True) for i in model.reaches}
    optimizer = torch.optim.AdamW(gates.values(), lr=GATE_RATE, weight_decay=0.0)
    length = min(length, model.config.max_position_embeddings)
    with without_routing(model):
        for step in range(steps):
            row = haystack.needle(length, (step % 10 + 0.5) / 10, step)
            ids, last = row.input_ids[None].to(model.device), slice(-row.answer - 1, None)
            with torch.no_grad():
                right = model.base_model(ids, use_cache=False).last_hidden_state[:, last]
            for i, reach in model.reaches.items():
                reach.probe = _Gate(gates[i], reach.window, reach.sinks)
            try:
                with torch.enable_grad():
                    made = model.base_model(ids, use_cache=False).last_hidden_state[:, last]
                    far = torch.stack(list(gates.values())).mean()
                    (F.mse_loss(made.float(), right.float()) + GATE_PRICE * far).backward(inputs=list(gates.values()))
            finally:
                for reach in model.reaches.values():
                    reach.probe = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for gate in gates.values():
                    gate.clamp_(0, 1)
    return {i: gate.detach() for i, gate in gates.items()}


class _Gate:
    """Takes the place of a `Probe`: mixes a module's whole output with that of its windows alone, head by head."""

    def __init__(self, gate: Float[Tensor, " key_heads"], window: int, sinks: int) -> None:
        self.gate, self.window, self.sinks = gate, window, sinks

    def put_in(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, context: Context, softcap: float | None
    ) -> Tensor:
        """The mixture."""
        tokens = PackedTokens.all_of(query)
        nobody = torch.zeros(query.shape[:2], dtype=torch.bool, device=query.device)
        queries, keys, values = (x.flatten(0, 1) for x in (query, key, value))
        near = attend_near_and_far(
            queries, keys, values, tokens, tokens, nobody, nobody, Context(), self.window, self.sinks, softcap=softcap
        )
        share = self.gate.to(output.dtype).repeat_interleave(query.shape[2] // len(self.gate))[:, None]
        return share * output + (1 - share) * near.view_as(output)


def _whole_heads(
    gates: Mapping[int, Float[Tensor, " key_heads"]], share: float
) -> dict[int, Bool[Tensor, "1 1 key_heads"]]:
    """The given share of all heads, those of the largest gates."""
    every = torch.cat(list(gates.values()))
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[every.topk(round(share * len(every))).indices] = True
    parts = chosen.split([len(gate) for gate in gates.values()])
    return {i: part[None, None] for i, part in zip(gates, parts, strict=True)}


class _Marked(ScoreRouter):
    """Keeps the tokens that it is told."""

    scores_entropy = reads_entropy = False
    chosen: Tensor

    def forward(self, x: Tensor, entropy: Tensor, context: Context | None = None) -> Decision:
        """Those chosen; of all tokens, where they are given once."""
        return Decision(self.chosen.expand(*x.shape[:2], -1).long())


def _retrofitted(original: Any, said: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    control = copy.deepcopy(original)
    retrofit(control, window=said["window"], sinks=said["sinks"], attention_share=1.0, **options)
    return control


def _put_marks(model: Any) -> dict[int, _Marked]:
    """Routers that keep what they are told, on the kept side of every routed layer."""
    marked = {}
    for i, reach in model.reaches.items():
        marked[i] = _Marked(model.config.hidden_size, ("seen near", "kept"), i, attention_share=0.5).to(model.device)
        marked[i].calibration.set_from(torch.linspace(0, 1, 10), 0.5)  # or it would warn of thresholds never set
        reach.replace("kept", marked[i])
    return marked


def _row(block: Mapping[str, Tensor], device: Any) -> tuple[Tensor, Tensor]:
    """A block as a batch of one, and what its tokens are to predict."""
    return block["input_ids"][None].to(device), block["shift_labels"].to(device)


@torch.no_grad()
def _loss(model: Any, ids: Tensor, predicted: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return float(F.cross_entropy(logits.float(), predicted))
