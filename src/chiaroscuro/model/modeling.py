"""`ChiarModel` and `ChiarForCausalLM`, as Hugging Face classes.

The model knows the batch, the padding, the documents in a row and the cache; its layers learn of them by a `Context`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from chiaroscuro.errors import UserError
from chiaroscuro.files import refuse_file
from chiaroscuro.layers import (
    Context,
    ExactBuffers,
    MetaRouter,
    Operator,
    RoutedBlock,
    Router,
    Routing,
    ScoreRouter,
    Thresholds,
    build_block,
    exact_modules,
)
from chiaroscuro.layers.context import OTHER_PADDING
from chiaroscuro.layers.norms import make_norm
from chiaroscuro.layers.registry import split_entry, with_history
from chiaroscuro.layers.thresholds import refuse_impossible_share
from chiaroscuro.model.cache import CACHE, ChiarCache, given_cache
from chiaroscuro.model.card import write_model_card
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.generation import BoundedGenerationMixin
from chiaroscuro.model.outputs import ChiarCausalLMOutput, ChiarModelOutput
from chiaroscuro.ops import linear_cross_entropy

GATED_LAYER = 0
"""The layer that the MetaRouter gates: the first, which the paper counts as layer 1."""


class ChiarLayer(GradientCheckpointingLayer, RoutedBlock):
    """A routed block in a model: activation checkpointing can run it a second time in the backward."""

    follows_data = True


_SOURCE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that say where a config is."""


_REFUSED = {
    "output_attentions": "attention weights are not returned, and a token sent to another operator has none: use "
    "output_routing=True, which says which operator each token was sent to",
    "head_mask": "heads can't be masked: drop it",
    **dict.fromkeys(("attn_mask", "padding_mask"), "the mask of padding is called attention_mask"),
}
"""Keywords that other models take, and that would change the result."""


def refuse_keywords(given: Mapping[str, Any], forward: Callable[..., Any], config: ChiarConfig, *more: str) -> None:
    """Refuse the keywords that a forward can't honour and that would change its result, and misspelt ones.

    Args:
        given: keywords beside those of its signature.
        forward: whose signature they may be misspelt names of.
        config: where `output_attentions` may be set, too.
        more: keywords that it takes beside those of its signature.

    Raises:
        UserError: there is one.

    """
    asked = {"output_attentions": config.output_attentions} | {k: v for k, v in given.items() if v is not None}
    for name, reason in _REFUSED.items():
        if asked.pop(name, False) is not False:
            raise UserError(f"{name}: {reason}")
    if not asked or torch.compiler.is_compiling():
        return
    known = [*signature(forward).parameters, *more]
    _refuse_misspelt(asked, known)


