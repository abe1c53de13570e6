"""Attention modules of other libraries' decoders, routed: all see what is near, some what is kept far away.

A module keeps its own forward, which projects, normalises and rotates. It hands queries, keys and values to a function
that transformers looks up by the name in the module's configuration; for a routed module that is `attend_routed`. Who
looks and who is kept was decided before, from what the module was given.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from chiaroscuro.errors import UserError
from chiaroscuro.layers import Context, PackedTokens, ScoreRouter, build_router
from chiaroscuro.layers.attend_near_and_far import attend_from_newest, attend_near_and_far, gains_from_far
from chiaroscuro.layers.context import OTHER_PADDING, Spectra
from chiaroscuro.layers.registry import build_kv_router
from chiaroscuro.model.modeling import segments_of
from chiaroscuro.retrofitting.routed_cache import RoutedLayer, layer_of

IMPLEMENTATION = "chiaroscuro"
"""The name under which routed modules find `attend_routed`."""

SHARED = "chiaroscuro"
"""The argument by which a model hands its `Forward` down to its modules, and a module what it was given."""

HIDDEN = -1e4
"""A mask that adds this or less to a score hides the token: −∞, a type's least number, and −10,000."""

NO_WEIGHTS = "drop output_attentions: a routed module computes no whole matrix of weights"
"""What is said to whoever asks for these."""

GUESSED = "those of white noise, so its share is a guess"

LOOK_SIDE = ("near", "far")
"""What a router of the look side chooses between."""


class ReachedError(Exception):
    """What a module was given, inside `Reach.stopping`; no error."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Forward:
    """What the modules of a model share in one forward. It is handed down beside the other arguments.

    So forwards of several threads have one each, and a layer whose activations are checkpointed has in the backward the
    one that it had before.

    Attributes:
        input_ids: the new tokens, where the model was given ids.
        position_ids: their positions, if these alone tell documents apart: where a model's attention has no mask.

    """

    def __init__(self, input_ids: Tensor | None = None, position_ids: Tensor | None = None) -> None:
        self.input_ids: Int[Tensor, "batch time"] | None = input_ids
        self.position_ids = position_ids
        self._masks: list[tuple[Any, Any]] = []
        self._continued = False
        self._elsewhere: dict[torch.device, Forward] = {}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Forward":
        """On another device; accelerate calls it for a layer whose weights lie there."""
        device = torch.device(device)
        given = (self.input_ids, self.position_ids)
        if all(one is None or one.device == device for one in given):
            return self
        if device not in self._elsewhere:
            moved = (None if one is None else one.to(device, non_blocking=non_blocking) for one in given)
            self._elsewhere[device] = Forward(*moved)
        return self._elsewhere[device]

    def read_mask(
        self, mask: Any, time: int
    ) -> tuple[Bool[Tensor, "batch keys"] | None, Int[Tensor, "batch time"] | None, Int[Tensor, "batch time"] | None]:
        """Which tokens are real, which document each belongs to, and which place each has, from a module's mask.

        It is read once for all modules. Places count real tokens; None where nothing is padded or there are documents,
        and the positions that the model was given say it.

        Raises:
            UserError: it is neither causal nor causal within documents.

        """
        for known, read in self._masks:
            if known is mask:
                return read
        if mask is None:
            places = self.position_ids
            read = None, None if places is None else segments_of(places, None), None
        elif isinstance(mask, Tensor):
            real, segments = _read_mask(mask, time)
            read = real, segments, None if real is None else (real.cumsum(1) - 1).clamp(min=0)[:, -time:]
        else:
            raise UserError(f"a {type(mask).__name__} as mask: load the model with attn_implementation='sdpa'")
        self._masks.append((mask, read))
        return read

    def check_continued(self, real: Bool[Tensor, "batch keys"] | None, cached: RoutedLayer, time: int) -> None:
        """Raise a UserError where the mask has cached tokens for padding that were real, or the other way round.

        One layer is asked for all.

        Args:
            real: which cached and new tokens are real; None where all are.
            cached: a layer of the cache, which has counted the new tokens already.
            time: how many tokens are new.

        """
        if self._continued or not cached.state.begun:
            return
        self._continued = True
        past, state = cached.columns - time, cached.state
        if real is None:
            same = state.length == past
        else:
            same = bool((real[:, :past].sum(1).repeat_interleave(state.heads) == state.seen).all())
        if not same:
            raise UserError(OTHER_PADDING)


present: ContextVar[Forward | None] = ContextVar("present", default=None)
"""The `Forward` that a thread is in, for modules of layers that hand nothing down: Nemotron's, StableLM's."""


class Given(NamedTuple):
    """What a module was given, for its attention function.

    Attributes:
        hidden: its input.
        cached: the layer of a cache.
        position_ids: of the new tokens.
        forward: what all modules share.

    """

    hidden: Float[Tensor, "batch time width"]
    cached: RoutedLayer | None
    position_ids: Int[Tensor, "#batch time"] | None
    forward: Forward


def _of_one_type(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as SDPA takes them under autocast, where those that were rotated are float32 yet."""
    if query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _read_mask(mask: Tensor, time: int) -> tuple[Tensor | None, Tensor | None]:
    if mask.ndim == 2:
        return mask.bool(), None
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise UserError(f"an attention_mask of shape {tuple(mask.shape)}: routed attention takes (batch, tokens)")
    if mask.dtype != torch.bool:
        if bool(((mask != 0) & (mask > HIDDEN)).any()):
            raise UserError(
                "this attention_mask adds a bias to some scores, which routed attention can't honour: a mask has 0 "
                f"where a token is seen, and {HIDDEN:g} or less where not"
            )
        mask = mask == 0
    seen = mask[:, 0]
    real = seen.any(1)
    keys = seen.shape[-1]
    causal = torch.ones_like(seen).tril(keys - time)
    if bool(((seen == causal & real[:, None]) | ~real[:, -time:, None]).all()):
        return (None if bool(real.all()) else real), None
    # Fewer than all before it: rows of several documents, each of which begins where a token sees itself alone.
    if keys == time and bool(real.all()):
        segments = (seen.sum(-1) == 1).cumsum(1)
        if torch.equal((segments[:, :, None] == segments[:, None]) & causal, seen):
            return None, segments
    raise UserError(
        "this attention_mask hides tokens in another way than by padding or by documents: routed attention can't "
        "honour it"
    )


