"""The full operator: multi-head causal self-attention with rotary positions and, optionally, grouped heads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers.attend_near_and_far import attend_from_newest, attend_near_and_far, gains_from_far
from chiaroscuro.layers.attend_packed import attend_packed
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Count, Operator, Work, is_number, is_whole
from chiaroscuro.layers.packed_tokens import AttentionContext, PackedTokens, check_attention_context
from chiaroscuro.layers.reach_state import ReachState
from chiaroscuro.layers.rotary import frequencies_of
from chiaroscuro.layers.state import KeptTokens, OperatorState
from chiaroscuro.ops.attention import attend, rotary_table, rotate
from chiaroscuro.ops.reach_attention import LONGEST_WINDOW, reach_mask

WIDEST = 2**24
"""The most heads, and the widest one: far beyond any model, and a tensor's size still fits 64 bits."""


@dataclass(frozen=True)
class AttentionOptions:
    """Options of attention; each bears the name of the configuration's field that it defaults to in a model.

    Attributes:
        num_attention_heads: h.
        num_key_value_heads: heads of keys and values, each shared by h / this many query heads; h unless given.
        head_dim: c, the width of a head; d / h unless given.
        bias: whether the projections have biases.
        attention_dropout: on the attention probabilities, in training.
        rope_theta: the base of the rotary angles.
        rope_parameters: scaling of the rotary angles, see `frequencies_of`; where given, `rope_theta` is read from it.
        max_position_embeddings: the longest sequence, on which some types of scaling depend.
        attention_context: what tokens attend to beyond their window: `"all"` earlier tokens (the paper), only those
            `"routed"` here, where a layer routes only some, or those that are `"kept"`.
        window: w, how many tokens each token attends to in any case, its own included, whoever was routed or kept;
            unless given, itself alone.
        sinks: s, how many tokens at the beginning of a sequence all attend to.

    """

    num_attention_heads: int = 1
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    bias: bool = True
    attention_dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_parameters: Mapping[str, Any] | None = None
    max_position_embeddings: int = 1024
    attention_context: AttentionContext = "all"
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        check_attention_context(self.attention_context)
        if self.window is not None and not _is_whole(self.window, 1, LONGEST_WINDOW):
            raise UserError(
                f"window={self.window!r}: must be a whole number of tokens from 1 to {LONGEST_WINDOW}, or left out for "
                "no window"
            )
        if not _is_whole(self.sinks, 0, LONGEST_WINDOW):
            raise UserError(f"sinks={self.sinks!r}: must be a whole number of tokens from 0 to {LONGEST_WINDOW}")
        if self.sinks and self.window is None:
            raise UserError(f"sinks={self.sinks} without a window: set window too, or drop sinks")
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            value = getattr(self, name)
            optional = name != "num_attention_heads"
            if not (optional and value is None) and not _is_whole(value, 1, WIDEST):
                raise UserError(f"{name}={value!r}: must be a whole number from 1 to {WIDEST:,}")
        if not isinstance(self.bias, bool):
            raise UserError(f"bias={self.bias!r}: must be true or false")
        if not is_number(self.attention_dropout) or not 0 <= self.attention_dropout < 1:
            raise UserError(f"attention_dropout={self.attention_dropout!r}: must be a number from 0 to less than 1")
        if not is_number(self.rope_theta) or not 0 < self.rope_theta < math.inf:
            raise UserError(f"rope_theta={self.rope_theta!r}: must be a positive number")

    def widths(self, width: int) -> tuple[int, int, int]:
        """Heads of the queries, heads of keys and values, and the width of each."""
        heads = self.num_attention_heads
        return heads, self.num_key_value_heads or heads, self.head_dim or width // heads

    @property
    def near_and_far(self) -> bool:
        """Whether what is near and what is far are different things: the paper's attention has one or the other."""
        return self.window is not None or self.attention_context == "kept"


