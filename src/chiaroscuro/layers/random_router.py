"""Routing by chance: what any score that means something has to beat."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.context import Context
from chiaroscuro.layers.router import KEY_SIDE, ScoreRouter, SeededOptions

_32_BITS = 0xFFFFFFFF
_OF_THE_KEY_SIDE = 0x9E3779B9
"""What a hash of the key side begins with, so that who is kept is not who looks. Any number but 0 would do."""


class RandomRouter(ScoreRouter):
    """A number in [0, 1) that a hash makes of seed, side, layer, position and token: sides and layers are independent.

    It is drawn without a generator, so a token goes the same way alone, in a batch, and continued from a cache. The
    position counts real tokens, as everywhere, so padding changes nothing either.
    """

    Options = SeededOptions
    scores_entropy = False
    reads_entropy = False
    null_is_exact = True

    def null_quantiles(self, probabilities: Sequence[float]) -> Float[Tensor, " probabilities"]:
        """Those of the uniform distribution: the probabilities themselves."""
        return torch.tensor(probabilities, dtype=torch.float32, device="cpu")

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"], context: Context
    ) -> Float[Tensor, "batch time"]:
        """The hash of each token and its place.

        Raises:
            UserError: the token ids are not known, as where embeddings were given instead.

        """
        if context.input_ids is None:
            raise UserError("router='random' draws by token id: give input_ids, not embeddings")
        begin = _OF_THE_KEY_SIDE if self.operator_names == KEY_SIDE else 0
        mixed = torch.full_like(context.input_ids, begin, dtype=torch.int64)
        for part in (self.options.router_seed, self.layer, context.positions(x), context.input_ids):
            mixed = _scramble(mixed ^ part)
        # 24 bits are what a float32 holds without rounding up to 1.
        return (mixed >> 8).float() / 2**24


def _scramble(number: Tensor) -> Tensor:
    """Spread 32 bits: every bit of the result depends on every bit of the number.

    Shifts and factors are those of a search for the least biased (github.com/skeeto/hash-prospector); with factors
    below 2³¹ no product leaves the 63 bits of an int64.
    """
    number = number & _32_BITS
    number = ((number ^ (number >> 16)) * 0x21F0AAAD) & _32_BITS
    number = ((number ^ (number >> 15)) * 0x735A2D97) & _32_BITS
    return number ^ (number >> 15)
