"""The checkpoints of the author's code (hackie123/CHIAR-former), into ours exactly.

Such a file is `{"model": state dict, "cfg": what was set on the configuration's instance, …}`, of one of these kinds:

- CHIAR-Former or baseline. `cfg` holds the vocabulary's size and the routing mode, and little more.
- Mixed training: a CHIAR-Former without `cfg`, and a `_cls_head_<task>` or two. Those were trained on the embeddings,
  past every layer, so they are no heads of this model: they are left out, which is said.
- Classifiers, without `cfg`: a CHIAR-Former or a baseline, under `backbone.` or (a baseline) without it, and
  `classifier`, two linear maps with a GELU in between on the mean over all positions. The author pads with a real token
  and counts it as any other. So ours gives the author's logits where it gets no attention_mask; where it gets one,
  padding is left out, as it should be.

Shapes and names say what the model is: width, layers, menus, feed-forward, heads, angles, length. Thresholds are no
weights; `cfg` or the caller knows them. Then three conventions differ. Queries, keys and values are one matrix there.
Entropy counts the DC term twice there: `spectrum="reference"`. And there the inverse DCT of a DCT is 2x, so that a
filter w there is 2w here.
"""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.model import ChiarForCausalLM, ChiarForSequenceClassification
from chiaroscuro.model.config import ChiarConfig

BACKBONE = "backbone."
FILTER_SCALE = 2.0
"""The author's idct(dct(x)) over x."""

# What the author's configuration holds unless it was set on the instance, and so in `cfg`.
_THEIR_LENGTH = 256
_THEIR_THETA = 10000.0
_THEIR_DROPOUT = 0.1

_OURS_TO_THEIRS = [
    (r"^score\.", "classifier."),
    (r"^model\.", ""),
    (r"^embed_tokens\.", "token_emb."),
    (r"^meta_router\.", "meta_router.gate_proj."),
    (r"\.operators\.dct\.weight$", ".dct_mix.w"),
    (r"\.operator_norms\.dct\.", ".dct_mix.norm."),
    (r"\.operators\.attention\.", ".attn."),
    (r"\.operator_norms\.attention\.", ".attn.norm."),
    (r"\.[qkv]_proj\.", ".qkv."),
    (r"\.feed_forward\.", ".ffn."),
    (r"\.feed_forward_norm\.", ".ffn_norm."),
    (r"\.router\.proj\.", ".router.gate_proj."),
]
_THEIR_BASELINE = (r"^layers\.(\d+)\.(attn|ffn|ffn_norm)\.", r"\2s.\1.")

_OPERATORS = {"dct_mix": "dct", "attn": "attention"}
_OPERATOR = re.compile(r"(?:backbone\.)?(?:layers\.(\d+)\.(dct_mix|attn)|attns\.(\d+))\.")
_ANGLES = re.compile(r"\battns?\.(?:\d+\.)?rope\.(?:inv_freq|cos_cache|sin_cache)$")
_COSINES = re.compile(r"\.rope\.cos_cache$")
_LABELS = re.compile(r"^classifier\.3\.weight$")
_FEED_FORWARD = re.compile(r"\bffns?\.(?:\d+\.)?0\.weight$")
_LEARNED_ROUTER = re.compile(r"layers\.\d+\.router\.gate_proj\.")
_MIXED_HEAD = re.compile(r"_cls_head_\w+\.(?:\w+\.)*(?:weight|bias)$")


@dataclass(frozen=True)
class Imported:
    """A checkpoint of the author's, as ours.

    Attributes:
        model: in evaluation mode.
        remarks: what was left out or could not be known, a line each.

    """

    model: ChiarForCausalLM | ChiarForSequenceClassification
    remarks: tuple[str, ...]


def load_reference_checkpoint(
    path: str | Path, *, heads: int | None = None, thresholds: tuple[float, float] | None = None
) -> ChiarForCausalLM | ChiarForSequenceClassification:
    """The model of one of the author's checkpoints; what was left out or could not be known is a warning.

    Only tensors and plain values are read (`weights_only=True`): code in the file is not run.

    Args:
        path: the author's `.pt` file.
        heads: h, where neither the buffers of the file nor its `cfg` tell it.
        thresholds: (τ_low, τ_high) of the entropy, for a checkpoint that routes by them and does not say where they
            stood; they take the place of those that it says.

    Returns:
        The model in evaluation mode, with the author's outputs: a `ChiarForSequenceClassification` for a classifier, a
        `ChiarForCausalLM` for the others. Its MetaRouter pools over the batch, as published.

    Raises:
        UserError: no such file, one that can't be read, keys that are missing or unknown, wrong shapes, values that are
            not finite, a `cfg` that contradicts the tensors, or heads and thresholds that are needed, impossible or not
            asked for.

    """
    imported = import_reference(path, heads=heads, thresholds=thresholds)
    for remark in imported.remarks:
        warnings.warn(f"{path}: {remark}", stacklevel=2)
    return imported.model


