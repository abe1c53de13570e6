"""Sparse execution is dense execution, at less cost: outputs, gradients, causality, and what it leaves undone.

Oracle: the same weights under `execution="dense"`, where every operator runs on every token. A choice of operators is
a discontinuity, so draws in which a token comes within 1e-5 of a switch are dropped and counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, WIDTH, Switches, build, shrunk, tokens
from torch import Tensor, nn

from chiaroscuro import ChiarConfig, ChiarForCausalLM
from chiaroscuro.layers import Context, KeptTokens, RoutedBlock, SelfAttention, build_block
from chiaroscuro.layers import context as context_module
from chiaroscuro.ops import spectral_filter, spectral_mix_with_entropy
from largest import Largest

CONTEXTS = ["all", "routed"]
MENUS = [
    ["dct"],
    ["attention"],
    ["rbf"],
    ["dct", "attention"],
    ["dct", "rbf"],
    ["rbf", "attention"],
    ["dct", "rbf", "attention"],
]

# Its new name is not in the oldest transformers that the package runs on.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")


def pair(**fields: Any) -> tuple[ChiarForCausalLM, ChiarForCausalLM]:
    """One model under both executions."""
    sparse, dense = (build(ChiarConfig(vocab_size=VOCABULARY, execution=e, **fields)) for e in ("sparse", "dense"))
    assert [layer.execution for layer in sparse.model.layers] != [layer.execution for layer in dense.model.layers]
    return sparse, dense


def padding(kind: str, batch: int, time: int, seed: int) -> Tensor | None:
    """Which tokens are real, or None for no mask at all."""
    if kind == "no mask":
        return None
    generator = torch.Generator().manual_seed(seed)
    real = torch.ones(batch, time, dtype=torch.long)
    for row in real:
        first, last = (int(torch.randint(0, time + 1, (), generator=generator)) for _ in range(2))
        if kind in ("left", "both"):
            row[:first] = 0
        if kind in ("right", "both"):
            row[last:] = 0
        if kind == "holes":
            row[torch.rand(time, generator=generator) < 0.4] = 0
    return real


def outcome(
    model: ChiarForCausalLM, embeddings: Tensor, mask: Tensor | None, direction: Tensor
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Logits of the real tokens, which operator each token got, and every gradient, of a mean over the logits."""
    model.zero_grad()
    inputs = embeddings.clone().requires_grad_()
    out = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False, output_routing=True)
    real = torch.ones(embeddings.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    ((out.logits * direction)[real].sum() / max(1, int(real.sum()))).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits[real].detach(), [r.operator_index for r in out.routing], found | {"input": inputs.grad}


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "time": st.integers(1, 17),
        "heads": st.sampled_from([1, 2, 3]),
        "head_width": st.sampled_from([2, 6, 8]),
        "menus": st.lists(st.sampled_from(MENUS), min_size=1, max_size=3),
        "norm": st.sampled_from(["pre", "post"]),
        "share": st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 1.0]),
        "context": st.sampled_from(CONTEXTS),
        "padding": st.sampled_from(["no mask", "none", "left", "right", "both", "holes"]),
        "attention": st.sampled_from(["sdpa", "eager"]),
        "seed": st.integers(0, 2**31),
    }
)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    ("router", "training"),
    [("threshold", True), ("threshold", False), ("hard", True), ("hard", False), ("learned", True), ("learned", False)],
)
def test_sparse_equals_dense_with_every_gradient(router: str, training: bool, precision: str) -> None:
    # The bounds; in float64 nothing but the order of additions may differ.
    forward, gradient = {"float32": (3e-5, 1e-4), "float64": (1e-12, 1e-11)}[precision]
    switches = Switches()

    @settings(max_examples=40)
    @given(case=cases)
    def holds(case: dict[str, Any]) -> None:
        width = case["heads"] * case["head_width"]
        # A norm of two features divides by their difference, which takes float32's rounding beyond the bound.
        assume(precision == "float64" or width > 2)
        models = pair(
            hidden_size=width,
            num_attention_heads=case["heads"],
            operators=case["menus"],
            norm=case["norm"],
            attention_share=case["share"],
            attention_context=case["context"],
            router=router,
            max_position_embeddings=32,
            attn_implementation=case["attention"],
        )
        shape = (case["batch"], case["time"])
        generator = torch.Generator().manual_seed(case["seed"])
        embeddings = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
        direction = torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
        mask, found = padding(case["padding"], *shape, case["seed"]), []
        with switches.watch(models[0].train(training)) as distances:
            for model in models:
                model.train(training).to(getattr(torch, precision))
                dtype = model.dtype
                found.append(outcome(model, embeddings.to(dtype), mask, direction.to(dtype)))
        if not switches.clear(distances):
            return
        (logits, index, gradients), (wanted_logits, wanted_index, wanted) = found
        torch.testing.assert_close(index, wanted_index, atol=0, rtol=0)
        torch.testing.assert_close(logits, wanted_logits, atol=forward, rtol=forward)
        assert gradients.keys() == wanted.keys()
        for name, expected in wanted.items():
            torch.testing.assert_close(gradients[name], expected, atol=gradient, rtol=gradient, msg=name)

    holds()
    switches.report()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["no mask", "left", "both"])
