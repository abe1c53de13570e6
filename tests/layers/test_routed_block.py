"""The routed block against an oracle: every operator runs on everything, Python picks token by token."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from chiaroscuro import UserError
from chiaroscuro.layers import Context, LayerStates, RoutedBlock, SelfAttention, SpectralMixing, build_block
from chiaroscuro.layers import context as contexts
from chiaroscuro.ops import spectral_entropy

WIDTH = 16
MENUS = [
    ("dct",),
    ("attention",),
    ("rbf",),
    ("dct", "attention"),
    ("dct", "rbf"),
    ("rbf", "attention"),
    ("dct", "rbf", "attention"),
]
ROUTERS = ("threshold", "soft", "hard")


def block_by_tokens(block: RoutedBlock, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens after the layer, and each token's weight for every operator; at padding whatever comes."""
    pre = block.norm_placement == "pre"
    source = block.operator_norms["input"](x) if pre else x
    outputs = []
    for name in block.operator_names:
        mixed = block.operators[name](source, Context(attention_mask=real))
        outputs.append(x + mixed if pre else block.operator_norms[name](x + mixed))
    entropy = spectral_entropy(source, block.spectrum)
    rows = []
    weights = torch.zeros(*x.shape[:2], len(outputs))
    for b in range(x.shape[0]):
        row = []
        for t in range(x.shape[1]):
            if len(outputs) == 1:
                given = torch.ones(1)
            elif block.thresholds is not None:
                index = sum(entropy[b, t].item() > threshold for threshold in block.thresholds.tolist())
                given = torch.eye(len(outputs))[index]
            else:
                decision = block.router(source, entropy)
                index = decision.operator_index[b, t]
                given = torch.eye(len(outputs))[index] if decision.weights is None else decision.weights[b, t]
            weights[b, t] = given.detach()
            token = sum(given[k] * outputs[k][b, t] for k in range(len(outputs)))
            fed = block.feed_forward(block.feed_forward_norm(token) if pre else token)
            row.append(token + fed if pre else block.feed_forward_norm(token + fed))
        rows.append(torch.stack(row))
    return torch.stack(rows), weights


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(menu: tuple[str, ...], seed: int = 0, **options: object) -> RoutedBlock:
    torch.manual_seed(seed)
    # A share of a half uses every operator of a menu, on what is near white noise.
    block = build_block(WIDTH, menu, {"num_attention_heads": 2, "attention_share": 0.5, **options})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return block


