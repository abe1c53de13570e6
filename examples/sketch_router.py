"""A router of one's own: a learned score on a few drawn features, with an option, a parameter and a drawn buffer.

    chiaroscuro --import examples.sketch_router train recipes/small.yaml 'model.router={sketch: {features: 8}}'

Importing the file registers the router as `sketch`. Thresholds, calibration, the dial and sparse execution come with
`ScoreRouter`; `reset_parameters` is what a model calls to draw the buffer when it is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chiaroscuro import register_router
from chiaroscuro.layers import Context, ScoreRouter, SeededOptions, Work


@dataclass(frozen=True)
class SketchOptions(SeededOptions):
    """Options of a router by a score that draws something, by the model's `router_seed`; and `features`, m, drawn."""

    features: int = 16


class SketchRouter(ScoreRouter):
    """s = w · tanh(R x / √d), R of shape (m, d) drawn once and kept, w learned through the scale σ(s)."""

    Options = SketchOptions
    scores_entropy = False
    sketch: Tensor

    def __init__(self, width: int, operators: Sequence[str], layer: int = 0, **options: Any) -> None:
        super().__init__(width, operators, layer, **options)
        self.register_buffer("sketch", torch.empty(self.options.features, width))
        self.weight = nn.Parameter(torch.empty(self.options.features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """R ~ N(0, 1) from the seed, another in every layer; w = 1/√m."""
        generator = torch.Generator("cpu").manual_seed(self.options.router_seed + self.layer)
        self.sketch.copy_(torch.randn(self.sketch.shape, generator=generator, device="cpu"))
        self.weight.fill_(len(self.weight) ** -0.5)

    def null_quantiles(self, probabilities: Sequence[float]) -> Float[Tensor, " probabilities"]:
        """Those of N(0, 0.394): of white noise R x / √d is normal, and the variance of tanh of that is 0.394."""
        # The ends of the table are finite, as those of a table of data are.
        inner = torch.tensor(probabilities, dtype=torch.float64, device="cpu").clamp(1e-4, 1 - 1e-4)
        return (0.394**0.5 * torch.special.ndtri(inner)).float()

    def score(
        self, x: Float[Tensor, "batch time width"], entropy: Float[Tensor, "batch time"], context: Context
    ) -> Float[Tensor, "batch time"]:
        """s, with its gradient."""
        drawn = x @ self.sketch.to(x.dtype).T * self.width**-0.5
        return (drawn.tanh() @ self.weight).float()

    def scale(self, score: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
        """σ(s), through which w learns."""
        return score.sigmoid()

    @classmethod
    def count(cls, width: int, operators: int, options: SketchOptions, work: Work) -> int | float:
        """The product with R, whose backward is one product, for R is fixed."""
        return work.transform * 2 * width * options.features


register_router("sketch", SketchRouter)
