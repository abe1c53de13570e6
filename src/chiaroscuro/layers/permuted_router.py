"""H of shuffled features: if it routes as well as H, the order of the feature axis carries nothing."""

import torch
from jaxtyping import Float
from torch import Tensor

from chiaroscuro.layers.router import ScoreRouter
from chiaroscuro.ops import spectral_entropy
from chiaroscuro.ops.spectral import Spectrum


class PermutedRouter(ScoreRouter):
    """H(P x), P one permutation of the d features, drawn once from the seed and the same in every layer.

    White noise stays white noise, so the null and an uncalibrated layer's thresholds are those of H.

    Args:
        operators: the menu, in order of cost.
        width: d, the features of a token.
        attention_share: ρ, the share of tokens for the last operator.
        thresholds: K − 1 fixed ones, instead of calibrated ones.
        spectrum: of the entropy.
        router_seed: of the permutation.

    """

    permutation: Tensor

    def __init__(
        self,
        operators: tuple[str, ...],
        width: int,
        attention_share: float = 0.25,
        thresholds: tuple[float, ...] | None = None,
        spectrum: Spectrum = "orthonormal",
        router_seed: int = 0,
    ) -> None:
        super().__init__(operators, width, attention_share, thresholds, spectrum)
        self.spectrum = spectrum
        self.router_seed = router_seed
        self.register_buffer("permutation", torch.empty(width, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the permutation: the seed's, whatever was drawn before."""
        generator = torch.Generator("cpu").manual_seed(self.router_seed)
        self.permutation.copy_(torch.randperm(len(self.permutation), generator=generator, device="cpu"))

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time"]:
        """H of the permuted features."""
        return spectral_entropy(x.detach()[..., self.permutation], self.spectrum).float()