def padding(batch: int, time: int, seed: int) -> Tensor:
    """Rows padded on the left or on the right by up to all but one token."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.ones(batch, time, dtype=torch.bool)
    for row in real:
        missing = int(torch.randint(0, time, (), generator=generator))
        if torch.rand((), generator=generator) < 0.5:
            row[:missing] = False
        else:
            row[time - missing :] = False
    return real


def keeps_away(block: RoutedBlock, x: Tensor, margin: float = 1e-5) -> bool:
    """Whether no entropy is so near a threshold that rounding could decide it."""
    if block.thresholds is None:
        return True
    entropy = block.route(x).entropy
    return bool(((entropy[..., None] - block.thresholds).abs() > margin).all())


cases = st.fixed_dictionaries(
    {
        "menu": st.sampled_from(MENUS),
        "norm": st.sampled_from(["pre", "post"]),
        "router": st.sampled_from(ROUTERS),
        "spectrum": st.sampled_from(["orthonormal", "reference"]),
        "training": st.booleans(),
        "padded": st.booleans(),
        "seed": st.integers(0, 9999),
    }
)


@given(case=cases)
def test_dense_execution_is_the_oracle_forward_and_gradient(case: dict) -> None:
    block = make(case["menu"], case["seed"], **{k: case[k] for k in ("norm", "router", "spectrum")})
    block.train(case["training"])
    x = draw(case["seed"], 2, 6, WIDTH)
    real = padding(2, 6, case["seed"]) if case["padded"] else torch.ones(2, 6, dtype=torch.bool)
    assume(keeps_away(block, x))
    direction = draw(case["seed"] + 1, 2, 6, WIDTH) * real[..., None]

    results = []
    for ours in (True, False):
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        if ours:
            y, routing = block(inputs, Context(attention_mask=real if case["padded"] else None), output_routing=True)
        else:
            y, weights = block_by_tokens(block, inputs, real)
        (y * direction).sum().backward()
        # A parameter that nothing reached has no gradient, or zeros: the same.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in block.parameters()]
        results.append([y[real], inputs.grad, *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=2e-4, atol=2e-5)

    chosen = weights.argmax(-1).masked_fill(~real, -1)
    assert torch.equal(routing.operator_index, chosen)
    torch.testing.assert_close(routing.share, weights[real].mean(0), rtol=1e-4, atol=1e-5)
    assert routing.operators == case["menu"]
    assert routing.entropy.dtype == torch.float32 and routing.operator_index.dtype == torch.int64


def test_the_cases_use_every_operator() -> None:
    """Else the property above would compare one branch with itself."""
    for menu, norm in itertools.product(MENUS, ("pre", "post")):
        _, routing = make(menu, norm=norm)(draw(0, 4, 20, WIDTH), output_routing=True)
        assert (routing.share > 0.1).all(), (menu, norm, routing.share)


@given(case=cases, fill=st.sampled_from([0.0, 3.0, -1e3]))
def test_what_stands_at_padding_changes_nothing(case: dict, fill: float) -> None:
    block = make(case["menu"], case["seed"], **{k: case[k] for k in ("norm", "router", "spectrum")}).eval()
    x, real = draw(case["seed"], 2, 6, WIDTH), padding(2, 6, case["seed"])
    other = torch.where(real[..., None], x, fill + draw(case["seed"] + 1, 2, 6, WIDTH))
    (y, routing), (y_other, routing_other) = (
        block(z, Context(attention_mask=real), output_routing=True) for z in (x, other)
    )
    torch.testing.assert_close(y[real], y_other[real])
    assert y_other.isfinite().all()
    torch.testing.assert_close(routing.share, routing_other.share)
    assert torch.equal(routing.operator_index, routing_other.operator_index)
    assert torch.equal(routing.entropy, routing_other.entropy)
    # Padding is −1 and 0, and what is real is neither.
    assert ((routing.operator_index == -1) == ~real).all()
    assert ((routing.entropy == 0) == ~real).all()
    assert float(routing.share.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_alone_is_routed_nowhere(router: str) -> None:
    block = make(("dct", "attention"), router=router)
    y, routing = block(draw(0, 1, 3, WIDTH), Context(attention_mask=torch.zeros(1, 3, dtype=torch.bool)))
    assert torch.equal(routing.share, torch.zeros(2)) and y.isfinite().all()


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("menu", MENUS)
def test_the_routing_alone_is_that_of_the_forward(menu: tuple[str, ...], norm: str) -> None:
    block, x, real = make(menu, norm=norm).eval(), draw(0, 2, 6, WIDTH), padding(2, 6, 0)
    context = Context(attention_mask=real)
    alone, (_, within) = block.route(x, context), block(x, context, output_routing=True)
    for field in ("entropy", "operator_index", "share"):
        assert torch.equal(getattr(alone, field), getattr(within, field))


def test_the_router_sees_the_operators_input() -> None:
    x = draw(0, 2, 6, WIDTH) * torch.linspace(0.1, 5, WIDTH)
    for norm in ("pre", "post"):
        block = make(("dct", "attention"), norm=norm)
        _, routing = block(x)
        source = block.operator_norms["input"](x) if norm == "pre" else x
        torch.testing.assert_close(routing.entropy, spectral_entropy(source))
        assert torch.equal(routing.score, routing.entropy)


def test_one_operator_is_not_routed_and_tells_only_when_asked() -> None:
    block, x = make(("attention",)), draw(0, 2, 6, WIDTH)
    assert block.router is None and block.thresholds is None
    y, routing = block(x)
    assert routing is None
    y_told, routing = block(x, output_routing=True)
    assert torch.equal(y, y_told)
    assert torch.equal(routing.share, torch.ones(1))
    assert torch.equal(routing.operator_index, torch.zeros(2, 6).long())


def test_norms_and_parameters_by_placement() -> None:
    """Pre has one norm for all operators; post one each, as the paper's code."""
    assert set(make(("dct", "attention"), norm="pre").operator_norms) == {"input"}
    assert set(make(("dct", "attention"), norm="post").operator_norms) == {"dct", "attention"}
    block = make(("dct",), intermediate_size=24)
    assert block.feed_forward[0].out_features == 24
    assert make(("dct",)).feed_forward[0].out_features == 4 * WIDTH
    assert make(("dct",), feed_forward="swiglu", intermediate_size=24).feed_forward.up.out_features == 24


