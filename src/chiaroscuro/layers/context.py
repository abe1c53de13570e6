"""What a layer knows about its tokens beside their vectors: one typed object, given to operators and routers."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.state import LayerStates
from chiaroscuro.ops import (
    entropy_of_spectrum,
    has_kernel,
    spectral_coefficients,
    spectral_filter,
    spectral_mix,
    spectral_mix_with_entropy,
)
from chiaroscuro.ops.attention import AttentionImplementation, causal_mask
from chiaroscuro.ops.spectral import Spectrum

OTHER_PADDING = (
    "attention_mask has cached tokens for padding that were real when they were cached, or the other way round: repeat "
    "the mask that they came with, or start a new cache"
)
"""What is said of a mask that contradicts a cache."""


class Spectra:
    """The DCT of a layer's input and what follows from it, each computed once, for the router and the operators.

    Args:
        x: the operators' input.
        spectrum: of the entropy.
        differentiable: whether the entropy needs a gradient. A choice by thresholds has none.
        filter: the one filter that some operator of the layer applies to the coefficients, if exactly one does. Where
            there is a kernel for it, entropy and filtered tokens come from one pass over x.

    """

    def __init__(
        self,
        x: Float[Tensor, "batch time width"],
        spectrum: Spectrum = "orthonormal",
        *,
        differentiable: bool = False,
        filter: Float[Tensor, " width"] | None = None,
    ) -> None:
        self.x = x
        self.spectrum = spectrum
        self.differentiable = differentiable
        self._filter = filter if filter is not None and filter.device == x.device and has_kernel(x) else None
        self._coefficients: Tensor | None = None
        self._of_kernel: tuple[Tensor, Tensor] | None = None

    @property
    def coefficients(self) -> Float[Tensor, "batch time width"]:
        """DCT(x)."""
        if self._coefficients is None:
            self._coefficients = spectral_coefficients(self.x)
        return self._coefficients

    def entropy(self) -> Float[Tensor, "batch time"]:
        """H(x)."""
        if self._filter is not None:
            entropy = self._by_kernel(self._filter)[1]
            return entropy if self.differentiable else entropy.detach()
        coefficients = self.coefficients if self.differentiable else self.coefficients.detach()
        return entropy_of_spectrum(coefficients, self.spectrum)

    def filtered(self, weight: Float[Tensor, " width"]) -> Float[Tensor, "batch time width"]:
        """iDCT(DCT(x) ⊙ w), in x's type."""
        if weight is self._filter:
            return self._by_kernel(weight)[0]
        return spectral_filter(self.coefficients, weight).to(self.x.dtype)

    def filtered_at(
        self, weight: Float[Tensor, " width"], index: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens width"]:
        """`filtered` of some tokens of the flattened batch alone; of all where the index is None."""
        if weight is self._filter:  # filtering the other tokens too costs a kernel less than reading x again
            mixed = self._by_kernel(weight)[0].flatten(0, 1)
            return mixed if index is None else mixed.index_select(0, index)
        if self._coefficients is None and index is not None:  # nobody needs those of the other tokens
            return spectral_mix(self.x.flatten(0, 1).index_select(0, index), weight)
        return spectral_filter(self.coefficients.flatten(0, 1), weight, index).to(self.x.dtype)

    def _by_kernel(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self._of_kernel is None:
            self._of_kernel = spectral_mix_with_entropy(self.x, weight, self.spectrum)
        return self._of_kernel


@dataclass(frozen=True)
class Context:
    """What operators and routers may read beside x. All of it is optional for a layer that is used alone.

    Attributes:
        attention_mask: True for real tokens, over the cached and the new ones; None where nothing is padded.
        position_ids: each new token's position; counted from 0 where not given.
        past: how many tokens of each row came before the new ones, padding included.
        input_ids: the new tokens' ids, where the model was given ids.
        segments: the number of the document that each token belongs to, rising within a row, where a row holds several
            documents that must not see each other. Never together with cached tokens.
        implementation: of attention, `"sdpa"` or `"eager"`.
        cache: the states of this layer's operators; None where nothing is cached.
        state: the state of the operator that is being run, from `cache`.
        spectra: the DCT of the layer's input, shared by the router and the operators.
        routed: in dense execution, the tokens whose output of this operator will be used.
        choice: for an operator that a menu has under several names, by which of them each token goes to it, from 0;
            outside their range for the tokens of other operators.
        kept: which of the new tokens are seen from beyond the window, for all key-value heads or for each; None where
            nothing decides it.
        kept_scale: what their values are multiplied by, where the router that decides it says so.
        layer_input: the tokens before the layer's norm.
        shared: things that are the same for all layers of one forward, computed by the first layer that needs them.

    """

    attention_mask: Bool[Tensor, "batch keys"] | None = None
    position_ids: Int[Tensor, "batch time"] | None = None
    past: int = 0
    input_ids: Int[Tensor, "batch time"] | None = None
    segments: Int[Tensor, "batch time"] | None = None
    implementation: AttentionImplementation = "sdpa"
    cache: LayerStates | None = None
    state: Any = None
    spectra: Spectra | None = None
    routed: Bool[Tensor, "batch time"] | None = None
    choice: Int[Tensor, "batch time"] | None = None
    kept: Bool[Tensor, "batch time *key_heads"] | None = None
    kept_scale: Float[Tensor, "batch time *key_heads"] | None = None
    layer_input: Float[Tensor, "batch time width"] | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mask = self.attention_mask
        if mask is not None and mask.dtype != torch.bool:
            if mask.is_floating_point():
                raise UserError(f"an attention_mask of {mask.dtype}: give True, or 1, for real tokens")
            object.__setattr__(self, "attention_mask", mask.bool())

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Context":
        """On another device; accelerate calls it for a layer whose weights lie there."""
        device = torch.device(device)
        names = (
            *("attention_mask", "position_ids", "input_ids", "segments", "routed"),
            *("choice", "kept", "kept_scale", "layer_input"),
        )
        given = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        if given and all(tensor.device == device for tensor in given.values()):
            return self
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in given.items()}
        return replace(self, **moved, shared=self.shared.setdefault(device, {}))

    def real(self, time: int) -> Bool[Tensor, "batch time"] | None:
        """Which of the `time` new tokens are real; None where all are."""
        return None if self.attention_mask is None else self.attention_mask[:, -time:]

    def positions(self, x: Float[Tensor, "batch time width"]) -> Int[Tensor, "batch time"]:
        """The position of each new token."""
        if self.position_ids is not None:
            return self.position_ids
        return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)

    def mask(self, time: int) -> Bool[Tensor, "batch 1 time keys"] | None:
        """Which keys each new token sees: causal, real, of its own document. None where it is causal alone."""
        if self.attention_mask is None and self.segments is None:
            return None
        if "mask" not in self.shared:
            self.shared["mask"] = self.mask_over(self.attention_mask, time)
        return self.shared["mask"]

    def mask_over(
        self, keys: Bool[Tensor, "batch keys"] | None, time: int, causal: bool = True
    ) -> Bool[Tensor, "batch 1 time keys"]:
        """The mask where only some tokens serve as keys; a token that is none of them sees itself alone."""
        if keys is None:
            assert self.segments is not None
            keys = torch.ones_like(self.segments, dtype=torch.bool)
        mask = causal_mask(keys, time)
        if not causal:
            mask = mask | keys[:, None, None, :]
        if self.segments is not None:
            mask = mask & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
        return mask