def import_reference(
    path: str | Path, *, heads: int | None = None, thresholds: tuple[float, float] | None = None
) -> Imported:
    """What `load_reference_checkpoint` does, with the remarks beside the model; see there."""
    path = Path(os.path.expanduser(path))
    try:
        weights, settings = _read(path)
        remarks = []
        if left_out := [name for name in weights if _MIXED_HEAD.match(name)]:
            remarks.append(f"left out: {', '.join(left_out)} (heads on the embeddings, past every layer)")
        weights = {name: value for name, value in weights.items() if name not in left_out}
        if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
            raise UserError(f"holds NaN or infinite values, take an earlier checkpoint: {_listed(broken)}")
        if "routing_mode" not in settings and any(_LEARNED_ROUTER.search(name) for name in weights):
            settings["routing_mode"] = "soft"
            remarks.append(
                "the file does not say whether its router is soft or hard, which have the same weights: took soft; if "
                "it is hard, load what was imported with router='hard'"
            )
        model = _build(weights, settings, heads, thresholds)
        _fill(model, weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Imported(model.eval(), tuple(remarks))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise UserError("no such file")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle fails with, nobody can list
        if "GLOBAL" in str(error):
            raise UserError("holds objects beside tensors, whose code is not run: not loaded") from None
        raise UserError("can't be read: it is cut short, or was not written by torch.save") from None
    weights = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise UserError("holds no state dict under 'model', as the author's checkpoints do")
    if unfit := [name for name, value in weights.items() if not _is_plain(value)]:
        raise UserError(f"holds tensors that are sparse, quantised, nested or without values: {_listed(unfit)}")
    settings = loaded.get("cfg")
    return dict(weights), dict(settings) if isinstance(settings, dict) else {}


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is an ordinary array of numbers, of 16 bits or more where they are real."""
    dense = value.layout is torch.strided and not (value.is_quantized or value.is_nested or value.is_meta)
    return dense and not (value.is_floating_point() and value.element_size() < 2)


def _build(
    weights: dict[str, Tensor], settings: dict[str, Any], heads: int | None, thresholds: tuple[float, float] | None
) -> ChiarForCausalLM | ChiarForSequenceClassification:
    """The model that these weights are of, untrained."""
    prefix = _prefix(weights)
    embedding = weights.get(f"{prefix}token_emb.weight")
    if embedding is None or embedding.dim() != 2:
        raise UserError(f"no checkpoint of the author's code: missing: {prefix}token_emb.weight, a matrix")
    vocabulary, width = embedding.shape
    if (said := settings.get("vocab_size")) not in (None, vocabulary):
        raise UserError(f"cfg has vocab_size={said!r}, but {prefix}token_emb.weight has {vocabulary} rows")
    menus = _menus(weights)
    angles = [value for name, value in weights.items() if name.endswith(".rope.inv_freq") and value.numel()]
    dropout = settings.get("dropout", _THEIR_DROPOUT)
    fields: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": _heads(width, menus, angles, settings.get("n_heads"), heads),
        "intermediate_size": _rows(weights, _FEED_FORWARD),
        "max_position_embeddings": _rows(weights, _COSINES) or settings.get("max_seq_len", _THEIR_LENGTH),
        "rope_theta": _rope_theta(angles),
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
        "norm": "post",
        "embedding_norm": False,
        "operators": menus,
        "meta_router": "batch" if any(name.startswith(f"{prefix}meta_router.") for name in weights) else "none",
        "spectrum": "reference",
        **_routing(settings, menus, thresholds),
    }
    if not _is_classifier(weights):
        return ChiarForCausalLM(ChiarConfig(**fields))
    fields |= {"classifier_head": "mlp", "num_labels": _rows(weights, _LABELS) or 2}
    return ChiarForSequenceClassification(ChiarConfig(**fields))


def _prefix(weights: dict[str, Tensor]) -> str:
    return BACKBONE if any(name.startswith(BACKBONE) for name in weights) else ""


def _is_classifier(weights: dict[str, Tensor]) -> bool:
    return any(name.startswith((BACKBONE, "classifier.")) for name in weights)


def _rows(weights: dict[str, Tensor], pattern: re.Pattern[str]) -> int | None:
    """The length of the first weight of that name; None where there is none that has a length."""
    return next((len(value) for name, value in weights.items() if pattern.search(name) and value.dim()), None)


def _menus(weights: dict[str, Tensor]) -> list[list[str]]:
    found = {(int(match[1] or match[3]), match[2] or "attn") for name in weights if (match := _OPERATOR.match(name))}
    layers = sorted({layer for layer, _ in found})
    if not layers or layers != list(range(len(layers))):
        missing = next((i for i, layer in enumerate(layers) if i != layer), 0)
        raise UserError(f"no checkpoint of the author's code: layer {missing} has neither a dct_mix nor an attn")
    return [[ours for theirs, ours in _OPERATORS.items() if (layer, theirs) in found] for layer in layers]


def _heads(width: int, menus: list[list[str]], angles: list[Tensor], said: int | None, given: int | None) -> int:
    """The number of heads, d / 2n of n angles each; as `cfg` says or the caller gives, where no angles are there."""
    if not angles:
        if None not in (said, given) and said != given:
            raise UserError(f"cfg has n_heads={said!r}, not {given}: drop --heads")
        told = given if said is None else said
        if told is None and any("attention" in menu for menu in menus):
            raise UserError(
                "neither rope.inv_freq, whose length tells the number of heads, nor n_heads in cfg: give --heads"
            )
        return 1 if told is None else told
    count = angles[0].numel()
    if width % (2 * count):
        raise UserError(f"rope.inv_freq has {count} entries, but heads of width {2 * count} don't make up d={width}")
    found = width // (2 * count)
    for other, source in ((said, " as n_heads in cfg says"), (given, "")):
        if other not in (None, found):
            raise UserError(
                f"rope.inv_freq has {count} entries, which at d={width} are {found} heads, not {other!r}{source}"
            )
    return found


def _rope_theta(angles: list[Tensor]) -> float:
    """θ of the angles θ^(−k/n), k = 0 … n − 1, which every layer has to share.

    The angles are rounded, in half precision to two digits or three: θ is the roundest number that gives them.
    """
    if not angles:
        return _THEIR_THETA
    count = angles[0].numel()
    thetas = [_THEIR_THETA]
    if count > 1:
        last = angles[0].double().flatten()[-1]
        estimate = float(last ** (-count / (count - 1)))
        thetas = [float(f"{estimate:.{digits}g}") for digits in range(1, 7)]  # a float32 tells no more of them
    rounding = max([1e-5, *(torch.finfo(found.dtype).eps for found in angles if found.is_floating_point())])
    for theta in thetas:
        expected = theta ** (-torch.arange(count, dtype=torch.float64) / count)
        if all(
            found.shape == (count,) and torch.allclose(found.double(), expected, rtol=rounding, atol=0)
            for found in angles
        ):
            return theta
    raise UserError("rope.inv_freq is not θ^(−k/n) of one θ in all layers, and can't be imported exactly")


def _routing(
    settings: dict[str, Any], menus: list[list[str]], thresholds: tuple[float, float] | None
) -> dict[str, Any]:
    """The configuration's fields on routing."""
    routed = any(len(menu) > 1 for menu in menus)
    mode = settings.get("routing_mode", "threshold")
    if mode not in ("threshold", "soft", "hard"):
        raise UserError(f"cfg has routing_mode={mode!r}: known are threshold, soft and hard")
    if not routed or mode != "threshold":
        if thresholds is not None:
            by = f"its routing_mode is {mode}" if routed else "none of its layers has a choice"
            raise UserError(f"thresholds {thresholds} for a checkpoint that has no use for them, {by}: drop them")
        return {"router": mode} if routed else {}
    said = [settings.get("tau_low"), settings.get("tau_high")]
    if thresholds is None and None in said:
        raise UserError(
            "routes by thresholds and does not say which: give those that it was trained with by --thresholds LOW HIGH "
            "(published: 0.855 0.865 at 17M parameters, 0.8935 0.8973 at 400M)"
        )
    return {"calibration": "fixed", "entropy_thresholds": said if thresholds is None else thresholds}


def _fill(model: ChiarForCausalLM | ChiarForSequenceClassification, weights: dict[str, Tensor]) -> None:
    """Copy every weight to its place; all or nothing."""
    prefix = _prefix(weights)
    embedding, head = f"{prefix}token_emb.weight", f"{prefix}lm_head.weight"
    baseline = any(name.startswith(f"{prefix}attns.") for name in weights)
    # Of theirs to ours: three for queries, keys and values, in the order in which a layer has them; else one.
    places: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(_their_name(name, prefix, baseline), []).append(parameter)
    if head in weights or not _is_classifier(weights):  # a classifier may have kept it, and has no use for it
        places[head] = places[embedding]
    shapes = {name: (sum(map(len, parts)), *parts[0].shape[1:]) for name, parts in places.items()}
    flaws = {
        "missing": [name for name in places if name not in weights],
        "unknown": [name for name in weights if name not in places and not _ANGLES.search(name)],
        "of a wrong shape": [
            f"{name} {tuple(weights[name].shape)}, not {shape}"
            for name, shape in shapes.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    if any(flaws.values()):
        said = "; ".join(f"{what}: {_listed(names)}" for what, names in flaws.items() if names)
        raise UserError(f"no checkpoint of the author's code: {said}")
    if head in places and not torch.equal(weights[head], weights[embedding]):
        raise UserError(f"{head} is not {embedding}, and the author's code ties them: not loaded")
    with torch.no_grad():
        for name, parts in places.items():
            scale = FILTER_SCALE if name.endswith(".dct_mix.w") else 1.0
            for part, value in zip(parts, weights[name].split([len(part) for part in parts]), strict=True):
                part.copy_(scale * value)


def _their_name(ours: str, prefix: str, baseline: bool) -> str:
    name = ours
    for pattern, replacement in [*_OURS_TO_THEIRS, *([_THEIR_BASELINE] if baseline else [])]:
        name = re.sub(pattern, replacement, name)
    return name if name.startswith("classifier.") else prefix + name


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