def test_thresholds_and_shares_reach_the_router() -> None:
    fixed = make(("dct", "rbf", "attention"), thresholds=(0.3, 0.9))
    torch.testing.assert_close(fixed.thresholds, torch.tensor([0.3, 0.9]))
    x = draw(0, 2, 6, WIDTH)
    for share, operator in ((0.0, 0), (1.0, 1)):
        _, routing = make(("dct", "attention"), attention_share=share)(x)
        assert (routing.operator_index == operator).all()


def test_attention_looks_back_in_a_routed_layer_too() -> None:
    """The context is all tokens: a token that attends sees those that were sent elsewhere."""
    block, x = make(("dct", "attention"), norm="post").eval(), draw(0, 1, 8, WIDTH)
    _, routing = block(x)
    index = routing.operator_index[0].tolist()
    attending = max(t for t in range(8) if index[t] == 1)
    skipping = next(t for t in range(attending) if index[t] == 0)
    changed = x.clone()
    # In post-norm H is of x itself, and of −x it is the same: the choices stay as they are.
    changed[0, skipping] = -x[0, skipping]
    y, y_changed = block(x)[0], block(changed)[0]
    assert block(changed)[1].operator_index[0].tolist() == index
    assert (y - y_changed)[0, attending].abs().max() > 1e-4
    assert torch.equal(y[0, :skipping], y_changed[0, :skipping])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_continued_from_a_cache_the_mask_covers_the_earlier_tokens_too(norm: str) -> None:
    block, x = make(("dct", "attention"), norm=norm).eval(), draw(0, 2, 6, WIDTH)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    whole, routing = block(x, Context(attention_mask=real))
    states, parts = LayerStates(), []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        ids = torch.arange(start, end).expand(2, -1)
        context = Context(attention_mask=real[:, :end], position_ids=ids, past=start, cache=states)
        y, part = block(x[:, start:end], context)
        parts.append(y)
        assert torch.equal(part.operator_index, routing.operator_index[:, start:end])
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real])


def test_dropout_acts_on_both_sublayers_in_training_alone() -> None:
    block, x = make(("dct",), hidden_dropout=0.5), draw(0, 2, 6, WIDTH)
    assert not torch.equal(block(x)[0], block(x)[0])
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])
    assert make(("attention",), attention_dropout=0.3).operators["attention"].options.attention_dropout == 0.3


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_bfloat16_runs_with_a_float32_entropy(router: str, norm: str) -> None:
    block = make(("dct", "rbf", "attention"), router=router, norm=norm).bfloat16()
    y, routing = block(draw(0, 2, 6, WIDTH).bfloat16())
    assert y.dtype == torch.bfloat16 and routing.entropy.dtype == torch.float32
    y.sum().backward()


def test_what_a_block_refuses(unchecked: None) -> None:
    with pytest.raises(UserError, match="feed_forward='relu': choose one of gelu, swiglu"):
        make(("dct",), feed_forward="relu")
    with pytest.raises(UserError, match="norm='middle': choose one of pre, post"):
        make(("dct",), norm="middle")
    with pytest.raises(UserError, match="norm_type='batch': choose one of layer, rms"):
        make(("dct",), norm_type="batch")
    with pytest.raises(UserError, match="execution='fast': choose one of sparse, dense"):
        make(("dct",), execution="fast")
    with pytest.raises(UserError, match="has at least one operator"):
        make(())
    with pytest.raises(UserError, match="names 'dct' twice"):
        make(("dct", "dct"))
    with pytest.raises(ValueError, match="need 1, in rising order"):
        make(("dct", "attention"), thresholds=(0.8, 0.9))
    with pytest.raises(UserError, match=r"attention_share=1\.5: must be a number from 0 to 1"):
        make(("dct", "attention"), attention_share=1.5)