def test_sparse_equals_dense_over_several_tiles(kind: str, context: str) -> None:
    sparse, dense = pair(
        hidden_size=WIDTH,
        num_attention_heads=2,
        operators=[["dct", "attention"], ["dct", "rbf", "attention"], ["attention"]],
        attention_share=0.6,
        attention_context=context,
    )
    generator = torch.Generator().manual_seed(0)
    # In float64: of 1,300 tokens, some come within float32's rounding of a threshold.
    embeddings = torch.randn(3, 430, WIDTH, generator=generator, dtype=torch.float64)
    direction = torch.randn(3, 430, VOCABULARY, generator=generator, dtype=torch.float64)
    mask = padding(kind, 3, 430, 5)
    found, wanted = (outcome(m.double().train(), embeddings, mask, direction) for m in (sparse, dense))
    assert all((index == k).sum() > 50 for index in found[1][:2] for k in range(int(index.max()) + 1))
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-9)


def test_a_model_is_sparse_unless_it_weighs() -> None:
    assert {shrunk("small", router=r).execution for r in ("threshold", "hard")} == {"sparse"}
    assert shrunk("small", router="soft").execution == "dense"
    assert shrunk("small").attention_context == "all"


@pytest.mark.parametrize("context", CONTEXTS)
def test_hard_routing_trains_as_it_infers(context: str) -> None:
    """In training its gradient needs every operator, and in the routed context a mask says what was routed."""
    model, ids = build(shrunk("small", router="hard", attention_context=context)), tokens(0, 2, 20)
    mask = padding("both", 2, 20, 3)
    training, inference = (model.train(t)(ids, attention_mask=mask).logits for t in (True, False))
    torch.testing.assert_close(training[mask.bool()], inference[mask.bool()], atol=1e-5, rtol=0)


# What is left undone