def _refuse_misspelt(names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        close = get_close_matches(name, known, n=1, cutoff=0.9)
        if close and name not in known:
            raise UserError(f"unknown keyword {name}: did you mean {close[0]}?")


def refuse_other_fields(batch: Mapping[str, Any]) -> None:
    """Refuse the fields of a batch that a forward would refuse: what else it has is its owner's.

    Raises:
        UserError: there is one.

    """
    for name, reason in _REFUSED.items():
        if not (batch.get(name) is None or batch[name] is False):
            raise UserError(f"{name}: {reason}")
    _refuse_misspelt(map(str, batch), ["input_ids", "attention_mask", "position_ids", "shift_labels"])


def document_positions(
    cu_seq_lens: Int[Tensor, " boundaries"], x: Float[Tensor, "batch time width"]
) -> Int[Tensor, "1 time"]:
    """Positions that restart at each document of the one row.

    Args:
        cu_seq_lens: 0, the cumulative lengths of the documents, and T.
        x: the tokens.

    Raises:
        UserError: there are several rows, or these are not such numbers.

    """
    rows, time, _ = x.shape
    if not isinstance(cu_seq_lens, Tensor):
        raise UserError(f"cu_seq_lens_q={cu_seq_lens!r}: give a tensor")
    bounds = cu_seq_lens.to(x.device).long()
    fits = rows == 1 and bounds.ndim == 1 and len(bounds) > 1 and not cu_seq_lens.is_floating_point()
    if not fits or int(bounds[0]) != 0 or int(bounds[-1]) != time or bool((bounds.diff() < 0).any()):
        raise UserError(
            f"cu_seq_lens_q={cu_seq_lens.tolist()} for {rows} rows of {time} tokens: give one row, and where its "
            "documents begin and the last ends; or give position_ids"
        )
    place = torch.arange(time, device=x.device)
    return (place - bounds[torch.searchsorted(bounds, place, right=True) - 1])[None]


def _positions(logits_to_keep: Any) -> slice | Tensor:
    """The positions whose logits are wanted: so many last ones (0: all), or those that a tensor has."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim == 1 and not logits_to_keep.is_floating_point():
            return logits_to_keep
        raise UserError(
            f"logits_to_keep of shape {tuple(logits_to_keep.shape)} and dtype {logits_to_keep.dtype}: give a number, "
            "or positions (kept,)"
        )
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, Integral) or int(logits_to_keep) < 0:
        raise UserError(f"logits_to_keep={logits_to_keep!r}: give 0 for all, or how many of the last")
    return slice(-int(logits_to_keep), None)


def _refuse_beyond(kept: Tensor, tokens: Tensor) -> None:
    """Raise a UserError where logits are wanted of positions that there are not."""
    time = tokens.shape[1] if tokens.ndim > 1 else 0
    if kept.numel() and not -time <= int(kept.min()) <= int(kept.max()) < time:
        raise UserError(f"logits_to_keep={kept.tolist()}: positions of {time} tokens are 0 to {time - 1}")


def refuse_no_tensor(name: str, value: Any) -> None:
    """Raise a UserError if this is no tensor."""
    if not isinstance(value, Tensor):
        raise UserError(f"{name} is a {type(value).__name__}: give a tensor")


def _refuse_other_shapes(mismatched: Any) -> None:
    """Raise a UserError where tensors that are no router's have another shape than those saved."""
    for name, saved, wanted in sorted(mismatched):
        if ".router." not in name and ".kv_router." not in name:
            raise UserError(
                f"{name} was saved with shape {tuple(saved)}, and the config asks for {tuple(wanted)}: leave the "
                "fields that say so as they were saved"
            )


class ChiarPreTrainedModel(PreTrainedModel):
    """What the models share: initialisation, saving and loading, and the share of attention."""

    config_class = ChiarConfig
    config: ChiarConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChiarLayer"]  # noqa: RUF012 (transformers reads it so)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: ChiarConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, ChiarConfig):
            raise UserError(f"{type(self).__name__} takes a ChiarConfig, not a {type(config).__name__}")
        config.check()
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """As the parent; and a loaded model keeps the type of what has one of its own."""
        super().post_init()
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *exact_modules(self)}

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02) for matrices and embeddings, zeros for biases; other modules by their `reset_parameters`."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm | Operator | Router | MetaRouter | ExactBuffers):
            module.reset_parameters()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever; beside the weights lies a page that says what the model is, unless there is one."""
        self.config.check()  # what changed since could not be loaded, such as a vocabulary without its special tokens
        writes = args[0] if args else kwargs.get("is_main_process", True)
        refuse_file(Path(save_directory), str(save_directory))  # of which the parent only writes into a log
        if writes:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_model_card(self, save_directory)  # before all is uploaded, if that is asked for
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing for our own classes, whose source transformers would copy to the weights; see `ChiarConfig`."""
        if not cls.__module__.startswith(f"{__package__}."):
            super().register_for_auto_class(auto_class)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as any Hugging Face model; `attention_share=ρ` and `kv_share` set the thresholds too.

        With another `router` or `kv_router` than the model was saved with, its layers are as good as uncalibrated:
        thresholds of one score mean nothing to another. So are those of a router that draws something, with another
        `router_seed`, those of an entropy of another `spectrum`, and those of a longer or shorter menu. Another
        `history` alone makes no other router. Fixed thresholds are those of the config, given or saved.

        Raises:
            UserError: a saved tensor that is no router's has another shape than the config says.

        """
        routing = {"router", "kv_router", "router_seed", "spectrum", "attention_share", "kv_share", "calibration"}
        routing |= {"attention_spread", "kv_spread"}
        asked = (routing | {"config", "entropy_thresholds"}) & {*kwargs}
        saved = cls._saved_config(*args, **kwargs) if asked else None
        # Another router, or menu, may have tensors of other shapes, which are as good as missing.
        may_differ = not {"router", "kv_router", "operators"}.isdisjoint(kwargs)
        tolerant = may_differ and not kwargs.get("ignore_mismatched_sizes")
        wanted = kwargs.pop("output_loading_info", False)
        kwargs |= {"ignore_mismatched_sizes": True} if tolerant else {}
        parent: Any = super()
        loaded: tuple[Any, Any] = parent.from_pretrained(*args, **kwargs, output_loading_info=True)
        model, info = loaded
        if tolerant:
            _refuse_other_shapes(info["mismatched_keys"])

        def said(config: Any, field: str) -> Any:
            value = getattr(config, field)
            if field not in ("router", "kv_router"):
                return value
            # However it is written. A history changes neither scores nor what thresholds were calibrated on.
            options = asdict(getattr(config, f"{field}_options"))
            others = ("history", "attention_share", "thresholds", "spectrum")
            return split_entry(value)[0], {name: own for name, own in options.items() if name not in others}

        def changed(*fields: str) -> bool:
            return saved is not None and any(said(saved, field) != said(model.config, field) for field in fields)

        for block in model.trunk.blocks if saved is not None else ():
            for field, router in (("router", block.router), ("kv_router", block.kv_router)):
                if router is None:
                    continue
                if changed(field) or (router.reads_entropy and changed("spectrum")):
                    for module in router.modules():
                        if isinstance(module, Router | Thresholds):
                            module.reset_parameters()
        for thresholds in model.thresholds().values():
            if not thresholds.running:
                thresholds.set_fixed()
        # Given fixed thresholds count for more than a share.
        given = model.config.calibration == "fixed" and changed("calibration", "entropy_thresholds")
        if model.thresholds() and not given and changed("attention_share", "attention_spread", "calibration"):
            model.set_attention_share(model.config.attention_share)
        if model.kv_thresholds() and changed("kv_share", "kv_spread"):
            model.set_attention_share(kv_share=model.config.kv_share)
        return loaded if wanted else model

    @classmethod
    def _saved_config(cls, name: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        """The config saved with the weights, or None if there is none."""
        name = kwargs.get("pretrained_model_name_or_path") if name is None else name
        if name is None:
            return None
        source = {option: kwargs[option] for option in _SOURCE if option in kwargs}
        try:
            return cls.config_class.from_pretrained(name, **source)
        except OSError:
            return None

    @property
    def trunk(self) -> "ChiarModel":
        """The model without a head; for a `ChiarModel`, itself."""
        return cast(ChiarModel, self.base_model)

    def thresholds(self) -> dict[int, Thresholds]:
        """The calibration of every layer that routes by a score, by layer number."""
        return {
            i: block.router.calibration
            for i, block in enumerate(self.trunk.blocks)
            if isinstance(block.router, ScoreRouter)
        }

    def kv_thresholds(self) -> dict[int, Thresholds]:
        """The calibration of the key side, of every layer where it decides who is kept, by layer number."""
        routers = ((i, block.kv_router) for i, block in enumerate(self.trunk.blocks))
        return {i: router.calibration for i, router in routers if router is not None}

    def set_attention_share(self, share: float | None = None, *, kv_share: float | None = None) -> None:
        """Route this share of the tokens to each menu's last operator, and keep that share, by the quantiles seen.

        A layer that was never calibrated answers with the quantile of white noise, which is all that is known of it.
        Thresholds that were fixed are so no longer: the config then says `calibration="running"`. Where the config
        spreads a share over the layers (`attention_spread`, `kv_spread`), this is their mean.

        Args:
            share: ρ from 0 to 1; as it is unless given.
            kv_share: the share of the tokens that are kept, to be seen from beyond the window, from 0 to 1; as it is
                unless given.

        Raises:
            UserError: neither is given, a share is no such number, or no layer has thresholds of that side.

        """
        if share is None and kv_share is None:
            raise UserError("no share to set: give the share that looks, kv_share, the share that is kept, or both")
        sides = (
            (share, "attention_share", self.thresholds()),
            (kv_share, "kv_share", self.kv_thresholds()),
        )
        missing = {
            "attention_share": f"no layer routes by thresholds (router={self.config.router!r}, menus "
            f"{self.config.operators}): there is no share to set",
            "kv_share": f"no layer decides who is kept (attention_context={self.config.attention_context!r}): there is "
            "no kv_share to set",
        }
        for value, field, layers in sides:
            if value is None:
                continue
            refuse_impossible_share(field, value)
            if not layers:
                raise UserError(missing[field])
            for thresholds in layers.values():
                thresholds.check_present()
        for value, field, layers in sides:
            shares = self.config.layer_shares(field, value) if value is not None else {}
            for i, thresholds in layers.items() if value is not None else ():
                thresholds.running = True
                thresholds.set_share(shares[i])
        if share is not None:
            self.config.attention_share = float(share)
            self.config.calibration, self.config.entropy_thresholds = "running", None
        if kv_share is not None:
            self.config.kv_share = float(kv_share)

    def set_history(self, history: int | None) -> None:
        """Let thresholds follow so many tokens of each row, which brings the shares nearer to those asked for.

        See `chiaroscuro.layers.row_thresholds`.

        Args:
            history: None for thresholds that stand still.

        Raises:
            UserError: no positive whole number, thresholds that were fixed, or no layer has any.

        """
        sides = {
            name: [router for block in self.trunk.blocks if isinstance(router := getattr(block, name), ScoreRouter)]
            for name in ("router", "kv_router")
        }
        routers = [router for own in sides.values() for router in own]
        if not routers:
            raise UserError(
                f"no layer routes by thresholds (router={self.config.router!r}, menus {self.config.operators}): none "
                "can follow a row"
            )
        options = [router.with_history(history) for router in routers]
        for router, own in zip(routers, options, strict=True):
            router.options = own
        for name, present in sides.items():
            if present:
                setattr(self.config, name, with_history(getattr(self.config, name), history))

    def step_calibration(self) -> None:
        """Move the thresholds of running calibration. Call it once after each optimizer step.

        A training forward only notes the scores that it routed by. So gradient checkpointing recomputes the same
        routing, a batch's later tokens decide nothing about its earlier ones, and processes agree.

        An adapter of peft is saved with the thresholds if its config has `modules_to_save=["calibration"]`.
        """
        for thresholds in [*self.thresholds().values(), *self.kv_thresholds().values()]:
            if thresholds.running:
                thresholds.step()


class ChiarModel(ChiarPreTrainedModel):
    """The CHIAR-Former without a head: embeddings, L routed blocks, a final norm."""

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.meta_router = None
        if config.meta_router is not None and config.meta_router != "none":
            self.meta_router = MetaRouter(config.hidden_size, config.meta_router)
        self.layers = nn.ModuleList(
            build_block(config.hidden_size, menu, config.fields(i), i, ChiarLayer)
            for i, menu in enumerate(config.operators or [])
        )
        self.norm = make_norm(config.norm_type, config.hidden_size, config.norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def blocks(self) -> list[RoutedBlock]:
        """The layers, with their type."""
        return [cast(RoutedBlock, layer) for layer in self.layers]

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Int[Tensor, "batch keys"] | Bool[Tensor, "batch keys"] | None = None,
        position_ids: Int[Tensor, "#batch time"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time width"] | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> ChiarModelOutput:
        """Run the model.

        Args:
            input_ids: the tokens; with a cache, those that came new.
            attention_mask: 1 for real tokens, 0 for padding, on either side; over the cached tokens too. Padding is
                not routed, attended to, pooled or counted.
            position_ids: counted over the real tokens where not given. Where they restart within a row, as in a batch
                of transformers' `DataCollatorWithFlattening`, the row holds several documents, which don't see each
                other.
            cache: a cache to continue.
            inputs_embeds: embeddings instead of input_ids.
            use_cache: whether to return a cache; the config's unless given, never by default in training.
            output_routing: return what every layer routed where, and the gate.
            output_hidden_states: return the tokens after every layer.
            return_dict: False for a plain tuple.
            past_key_values: the same as `cache`, under the name that it had before transformers 5.24.
            kwargs: what transformers and other libraries pass to every model. `cu_seq_lens_q`, where each document in
                the one row begins and the last ends, gives the positions if position_ids doesn't. What would change
                the result and can't be honoured is refused; the rest is ignored.

        Raises:
            UserError: not exactly one of input_ids and inputs_embeds, a sequence longer than
                `max_position_embeddings`, a token outside the vocabulary's size, a mask of another length, a cache
                for a model that can't have one or for several documents in a row, or a keyword that can't be honoured
                or is close to one of ours.

        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds, and not both")
        refuse_keywords(kwargs, ChiarModel.forward, self.config)
        given = given_cache(cache=cache, past_key_values=past_key_values)
        asked = use_cache or given is not None
        if use_cache is None:
            use_cache = given is not None or (bool(self.config.use_cache) and not self.training)
        elif not use_cache and given is not None:
            raise UserError("a cache with use_cache=False: drop one of them")
        states = self.check_cache(given) if use_cache else None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embed(input_ids, inputs_embeds)
        if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
            position_ids = document_positions(kwargs["cu_seq_lens_q"], x)
        context = self.prepare(x, attention_mask, position_ids, states, input_ids)
        if context.segments is not None and states is not None:
            if asked:
                raise UserError(
                    "position_ids restart within a row, so it holds several documents, which a cache can't continue: "
                    "pass use_cache=False"
                )
            states = None
        if states is not None:
            states.unfinished = True
        gate = self.gate(x, context, states)
        hidden_states: list[Tensor] = []
        routings: list[Routing | None] = []
        for i in range(len(self.layers)):
            if output_hidden_states:
                hidden_states.append(x)
            x, routing = self.run_layer(i, x, gate, context, states, output_routing)
            routings.append(routing)
        # Noted here and not in the layers, which activation checkpointing runs a second time. Generated tokens are not
        # followed.
        if self.training and states is None and (followed := self._followed_scores(routings)):
            _note(followed, context.real(x.shape[1]))
        if states is not None:
            states.tokens_seen, states.rows = states.tokens_seen + x.shape[1], x.shape[0]
            states.real, states.unfinished = context.attention_mask, False
        x = self.norm(x)
        return ChiarModelOutput(
            last_hidden_state=x,
            **cast(Any, {CACHE: states}),
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            routing=tuple(routings) if output_routing or self.penalises() else None,
            meta_gate=gate if output_routing else None,
        )

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """The input of layer 0: embeddings, normalised if the config says so, with dropout."""
        if inputs_embeds is None:
            assert input_ids is not None
            refuse_no_tensor("input_ids", input_ids)
            if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
                raise UserError(
                    f"input_ids of shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}: need shape (B, T) and "
                    "dtype torch.int64 or torch.int32"
                )
            try:
                x = self.embed_tokens(input_ids)
            except IndexError:
                size = self.config.vocab_size
                raise UserError(
                    f"a token outside the vocabulary, vocab_size={size}: use the model's own tokenizer"
                ) from None
        else:
            refuse_no_tensor("inputs_embeds", inputs_embeds)
            x, width = inputs_embeds, self.config.hidden_size
            if x.ndim != 3 or x.shape[-1] != width or not x.is_floating_point():
                raise UserError(
                    f"inputs_embeds of shape {tuple(x.shape)} and dtype {x.dtype}: need shape (B, T, {width}) and a "
                    "floating-point dtype"
                )
            device = x.device.type
            casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            if x.dtype != self.dtype and not casts:
                raise UserError(f"inputs_embeds of dtype {x.dtype}, and weights of {self.dtype}: convert one of them")
        if self.config.embedding_norm:
            x = F.layer_norm(x, x.shape[-1:])
        return self.dropout(x)

    def prepare(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: ChiarCache | None = None,
        input_ids: Tensor | None = None,
    ) -> Context:
        """What all layers share: padding, positions, documents, the attention implementation, token ids.

        Documents in one row are told by positions that restart among the real tokens, as transformers'
        `DataCollatorWithFlattening` makes them. One that begins with the first token after a cache is not told.
        """
        batch, time, _ = x.shape
        seen = 0 if cache is None else cache.get_seq_length()
        if time == 0:
            raise UserError(f"an input of shape {tuple(x.shape[:2])} has no tokens: give at least one per row")
        if seen + time > self.config.max_position_embeddings:
            raise UserError(
                f"{seen + time} tokens, but max_position_embeddings={self.config.max_position_embeddings}: "
                "shorten the sequence, or configure the model for longer ones"
            )
        if seen and cache is not None and cache.rows != batch:
            raise UserError(f"the cache holds {cache.rows} rows, the input has {batch}: the two must match")
        if attention_mask is None and cache is not None and cache.padded:
            raise UserError(
                "this cache was begun with an attention_mask: pass one again, over the cached and the new tokens"
            )
        for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if value is not None:
                refuse_no_tensor(name, value)
        if attention_mask is not None:
            attention_mask = self._checked_mask(attention_mask, batch, seen + time, cache)
        segments = None
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(seen, seen + time, device=x.device)[None]
            else:
                position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -time:]
        elif position_ids.shape not in ((batch, time), (1, time)):
            raise UserError(
                f"position_ids of shape {tuple(position_ids.shape)}: need ({batch}, {time}) or (1, {time}), one for "
                "each new token"
            )
        elif position_ids.is_floating_point():
            raise UserError(f"position_ids of dtype {position_ids.dtype}: give whole numbers")
        elif time > 1:
            real = None if attention_mask is None else attention_mask[:, -time:]
            # Whether there are several is to be known where they are refused: a break in a compiled graph.
            known = cache is not None or self.config.meta_router in ("batch", "sequence")
            find = _segments_of_data if known else segments_of
            segments = find(position_ids.expand(batch, -1), real)
        return Context(
            attention_mask=attention_mask,
            position_ids=position_ids.expand(batch, -1),
            past=seen,
            input_ids=input_ids,
            segments=segments,
            implementation=self.config._attn_implementation or "sdpa",
        )

    def _checked_mask(self, attention_mask: Tensor, batch: int, keys: int, cache: ChiarCache | None) -> Tensor | None:
        """The mask as booleans; None where nothing is padded and execution is sparse."""
        if attention_mask.shape != (batch, keys):
            raise UserError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: need ({batch}, {keys}), "
                "a row for each sequence, over cached and new tokens"
            )
        if (
            attention_mask.is_floating_point()
            and not torch.compiler.is_compiling()
            and bool((attention_mask < 0).any())
        ):
            raise UserError("attention_mask with numbers below 0: give True, or 1, for real tokens and 0 for padding")
        attention_mask = attention_mask.bool()
        if torch.compiler.is_compiling() or (cache is None and self.config.execution == "dense"):
            return attention_mask  # whether anything is padded depends on the data, which a compiler can't test
        padded = bool(~attention_mask.all())
        if cache is not None and (padded or cache.real is not None):
            cached = attention_mask[:, : cache.tokens_seen]
            if not bool((cached if cache.real is None else cached == cache.real.to(cached.device)).all()):
                raise UserError(
                    f"{OTHER_PADDING} (generate makes a mask of what is no pad_token_id where it is given none)"
                )
        return attention_mask if padded or self.config.execution == "dense" else None

    def gate(self, x: Tensor, context: Context, cache: ChiarCache | None = None) -> Tensor | None:
        """The MetaRouter's g of the embedded tokens, continued from the cache; None without a MetaRouter."""
        if self.meta_router is None:
            return None
        past = None if cache is None else cache.meta_state.last
        gate, sums = self.meta_router(x, context.real(x.shape[1]), past, context.segments)
        if cache is not None:
            cache.meta_state.extend(*sums)
        return gate

    def run_layer(
        self,
        index: int,
        x: Tensor,
        gate: Tensor | None,
        context: Context,
        cache: ChiarCache | None = None,
        output_routing: bool = False,
    ) -> tuple[Tensor, Routing | None]:
        """One layer on its input, gated if it is the gated one."""
        layer = self.layers[index]
        if cache is not None:
            context = replace(context, cache=cache.states[index])
        y, routing = layer(x, context, output_routing)
        if gate is not None and index == GATED_LAYER:
            y = gate[..., None] * y + (1 - gate[..., None]) * x
        return y, routing

    def _followed_scores(self, routings: list[Routing | None]) -> list[tuple[Thresholds, Tensor]]:
        """For each layer with running calibration, its thresholds and the scores that it routed by."""
        found = []
        for block, routing in zip(self.blocks, routings, strict=True):
            router = block.router
            if isinstance(router, ScoreRouter) and router.calibration.running:
                assert routing is not None and routing.score is not None
                found.append((router.calibration, routing.score))
            router = block.kv_router
            if router is not None and router.calibration.running:
                assert routing is not None and routing.kept_score is not None
                found.append((router.calibration, routing.kept_score))
        return found

    def penalises(self) -> bool:
        """Whether this forward's loss has a collapse penalty, and so needs the routing."""
        return self.training and self.config.collapse_penalty > 0

    def collapse_term(self, routings: tuple[Routing | None, ...], attention_mask: Tensor | None) -> Tensor:
        """λ Σ_layers U of a forward's routing, to be subtracted from its loss where the model `penalises`."""
        utilisation = utilisation_entropy(routings, attention_mask)
        if torch.is_grad_enabled() and not utilisation.requires_grad:
            raise UserError(
                f"collapse_penalty={self.config.collapse_penalty} would teach nothing: router={self.config.router!r} "
                "gives no weights, or gradient checkpointing has use_reentrant=True, which loses their gradient"
            )
        return self.config.collapse_penalty * utilisation

    def check_cache(self, cache: Any) -> ChiarCache:
        """The given cache, or a new one; a UserError if it can't serve this model."""
        if self.gradient_checkpointing and self.training:
            raise UserError("a cache with gradient checkpointing, which would fill it twice: pass use_cache=False")
        dense = self.training and self.config.router_class.trains_densely
        if dense and not self.config.uncacheable() and self.config.uncacheable(dense=True):
            raise UserError(
                f"a cache while router={self.config.router!r} trains, which runs every operator on every token: call "
                "model.eval(), or pass use_cache=False"
            )
        if cache is None:
            return ChiarCache(self.config)
        if not isinstance(cache, ChiarCache):
            if reason := self.config.uncacheable():
                raise UserError(f"a cache for a model with {reason}: drop it")
            raise UserError(
                f"cache is a {type(cache).__name__}: need a chiaroscuro.ChiarCache(model.config), "
                "which knows the layers that keep nothing"
            )
        if len(cache.layers) != len(self.layers):
            raise UserError(
                f"cache has {len(cache.layers)} layers, the model {len(self.layers)}: "
                "need a chiaroscuro.ChiarCache(model.config)"
            )
        if cache.config is not self.config:
            if cache.config.entries != self.config.entries:
                raise UserError(
                    "cache is of a model with other operators, or with other options of them, such as another window: "
                    "need a chiaroscuro.ChiarCache(model.config)"
                )
            cache.config = self.config
        if cache.unfinished:
            raise UserError(
                "a forward with this cache failed halfway, and some layers have its tokens: start a new one"
            )
        return cache


