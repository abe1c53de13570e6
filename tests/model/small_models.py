"""Every preset at the size of a unit test, with weights that make each token matter to the later ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from chiaroscuro import ChiarConfig, ChiarForCausalLM
from chiaroscuro.layers import HardRouter, MetaRouter, RoutedBlock, Routing, ScoreRouter, SpectralMixing
from chiaroscuro.ops import null_entropy_quantiles

VOCABULARY, WIDTH, LENGTH = 53, 32, 48
# Near and far have tests of their own, in test_reach.py.
PRESETS = sorted(name for name in ChiarConfig.presets() if not name.startswith("reach"))
ROUTERS = ["threshold", "random", "permuted", "norm", "learned", "soft", "hard"]
LEAKY = ("batch", "sequence")

MARGIN = 1e-5
"""How far from a switch of operators a token has to be for two roundings of it to be comparable."""


def shrunk(preset: str, **changes: object) -> ChiarConfig:
    """The preset with its own norm, menus, thresholds and MetaRouter, but small and without dropout."""
    small: dict[str, object] = {
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if ChiarConfig.preset(preset).entropy_thresholds and changes.get("router", "threshold") in (
        "threshold",
        "permuted",
    ):
        # The published thresholds are of wider vectors, whose entropy is larger.
        small["entropy_thresholds"] = null_entropy_quantiles(WIDTH, [0.33, 0.67]).tolist()
    return ChiarConfig.preset(preset, **{**small, **changes})


def build(config: ChiarConfig, seed: int = 0) -> ChiarForCausalLM:
    """A model for inference with large random weights: at N(0, 0.02) a leak would hide in the tolerance."""
    torch.manual_seed(seed)
    model = ChiarForCausalLM(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.1)
            elif isinstance(module, SpectralMixing):
                nn.init.normal_(module.weight, mean=1.0, std=0.3)
            elif isinstance(module, MetaRouter):
                nn.init.normal_(module.weight, std=1.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    return model


def tokens(seed: int, rows: int = 2, time: int = 12) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str, extra: int, seed: int) -> tuple[Tensor, Tensor]:
    """The rows as one batch, `extra` longer than the longest, with random tokens in the padding."""
    time = max(len(row) for row in rows) + extra
    ids, mask = tokens(seed, len(rows), time), torch.zeros(len(rows), time, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(time - len(row), time) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


class Switches:
    """Keeps draws whose tokens stay clear of a switch of operators, and counts those that it drops."""

    def __init__(self) -> None:
        self.drawn = self.dropped = 0

    @contextmanager
    def watch(self, model: ChiarForCausalLM) -> Iterator[list[float]]:
        """The list fills with each routed layer's smallest distance to a switch, in every forward inside."""
        found: list[float] = []

        def by_score(block: RoutedBlock, inputs: object, output: tuple[Tensor, Routing]) -> None:
            score, thresholds = output[1].score, block.thresholds
            assert score is not None and thresholds is not None
            found.append((score[..., None] - thresholds).abs().min().item())

        def by_argmax(projection: nn.Module, inputs: object, logits: Tensor) -> None:
            best = logits.topk(2, dim=-1).values
            found.append((best[..., 0] - best[..., 1]).abs().min().item())

        handles = []
        for layer in model.model.layers:
            if isinstance(layer.router, ScoreRouter):
                handles.append(layer.register_forward_hook(by_score))
            elif isinstance(layer.router, HardRouter):
                handles.append(layer.router.proj.register_forward_hook(by_argmax))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def clear(self, distances: list[float]) -> bool:
        """Whether this draw counts."""
        self.drawn += 1
        near = min(distances, default=1.0) < MARGIN
        self.dropped += near
        return not near

    def report(self) -> None:
        print(f"{self.dropped} of {self.drawn} draws dropped, nearer than {MARGIN} to a switch of operators")
        assert self.drawn > 0
        assert 2 * self.dropped < self.drawn
