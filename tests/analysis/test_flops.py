"""The count of operations, against PyTorch's own counter on a model that runs, and against sums done by hand.

`torch.utils.flop_counter` sees every matrix product that is called, and no FFT and no flash attention: so it is asked
where all is products, in eager attention, which computes every pair, and at a width that the DCT takes as a product.
There the two counts are equal, to the last operation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError
from chiaroscuro.analysis.flops import (
    attention_part,
    compare_protocols,
    count_decode_flops,
    count_flops,
    count_llama_flops,
    count_published_flops,
    full_attention,
    largest_share,
    saving,
    shortest_length,
)
from chiaroscuro.analysis.savings import describe_flops
from chiaroscuro.cli import main
from chiaroscuro.layers import Count, SelfAttention, ThresholdRouter
from chiaroscuro.layers.registry import OPERATORS, ROUTERS
from chiaroscuro.layers.spectral_mixing import transform_operations
from chiaroscuro.model.config import default_operators
from chiaroscuro.report.flops_terminal import explain

MENUS = [
    ["dct"],
    ["attention"],
    ["dct", "attention"],
    ["dct", "rbf", "attention"],
    ["dct", "rbf"],
    ["rbf", "attention"],
]


def config(**fields: object) -> ChiarConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 100, "meta_router": "none"}
    return ChiarConfig(**sizes | {"max_position_embeddings": 2**15} | fields)


def issue(context: str = "all") -> ChiarConfig:
    """Of the shape that the benchmarks have."""
    shape = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 8192}
    return config(**shape, operators=default_operators(12), attention_context=context)


configs = st.builds(
    config,
    operators=st.lists(st.sampled_from(MENUS), min_size=1, max_size=4),
    attention_context=st.sampled_from(["all", "routed"]),
    execution=st.sampled_from(["sparse", "dense"]),
    feed_forward=st.sampled_from(["gelu", "swiglu"]),
    meta_router=st.sampled_from(["none", "causal"]),
    router=st.sampled_from(["threshold", "permuted", "learned", "hard"]),
)


def counted_by_pytorch(model: torch.nn.Module, ids: torch.Tensor, training: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ["threshold", "random", "permuted", "learned", "hard", "soft"])
@pytest.mark.parametrize("meta_router", ["none", "causal"])
@pytest.mark.parametrize("menus", [[menu] for menu in MENUS] + [MENUS])
def test_dense_and_not_causal_it_is_pytorch_s_count(
    menus: list[list[str]], meta_router: str, router: str, training: bool
) -> None:
    shape = config(
        operators=menus, execution="dense", router=router, meta_router=meta_router, attn_implementation="eager"
    )
    torch.manual_seed(0)
    wanted = counted_by_pytorch(ChiarForCausalLM(shape), torch.randint(100, (1, 48)), training)
    assert count_flops(shape, 48, training=training, causal=False).total == wanted


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("hidden", [None, 48])
def test_a_gated_feed_forward_is_pytorch_s_count_too(hidden: int | None, training: bool) -> None:
    fields = {"execution": "dense", "feed_forward": "swiglu", "intermediate_size": hidden}
    shape = config(operators=MENUS, attn_implementation="eager", **fields)
    torch.manual_seed(0)
    wanted = counted_by_pytorch(ChiarForCausalLM(shape), torch.randint(100, (1, 48)), training)
    assert count_flops(shape, 48, training=training, causal=False).total == wanted


@pytest.mark.parametrize("menu", [menu for menu in MENUS if len(menu) > 1])
def test_a_hard_router_trains_densely_under_sparse_execution(menu: list[str]) -> None:
    shape = config(operators=[menu], execution="sparse", router="hard", attn_implementation="eager")
    torch.manual_seed(0)
    wanted = counted_by_pytorch(ChiarForCausalLM(shape).train(), torch.randint(100, (1, 48)), training=True)
    assert count_flops(shape, 48, training=True, causal=False).total == wanted
    assert count_flops(shape, 48, share=0.1).total < count_flops(config(operators=[menu], execution="dense"), 48).total


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", ["all", "routed"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_sparse_execution_runs_what_is_counted(share: float, context: str, training: bool) -> None:
    """The plain form of sparse attention computes every pair of its queries and keys: not causal, but sparse."""
    shape = config(
        operators=[["dct", "attention"]],
        attention_share=share,
        attention_context=context,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model, ids = ChiarForCausalLM(shape).eval(), torch.randint(100, (1, 200))
    with torch.no_grad():
        (routing,) = model(ids, output_routing=True, use_cache=False).routing
    routed = (routing.operator_index == 1).sum().item()
    assert 0 < routed < 200
    found = count_flops(shape, 200, share=routed / 200, training=training, causal=False).total
    assert found == pytest.approx(counted_by_pytorch(model, ids, training), rel=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_of_a_llama_too(training: bool) -> None:
    shape = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        attn_implementation="eager",
    )
    wanted = counted_by_pytorch(LlamaForCausalLM(shape), torch.randint(100, (1, 48)), training)
    assert count_llama_flops(shape, 48, training=training, causal=False).total == wanted


@pytest.mark.parametrize(
    ("context", "length", "ratio"),
    [
        ("routed", 256, 1.30),
        ("routed", 1024, 1.50),
        ("routed", 4096, 2.18),
        ("routed", 8192, 2.87),
        ("all", 4096, 1.72),
        ("all", 8192, 2.07),
    ],
)
def test_what_twelve_layers_save(context: str, length: int, ratio: float) -> None:
    compared = compare_protocols(issue(context), length, 0.25)
    assert compared["exact"]["training"]["ratio"] == pytest.approx(ratio, abs=0.015)
    assert 1 - 1 / compared["exact"]["training"]["ratio"] == pytest.approx(saving(issue(context), length, 0.25))


def test_the_published_formula_by_hand() -> None:
    shape = config(operators=[["dct"], ["dct", "rbf"], ["dct", "attention"], ["dct", "attention"], ["attention"]])
    layer = 100 * (3 * 32**2 + 100 * 32 + 100 * 32 + 32**2)
    assert count_published_flops(shape, 100, share=0.5).total == 2 * layer
    # The published figure of the author's four layers, 0 + ½ + ½ + 1.
    four = compare_protocols(config(operators=default_operators(4)), 256, 0.5)["paper"]
    assert four["forward"]["saving"] == four["training"]["saving"] == pytest.approx(0.5)
    assert four["training"]["flops"] == 3 * four["forward"]["flops"]


def test_what_the_paper_s_own_size_can_save() -> None:
    paper = ChiarConfig.preset("v2-400m")
    assert attention_part(paper, 256)["of_a_layer"] == pytest.approx(0.36, abs=0.02)
    assert largest_share(paper, 256) is None
    assert 0.08 < saving(paper, 256, 0.5) < 0.1


@given(shape=configs, length=st.integers(1, 3000), share=st.floats(0, 1), training=st.booleans())
def test_more_tokens_more_attention_and_more_pairs_are_never_less(
    shape: ChiarConfig, length: int, share: float, training: bool
) -> None:
    count = count_flops(shape, length, share=share, training=training)
    assert all(number >= 0 for number in count.by_operator.values())
    assert count.total == pytest.approx(sum(count.by_operator.values()))
    assert count_flops(shape, length + 1, share=share, training=training).total > count.total
    if share * length >= 1:  # of half a token the formulas of pairs say nothing
        assert count_flops(shape, length, share=share, training=training, causal=False).total >= count.total
    without = count_flops(shape, length, share=share, training=training, head=False)
    assert count.total - without.total == pytest.approx((3 if training else 1) * 2 * 32 * 100 * length)
    if not any("rbf" in menu for menu in shape.menus):  # whose products can cost more than attention's at a small width
        assert (
            count_flops(shape, length, share=(1 + share) / 2, training=training).total
            >= count.total - 1e-6 * count.total
        )


@given(shape=configs, length=st.integers(1, 3000))
def test_sparse_is_never_more_than_dense_and_all_attention_is_the_baseline(shape: ChiarConfig, length: int) -> None:
    # rbf apart, whose features sparse execution makes for the tokens and again for those that they weigh.
    menus = [[name for name in menu if name != "rbf"] for menu in shape.menus]
    sparse, dense = (config(operators=menus, execution=e) for e in ("sparse", "dense"))
    for share in (0.0, 0.3, 1.0):
        assert count_flops(sparse, length, share=share).total <= count_flops(dense, length, share=share).total * (
            1 + 1e-9
        )
    attention = config(operators=[["dct", "attention"]] * 2, attention_context=shape.attention_context)
    count = dict(count_flops(attention, length, share=1.0).by_operator)
    baseline = count_flops(full_attention(attention), length).by_operator
    assert count.pop("dct") == 0 and count.pop("router") > 0
    assert count == pytest.approx(baseline)


@settings(max_examples=12)
@given(weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3), share=st.floats(0.01, 0.99))
def test_a_share_that_is_spread_counts_in_each_layer_and_is_the_mean(weights: list[float], share: float) -> None:
    """What grows with the number of tokens that look, with everybody kept, is the same whichever layer they look in."""
    near = {"operators": [["local", "attention"]] * 3, "window": 8, "attention_context": "all"}
    flat, spread = config(**near), config(**near, attention_spread=weights)
    totals = [count_flops(c, 200, share=share).total for c in (flat, spread)]
    assert totals[1] == pytest.approx(totals[0], rel=1e-6)
    kept = near | {"attention_context": "kept"}
    numbers = [
        count_flops(config(**kept, kv_spread=each), 200, kv_share=part).numbers_kept
        for each, part in ((weights, share), (None, share), (None, share / 2))
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6) and numbers[1] > numbers[2]
    # Where the same layers look and keep more than others, more pairs are seen than if all had the mean.
    pairs = [
        count_flops(config(**kept, kv_spread=kv, attention_spread=look), 200).by_operator["attention scores"]
        for kv, look in (([1, 2, 3], [1, 2, 3]), ([1, 2, 3], None), (None, [1, 2, 3]), (None, None))
    ]
    assert pairs[0] > 1.05 * pairs[3] and pairs[1:3] == pytest.approx([pairs[3]] * 2, rel=1e-6)


@pytest.mark.parametrize("menu", [["local", "attention"], ["dct", "attention"]])
def test_dense_execution_keeps_the_same_tokens_in_its_cache(menu: list[str]) -> None:
    sparse, dense = (
        config(operators=[menu], window=8, sinks=2, attention_context="routed", execution=execution)
        for execution in ("sparse", "dense")
    )
    for count in (count_flops, count_decode_flops):
        expected = count(sparse, 100, share=0.3).numbers_kept
        assert count(dense, 100, share=0.3).numbers_kept == expected < count(dense, 100, share=1.0).numbers_kept


@pytest.mark.parametrize("menu", [["attention"], ["local", "attention"]])
def test_the_baseline_of_near_and_far_has_no_window(menu: list[str]) -> None:
    near = config(operators=[menu] * 2, window=8, sinks=2, attention_context="kept", kv_share=0.25)
    whole = config(operators=[["attention"]] * 2)
    for count, length in ((count_flops, 100), (count_decode_flops, 100)):
        assert count(full_attention(near), length) == count(full_attention(whole), length)
        assert count(near, length).numbers_kept < count(full_attention(near), length).numbers_kept


@given(length=st.integers(1, 5000), share=st.floats(0, 1), context=st.sampled_from(["all", "routed"]))
def test_a_decoded_token_is_what_the_sequence_grows_by(length: int, share: float, context: str) -> None:
    # With attention alone exactly; where tokens are routed, in the mean over them.
    baseline = config(operators=[["attention"]] * 3)
    grown = count_flops(baseline, length + 1).total - count_flops(baseline, length).total
    assert count_decode_flops(baseline, length).total == pytest.approx(grown)
    mixed = config(operators=default_operators(4), attention_context=context)
    grown = count_flops(mixed, length + 1, share=share).total - count_flops(mixed, length, share=share).total
    assert count_decode_flops(mixed, length, share=share).total == pytest.approx(grown, rel=0.02)


@pytest.mark.parametrize("context", ["all", "routed"])
def test_from_where_on_it_can_be_had(context: str) -> None:
    shape = issue(context)
    length = shortest_length(shape, 0.25)
    assert saving(shape, length, 0.25) >= 0.35 > saving(shape, length - 1, 0.25)
    share = largest_share(shape, 8192)
    assert saving(shape, 8192, share) >= 0.35 > saving(shape, 8192, share + 0.001)
    assert shortest_length(shape, 1.0) is None


@pytest.mark.parametrize(
    ("length", "share", "says"),
    [
        (0, 0.5, "length 0"),
        (5, -0.1, "attention_share=-0.1: must be a number"),
        (5, 1.1, "attention_share=1.1: must be a number"),
    ],
)
def test_what_can_t_be_counted(length: int, share: float, says: str) -> None:
    for count in (count_flops, count_decode_flops, count_published_flops):
        with pytest.raises(UserError, match=says):
            count(config(), length, share=share)
    with pytest.raises(UserError, match="length 0"):
        count_llama_flops(LlamaConfig(), 0)


def test_the_command_takes_another_vocabulary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["chiaroscuro", "flops", "small", "--length", "100", "--vocabulary", "500"]
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    main()
    printed = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", words)
    main()
    text = capsys.readouterr().out
    assert printed["by_operator"]["forward"]["ours"]["head"] == 2 * 128 * 500 * 100
    assert list(printed["protocols"]) == ["exact", "no-head", "paper"]
    assert all(list(steps) == ["forward", "training"] for steps in printed["protocols"].values())
    assert f"{printed['protocols']['exact']['training']['saving']:.1%}" in text


def test_the_paper_s_claim_is_held_against_the_model_it_is_of() -> None:
    for name in ("v2-400m", "reach-400m", "v1-all-three", "small"):
        figures = describe_flops(ChiarConfig.preset(name, use_cache=False), 256)
        assert ("The paper claims to save 35–40% of all operations (v2)." in explain(figures)) == (
            "v2" in name or name == "reach-400m"
        )
        assert "The paper saves" not in explain(figures)


def test_the_command_refuses_a_context_that_the_router_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config(operators=[["dct", "attention"]], router="soft").save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chiaroscuro", "flops", str(tmp_path), "--context", "routed"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "router='soft'" in capsys.readouterr().err


def test_a_classifier_has_no_head_of_words() -> None:
    classifier = config(architectures=["ChiarForSequenceClassification"])
    without = count_flops(config(), 64, head=False).by_operator
    assert count_flops(classifier, 64).by_operator == without
    assert attention_part(classifier, 64)["of_a_layer"] == attention_part(classifier, 64)["of_the_model"]


def test_rbf_without_a_mask_weighs_every_pair() -> None:
    masked, open_ = (config(operators=[["rbf"]], rbf_causal=causal) for causal in (True, False))
    added = {n: count_flops(open_, n).total - count_flops(masked, n).total for n in (64, 128)}
    # 8 R operations a pair, of which a mask leaves n (n + 1) / 2.
    assert added == {n: 8 * 64 * n * (n - 1) / 2 for n in added}


def test_a_score_of_two_layers_and_one_of_several_heads_cost_more() -> None:
    def router_operations(kv_router: Any) -> float:
        config = ChiarConfig(
            operators=[["local", "attention"]],
            vocab_size=32,
            hidden_size=64,
            num_attention_heads=4,
            window=4,
            attention_context="kept",
            router="random",
            kv_router=kv_router,
        )
        return count_flops(config, 16).by_operator["router"]

    one = router_operations("fitted") - router_operations("random")
    assert one == 16 * 2 * 64
    assert router_operations({"fitted": {"heads": 4}}) - router_operations("random") == 4 * one
    assert router_operations({"fitted": {"hidden": 8}}) - router_operations("random") == 16 * 2 * (64 * 8 + 8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (lambda: 12, r"gave 12: give a Count"),
        (lambda: None, r"gave None: give a Count"),
        (lambda: Count({"mine": "many"}), r"gave 'many': count with finite numbers"),  # type: ignore[dict-item]
        (lambda: Count({"mine": float("nan")}), r"gave nan: count with finite numbers"),
        (lambda: Count({}, numbers_kept=None), r"gave None: count with finite numbers"),  # type: ignore[arg-type]
    ],
)
def test_a_count_of_an_operator_from_outside_is_one(
    monkeypatch: pytest.MonkeyPatch, given: Any, complaint: str
) -> None:
    counted = type("Counted", (SelfAttention,), {"count": classmethod(lambda *arguments: given()), "part_of": None})
    monkeypatch.setitem(OPERATORS, "counted", counted)
    with pytest.raises(UserError, match=rf"Counted\.count\(\) {complaint}"):
        count_flops(ChiarConfig.preset("small", operators=[["counted"]]), 8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["router", "kv_router"])
def test_a_count_of_a_router_from_outside_is_one(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    counted = type("Counted", (ThresholdRouter,), {"count": classmethod(lambda *arguments: "few")})
    monkeypatch.setitem(ROUTERS, "counted", counted)
    config = ChiarConfig.preset("reach-small", **{"router": "threshold", "kv_router": "threshold", field: "counted"})
    with pytest.raises(UserError, match=r"Counted\.count\(\) gave 'few': count with finite numbers"):
        count_flops(config, 8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", ["all", "routed", "kept"])
@pytest.mark.parametrize("menu", [["local", "attention"], ["dct", "local"], ["dct", "local", "attention"]])
def test_near_and_far_executed_densely_is_pytorch_s_count(menu: list[str], context: str, training: bool) -> None:
    """A mask leaves nothing out."""
    shape = config(
        operators=[menu],
        execution="dense",
        window=8,
        sinks=2,
        attention_context=context,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    wanted = counted_by_pytorch(ChiarForCausalLM(shape), torch.randint(100, (1, 48)), training)
    assert count_flops(shape, 48, training=training, causal=False).total == wanted


def test_the_published_formula_takes_those_that_look() -> None:
    shape = {"window": 8, "attention_share": 0.25}
    whole = count_published_flops(config(operators=[["attention"]]), 64).total
    assert count_published_flops(config(operators=[["local", "attention"]], **shape), 64).total == whole / 4
    assert count_published_flops(config(operators=[["local"]], **shape), 64).total == 0
    assert count_published_flops(config(operators=[["attention"]], window=8), 64).total == whole


@pytest.mark.parametrize(("tokens", "by_matrix"), [(1, True), (64, True), (65, False)])
def test_a_few_wide_tokens_are_transformed_by_a_matrix(tokens: int, by_matrix: bool) -> None:
    counted = transform_operations(128, tokens)
    assert (counted == 2 * 128**2) == by_matrix


def test_sequences_that_decode_together_are_transformed_together() -> None:
    """One token alone goes by the matrix product, 32 of them by the FFT: for the entropy and for the filter."""
    shape = config(operators=[["dct", "attention"]], hidden_size=256, num_attention_heads=4)
    for rows in (1, 32):
        counted = count_decode_flops(shape, 100, share=0.25, rows=rows).by_operator
        once = transform_operations(256, rows)
        assert once == (2 * 256**2 if rows == 1 else 2.5 * 256 * 8)
        assert counted["router"] == once
        assert counted["dct"] == pytest.approx(0.75 * transform_operations(256, 0.75 * rows))