def test_a_block_takes_modules() -> None:
    dct, attention = SpectralMixing(WIDTH), SelfAttention(WIDTH, num_attention_heads=2)
    block = RoutedBlock(WIDTH, {"attention": attention}, None, torch.nn.Identity())
    x = draw(0, 2, 6, WIDTH)
    after = x + attention(block.operator_norms["input"](x))
    torch.testing.assert_close(block(x)[0], after + block.feed_forward_norm(after))
    with pytest.raises(UserError, match="a router exactly where it has several"):
        RoutedBlock(WIDTH, {"dct": dct, "attention": attention}, None, torch.nn.Identity())


def test_an_entry_of_a_menu_has_options_of_its_own() -> None:
    block = make(("dct", {"attention": {"num_attention_heads": 4, "bias": False}}))
    attention = block.operators["attention"]
    assert attention.heads == 4 and attention.q_proj.bias is None
    assert make(("dct", {"attention": None})).operators["attention"].heads == 2
    with pytest.raises(UserError, match="unknown option heads=4 of SelfAttention: did you mean 'head_dim'"):
        make(({"attention": {"heads": 4}},))
    with pytest.raises(UserError, match="give a name, or a mapping from one name to its options"):
        make(({"attention": {}, "dct": {}},))


@pytest.mark.parametrize("router", ["soft", "hard"])
def test_one_module_of_several_names_is_not_weighed(router: str) -> None:
    with pytest.raises(UserError, match="one module with one output"):
        make(("local", "attention"), router=router, window=4)


@pytest.mark.parametrize(
    ("menu", "fields", "complaint"),
    [
        (({"local": {"window": 8}}, "attention"), {"window": 4}, "'local' is one module with 'attention' here"),
        (("dct",), {"hidden_dropout": "x"}, "hidden_dropout='x'"),
        (("dct",), {"hidden_dropout": 1.0}, "hidden_dropout=1.0"),
        (("dct",), {"intermediate_size": -4}, "intermediate_size=-4"),
        (("dct",), {"intermediate_size": 2.5}, "intermediate_size=2.5"),
        (("attention",), {"spectrum": "other"}, "spectrum='other': choose one of orthonormal, reference"),
        (("local", "attention"), {"window": 4, "attention_context": "kept", "kv_share": "half"}, "kv_share='half'"),
    ],
)
def test_impossible_fields(
    menu: tuple[object, ...], fields: dict[str, object], complaint: str, unchecked: None
) -> None:
    with pytest.raises(UserError, match=complaint):
        build_block(WIDTH, menu, {"num_attention_heads": 2, **fields})


def test_a_mask_of_whole_numbers_is_one(unchecked: None) -> None:
    block, x = make(("dct", "attention")), draw(0, 2, 6, WIDTH)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    whole, wanted = (block(x, Context(attention_mask=each))[0] for each in (mask, mask.bool()))
    torch.testing.assert_close(whole, wanted)
    block.calibrate(x, context=Context(attention_mask=mask))
    with pytest.raises(UserError, match=r"an attention_mask of torch\.float32"):
        block(x, Context(attention_mask=mask.float()))


@pytest.mark.parametrize("router", ["learned", "random", "norm"])
def test_a_filter_transforms_its_own_tokens_alone_where_no_router_reads_h(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = contexts.spectral_mix
    monkeypatch.setattr(contexts, "spectral_mix", lambda x, weight: seen.append(len(x)) or real(x, weight))
    block, x = make(("dct", "attention"), router=router), draw(0, 1, 40, WIDTH)
    ids = torch.arange(40)[None]
    routing = block.route(x, Context(input_ids=ids))
    with torch.no_grad():
        block(x, Context(input_ids=ids))
    filtered = int((routing.operator_index == 0).sum())
    assert 0 < filtered < 40 and seen == [filtered]
