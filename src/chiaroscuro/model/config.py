"""`ChiarConfig`: everything that makes one CHIAR-Former differ from another, checked at construction.

A model is a list of layers and a layer is a menu of operators, so one class is the full-attention baseline
(`[["attention"]] * L`), the paper's two versions, every ablation between them, and what a user invents.
"""

import copy
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from chiaroscuro.auto_classes import AUTO_MAP, HUB_MODULE, write_hub_module
from chiaroscuro.errors import UserError, suggest
from chiaroscuro.files import refuse_file
from chiaroscuro.layers import Operator, Router, ScoreRouter, check_seed, find_operator, find_router, pick_thresholds
from chiaroscuro.layers.block import Execution, NormPlacement
from chiaroscuro.layers.feed_forward import FEED_FORWARDS, FeedForwardKind
from chiaroscuro.layers.meta_router import Pooling
from chiaroscuro.layers.norms import NormType
from chiaroscuro.layers.operator import hosts, is_number, is_whole, make_options, with_defaults
from chiaroscuro.layers.packed_tokens import AttentionContext
from chiaroscuro.layers.registry import Entry, check_kv_heads, hosts_of, key_side, refuse_model_s_options, split_entry
from chiaroscuro.layers.short_convolution import LARGEST_KERNEL
from chiaroscuro.model.spread import SPREADS, spread
from chiaroscuro.ops.spectral import Spectrum

ClassifierPooling = Literal["mean", "last"]
ClassifierHead = Literal["linear", "mlp"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "feed_forward": get_args(FeedForwardKind),
    "norm": get_args(NormPlacement),
    "norm_type": get_args(NormType),
    "meta_router": ("none", *get_args(Pooling)),
    "spectrum": get_args(Spectrum),
    "calibration": ("running", "fixed"),
    "execution": get_args(Execution),
    "attention_context": get_args(AttentionContext),
    "classifier_pooling": get_args(ClassifierPooling),
    "classifier_head": get_args(ClassifierHead),
}
_POSITIVE = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
)
_INTEGERS = _POSITIVE[:-1]
# Far beyond any model; products of these still fit the 64 bits of a tensor's size.
_LARGEST = {"num_hidden_layers": 10_000, "hidden_size": 2**24, "intermediate_size": 2**26}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
"""What a classifier's `problem_type` may be, beside None."""

_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_SHARES = ("attention_share", "kv_share", "hidden_dropout", "attention_dropout")
_SPREADS = dict(SPREADS.values())
# What transformers itself passes to a config's constructor, beside the fields: they are not the user's to misspell.
_LIBRARY_FIELDS = frozenset(PreTrainedConfig().to_dict()) | {
    "_commit_hash",
    "rope_scaling",
    "_name_or_path",
    "_attn_implementation",
    "attn_implementation",
    "architectures",
    "auto_map",
    "name_or_path",
    "num_labels",
    "torch_dtype",
}


_SAVED = "_saved_by_chiaroscuro"
"""Marks the fields that `from_dict` passes to the constructor, among which unknown names are no mistake."""


