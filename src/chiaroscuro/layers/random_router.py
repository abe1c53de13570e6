"""Routing by chance: what any score that means something has to beat."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.router import ScoreRouter
from chiaroscuro.ops.spectral import Spectrum

_32_BITS = 0xFFFFFFFF


class RandomRouter(ScoreRouter):
    """A number in [0, 1) that a hash makes of seed, layer, position and token.

    It is drawn without a generator, so a token goes the same way alone, in a batch, and continued from a cache. The
    position counts real tokens, as everywhere, so padding changes nothing either.

    Args:
        operators: the menu, in order of cost.
        width: d, the features of a token.
        attention_share: ρ, the share of tokens for the last operator.
        thresholds: K − 1 fixed ones, instead of calibrated ones.
        layer: number of the layer; layers draw independently.
        router_seed: of the draw.

    """

    scores_entropy = False

    def __init__(
        self,
        operators: tuple[str, ...],
        width: int,
        attention_share: float = 0.25,
        thresholds: tuple[float, ...] | None = None,
        layer: int = 0,
        router_seed: int = 0,
    ) -> None:
        super().__init__(operators, width, attention_share, thresholds)
        self.layer = layer
        self.router_seed = router_seed

    def null_quantiles(
        self, width: int, probabilities: Sequence[float], spectrum: Spectrum
    ) -> Float[Tensor, " probabilities"]:
        """Those of the uniform distribution: the probabilities themselves."""
        return torch.tensor(probabilities, dtype=torch.float32, device="cpu")

    def score(
        self,
        x: Float[Tensor, "batch time width"],
        entropy: Float[Tensor, "batch time"],
        position_ids: Int[Tensor, "batch time"] | None = None,
        input_ids: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time"]:
        """The hash of each token and its place.

        Raises:
            UserError: the token ids are not known, as where embeddings were given instead.

        """
        if input_ids is None:
            raise UserError("router='random' draws by token id: give input_ids, not embeddings")
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        mixed = torch.zeros_like(input_ids, dtype=torch.int64)
        for part in (self.router_seed, self.layer, position_ids, input_ids):
            mixed = _scramble(mixed ^ part)
        # 24 bits are what a float32 holds without rounding up to 1.
        return (mixed >> 8).float() / 2**24


def _scramble(number: Tensor) -> Tensor:
    """Spread 32 bits: every bit of the result hangs on every bit of the number.

    Shifts and factors are those of a search for the least biased (github.com/skeeto/hash-prospector); with factors
    below 2³¹ no product leaves the 63 bits of an int64.
    """
    number = number & _32_BITS
    number = ((number ^ (number >> 16)) * 0x21F0AAAD) & _32_BITS
    number = ((number ^ (number >> 15)) * 0x735A2D97) & _32_BITS
    return number ^ (number >> 15)
