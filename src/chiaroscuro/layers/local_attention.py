"""Attention to the neighbours alone: what a token gets that does not look far."""

from dataclasses import replace

from jaxtyping import Bool
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.operator import Count, Operator, Work
from chiaroscuro.layers.self_attention import AttentionOptions, SelfAttention


class LocalAttention(SelfAttention):
    """`attention` of which no token looks beyond its window of w tokens and the s sinks.

    On a menu with `attention` the two are one module, with one set of projections: its tokens are `attention`'s, which
    do not look far, and are near to those that do.

    Args:
        width: d, the features of a token.
        options: those of `attention`, of which it needs `window`.

    Raises:
        UserError: as for `attention`; no window.

    """

    cost = 1.5
    part_of = SelfAttention
    gain_of_being_kept = Operator.gain_of_being_kept  # it has no far

    @classmethod
    def check(cls, width: int, options: AttentionOptions) -> None:
        """Refuse to attend to nothing."""
        super().check(width, options)
        if options.window is None:
            raise UserError("operator 'local' without a window: set window, such as window=128")

    def _decided(
        self, chosen: Bool[Tensor, "batch time"], real: Bool[Tensor, "batch time"], context: Context
    ) -> tuple[Bool[Tensor, "batch time"], Bool[Tensor, "batch time *key_heads"]]:
        """None looks, and so none need be kept."""
        return chosen & False, real & False

    @classmethod
    def keeps(cls, options: AttentionOptions) -> bool:
        """Nobody sees from far."""
        return False

    @classmethod
    def count(cls, width: int, options: AttentionOptions, work: Work) -> Count:
        """That of attention of which none looks and none is kept."""
        return super().count(width, replace(options, attention_context="kept"), replace(work, last=0, kept=0))
