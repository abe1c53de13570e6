"""Routers whose score is not H: by chance, by H of shuffled features, and learned."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro import UserError
from chiaroscuro.layers import (
    Context,
    LearnedRouter,
    PermutedRouter,
    RandomRouter,
    RoutedBlock,
    ThresholdRouter,
    build_block,
)
from chiaroscuro.ops import spectral_entropy

MENU = ("dct", "attention")
WIDTH = 16
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hashed(router: RandomRouter, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    context = Context(position_ids=positions, input_ids=ids)
    return router.score(torch.zeros(*ids.shape, WIDTH), torch.zeros(ids.shape), context)


def plain_hash(seed: int, layer: int, position: int, token: int) -> float:
    """The same in Python's whole numbers, which never overflow."""
    number = 0
    for part in (seed, layer, position, token):
        number = (number ^ part) & 0xFFFFFFFF
        number = ((number ^ (number >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        number = ((number ^ (number >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        number ^= number >> 15
    return (number >> 8) / 2**24


# By chance


@given(seed=seeds, layer=st.integers(0, 200), position=st.integers(0, 2**20), token=st.integers(0, 2**20))
def test_the_hash_is_the_one_of_whole_numbers(seed: int, layer: int, position: int, token: int) -> None:
    router = RandomRouter(WIDTH, MENU, layer=layer, router_seed=seed)
    found = hashed(router, torch.tensor([[token]]), torch.tensor([[position]]))
    assert found.item() == plain_hash(seed, layer, position, token)
    assert 0 <= found.item() < 1


@pytest.mark.parametrize("varied", ["token", "position", "layer", "seed"])
def test_the_draw_is_uniform_along_each_of_its_parts_and_independent_between_neighbours(varied: str) -> None:
    count = 4096
    steps = torch.arange(count)[None]
    still = torch.full((1, count), 7)
    if varied == "token":
        found = hashed(RandomRouter(WIDTH, MENU), steps, still)[0]
    elif varied == "position":
        found = hashed(RandomRouter(WIDTH, MENU), still, steps)[0]
    else:
        name = {"layer": "layer", "seed": "router_seed"}[varied]
        routers = (RandomRouter(WIDTH, MENU, **{name: value}) for value in range(count))
        found = torch.stack([hashed(router, still[:, :1], still[:, :1])[0, 0] for router in routers])
    # Kolmogorov–Smirnov at 0.1%: 1.95 / √n; the correlation of neighbours has a standard deviation of 1 / √n.
    ordered = found.sort().values
    assert (ordered - (torch.arange(count) + 0.5) / count).abs().max() < 1.95 / math.sqrt(count)
    assert torch.corrcoef(torch.stack([found[1:], found[:-1]]))[0, 1].abs() < 4 / math.sqrt(count)


def test_uncalibrated_it_already_sends_the_share() -> None:
    for share in (0.0, 0.25, 0.8, 1.0):
        router = RandomRouter(WIDTH, MENU, attention_share=share)
        ids = torch.arange(20_000)[None]
        taken = (hashed(router, ids)[..., None] > router.calibration.values).sum(-1).float().mean().item()
        assert taken == pytest.approx(share, abs=0.015)
        assert 0 < taken < 1 or share in (0, 1)


def test_positions_are_counted_from_zero_where_none_are_given() -> None:
    ids = torch.randint(0, 50, (2, 9))
    router = RandomRouter(WIDTH, MENU)
    assert torch.equal(hashed(router, ids), hashed(router, ids, torch.arange(9).expand(2, -1)))


def test_embeddings_alone_are_not_enough() -> None:
    with pytest.raises(UserError, match="router='random' draws by token id: give input_ids"):
        RandomRouter(WIDTH, MENU).score(torch.zeros(1, 2, WIDTH), torch.zeros(1, 2), Context())


# Shuffled features


@given(seed=seeds, spectrum=st.sampled_from(["orthonormal", "reference"]))
def test_permuted_is_h_of_the_features_in_another_order(seed: int, spectrum: str) -> None:
    router = PermutedRouter(WIDTH, MENU, spectrum=spectrum, router_seed=seed)
    x = draw(seed, 2, 5, WIDTH)
    order = router.permutation.tolist()
    assert sorted(order) == list(range(WIDTH))
    shuffled = torch.stack([x[..., feature] for feature in order], dim=-1)
    torch.testing.assert_close(router.score(x, torch.zeros(2, 5), Context()), spectral_entropy(shuffled, spectrum))


def test_the_permutation_is_the_seeds_and_no_other_draw_moves_it() -> None:
    torch.manual_seed(1)
    first = PermutedRouter(64, MENU, router_seed=3).permutation
    torch.manual_seed(2)
    assert torch.equal(PermutedRouter(64, MENU, router_seed=3).permutation, first)
    assert not torch.equal(PermutedRouter(64, MENU, router_seed=4).permutation, first)
    assert not torch.equal(first, torch.arange(64))


def test_it_scores_white_noise_as_h_does() -> None:
    x = draw(0, 1, 20_000, WIDTH)
    permuted = PermutedRouter(WIDTH, MENU)
    assert torch.equal(permuted.calibration.values, ThresholdRouter(WIDTH, MENU).calibration.values)
    share = permuted(x, torch.zeros(x.shape[:2])).operator_index.float().mean().item()
    assert share == pytest.approx(0.25, abs=0.01)


# Learned


def learned_block(share: float, norm: str, execution: str, seed: int = 0) -> RoutedBlock:
    torch.manual_seed(seed)
    block = build_block(
        WIDTH,
        MENU,
        {"num_attention_heads": 2, "router": "learned", "attention_share": share, "norm": norm, "execution": execution},
    )
    torch.nn.init.normal_(block.router.proj.weight, std=WIDTH**-0.5)
    return block


@settings(deadline=None)
@given(seed=seeds, norm=st.sampled_from(["pre", "post"]), share=st.sampled_from([0.25, 0.5, 1.0]))
def test_attention_is_scaled_by_the_sigmoid_of_the_score(seed: int, norm: str, share: float) -> None:
    block = learned_block(share, norm, "sparse", seed % 1000).eval()
    x = draw(seed, 2, 7, WIDTH)
    source = block.operator_norms["input"](x) if norm == "pre" else x
    score = source @ block.router.proj.weight[0] + block.router.proj.bias
    mixed = {name: operator(source) for name, operator in block.operators.items()}
    mixed["attention"] = mixed["attention"] * torch.sigmoid(score)[..., None]
    chosen = (score > block.thresholds)[..., None]
    if norm == "pre":
        h = x + torch.where(chosen, mixed["attention"], mixed["dct"])
        wanted = h + block.feed_forward(block.feed_forward_norm(h))
    else:
        h = {name: block.operator_norms[name](x + output) for name, output in mixed.items()}
        h = torch.where(chosen, h["attention"], h["dct"])
        wanted = block.feed_forward_norm(h + block.feed_forward(h))
    found, routing = block(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(routing.operator_index, chosen[..., 0].long())


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_the_gradient_reaches_the_projection_from_the_chosen_tokens_alone(execution: str) -> None:
    block = learned_block(0.5, "pre", execution)
    x = draw(1, 2, 9, WIDTH)
    chosen = block.route(x).operator_index == 1
    assert 0 < chosen.sum() < chosen.numel()
    for taken, reached in ((~chosen, False), (chosen, True)):
        block.zero_grad()
        # Attention is causal, so what a token gives others passes through it unscaled: each looks at itself alone.
        (block(x)[0] * taken[..., None]).sum().backward()
        assert (block.router.proj.weight.grad.abs().max() > 0) == reached


def test_thresholds_and_scale_leave_nothing_routed_at_a_share_of_one() -> None:
    block = learned_block(1.0, "pre", "sparse")
    routing = block(draw(2, 2, 9, WIDTH))[1]
    assert bool((routing.operator_index == 1).all())
    torch.testing.assert_close(routing.scale, routing.score.sigmoid())


def test_uncalibrated_it_stands_where_a_new_model_sends_the_share() -> None:
    torch.manual_seed(0)
    router = LearnedRouter(256, MENU, attention_share=0.25)
    torch.nn.init.normal_(router.proj.weight, std=0.02)
    torch.nn.init.zeros_(router.proj.bias)
    x = torch.nn.functional.layer_norm(draw(3, 1, 20_000, 256), (256,))
    assert router(x, torch.zeros(1, 20_000)).operator_index.float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_under_autocast_a_learned_score_keeps_its_digits() -> None:
    """In half precision many tokens would share one score, and a threshold among them would send all or none."""
    router, x = LearnedRouter(64, MENU), draw(4, 1, 1000, 64)
    wanted = router.score(x, torch.zeros(1, 1000), Context())
    with torch.autocast("cpu", torch.bfloat16):
        found = router.score(x, torch.zeros(1, 1000), Context())
    assert torch.equal(found, wanted) and len(found.unique()) > 990


def test_who_is_kept_by_chance_is_not_who_looks_by_chance() -> None:
    """At the same share, seed and layer both sides draw for themselves: they agree as often as chance has it."""
    fields = {"window": 4, "attention_context": "kept", "router": "random", "kv_router": "random"}
    fields |= {"attention_share": 0.25, "kv_share": 0.25}
    block = build_block(WIDTH, ("local", "attention"), {"num_attention_heads": 2, **fields})
    ids = torch.randint(1000, (4, 2000), generator=torch.Generator().manual_seed(0))
    routing = block.route(torch.zeros(*ids.shape, WIDTH), Context(input_ids=ids))
    looks, kept = routing.operator_index == 1, routing.kept
    assert abs(float((looks & kept).float().mean()) - 1 / 16) < 0.01
    assert abs(float(kept.float().mean()) - 1 / 4) < 0.02


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"attention_share": "half"}, "attention_share='half'"),
        ({"attention_share": None}, "attention_share=None"),
        ({"attention_share": True}, "attention_share=True"),
        ({"attention_share": 1.5}, "attention_share=1.5"),
        ({"thresholds": 0.5}, "thresholds=0.5: give a list of numbers"),
        ({"thresholds": (None,)}, r"thresholds=\(None,\): give a list of numbers"),
    ],
)
@pytest.mark.parametrize("router", [ThresholdRouter, RandomRouter, LearnedRouter])
def test_impossible_options_of_a_score(
    router: type, options: dict[str, object], complaint: str, unchecked: None
) -> None:
    with pytest.raises(UserError, match=complaint):
        router(WIDTH, MENU, **options)
