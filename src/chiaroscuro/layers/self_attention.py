"""The full operator: multi-head causal self-attention with rotary positions and, optionally, grouped heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro.errors import UserError
from chiaroscuro.layers.attend_packed import attend_packed
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Count, Operator, Work
from chiaroscuro.layers.packed_tokens import AttentionContext, PackedTokens, check_attention_context
from chiaroscuro.layers.rotary import BY_LENGTH, frequencies_of
from chiaroscuro.layers.state import KeptTokens
from chiaroscuro.ops.attention import attend, rotary_table, rotate


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
        rope_parameters: scaling of the rotary angles as in transformers; where given, `rope_theta` is read from it.
        max_position_embeddings: the longest sequence, on which some types of scaling depend.
        attention_context: where a layer routes only some tokens here, what they attend to: `"all"` tokens up to their
            own (the paper), or only the `"routed"` ones among these.

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

    def __post_init__(self) -> None:
        check_attention_context(self.attention_context)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            value = getattr(self, name)
            optional = name != "num_attention_heads"
            if not (optional and value is None) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise UserError(f"{name}={value!r}: must be a positive whole number")
        if not isinstance(self.bias, bool):
            raise UserError(f"bias={self.bias!r}: must be true or false")

    def widths(self, width: int) -> tuple[int, int, int]:
        """Heads of the queries, heads of keys and values, and the width of each."""
        heads = self.num_attention_heads
        return heads, self.num_key_value_heads or heads, self.head_dim or width // heads


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
    cost = 2
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
        self._frequencies = None if self._by_length else self._frequencies_at(self.options.max_position_embeddings)

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
            longest = options.max_position_embeddings
            frequencies_of(options.rope_parameters, head_width, longest, longest)

    def mix(self, x: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """Attend from every token.

        In the `"routed"` context tokens that are not routed here are attended to by themselves alone.

        Raises:
            ValueError: a cache together with routed tokens in the `"routed"` context, which only the packed form has.

        """
        mask = context.mask(x.shape[1])
        if context.routed is not None and self.options.attention_context == "routed":
            if context.state is not None:
                raise ValueError("a cache in the 'routed' context holds the routed tokens alone: use sparse execution")
            real = context.real(x.shape[1])
            mask = context.mask_over(context.routed if real is None else context.routed & real, x.shape[1])
        table = self._rotary(x, context)
        query = rotate(_split(self.q_proj(x), self.heads), table)
        key = rotate(_split(self.k_proj(x), self.key_value_heads), table)
        value = _split(self.v_proj(x), self.key_value_heads)
        if context.state is not None:
            key, value = context.state.update(key, value)
        mixed = attend(query, key, value, mask, self._dropout, context.implementation)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def mix_packed(
        self, x: Float[Tensor, "batch time width"], tokens: PackedTokens, context: Context
    ) -> Float[Tensor, "tokens width"]:
        """Attend from some tokens: queries, output and rows of scores for them alone."""
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

    @property
    def _dropout(self) -> float:
        return self.options.attention_dropout if self.training else 0.0

    def new_cache(self) -> KeptTokens:
        """Keys and values: of all tokens, or in the `"routed"` context of those that were routed here."""
        return KeptTokens()

    @classmethod
    def count(cls, width: int, options: AttentionOptions, work: Work) -> Count:
        """Projections of queries, keys, values and outputs, and two products with the scores."""
        heads, key_value_heads, head_width = options.widths(width)
        n, queried, kept = work.tokens, heads * head_width, key_value_heads * head_width
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

    @property
    def _by_length(self) -> bool:
        return self._rope.get("rope_type") in BY_LENGTH

    def _frequencies_at(self, length: int) -> tuple[Tensor, float]:
        return frequencies_of(self._rope, self.head_width, self.options.max_position_embeddings, length)

    def _rotary(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Cosines and sines for x's positions, which layers of the same options share."""
        key = ("rotary", self.head_width, *sorted((name, str(value)) for name, value in self._rope.items()))
        if key not in context.shared:
            positions = context.positions(x)
            frequencies, factor = self._frequencies or self._frequencies_at(context.past + x.shape[1])
            context.shared[key] = rotary_table(positions, frequencies.to(x.device), factor)
        return context.shared[key]


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