class ChiarConfig(PreTrainedConfig):
    """The configuration of a CHIAR-Former.

    Args:
        vocab_size: V, tokens of the vocabulary.
        hidden_size: d, the features of a token.
        num_hidden_layers: L; the number of menus where `operators` is given.
        num_attention_heads: h; must divide d into heads of even width.
        num_key_value_heads: heads of keys and values, each shared by h / this many query heads; h unless given.
        head_dim: c, the width of a head; d / h unless given.
        bias: whether attention's projections and the gelu feed-forward have biases. (Llama: false.)
        feed_forward: `"gelu"` (the paper: two matrices and their biases) or `"swiglu"` (Llama's: three matrices).
        intermediate_size: the feed-forward's width; unless given 4d, of swiglu 8/3 d, which has as many parameters.
        max_position_embeddings: the longest sequence that the model takes.
        rope_theta: the base of the rotary angles.
        rope_parameters: scaling of the rotary angles as in transformers, `{"rope_type": "linear", "factor": 2.0}`. A
            `rope_theta` in it counts for more than the field's. `longrope` has its long factors where
            `max_position_embeddings` exceeds its original one, whatever the length of a sequence, and `dynamic` changes
            nothing, since longer sequences are refused.
        hidden_dropout: on embeddings, sub-layer outputs and inside the feed-forward, in training.
        attention_dropout: on attention probabilities, in training.
        norm: `"pre"` (y = x + op(N(x))) or `"post"` (the paper: y = N(x + op(x))).
        norm_type: N, `"layer"` (LayerNorm) or `"rms"` (RMSNorm, Llama's).
        norm_epsilon: what N adds to the variance; 1e-5 for LayerNorm and 1e-6 for RMSNorm unless given.
        embedding_norm: a LayerNorm without parameters on the embeddings. Without it a layer that adds LN(x) repairs
            their small scale, and a comparison with a model that has no such layer is not fair.
        operators: a menu for every layer: lists of `"dct"`, `"conv"`, `"rbf"`, `"local"`, `"attention"` or registered
            names, in order of cost. `["local", "attention"]` is one attention, of which the tokens of `local` see the
            window alone. An entry may be a mapping from the name to options of that operator alone,
            `["dct", {"attention": {"num_attention_heads": 2}}]`; options left out take the values of the fields of the
            same names. Unless given: dct first, attention last, dct or attention in between.
        short_conv: k, the tokens of a short convolution in every layer before its operators: what these and the router
            see of x, N(x) or with post-norm x, is first added to its own causal depthwise convolution over k tokens.
            Its weights start at 0. Unless given, there is none.
        router: which operator gets which token. By a score against thresholds: `"threshold"` (the spectral entropy),
            `"permuted"` (that of shuffled features), `"random"` (a hash of layer, position and token), `"norm"` (of
            the layer's input), `"learned"` (a projection, which scales the last operator's output too), `"fitted"` (a
            score that `chiaroscuro.fit` sets on a trained model; option `hidden`). By weights: `"soft"`, `"hard"`. Or a
            registered name, or as in a menu a mapping from the name to options.
        router_seed: of what `"random"` and `"permuted"` draw.
        attention_share: ρ, the share of tokens that running calibration sends to a menu's last operator.
        attention_spread: a weight for each of the L layers. The shares of those that are routed are in proportion to
            it, but ρ / 4 at least and 1 at most, and ρ is their mean. `chiaroscuro.fit` can set it. Unless given, all
            have ρ.
        attention_context: what a token that is routed to attention attends to, beyond its window if there is one:
            `"all"` earlier tokens (the paper), only the `"routed"` ones among them (ρ² of the scores and ρ of the keys
            and values), or those that are `"kept"`, which a router of their own decides when they are written.
        window: w, how many tokens `attention` and `local` attend to in any case, their own included. Unless given,
            attention has no window: a token sees itself, and the attention_context.
        sinks: s, how many tokens at the beginning of a sequence are seen from everywhere.
        kv_share: the share of tokens that running calibration keeps where attention_context is `"kept"`.
        kv_spread: what `attention_spread` is to ρ, to `kv_share`.
        kv_router: which tokens are kept: a router by a score, named as `router` is. Its option `heads` lets each of the
            key-value heads keep tokens of its own, where the router has it.
        execution: `"sparse"` runs each operator on its own tokens alone; `"dense"` runs each on all tokens and drops
            what was not asked for, which computes the same and saves nothing. Unless given: sparse wherever each token
            gets one operator; dense for `router="soft"`. `router="hard"` trains densely under both.
        calibration: `"running"` moves the thresholds towards ρ while training; `"fixed"` leaves them as given.
        rbf_causal: whether rbf masks later tokens. False is the published form, in which a token **reads the future**.
        entropy_thresholds: (τ_low, τ_high) for `calibration="fixed"`: three operators split at both, dct/rbf at the
            low one, rbf/attention at the high one, any other pair at their mean.
        meta_router: what the gate of the first layer is computed from: `"none"`, `"causal"`, `"sequence"` (**reads the
            future**) or `"batch"` (the paper; **reads the future and the batch's other rows**). Unless given:
            `"causal"` where any layer has a choice, `"none"` for the baselines.
        spectrum: `"orthonormal"`, or `"reference"` to route as the author's code does.
        collapse_penalty: λ; the training loss gets −λ Σ_layers (entropy of the mean router weights). For soft and hard.
        task_labels: of `ChiarForMixedTasks`, how many labels each classification task has, by its name.
        use_cache: whether generation caches. Unless given: where the model can. With `meta_router="batch"` or
            `"sequence"` it can't, nor with an operator that keeps no state.
        tie_word_embeddings: the LM head shares the embedding's weights.
        classifier_pooling: what a classifier of texts scores: the `"mean"` of the real tokens, or the `"last"` of them.
        classifier_head: what scores it: `"linear"`, or `"mlp"`, the author's: d → d, GELU, dropout, d → labels.
        pad_token_id: of the tokenizer; as `bos_token_id` and `eos_token_id`.
        bos_token_id: see there.
        eos_token_id: see there.
        kwargs: what transformers itself adds (`dtype`, `attn_implementation`, …); any other name is an error.

    Raises:
        UserError: an unknown field, an unknown name or an impossible combination, named with its value.

    """

    model_type = "chiar"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (transformers reads it so)

    vocab_size: int = 8192
    hidden_size: int = 128
    num_hidden_layers: int | None = None
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    bias: bool = True
    feed_forward: FeedForwardKind = "gelu"
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    norm: NormPlacement = "pre"
    norm_type: NormType = "layer"
    norm_epsilon: float | None = None
    embedding_norm: bool = True
    operators: list[list[Any]] | None = None
    short_conv: int | None = None
    router: Entry = "threshold"
    router_seed: int = 0
    attention_share: float = 0.25
    attention_spread: list[float] | None = None
    attention_context: AttentionContext = "all"
    window: int | None = None
    sinks: int = 0
    kv_share: float = 0.25
    kv_spread: list[float] | None = None
    kv_router: Entry = "threshold"
    rbf_causal: bool = True
    execution: Execution | None = None
    calibration: str = "running"
    entropy_thresholds: list[float] | None = None
    meta_router: Literal["none"] | Pooling | None = None
    spectrum: Spectrum = "orthonormal"
    collapse_penalty: float = 0.0
    task_labels: dict[str, int] | None = None
    use_cache: bool | None = None
    tie_word_embeddings: bool = True
    classifier_pooling: ClassifierPooling = "mean"
    classifier_head: ClassifierHead = "linear"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, and check."""
        if not kwargs.pop(_SAVED, False):
            self.refuse_unknown(kwargs, library=_LIBRARY_FIELDS)
        for field in get_annotations(ChiarConfig):
            if hasattr(self, field):
                setattr(self, field, _plain(getattr(self, field)))
        self._check_library_fields()
        labels = _plain(kwargs.get("num_labels"))
        if labels is not None and not is_whole(labels):
            raise UserError(f"num_labels={labels!r}: must be a whole number")
        self._check_rope()
        self.rope_parameters = None if self.rope_parameters is None else dict(self.rope_parameters)
        super().__post_init__(**kwargs)  # fills in rope_parameters
        rope = dict(self.rope_parameters or {})
        self.rope_theta = rope.pop("rope_theta")
        if rope.pop("rope_type") == "default" and not rope:  # all is said by rope_theta
            self.rope_parameters = None
        if self.operators is None:
            layers = 6 if self.num_hidden_layers is None else self.num_hidden_layers
            self._check_number("num_hidden_layers", layers)
            self.operators = default_operators(layers)
        else:
            self.operators = _as_menus(self.operators)
        if self.num_hidden_layers is None:
            self.num_hidden_layers = len(self.operators)
        if self.intermediate_size is None:
            self._check_number("hidden_size", self.hidden_size)
            self._check_choice("feed_forward")
            self.intermediate_size = FEED_FORWARDS[self.feed_forward].default_hidden(self.hidden_size)
        if self.entropy_thresholds is not None:
            self.entropy_thresholds = _as_thresholds(self.entropy_thresholds)
        if self.meta_router is None:
            self.meta_router = "causal" if self.routed_layers else "none"
        if self.execution is None:
            self.execution = "sparse" if _router_class(self.router).one_operator_per_token else "dense"
        # Whether the model can be cached is known once the rest is known to be possible.
        cached = self.use_cache
        self.use_cache = False if cached is None else cached
        self.check()
        if cached is None:
            self.use_cache = not self.uncacheable()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ChiarConfig":
        """The configuration of that name, with some fields changed.

        Args:
            name: one of `presets()`.
            changes: fields to set otherwise. What hangs on a changed field follows it: another depth continues the
                pattern of the menus, a router not by entropy or running calibration drops the fixed thresholds.

        Raises:
            UserError: an unknown preset or field, or a change that makes the configuration impossible.

        """
        if not isinstance(name, str) or name not in _PRESETS:
            raise UserError(f"unknown preset {name!r}: {suggest(name, _PRESETS)}")
        fields = copy.deepcopy(_PRESETS[name][1])
        changes = {field: _plain(value) for field, value in changes.items()}
        layers, menus = changes.get("num_hidden_layers"), fields["operators"]
        if isinstance(layers, int) and 0 < layers <= _LARGEST["num_hidden_layers"] and "operators" not in changes:
            if menus == [menus[0]] * len(menus):
                fields["operators"] = [menus[0]] * layers
            elif menus == default_operators(len(menus)):
                fields["operators"] = default_operators(layers)
        if changes.get("calibration") == "running" or not _routes_by_entropy(changes.get("router", "threshold")):
            fields.pop("entropy_thresholds", None)
            fields.pop("calibration", None)
        if changes.get("calibration") == "fixed" and "entropy_thresholds" not in changes | fields:
            raise UserError(f"preset {name!r} with calibration='fixed': give entropy_thresholds=[low, high] too")
        if "attention_share" in changes and (fields | changes).get("calibration") == "fixed":
            raise UserError(
                f"attention_share={changes['attention_share']!r} with preset {name!r}, whose thresholds are fixed and "
                "follow no share: set calibration='running' too"
            )
        return cls(**(fields | changes))

    @classmethod
    def presets(cls) -> dict[str, str]:
        """Every preset's name and a line on what it is."""
        return {name: description for name, (description, _) in _PRESETS.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does. What a saved config has beside our fields is kept: only a constructor's is an error.

        Raises:
            UserError: a keyword is a misspelt field.

        """
        known = get_annotations(ChiarConfig)
        for name in kwargs.keys() - known.keys():
            if close := get_close_matches(name, known, n=1, cutoff=0.85):
                raise UserError(f"unknown field {name}: did you mean {close[0]}?")
        given = {name: _plain(value) for name, value in kwargs.items()}
        return super().from_dict({**config_dict, _SAVED: True}, **given)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As transformers does, and write the module with which `trust_remote_code=True` finds our classes."""
        refuse_file(Path(save_directory), str(save_directory))
        given = getattr(self, "auto_map", None) or {}
        # From the Hub it comes back as "owner/name--module.Class": what is saved has a module of its own.
        self.auto_map = AUTO_MAP | {kind: place for kind, place in given.items() if HUB_MODULE not in str(place)}
        os.makedirs(save_directory, exist_ok=True)
        write_hub_module(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing for our own class, whose source is not to be copied beside weights: `save_pretrained` does more."""
        if cls is not ChiarConfig:
            super().register_for_auto_class(auto_class)

    @property
    def menus(self) -> list[list[str]]:
        """The names of `operators`, which construction has filled in."""
        return [[split_entry(entry)[0] for entry in menu] for menu in self.operators or []]

    @property
    def entries(self) -> list[list[tuple[type[Operator], Any]]]:
        """For each layer, the class and the options of each operator on its menu; of two that are one module the same.

        Raises:
            UserError: an unknown operator or option, or an impossible one.

        """
        fields = self.fields()
        found = []
        for menu in self.operators or []:
            given, host = dict(map(split_entry, menu)), hosts_of(menu)
            named = [(find_operator(name), given[host[name]]) for name in given]
            found.append([(cls, make_options(cls, with_defaults(cls, options, fields))) for cls, options in named])
        return found

    @property
    def windows(self) -> list[int]:
        """The windows of the operators that have one."""
        found = [getattr(options, "window", None) for menu in self.entries for _, options in menu]
        return [window for window in found if window is not None]

    @property
    def router_class(self) -> type[Router]:
        """The class of the router."""
        return _router_class(self.router)

    @property
    def kv_router_class(self) -> type[Router]:
        """The class of the key side's router."""
        return _router_class(self.kv_router, "kv_router")

    @property
    def router_options(self) -> Any:
        """Its options, those that the entry leaves out from the fields of the config."""
        router = self.router_class
        return make_options(router, with_defaults(router, split_entry(self.router)[1], self.fields()))

    @property
    def kv_router_options(self) -> Any:
        """Those of the key side's router, likewise."""
        router = self.kv_router_class
        return make_options(router, with_defaults(router, split_entry(self.kv_router)[1], key_side(self.fields())))

    def fields(self, layer: int | None = None) -> dict[str, Any]:
        """Our fields by name: what operators and routers are built with. Of a layer its own shares and `thresholds`."""
        fields = {name: getattr(self, name) for name in get_annotations(ChiarConfig) if name[0] != "_"}
        if layer is None:
            return fields
        shared = [name for name, weights in _SPREADS.items() if getattr(self, weights) is not None]
        shares = {name: by_layer[layer] for name in shared if layer in (by_layer := self.layer_shares(name))}
        return fields | shares | {"thresholds": self.thresholds_of(layer)}

    def layer_shares(self, field: str, mean: float | None = None) -> dict[int, float]:
        """The share of each layer that has one, by layer number.

        Args:
            field: `"attention_share"` or `"kv_share"`.
            mean: the mean over these layers; the field's own unless given.

        """
        mean = float(getattr(self, field) if mean is None else mean)
        layers = self.routed_layers if field == "attention_share" else self.keeping_layers
        weights = getattr(self, _SPREADS[field])
        if weights is None:
            return dict.fromkeys(layers, mean)
        return dict(zip(layers, spread([weights[i] for i in layers], mean), strict=True)) if layers else {}

    @property
    def shared_layers(self) -> list[int]:
        """The layers in which several operators of the menu are one module."""
        named = [{name: find_operator(name) for name in menu} for menu in self.menus]
        return [i for i, classes in enumerate(named) if any(host != name for name, host in hosts(classes).items())]

    @property
    def keeping_layers(self) -> list[int]:
        """The layers in which a router of the key side decides who is kept."""
        return sorted({i for i, _ in self._keeping()})

    def _keeping(self) -> list[tuple[int, tuple[type[Operator], Any]]]:
        """The operators that read its decisions, with their layers and their options."""
        found = []
        for i, (menu, entries) in enumerate(zip(self.menus, self.entries, strict=True)):
            host = hosts({name: cls for name, (cls, _) in zip(menu, entries, strict=True)})
            hosting = (entry for name, entry in zip(menu, entries, strict=True) if host[name] == name)
            found += [(i, (cls, options)) for cls, options in hosting if cls.keeps(options)]
        return found

    @property
    def routed_layers(self) -> list[int]:
        """The layers that have a choice."""
        return [i for i, menu in enumerate(self.menus) if len(menu) > 1]

    @property
    def follows_share(self) -> bool:
        """Whether `attention_share` says how many tokens go to the last operators: not with soft or hard routers."""
        return _routes_by_score(self.router) and self.calibration == "running"

    def thresholds_of(self, layer: int) -> tuple[float, ...] | None:
        """The fixed thresholds of a layer's menu; None where they are calibrated or there is no choice."""
        menu = self.menus[layer]
        if self.entropy_thresholds is None or len(menu) == 1:
            return None
        low, high = self.entropy_thresholds
        return pick_thresholds([find_operator(name).cost for name in menu], low, high)

    def check(self) -> None:
        """Raise a UserError for the first thing that is impossible; the model runs it on what was changed since."""
        self._check_library_fields()
        for field in _POSITIVE:
            self._check_number(field, getattr(self, field))
        for field in _SHARES:
            value = getattr(self, field)
            if not is_number(value) or not 0 <= value <= 1:
                raise UserError(f"{field}={value!r}: must be a number from 0 to 1")
        for field in ("hidden_dropout", "attention_dropout"):
            if getattr(self, field) == 1:
                raise UserError(f"{field}=1 drops everything: must be below 1")
        if self.norm_epsilon is not None and not (_is_finite(self.norm_epsilon) and self.norm_epsilon > 0):
            raise UserError(f"norm_epsilon={self.norm_epsilon!r}: must be a positive number")
        longest = min(LARGEST_KERNEL, self.max_position_embeddings)
        if self.short_conv is not None and not (is_whole(self.short_conv) and 1 <= self.short_conv <= longest):
            raise UserError(
                f"short_conv={self.short_conv!r}: must be a whole number of tokens from 1 to {longest} (the smaller of "
                f"max_position_embeddings and {LARGEST_KERNEL}), or null for none"
            )
        for field in ("bias", "embedding_norm", "rbf_causal", "tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"{field}={getattr(self, field)!r}: must be true or false")
        for field in _CHOICES:
            self._check_choice(field)
        check_seed(self.router_seed)
        if not _is_finite(self.collapse_penalty) or self.collapse_penalty < 0:
            raise UserError(f"collapse_penalty={self.collapse_penalty!r}: must be 0 or a positive number")
        for field in _TOKEN_IDS:
            value = getattr(self, field)
            for token in value if isinstance(value, list) and field == "eos_token_id" else [value]:
                if token is not None and (not is_whole(token) or not 0 <= token < self.vocab_size):
                    raise UserError(
                        f"{field}={value!r}: must be a token of the vocabulary, vocab_size={self.vocab_size}"
                    )
        if self.task_labels is not None and not isinstance(self.task_labels, dict):
            raise UserError(f"task_labels={self.task_labels!r}: give each task's number of labels, by its name")
        for task, labels in (self.task_labels or {}).items():
            # The heads stand in a ModuleDict, whose own attributes and dotted paths are no keys.
            named = isinstance(task, str) and task and "." not in task and not hasattr(nn.ModuleDict, task)
            if not named or task == "training" or not is_whole(labels) or labels < 2:
                raise UserError(
                    f"task_labels={self.task_labels!r}: give each task a name without dots that is no attribute of "
                    "ModuleDict, and 2 labels or more"
                )
        self._check_rope()
        self._check_menus()
        self._check_spreads()
        self._check_router()
        if self.use_cache and (reason := self.uncacheable()):
            raise UserError(f"use_cache=True with {reason}: set use_cache=False")

    def _check_library_fields(self) -> None:
        """Refuse what transformers would fail on, of the fields that every model has."""
        if isinstance(self.dtype, str) and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise UserError(f"dtype={self.dtype!r}: give the name of a type of torch, such as bfloat16")
        if self.id2label is not None and not isinstance(self.id2label, Mapping):
            raise UserError(f"id2label={self.id2label!r}: give a mapping, as in {{0: neg, 1: pos}}")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise UserError(f"problem_type={self.problem_type!r}: {suggest(str(self.problem_type), PROBLEM_TYPES)}")

    def _check_rope(self) -> None:
        if self.rope_parameters is not None and not isinstance(self.rope_parameters, Mapping):
            raise UserError(f"rope_parameters={self.rope_parameters!r}: give a mapping, as transformers has it")
        if self.rope_parameters is not None and not all(isinstance(name, str) for name in self.rope_parameters):
            raise UserError(f"rope_parameters={self.rope_parameters!r}: names are strings, as transformers has them")

    def _check_menus(self) -> None:
        self.operators = _as_menus(self.operators)
        if len(self.operators) != self.num_hidden_layers:
            raise UserError(
                f"operators has {len(self.operators)} menus, num_hidden_layers={self.num_hidden_layers}: "
                "give one menu a layer"
            )
        for i, menu in enumerate(self.operators):
            named = [split_entry(entry)[0] for entry in menu]
            try:
                costs = [find_operator(name).cost for name in named]
            except UserError as error:
                raise UserError(f"operators[{i}]={menu}: {error}") from None
            if not menu or len(set(named)) < len(named):
                raise UserError(f"operators[{i}]={menu}: a menu names at least one operator, and none twice")
            ranked = [cost for cost in costs if cost is not None]
            if ranked != sorted(ranked):
                raise UserError(
                    f"operators[{i}]={menu}: list the cheapest operator first (dct, conv, rbf, local, attention)"
                )
        fields = self.fields()
        for i, menu in enumerate(self.operators):
            given = dict(map(split_entry, menu))
            try:
                host = hosts_of(menu)
            except UserError as error:
                raise UserError(f"operators[{i}]={menu}: {error}") from None
            for name in given:
                cls, options = find_operator(name), given[host[name]]
                try:
                    cls.check(self.hidden_size, make_options(cls, with_defaults(cls, options, fields)))
                except UserError as error:
                    if not options:  # then a field of the model is to blame, and no single menu
                        raise
                    raise UserError(f"operators[{i}]={menu}: {error}") from None

    def _check_spreads(self) -> None:
        for field in _SPREADS.values():
            weights = getattr(self, field)
            if weights is None:
                continue
            listed = isinstance(weights, Sequence) and not isinstance(weights, str)
            if not listed or not all(_is_finite(weight) and weight >= 0 for weight in weights):
                raise UserError(
                    f"{field}={weights!r}: give a list of weights, 0 or more, one a layer, or null for none"
                )
            if len(weights) != self.num_hidden_layers:
                raise UserError(
                    f"{field} has {len(weights)} weights, num_hidden_layers={self.num_hidden_layers}: give one a layer"
                )
            setattr(self, field, [float(weight) for weight in weights])

    def _check_router(self) -> None:
        router, by_score = self.router_class, _routes_by_score(self.router)
        refuse_model_s_options("router", self.router)
        try:
            options = self.router_options
        except UserError as error:
            raise UserError(f"router={self.router!r}: {error}") from None
        if getattr(options, "heads", 1) != 1:
            raise UserError(
                f"router={self.router!r}: a token goes to one operator with all of its heads; leave heads out, or give "
                "them to kv_router"
            )
        self._check_kv_router()
        if self.shared_layers and (router.trains_densely or not router.one_operator_per_token):
            i = self.shared_layers[0]
            raise UserError(
                f"operators[{i}]={self.menus[i]} with router={self.router!r}, which weighs all operators' outputs: "
                "two of these are one module, which gives a token one output; use a router by a score"
            )
        if self.entropy_thresholds is not None:
            self.entropy_thresholds = _as_thresholds(self.entropy_thresholds)
            if self.calibration == "running":
                raise UserError(
                    f"entropy_thresholds={self.entropy_thresholds} with calibration='running', which would move them: "
                    "set calibration='fixed' or drop entropy_thresholds"
                )
            if not by_score:
                raise UserError(
                    f"entropy_thresholds={self.entropy_thresholds} with router={self.router!r}, which has none: "
                    "use router='threshold' or drop entropy_thresholds"
                )
            if not _routes_by_entropy(self.router):
                raise UserError(
                    f"entropy_thresholds={self.entropy_thresholds} with router={self.router!r}, whose score is no "
                    "entropy: use calibration='running', or router='threshold'"
                )
            for i in self.routed_layers:
                if len(self.menus[i]) > 3:
                    raise UserError(
                        f"operators[{i}]={self.menus[i]} with entropy_thresholds={self.entropy_thresholds}: two "
                        "thresholds split at most three operators; use calibration='running'"
                    )
        elif self.calibration == "fixed" and by_score and self.routed_layers:
            raise UserError("calibration='fixed' without entropy_thresholds: give entropy_thresholds=[low, high]")
        if self.collapse_penalty and by_score:
            raise UserError(
                f"collapse_penalty={self.collapse_penalty} with router={self.router!r}, which gives no weights to "
                "penalise: use router='soft' or 'hard'"
            )
        if self.collapse_penalty and not self.routed_layers:
            raise UserError(
                f"collapse_penalty={self.collapse_penalty} with operators={self.operators}, no layer of which has "
                "a choice to penalise: drop collapse_penalty"
            )
        if not router.one_operator_per_token:
            if self.execution == "sparse":
                raise UserError(
                    f"execution='sparse' with router={self.router!r}, which needs every operator's output for every "
                    "token: use execution='dense', or router='threshold' or 'hard'"
                )
            contexts = (getattr(options, "attention_context", None) for menu in self.entries for _, options in menu)
            if "routed" in (self.attention_context, *contexts):
                raise UserError(
                    f"attention_context='routed' with router={self.router!r}, under which every token attends: use "
                    "attention_context='all'"
                )

    def _check_kv_router(self) -> None:
        router = _router_class(self.kv_router, "kv_router")
        if not issubclass(router, ScoreRouter):
            raise UserError(
                f"kv_router={self.kv_router!r}: the key side keeps a token or drops it by a score; choose threshold, "
                "random, learned, …"
            )
        refuse_model_s_options("kv_router", self.kv_router)
        try:
            options = self.kv_router_options
        except UserError as error:
            raise UserError(f"kv_router={self.kv_router!r}: {error}") from None
        heads = getattr(options, "heads", 1)
        keeping = self._keeping()
        for i, (cls, own) in keeping:
            try:
                check_kv_heads(self.kv_router, heads, cls.key_heads(self.hidden_size, own))
            except UserError as error:
                raise UserError(f"operators[{i}]={self.operators[i] if self.operators else []}: {error}") from None
        if not keeping:  # then it chooses nothing yet
            check_kv_heads(self.kv_router, heads, self.num_key_value_heads or self.num_attention_heads)

    def uncacheable(self, dense: bool = False) -> str:
        """Why no cache can serve this model, or this one in dense execution; empty where one can."""
        dense = dense or self.execution == "dense"
        if self.meta_router in ("batch", "sequence"):
            return f"meta_router={self.meta_router!r}, whose gate reads tokens that a cache has not seen yet"
        for i, (menu, entries) in enumerate(zip(self.menus, self.entries, strict=True)):
            for name, (cls, options) in zip(menu, entries, strict=True):
                routed = i in self.routed_layers and getattr(options, "attention_context", None) == "routed"
                if routed and dense and not getattr(options, "near_and_far", False):
                    return "attention_context='routed' under execution='dense', whose keys are of all tokens"
                if reason := cls.uncacheable(options):
                    return f"operators[{i}]={menu}: {name!r} {reason}"
        return ""

    def _check_number(self, field: str, value: Any) -> None:
        whole = field in _INTEGERS
        if not (is_whole(value) if whole else _is_finite(value)) or value <= 0:
            raise UserError(f"{field}={value!r}: must be a positive {'whole number' if whole else 'number'}")
        if whole and value > (largest := _LARGEST.get(field, 2**31)):
            raise UserError(f"{field}={value!r}: must be at most {largest:,}")

    def _check_choice(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, str) or value not in _CHOICES[field]:
            raise UserError(f"{field}={getattr(self, field)!r}: choose one of {', '.join(_CHOICES[field])}")

    @staticmethod
    def refuse_unknown(changes: Mapping[str, Any], library: Collection[str] = ()) -> None:
        """Raise a UserError for the first name that is no field of ours.

        Args:
            changes: values by name.
            library: what transformers may pass beside them.

        """
        fields = get_annotations(ChiarConfig)
        for name, value in changes.items():
            if name not in fields and name not in library:
                raise UserError(f"unknown field {name}={value!r}: {suggest(name, fields)}")


def default_operators(layers: int) -> list[list[Any]]:
    """The paper's pattern: dct first, a choice in between, full attention last (one layer: a choice)."""
    if layers == 1:
        return [["dct", "attention"]]
    return [["dct"], *[["dct", "attention"] for _ in range(layers - 2)], ["attention"]]


def _as_menus(operators: Any) -> list[list[Any]]:
    well_formed = isinstance(operators, Sequence) and not isinstance(operators, str) and len(operators) > 0
    if not well_formed or not all(isinstance(menu, Sequence) and not isinstance(menu, str) for menu in operators):
        raise UserError(f"operators={operators!r}: give a list of menus, one a layer, such as [['dct'], ['attention']]")
    for i, menu in enumerate(operators):
        for entry in menu:
            try:
                split_entry(entry)
            except UserError as error:
                raise UserError(f"operators[{i}]={menu}: {error}") from None
    return [list(menu) for menu in operators]


def _as_thresholds(thresholds: Any) -> list[float]:
    pair = list(thresholds) if isinstance(thresholds, Sequence) and not isinstance(thresholds, str) else []
    if len(pair) != 2 or not all(map(_is_no_nan, pair)) or not pair[0] <= pair[1]:
        raise UserError(f"entropy_thresholds={thresholds!r}: give two numbers [low, high], low ≤ high")
    return [float(t) for t in pair]


def _routes_by_score(router: Any) -> bool:
    return issubclass(_router_class(router), ScoreRouter)


def _routes_by_entropy(router: Any) -> bool:
    cls = _router_class(router)
    return issubclass(cls, ScoreRouter) and cls.scores_entropy


def _plain(value: Any) -> Any:
    """A scalar of NumPy is a number like any other, but JSON doesn't know it."""
    return value.item() if isinstance(value, np.generic) else value


def _router_class(router: Any, field: str = "router") -> type[Router]:
    try:
        name, _ = split_entry(router)
    except UserError as error:
        raise UserError(f"{field}={error}") from None
    return find_router(name)


def _is_finite(value: Any) -> bool:
    """A number that is none of the infinities, as a float: whole ones can be too large for that."""
    return is_number(value) and abs(value) <= sys.float_info.max


def _is_no_nan(value: Any) -> bool:
    return _is_finite(value) or (isinstance(value, float) and math.isinf(value))


_PAPER: dict[str, Any] = {
    "vocab_size": 50257,
    "max_position_embeddings": 256,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "norm": "post",
    "embedding_norm": False,
    "meta_router": "none",
}
_V1: dict[str, Any] = {
    **_PAPER,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "calibration": "fixed",
    "entropy_thresholds": [0.855, 0.865],
}
_V2: dict[str, Any] = {**_PAPER, "hidden_size": 1024, "num_attention_heads": 16}
_SMALL: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 8192}
_REACH: dict[str, Any] = {
    "sinks": 4,
    "attention_context": "kept",
    "router": "fitted",
    "kv_router": "fitted",
    "meta_router": "none",
}
_BASELINE_THRESHOLDS: dict[str, Any] = {"calibration": "running", "entropy_thresholds": None}

_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": (
        "ours, for two CPU cores: 6 layers, d 128, dct or attention by a calibrated threshold, pre-norm",
        {**_SMALL, "operators": default_operators(6), "meta_router": "causal"},
    ),
    "small-baseline": (
        "the same size with full attention in every layer",
        {**_SMALL, "operators": [["attention"]] * 6, "meta_router": "none"},
    ),
    "reach-small": (
        "near and far: 6 layers, d 128, window 64; a quarter looks far, a quarter is kept, by fitted scores",
        {**_SMALL, **_REACH, "operators": [["local", "attention"]] * 6, "window": 64},
    ),
    "reach-400m": (
        "near and far in the size of the paper's v2: 28 layers, d 1024, window 128, up to 32,768 tokens",
        {
            **_REACH,
            "vocab_size": 50257,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "max_position_embeddings": 32768,
            "operators": [["local", "attention"]] * 28,
            "window": 128,
        },
    ),
    "v1-three-operator": (
        "paper v1, 17M: dct · dct/rbf · rbf/attention · attention",
        {**_V1, "operators": [["dct"], ["dct", "rbf"], ["rbf", "attention"], ["attention"]]},
    ),
    "v1-all-three": (
        "paper v1, 17M: dct · all three · all three · attention",
        {
            **_V1,
            "operators": [["dct"], ["dct", "rbf", "attention"], ["dct", "rbf", "attention"], ["attention"]],
        },
    ),
    "v1-dct-attention": (
        "paper v1, 17M: dct · dct/attention · dct/attention · attention",
        {**_V1, "operators": default_operators(4)},
    ),
    "v1-baseline": (
        "paper v1, 17M: full attention in 4 layers",
        {**_V1, **_BASELINE_THRESHOLDS, "operators": [["attention"]] * 4},
    ),
    "v2-400m": (
        "paper v2, 400M: 28 layers, d 1024, dct or attention, MetaRouter over the batch",
        {
            **_V2,
            "operators": default_operators(28),
            "meta_router": "batch",
            "calibration": "fixed",
            "entropy_thresholds": [0.8935, 0.8973],
        },
    ),
    "v2-400m-baseline": (
        "paper v2, 404M: full attention in 28 layers",
        {**_V2, "operators": [["attention"]] * 28},
    ),
}