class ChiarForCausalLM(ChiarPreTrainedModel, BoundedGenerationMixin):
    """The CHIAR-Former as a language model; its head shares the embedding's weights unless the config says not to."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # The heads of `ChiarForMixedTasks` are ignored without a warning.
    _keys_to_ignore_on_load_unexpected = [r"heads\."]  # noqa: RUF012
    # The loss is divided by `num_items_in_batch` where the Trainer gives it.
    accepts_loss_kwargs = True

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__(config)
        self.model = ChiarModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Int[Tensor, "batch keys"] | Bool[Tensor, "batch keys"] | None = None,
        position_ids: Int[Tensor, "#batch time"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time width"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_logits: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> ChiarCausalLMOutput:
        """Run the model and its head.

        A training step needs only the loss, and the logits are by far the largest tensor of a small model. So in
        training they are computed in chunks (`ops.linear_cross_entropy`) and not returned, unless asked for.

        Args:
            input_ids: see `ChiarModel.forward`, as for all that is not named here.
            attention_mask: see there.
            position_ids: see there.
            cache: see there.
            inputs_embeds: see there.
            labels: the tokens themselves, which the model shifts; −100 for tokens that are not to be predicted.
                Predictions at padding and of padding are not counted.
            use_cache: see there.
            logits_to_keep: compute only the last so many logits (0: all), or those at these positions.
            output_routing: see there.
            output_hidden_states: see there.
            return_dict: see there.
            num_items_in_batch: divide the summed loss by this instead of by the number of this forward's predictions,
                so that the losses of several forwards of one step add up. It is the number of all labels, as the
                Trainer counts them; where some are at padding, it is scaled to those that count.
            output_logits: whether to return logits with a loss; by default in evaluation, but not in training. They
                are always returned without labels, and if the head or `loss_function` was replaced.
            past_key_values: see there.
            kwargs: `shift_labels`, (B, T): labels that are shifted already, the token that each position is to predict.
                (It is not in the signature, because the Trainer would then require it in every batch.) Others as in
                `ChiarModel.forward`.

        Raises:
            UserError: as `ChiarModel.forward`; labels that are not one whole number for each token.

        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        refuse_keywords(kwargs, ChiarForCausalLM.forward, self.config, "shift_labels")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(given, Tensor):  # before a cache or a calibration takes anything up
            self._check_labels(given, self.config.vocab_size, labels=labels, shift_labels=shift_labels)
        kept = _positions(logits_to_keep)
        if isinstance(kept, Tensor) and isinstance(given, Tensor) and not torch.compiler.is_compiling():
            _refuse_beyond(kept, given)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=output_routing,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state[:, kept]
        predicts = labels is not None or shift_labels is not None
        wanted = not self.training if output_logits is None else output_logits
        logits = self.lm_head(hidden) if wanted or not predicts or self._loss_needs_logits() else None
        loss = term = None
        if predicts:
            targets = self.targets_of(labels, shift_labels, attention_mask)
            if num_items_in_batch is not None and attention_mask is not None:
                counted, labelled = targets.ne(-100).sum(), self.targets_of(labels, shift_labels).ne(-100).sum()
                num_items_in_batch = num_items_in_batch * torch.where(counted > 0, counted / labelled, 1)
            targets = targets[:, kept].long().contiguous()
            if logits is None:
                loss = linear_cross_entropy(
                    hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), divisor=num_items_in_batch
                )
            else:
                loss = self.loss_function(
                    logits,
                    labels=None,
                    vocab_size=self.config.vocab_size,
                    shift_labels=targets,
                    num_items_in_batch=num_items_in_batch,
                )
            if self.model.penalises():
                # As much of λ Σ U as this forward is of its step, so that accumulated forwards sum to one.
                part = 1.0 if num_items_in_batch is None else (targets != -100).sum() / num_items_in_batch
                term = part * self.model.collapse_term(outputs.routing, attention_mask)
                loss = loss - term
        return ChiarCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            routing=outputs.routing if output_routing else None,
            meta_gate=outputs.meta_gate,
            collapse_term=term,
        )

    @staticmethod
    def _check_labels(tokens: Tensor, vocabulary: int, **given: Tensor | None) -> None:
        for name, labels in given.items():
            if labels is None:
                continue
            refuse_no_tensor(name, labels)
            if labels.shape != tokens.shape[:2] or labels.dtype not in (torch.int64, torch.int32):
                raise UserError(
                    f"{name} of shape {tuple(labels.shape)} and dtype {labels.dtype}: need a token id or -100 for each "
                    f"token of the input, shape {tuple(tokens.shape[:2])} and dtype torch.int64"
                )
            # On a GPU this would wait for all that was computed before.
            if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
                wrong = labels[(labels >= vocabulary) | ((labels < 0) & (labels != -100))]
                if len(wrong):
                    raise UserError(
                        f"{name}: {int(wrong[0])} is neither a token id, from 0 to {vocabulary - 1}, nor -100"
                    )

    def _loss_needs_logits(self) -> bool:
        """Whether the head or the loss was replaced, by an adapter or by the user."""
        return type(self.lm_head) is not nn.Linear or self.loss_function is not ForCausalLMLoss

    @classmethod
    def targets_of(
        cls, labels: Tensor | None, shift_labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Int[Tensor, "batch time"]:
        """The token that each position is to predict, and −100 where none is; arguments as of `forward`."""
        targets = cls._shifted(labels) if shift_labels is None else shift_labels
        if attention_mask is None:
            return targets
        return cls._without_padding(targets, attention_mask, shifted_here=shift_labels is None)

    @staticmethod
    def _shifted(labels: Tensor | None) -> Tensor:
        assert labels is not None  # the caller has these or the others
        return F.pad(labels[:, 1:], (0, 1), value=-100)

    @staticmethod
    def _without_padding(targets: Tensor, attention_mask: Tensor, *, shifted_here: bool) -> Tensor:
        """The targets with −100 at padding and, where the labels were shifted here, for padding."""
        real = attention_mask[:, -targets.shape[1] :] != 0
        if shifted_here:
            real = real & F.pad(real[:, 1:], (0, 1))
        return targets.masked_fill(~real, -100)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused. `generate_batch` calls it."""
        raise UserError("generate_batch: a CHIAR-Former has no paged cache: use generate")

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Use our cache where transformers would use its `DynamicCache`; refuse any other kind."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation={generation_config.cache_implementation!r}: a CHIAR-Former has its own dynamic "
                "cache alone; drop the argument"
            )
        given = model_kwargs.get(CACHE)
        if given is not None or generation_config.cache_implementation == "dynamic":
            self.model.check_cache(given)
        if given is None and generation_config.use_cache:
            model_kwargs[CACHE] = ChiarCache(self.config)
            return None
        base: Any = super()  # its annotations name a protocol that this class doesn't satisfy
        return base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


@torch._disable_dynamo  # as in RoutedBlock: how many scores are real and finite is data, one graph break for all layers
def _note(followed: list[tuple[Thresholds, Tensor]], real: Tensor | None) -> None:
    """Note the scores of a training forward for running calibration."""
    for thresholds, score in followed:
        thresholds.note(score, real)


def segments_of(
    position_ids: Int[Tensor, "batch time"], attention_mask: Bool[Tensor, "batch time"] | None
) -> Int[Tensor, "batch time"] | None:
    """The document of each token; None where no position restarts."""
    if attention_mask is None:
        restarts = F.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0))
    else:  # the positions of padding say nothing: a real token goes on from the last real one before it
        place = torch.arange(position_ids.shape[1], device=position_ids.device)
        newest = torch.where(attention_mask, place, -1).cummax(1).values
        before = F.pad(newest[:, :-1], (1, 0), value=-1)
        earlier = position_ids.gather(1, before.clamp(min=0))
        restarts = attention_mask & (before >= 0) & (position_ids <= earlier)
    # Whether any does depends on the data, which a compiler can't test.
    return restarts.cumsum(1) if torch.compiler.is_compiling() or bool(restarts.any()) else None


_segments_of_data: Any = torch._disable_dynamo(segments_of)


def utilisation_entropy(
    routings: tuple[Routing | None, ...],
    attention_mask: Int[Tensor, "batch keys"] | Bool[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, ""]:
    """Σ_layers U, U = −Σ_k ḡ_k log ḡ_k of the layer's mean router weights ḡ over the real tokens, in nats.

    Largest where all operators are used alike; −λ of it in the loss works against collapse. Source: the paper, v1.
    """
    total = torch.zeros(())
    for weights in _weights(routings):
        if attention_mask is None:
            mean = weights.mean((0, 1))
        else:
            real = attention_mask[:, -weights.shape[1] :, None].to(weights.dtype)
            mean = (weights * real).sum((0, 1)) / real.sum().clamp(min=1)
        total = total.to(mean) - (mean * mean.clamp(min=1e-8).log()).sum()
    return total


def _weights(routings: tuple[Routing | None, ...]) -> Iterator[Tensor]:
    for routing in routings:
        if routing is not None and routing.weights is not None:
            yield routing.weights