class Reach(nn.Module):
    """Who looks and who is kept in one attention module: its routers, and how its attention is computed.

    Args:
        width: d, the features of what the module is given.
        layer: the module's number.
        fields: `window`, `sinks`, `router`, `kv_router`, and the shares `attention_share` and `kv_share`.

    Attributes:
        whole: by side, True inside a block where all look, or all are kept; False where none; None where scores decide.
        probe: takes up what the gains follow from, while a model is fitted.
        watchers: called with the decisions of each forward, and which tokens are real; None where all are.
        ready: the sides that were seen to have a score, and warned of where their thresholds are a guess.

    """

    def __init__(self, width: int, layer: int, fields: dict[str, Any]) -> None:
        super().__init__()
        self.window, self.sinks, self.layer = fields["window"], fields["sinks"], layer
        look = build_router(width, LOOK_SIDE, fields["router"], fields, layer)
        if not isinstance(look, ScoreRouter):
            raise UserError(f"router={fields['router']!r}: a retrofit needs a router by a score")
        self.look, self.kept = look, build_kv_router(width, fields, layer)
        for router in (self.look, self.kept):
            if router.scale(torch.zeros(1, 1)) is not None:
                raise UserError(f"{type(router).__name__} scales what it routes, and is trained along: take another")
        self.whole: dict[str, bool | None] = {"look": None, "kept": None}
        self.ready: set[str] = set()
        self._stopping = False  # see `stopping`
        self.probe: Probe | None = None
        self.watchers: list[Callable[[Tensor, Tensor, Tensor | None], None]] = []

    @property
    def routers(self) -> dict[str, ScoreRouter]:
        """By side."""
        return {"look": self.look, "kept": self.kept}

    def replace(self, side: str, router: ScoreRouter) -> None:
        """Put another router in."""
        setattr(self, side, router)
        self.ready.discard(side)

    @contextmanager
    def given(
        self, hidden: Tensor, cache: Cache | None, position_ids: Tensor | None, forward: Forward
    ) -> Iterator[Given]:
        """What the module was given. Inside the block the cache's layer may be updated."""
        if self._stopping:
            raise ReachedError(hidden)
        state = None if cache is None else layer_of(cache, self.layer, self.window, self.sinks, hidden.shape[1])
        try:
            yield Given(hidden, state, position_ids, forward)
        finally:
            if state is not None:
                state.expected = False

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside the block the module computes nothing, and raises `ReachedError` with what it was given."""
        self._stopping = True
        try:
            yield
        finally:
            self._stopping = False

    @contextmanager
    def as_whole(self, look: bool | None, kept: bool | None) -> Iterator[None]:
        """Inside the block all tokens look or are kept (True), none (False), or those that the scores say (None)."""
        before = self.whole
        self.whole = {"look": look, "kept": kept}
        try:
            yield
        finally:
            self.whole = before

    def attend(
        self,
        given: Given,
        query: Float[Tensor, "batch heads time head_width"],
        key: Float[Tensor, "batch key_heads time head_width"],
        value: Float[Tensor, "batch key_heads time head_width"],
        mask: Tensor | None,
        dropout: float,
        scaling: float | None,
        softcap: float | None,
    ) -> Float[Tensor, "batch time heads head_width"]:
        """Attention of the new tokens; the other arguments as transformers' attention functions have them."""
        hidden, cached, position_ids, forward = given
        time = query.shape[2]
        if key.shape[2] != time:
            raise UserError("this cache gives back earlier keys, which a routed module can't read: pass a DynamicCache")
        read = forward.read_mask(mask, time)
        if isinstance(mask, Tensor) and len(mask) not in (1, len(hidden)):
            raise UserError(f"an attention_mask of {len(mask)} rows for a batch of {len(hidden)}")
        attention_mask, segments, places = (None if one is None else one.expand(len(hidden), -1) for one in read)
        if segments is not None and cached is not None:
            raise UserError(
                "a mask, or positions, tell several documents apart, which a cache can't continue: pass use_cache=False"
            )
        if cached is not None and cached.state.rows == len(hidden) * cached.state.heads:
            forward.check_continued(attention_mask, cached, time)
        if places is None and position_ids is not None:
            places = position_ids.expand(len(hidden), -1)
        elif places is None and cached is not None:  # a model may tell its attention nothing of positions
            places = torch.arange(cached.columns - time, cached.columns, device=hidden.device).expand(len(hidden), -1)
        context = Context(
            attention_mask=attention_mask,
            segments=segments,
            past=0 if cached is None else cached.columns - time,
            position_ids=places,
            input_ids=forward.input_ids,
            cache=None if cached is None else cached.routers,
            state=None if cached is None else cached.state,
        )
        looks, kept = self.decide(hidden, context)
        if scaling is not None:
            query = query * (scaling * math.sqrt(query.shape[-1]))
        state = context.state
        if state is not None and state.continues(hidden, context):
            newest = attend_from_newest(
                query[:, :, 0], key[:, :, 0], value[:, :, 0], looks[:, 0], kept[:, 0], state, softcap=softcap
            )
            return newest[:, None]
        tokens = PackedTokens.real_of(hidden, context.real(time), segments)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = attend_near_and_far(
            tokens.take(query),
            tokens.take(key),
            tokens.take(value),
            tokens,
            tokens,
            looks,
            kept,
            context,
            self.window,
            self.sinks,
            dropout,
            softcap,
        )
        output = tokens.put_in(query.new_zeros(query.shape).flatten(2), mixed.flatten(1)).view_as(query)
        if self.probe is not None:
            output = self.probe.put_in(query, key, value, output, context, softcap)
        return output

    def decide(
        self, x: Float[Tensor, "batch time width"], context: Context
    ) -> tuple[Bool[Tensor, "batch time *look_heads"], Bool[Tensor, "batch time *key_heads"]]:
        """Which of the new tokens look far, and which are kept.

        Raises:
            UserError: a score that was not fitted yet.

        """
        entropy = None
        decided = []
        for side, router in self.routers.items():
            share = router.calibration.share if self.whole[side] is None else float(bool(self.whole[side]))
            if share in (0, 1):
                # A cache has a row for each head that chooses, whatever the shares of the moment; without one, one for
                # all heads is cheaper.
                heads = 1 if context.state is None else getattr(router.options, "heads", 1)
                shape = x.shape[:2] if heads == 1 else (*x.shape[:2], heads)
                decided.append(torch.full(shape, bool(share), device=x.device))
                continue
            self._see_that_it_is_ready(side, router)
            if router.reads_entropy and entropy is None:
                entropy = Spectra(x).entropy().float()
            given = x.new_zeros(x.shape[:2], dtype=torch.float32) if entropy is None else entropy
            own = None if context.cache is None else context.cache.of(side, router)
            decided.append(router(x, given, replace(context, state=own)).operator_index.bool())
        looks, kept = decided
        for watcher in self.watchers:
            watcher(looks, kept, context.real(x.shape[1]))
        return looks, kept

    def _see_that_it_is_ready(self, side: str, router: ScoreRouter) -> None:
        """Once: a score that was never fitted is an error, and thresholds that no data set a warning."""
        if side in self.ready:
            return
        if reason := router.unready():
            raise UserError(reason)
        calibration = router.calibration
        if not calibration.calibrated and not router.null_is_exact:
            warnings.warn(
                f"layer {self.layer}, side {side}: the thresholds of a {type(router).__name__} are {GUESSED}: "
                "calibrate(model, batches) sets them from data, and "
                f"fit(model, batches, {side}=...) puts a fitted score in its place",
                stacklevel=2,
            )
        self.ready.add(side)

    def extra_repr(self) -> str:
        """The window and the sinks."""
        return f"window={self.window}, sinks={self.sinks}"