@contextmanager
def rows_through(modules: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    """How many vectors went into each module."""
    counts = dict.fromkeys(modules, 0)

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] += inputs[0].shape[:-1].numel()

        return hook

    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["no mask", "left", "right", "both"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_an_operator_runs_on_its_own_tokens(
    norm: str, context: str, kind: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    menus = [["dct", "rbf", "attention"], ["dct", "attention"], ["attention"]]
    model = build(shrunk("small", operators=menus, num_hidden_layers=3, attention_context=context, norm=norm))
    model.train(training)
    ids, mask = tokens(1, 3, 30), padding(kind, 3, 30, 11)
    real = 90 if mask is None else int(mask.sum())
    layers = model.model.layers
    modules = {
        f"{i} {name}": m for i, layer in enumerate(layers) for name, m in layer.operators.named_modules() if name
    }
    filtered: list[int] = []

    def counting(coefficients: Tensor, weight: Tensor, index: Tensor | None = None) -> Tensor:
        filtered.append(coefficients.shape[:-1].numel() if index is None else len(index))
        return spectral_filter(coefficients, weight, index)

    monkeypatch.setattr(context_module, "spectral_filter", counting)
    with rows_through(modules) as counts:
        routing = model(ids, attention_mask=mask, output_routing=True, use_cache=False).routing
    for i, menu in enumerate(menus):
        got = {name: int((routing[i].operator_index == k).sum()) for k, name in enumerate(menu)}
        assert sum(got.values()) == real and min(got.values()) > 0
        keyed = got["attention"] if context == "routed" else real
        assert counts[f"{i} attention.q_proj"] == counts[f"{i} attention.out_proj"] == got["attention"]
        assert counts[f"{i} attention.k_proj"] == counts[f"{i} attention.v_proj"] == keyed
        if "dct" in menu:
            assert filtered.pop(0) == got["dct"]
        if "rbf" in menu:
            assert counts[f"{i} rbf.out_proj"] == got["rbf"]


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_an_operator_without_tokens_still_has_a_gradient(norm: str, share: float) -> None:
    """Zeros: training on several machines waits for every parameter's gradient."""
    menu = ["dct", "rbf", "attention"]
    model = build(shrunk("small", operators=[menu] * 4, norm=norm, attention_share=share)).train()
    model(tokens(0), labels=tokens(0)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    idle = model.model.layers[1].operators["attention" if share == 0 else "dct"]
    assert all((p.grad == 0).all() for p in idle.parameters())


def largest_in_a_step(time: int, kind: str, **changes: Any) -> int:
    model = build(shrunk("small", max_position_embeddings=time, num_hidden_layers=3, **changes)).train()
    ids, mask = tokens(0, 2, time), padding(kind, 2, time, 4)
    with Largest(apart=VOCABULARY) as largest:
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    return largest.numbers


@pytest.mark.parametrize("menu", [["dct", "attention"], ["dct", "rbf", "attention"]])
@pytest.mark.parametrize("kind", ["no mask", "left", "both"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_memory_is_linear_in_time(context: str, kind: str, menu: list[str]) -> None:
    fields = {"attention_context": context, "operators": [menu, ["attention"], menu], "attention_share": 0.5}
    short, long = (largest_in_a_step(time, kind, **fields) for time in (256, 512))
    assert long <= 2 * short
    assert long <= 2 * 512 * 4 * WIDTH  # the feed-forward's
    assert long < 512 * 512


def test_dense_execution_has_a_matrix_of_scores() -> None:
    """That the measure above sees one."""
    assert largest_in_a_step(256, "left", execution="dense") >= 2 * 256 * 256


# Causality, and what the routed context sees


@pytest.mark.parametrize("router", ["threshold", "random", "permuted", "learned", "hard"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_later_tokens_change_no_earlier_logits(context: str, router: str) -> None:
    model = build(shrunk("small", attention_context=context, router=router, attention_share=0.5))
    switches = Switches()

    @settings(max_examples=10)
    @given(seed=st.integers(0, 2**31), cut=st.integers(1, 15), kind=st.sampled_from(["no mask", "left", "both"]))
    def holds(seed: int, cut: int, kind: str) -> None:
        ids, mask = tokens(seed, 2, 16), padding(kind, 2, 16, seed)
        other = torch.cat([ids[:, :cut], (ids[:, cut:] + 1) % VOCABULARY], dim=1)
        with torch.no_grad(), switches.watch(model) as distances:
            before, after = (model(i, attention_mask=mask, use_cache=False).logits for i in (ids, other))
        if switches.clear(distances):
            real = torch.ones_like(ids[:, :cut]).bool() if mask is None else mask[:, :cut].bool()
            torch.testing.assert_close(after[:, :cut][real], before[:, :cut][real], atol=1e-5, rtol=0)

    holds()
    switches.report()


def routed_block(context: str, norm: str = "post", share: float = 0.5, seed: int = 0) -> RoutedBlock:
    torch.manual_seed(seed)
    options: Any = {"num_attention_heads": 2, "norm": norm, "attention_share": share, "attention_context": context}
    return build_block(WIDTH, ("dct", "attention"), options).eval().double()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 2**31), norm=st.sampled_from(["pre", "post"]), past=st.integers(0, 3))
def test_the_routed_context_is_attention_over_the_routed_tokens_alone(seed: int, norm: str, past: int) -> None:
    """Oracle: take the routed tokens out, let them attend as if there were no others, each at its true position."""
    block, x = routed_block("routed", norm, seed=seed), draw(seed, 1, 14, WIDTH)
    positions = past + torch.arange(14)[None]
    routed = block.route(x).operator_index[0] == 1
    y, _ = block(x, Context(position_ids=positions))
    alone = build_block(WIDTH, ("attention",), {"num_attention_heads": 2, "norm": norm}).eval().double()
    alone.load_state_dict(block.state_dict(), strict=False)
    if routed.any():
        wanted, _ = alone(x[:, routed], Context(position_ids=positions[:, routed]))
        torch.testing.assert_close(y[:, routed], wanted)


def test_what_is_not_routed_is_not_seen_in_the_routed_context() -> None:
    x = draw(0, 1, 12, WIDTH)
    difference = {}
    for context in CONTEXTS:
        block = routed_block(context)
        y, routing = block(x)
        routed = routing.operator_index[0] == 1
        assert 2 < int(routed.sum()) < 10
        # In post-norm H is of x itself, and of −x it is the same: the choices stay as they are.
        changed = torch.where(routed[:, None], x, -x)
        again, routing_again = block(changed)
        assert torch.equal(routing_again.operator_index, routing.operator_index)
        difference[context] = (again - y)[0, routed].abs().max().item()
    assert difference["routed"] == 0
    assert difference["all"] > 1e-3


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_routed_token_sees_the_routed_ones_before_it(context: str) -> None:
    block, x = routed_block(context), draw(0, 1, 12, WIDTH).requires_grad_()
    y, routing = block(x)
    routed = (routing.operator_index[0] == 1).nonzero().flatten().tolist()
    last = routed[-1]
    (seen,) = torch.autograd.grad(y[0, last].square().sum(), x)
    wanted = routed if context == "routed" else list(range(last + 1))
    assert seen[0].abs().amax(-1).nonzero().flatten().tolist() == wanted


# The ways to train


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["no mask", "both"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("preset", ["small", "v1-all-three"])
def test_gradient_checkpointing_changes_nothing(preset: str, context: str, kind: str, use_reentrant: bool) -> None:
    model, ids = build(shrunk(preset, attention_context=context)).train(), tokens(0, 2, 20)
    mask, losses, found = padding(kind, 2, 20, 3), [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.zero_grad()
        losses.append(model(ids, attention_mask=mask, labels=ids).loss)
        losses[-1].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses)
    assert found[0].keys() == found[1].keys()
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
def test_under_autocast_the_residual_stream_stays_in_full_precision(context: str) -> None:
    model, ids = build(shrunk("v1-all-three", attention_context=context)).train(), tokens(0, 2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, attention_mask=padding("both", 2, 20, 3), labels=ids, output_hidden_states=True)
    assert {h.dtype for h in out.hidden_states} == {torch.float32}
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("context", CONTEXTS)
def test_dropout_of_weights_acts_in_training_alone(context: str) -> None:
    model, ids = build(shrunk("small", attention_context=context, attention_dropout=0.4)), tokens(0, 2, 20)
    assert torch.equal(model(ids).logits, model(ids).logits)
    torch.testing.assert_close(model(ids).logits, build(shrunk("small", attention_context=context))(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_in_the_routed_context_a_cache_is_for_sparse_execution_alone(unchecked: None) -> None:
    attention = SelfAttention(WIDTH, num_attention_heads=2, attention_context="routed")
    x = torch.zeros(1, 3, WIDTH)
    with pytest.raises(ValueError, match="use sparse execution"):
        attention(x, Context(state=KeptTokens(), routed=torch.ones(1, 3).bool()))


# Where a kernel gives filter and entropy at once


@pytest.mark.parametrize("router", ["threshold", "hard", "soft"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_filter_and_entropy_of_one_kernel_are_those_of_two_steps(
    norm: str, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, with the plain function in the kernel's place: what the block does with its two results."""
    menus = [["dct"], ["dct", "attention"], ["dct", "rbf", "attention"], ["rbf", "attention"]]
    model = build(shrunk("small", operators=menus, router=router, norm=norm, spectrum="reference")).double().train()
    ids, mask, calls, filtered, found = tokens(0, 2, 20), padding("both", 2, 20, 3), [], [], []

    def counted(*inputs: Any) -> Any:
        calls.append(inputs[0].shape)
        return spectral_mix_with_entropy(*inputs)

    def filtering(*inputs: Any) -> Any:
        filtered.append(inputs[0].shape)
        return spectral_filter(*inputs)

    monkeypatch.setattr(context_module, "spectral_filter", filtering)
    for kernel in (False, True):
        monkeypatch.setattr(context_module, "has_kernel", lambda x, kernel=kernel: kernel)
        monkeypatch.setattr(context_module, "spectral_mix_with_entropy", counted)
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids, output_routing=True, use_cache=False)
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((out.loss.detach(), [(r.entropy, r.operator_index) for r in out.routing], gradients))
        assert (len(calls), len(filtered)) == ((3, 3) if kernel else (0, 3))  # once a layer, one way or the other
    torch.testing.assert_close(found[1], found[0])