class SelfAttention(Operator):
    """softmax(q kᵀ / √c) v over h heads of width c, causal, with rotary positions on q and k.

    Source: arXiv 1706.03762; RoPE arXiv 2104.09864, rotate-half convention; grouped heads arXiv 2305.13245.

    Args:
        width: d, the features of a token.
        options: see `AttentionOptions`.

    Raises:
        UserError: the heads don't divide the width, or into an odd one; the key-value heads don't divide the heads; an
            unknown context.

    """

    Options = AttentionOptions
    cost: ClassVar[int | float | None] = 2
    separates_documents = True

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.heads, self.key_value_heads, self.head_width = self.options.widths(width)
        bias = self.options.bias
        self.q_proj = nn.Linear(width, self.heads * self.head_width, bias=bias)
        self.k_proj = nn.Linear(width, self.key_value_heads * self.head_width, bias=bias)
        self.v_proj = nn.Linear(width, self.key_value_heads * self.head_width, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.head_width, width, bias=bias)
        # No buffer: it follows from the options, and is neither saved nor cast.
        self._frequencies = frequencies_of(self._rope, self.head_width, self.options.max_position_embeddings)

    @classmethod
    def check(cls, width: int, options: AttentionOptions) -> None:
        """Refuse heads that don't fit."""
        heads, key_value_heads, head_width = options.widths(width)
        if options.head_dim is None and width % heads:
            raise UserError(f"hidden_size={width} is not divisible by num_attention_heads={heads}: change one of them")
        if head_width % 2:
            given = f"hidden_size={width} over num_attention_heads={heads}"
            given = given if options.head_dim is None else f"head_dim={head_width}"
            raise UserError(f"{given} gives heads of width {head_width}: rotary positions need an even width")
        if heads % key_value_heads:
            raise UserError(
                f"num_attention_heads={heads} is not divisible by num_key_value_heads={key_value_heads}: each of "
                "these serves the same number of heads"
            )
        if options.rope_parameters is not None:
            frequencies_of(options.rope_parameters, head_width, options.max_position_embeddings)

    def mix(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """Attend from every token.

        In the `"routed"` context tokens that are not routed here are attended to by themselves alone, and by those
        whose window they are in.

        Raises:
            ValueError: a cache together with routed tokens in the `"routed"` context, which only the packed form has.

        """
        if self.options.near_and_far:
            return self._mix_near_and_far(x, context)
        mask = context.mask(x.shape[1])
        if context.routed is not None and self.options.attention_context == "routed":
            if context.state is not None:
                raise ValueError("a cache in the 'routed' context holds the routed tokens alone: use sparse execution")
            real = context.real(x.shape[1])
            mask = context.mask_over(context.routed if real is None else context.routed & real, x.shape[1])
        query, key, value = self.projected(x, context)
        if context.state is not None:
            # A cache may be filled under autocast, and used outside.
            key, value = (x.to(query.dtype) for x in context.state.update(key, value))
        mixed = attend(query, key, value, mask, self._dropout, context.implementation)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def projected(
        self, x: Float[Tensor, "batch time width"], context: Context
    ) -> tuple[
        Float[Tensor, "batch heads time head_width"],
        Float[Tensor, "batch key_heads time head_width"],
        Float[Tensor, "batch key_heads time head_width"],
    ]:
        """Queries and keys, rotated, and values of all tokens."""
        table = self._rotary(x, context)
        query = rotate(_split(self.q_proj(x), self.heads), table)
        key = rotate(_split(self.k_proj(x), self.key_value_heads), table)
        return query, key, _split(_gated(self.v_proj(x), context.kept_scale), self.key_value_heads)

    def mix_packed(
        self, x: Float[Tensor, "batch time width"], tokens: PackedTokens, context: Context
    ) -> Float[Tensor, "tokens width"]:
        """Attend from some tokens: queries, output and rows of scores for them alone."""
        if self.options.near_and_far:
            return self._mix_packed_near_and_far(x, tokens, context)
        state: KeptTokens | None = context.state
        keyed = tokens.keys(self.options.attention_context, context.real(x.shape[1]))
        idle = len(tokens) == 0 and not torch.is_grad_enabled()
        if idle and (state is None or len(keyed) == 0):
            if state is not None:
                empty = x.new_empty(0, self.key_value_heads, self.head_width)
                state.extend(keyed.chosen, empty, empty)
            return x.new_empty(0, x.shape[-1])
        cos, sin = self._rotary(x, context)
        sources = tokens.take(x)
        targets = sources if keyed is tokens else keyed.take(x)
        key = rotate(self.k_proj(targets).unflatten(-1, (self.key_value_heads, -1)), (keyed.take(cos), keyed.take(sin)))
        value = self.v_proj(targets).unflatten(-1, (self.key_value_heads, -1))
        if idle:
            assert state is not None
            state.extend(keyed.chosen, key, value)
            return x.new_empty(0, x.shape[-1])
        query = rotate(self.q_proj(sources).unflatten(-1, (self.heads, -1)), (tokens.take(cos), tokens.take(sin)))
        mixed = attend_packed(query, (key, value), tokens, keyed, context, dropout=self._dropout)
        return self.out_proj(mixed.flatten(1))

    @classmethod
    def keeps(cls, options: AttentionOptions) -> bool:
        """In the `"kept"` context."""
        return options.attention_context == "kept"

    @classmethod
    def key_heads(cls, width: int, options: AttentionOptions) -> int:
        """Those that groups of queries share."""
        return options.widths(width)[1]

    def _mix_near_and_far(self, x: Tensor, context: Context) -> Tensor:
        """`mix` where near and far differ: under a mask in dense execution, else by the packed form."""
        state: ReachState | None = context.state
        if state is not None and state.continues(x, context):
            return self._mix_newest(x, context)[:, None]
        masked = context.routed is not None or context.implementation == "eager" or torch.compiler.is_compiling()
        if state is not None or not masked:
            tokens = PackedTokens.real_of(x, context.real(x.shape[1]), context.segments)
            return tokens.put_in(torch.zeros_like(x), self._mix_packed_near_and_far(x, tokens, context))
        query, key, value = self.projected(x, context)
        mixed = attend(query, key, value, self._mask(x, context), self._dropout, context.implementation)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _mask(self, x: Tensor, context: Context) -> Bool[Tensor, "batch heads time time"]:
        """Which tokens each one sees; a padded one sees itself, so that no row of the softmax is empty."""
        real = context.real(x.shape[1])
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        chosen = real if context.routed is None else real & context.routed
        looks, kept = self._decided(chosen, real, context)
        places = self._places(x, real, context)[:, None]
        kept = kept[:, None] if kept.ndim == 2 else kept.transpose(1, 2)
        seen = reach_mask(places, places, looks[:, None], kept, self.options.window or 1, self.options.sinks)
        seen = seen & real[:, None, None]
        if context.segments is not None:
            seen = seen & (context.segments[:, None, :, None] == context.segments[:, None, None])
        seen = seen | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return seen.repeat_interleave(self.heads // seen.shape[1], 1) if seen.shape[1] > 1 else seen

    def _mix_packed_near_and_far(self, x: Tensor, tokens: PackedTokens, context: Context) -> Tensor:
        if len(x) == 0:  # a batch without rows
            return x.flatten(0, 1)
        state: ReachState | None = context.state
        if state is not None and len(tokens) == len(x) and state.continues(x, context):
            return self._mix_newest(x, context)
        everything = PackedTokens.real_of(x, context.real(x.shape[1]), context.segments)
        looks, kept = self._decided(tokens.chosen, everything.chosen, context)
        keyed = everything
        if self.options.window is None and state is None:  # then some tokens are seen by nobody
            keyed = PackedTokens.of(tokens.chosen | (kept if kept.ndim == 2 else kept.any(-1)), context.segments)
        if len(tokens) == 0 and state is None and not torch.is_grad_enabled():
            return x.new_empty(0, x.shape[-1])
        cos, sin = self._rotary(x, context)
        sources, targets = tokens.take(x), keyed.take(x)
        key = rotate(self.k_proj(targets).unflatten(-1, (self.key_value_heads, -1)), (keyed.take(cos), keyed.take(sin)))
        scale = None if context.kept_scale is None else keyed.take(context.kept_scale)
        value = _gated(self.v_proj(targets), scale).unflatten(-1, (self.key_value_heads, -1))
        query = rotate(self.q_proj(sources).unflatten(-1, (self.heads, -1)), (tokens.take(cos), tokens.take(sin)))
        window, sinks = self.options.window or 1, self.options.sinks
        mixed = attend_near_and_far(
            query, key, value, tokens, keyed, looks, kept, context, window, sinks, self._dropout
        )
        return self.out_proj(mixed.flatten(1))

    def _mix_newest(self, x: Float[Tensor, "batch 1 width"], context: Context) -> Float[Tensor, "batch width"]:
        """One new token of each row, with nothing to pack: what decoding does."""
        state: ReachState = context.state
        everybody = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        looks, kept = self._decided(everybody, everybody, context)
        cos, sin = (part[:, 0] for part in self._rotary(x, context))
        newest = x[:, 0]
        turned = rotate(
            torch.cat([self.q_proj(newest), self.k_proj(newest)], -1).unflatten(-1, (-1, self.head_width)), (cos, sin)
        )
        query, key = turned.split([self.heads, self.key_value_heads], 1)
        scale = None if context.kept_scale is None else context.kept_scale[:, 0]
        value = _gated(self.v_proj(newest), scale).unflatten(-1, (self.key_value_heads, -1))
        mixed = attend_from_newest(query, key, value, looks[:, 0], kept[:, 0], state, context.implementation)
        return self.out_proj(mixed.flatten(1))

    def _decided(
        self, chosen: Bool[Tensor, "batch time"], real: Bool[Tensor, "batch time"], context: Context
    ) -> tuple[Bool[Tensor, "batch time"], Bool[Tensor, "batch time *key_heads"]]:
        """Of the chosen tokens, which look far; and of all, which are seen from far."""
        looks = self._looking(chosen, context)
        if self.options.attention_context == "all":
            return looks, real
        if self.options.attention_context == "routed":
            return looks, looks
        if context.kept is None:
            raise UserError("attention_context='kept' without a decision who is kept: give the block a kv_router")
        return looks, context.kept & (real if context.kept.ndim == 2 else real[..., None])

    @staticmethod
    def _places(x: Tensor, real: Tensor, context: Context) -> Int[Tensor, "batch time"]:
        """Each token's place among the real ones of its row or document."""
        everything = PackedTokens.all_of(x, context.segments)
        # What is counted needs no index, which a compiler couldn't look into.
        return everything.ordinals(PackedTokens(real, None, context.segments)).view(x.shape[:2]) - 1

    def _looking(self, chosen: Tensor, context: Context) -> Bool[Tensor, "batch time"]:
        """Which of the chosen tokens look far: where `local` shares this module, those that are not its own."""
        chosen = chosen if context.routed is None else chosen & context.routed
        return chosen if context.choice is None else chosen & (context.choice > 0)

    @torch.no_grad()
    def gain_of_being_kept(
        self,
        x: Float[Tensor, "batch time width"],
        context: Context,
        slope: Float[Tensor, "batch time width"],
    ) -> Float[Tensor, "batch time key_heads"] | None:
        """What the loss loses if a token is seen from far, in nats, to first order: `gains_from_far`.

        The sum over the queries that have it beyond their window, and over the heads that share a key; 0 where nobody
        could see it, and at padding.

        Args:
            x: the operator's input.
            context: what else is known about the tokens; without a cache.
            slope: ∂L/∂y of the operator's output y where nothing far is seen.

        """
        query, key, value = self.projected(x, context)
        slopes = _split(slope @ self.out_proj.weight, self.heads)
        window, sinks = self.options.window or 1, self.options.sinks
        return gains_from_far(query, key, value, slopes, context, window, sinks)[1]

    @property
    def _dropout(self) -> float:
        return self.options.attention_dropout if self.training else 0.0

    def new_cache(self) -> OperatorState:
        """Keys and values: of all tokens, or in the `"routed"` context of those that were routed here.

        Where near and far differ: of the window, the sinks, and those that are seen from far.
        """
        if self.options.near_and_far:
            return ReachState(self.options.window or 1, self.options.sinks)
        return KeptTokens()

    @classmethod
    def count(cls, width: int, options: AttentionOptions, work: Work) -> Count:
        """Projections of queries, keys, values and outputs, and two products with the scores."""
        heads, key_value_heads, head_width = options.widths(width)
        n, queried, kept = work.tokens, heads * head_width, key_value_heads * head_width
        if options.near_and_far:
            return _count_near_and_far(width, options, work)
        routed = work.routed and options.attention_context == "routed"
        keys = n if routed else work.length
        past = work.past * (n / work.length if routed else 1.0)
        pairs = work.pairs(keys, past)
        return Count(
            {
                "attention projections": work.product * 4 * width * (queried * n + kept * keys),
                "attention scores": work.product * 4 * queried * pairs,
            },
            numbers_kept=2 * kept * (past + keys),
            published=n * (4 * width * width + 2 * work.length * width),
        )

    @property
    def _rope(self) -> Mapping[str, Any]:
        return self.options.rope_parameters or {"rope_theta": self.options.rope_theta}

    def _rotary(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Cosines and sines for x's positions, which layers of the same options share."""
        rope = sorted((name, str(value)) for name, value in self._rope.items())
        key = ("rotary", self.head_width, self.options.max_position_embeddings, *rope)
        if key not in context.shared:
            frequencies, factor = self._frequencies
            context.shared[key] = rotary_table(context.positions(x), frequencies.to(x.device), factor)
        return context.shared[key]


def _is_whole(value: Any, least: int, most: int | None = None) -> bool:
    return is_whole(value) and least <= value and (most is None or value <= most)


def _count_near_and_far(width: int, options: AttentionOptions, work: Work) -> Count:
    """`SelfAttention.count` where near and far differ."""
    heads, key_value_heads, head_width = options.widths(width)
    n, queried, kept = work.tokens, heads * head_width, key_value_heads * head_width
    looking = n if work.last is None else work.last
    share = {"all": 1.0, "routed": looking / work.length, "kept": work.kept}[options.attention_context]
    window, sinks = options.window or 1, options.sinks
    # Without a window a token that nobody asks and nobody keeps needs no key.
    keys = work.length if options.window is not None or work.past else n + share * (work.length - n)
    before, sunk = work.mean_beyond(window), work.mean_beyond(window) - work.mean_beyond(window + sinks)
    pairs = n * (work.mean_beyond(0) - before + sunk) + looking * share * (before - sunk)
    if work.dense:  # all scores are computed, and a mask hides most
        pairs = work.pairs(work.length, work.past)
    end = work.past + work.length
    held = min(end, window + sinks) + share * max(0, end - window - sinks)
    return Count(
        {
            "attention projections": work.product * 4 * width * (queried * n + kept * keys),
            "attention scores": work.product * 4 * queried * pairs,
        },
        numbers_kept=2 * kept * held,
        published=(n if work.dense else looking) * (4 * width * width + 2 * work.length * width),
    )


def _gated(value: Tensor, scale: Tensor | None) -> Tensor:
    """Values times what the key side's router says, for all heads or for each."""
    if scale is None:
        return value
    heads = scale.shape[-1] if scale.ndim == value.ndim else 1
    return (value.unflatten(-1, (heads, -1)) * scale.reshape(*value.shape[:-1], heads, 1).to(value.dtype)).flatten(-2)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