class Probe:
    """What the gains of a module's tokens follow from: its queries, keys and values, and the loss's slope.

    Args:
        window: w.
        sinks: s.

    """

    def __init__(self, window: int, sinks: int) -> None:
        self.window, self.sinks = window, sinks

    def put_in(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, context: Context, softcap: float | None
    ) -> Tensor:
        """Take up what there is, and add zeros to the output whose gradient is the loss's slope."""
        self.parts = [x.detach() for x in (query, key, value)]
        self.context, self.softcap = context, softcap
        self.zeros = torch.zeros_like(output, requires_grad=True)
        return output + self.zeros

    def gains(
        self, slope: Float[Tensor, "batch time heads head_width"]
    ) -> dict[str, Float[Tensor, "batch time key_heads"]]:
        """By side, what the loss loses by each token that looks, or is kept: see `gains_from_far`."""
        query, key, value, slopes = (x.transpose(1, 2) for x in (*self.parts, slope))
        look, kept = gains_from_far(query, key, value, slopes, self.context, self.window, self.sinks, self.softcap)
        return {"look": look, "kept": kept}


class MadeClass:
    """Put before a class of another library, in a class that is made of both when it is needed.

    No module has such a class by its name, so its instances are pickled by what it was made from.

    Attributes:
        made_from: a function, and its argument, that give the class.

    """

    made_from: ClassVar[tuple[Callable[[Any], type], Any]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, type(self).made_from, self.__dict__


def _blank(make: Callable[[Any], type], argument: Any) -> Any:
    made: Any = make(argument)
    return made.__new__(made)


class RoutedAttention(MadeClass, nn.Module):
    """Put before an attention class of transformers: `class Routed(RoutedAttention, LlamaAttention)`.

    The module has a `Reach` as `chiaroscuro`, and as its `config` a `ConfigView`.
    """

    chiaroscuro: Reach

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with routed attention."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        caches = [given for given in (*args, *kwargs.values()) if isinstance(given, Cache)]
        cache = caches[0] if caches else None
        forward = kwargs[SHARED] if SHARED in kwargs else present.get() or Forward()
        with self.chiaroscuro.given(hidden, cache, kwargs.get("position_ids"), forward) as given:
            return super().forward(*args, **(kwargs | {SHARED: given}))


class ConfigView:
    """A configuration seen by a routed module: all its fields, and another attention function."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


@torch._disable_dynamo  # who looks and who is kept is data: one graph break a module
def attend_routed(
    module: RoutedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Raises:
        UserError: an argument that it can't honour, or a module that is not routed.

    """
    if not isinstance(module, RoutedAttention):
        raise UserError(
            f"attn_implementation={IMPLEMENTATION!r} is of a retrofitted model, and this is a {type(module).__name__} "
            "without its routing: load the folder with AutoModelForCausalLM"
        )
    if kwargs.get("output_attentions"):
        raise UserError(NO_WEIGHTS)
    if kwargs.get("is_causal") is False:
        raise UserError("drop is_causal=False: routed attention is causal")
    given, device = kwargs[SHARED], query.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return module.chiaroscuro.attend(given, query, key, value, attention_mask, dropout, scaling, softcap), None
    parts = _of_one_type(query, key, value)
    with torch.autocast(device, enabled=False):
        return module.chiaroscuro.attend(given, *parts, attention_mask, dropout, scaling, softcap), None


AttentionInterface.register(IMPLEMENTATION, attend_routed)
