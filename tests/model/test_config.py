"""What a configuration may be, and that everything else is refused in one line.

Oracle: the table of presets and the field list of the specification, written out.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError, register_router
from chiaroscuro.analysis.flops import count_flops
from chiaroscuro.layers import Operator, Router, ScoreRouter
from chiaroscuro.layers.registry import OPERATORS, ROUTERS
from chiaroscuro.model.loading import near_of, window_of

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
A, D, R = "attention", "dct", "rbf"

# Layers, operators, d and h, T and V of the paper's models; norm, dropout and thresholds as published.
PAPER = {
    "v1-three-operator": (256, 4, [[D], [D, R], [R, A], [A]], "none", [0.855, 0.865]),
    "v1-all-three": (256, 4, [[D], [D, R, A], [D, R, A], [A]], "none", [0.855, 0.865]),
    "v1-dct-attention": (256, 4, [[D], [D, A], [D, A], [A]], "none", [0.855, 0.865]),
    "v1-baseline": (256, 4, [[A]] * 4, "none", None),
    "v2-400m": (1024, 16, [[D], *[[D, A]] * 26, [A]], "batch", [0.8935, 0.8973]),
    "v2-400m-baseline": (1024, 16, [[A]] * 28, "none", None),
}
OURS = {
    "small": ([[D], *[[D, A]] * 4, [A]], "causal"),
    "small-baseline": ([[A]] * 6, "none"),
}
REACH = {"reach-small": (128, 4, 6, 64, 8192, 1024), "reach-400m": (1024, 16, 28, 128, 50257, 32768)}


def config(**changes: Any) -> ChiarConfig:
    return ChiarConfig(**{**SMALL, **changes})


# Presets


def test_presets_are_these_each_with_a_line() -> None:
    presets = ChiarConfig.presets()
    assert set(presets) == set(PAPER) | set(OURS) | set(REACH)
    assert all(line and "\n" not in line for line in presets.values())


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_presets(name: str) -> None:
    width, heads, operators, meta_router, thresholds = PAPER[name]
    c = ChiarConfig.preset(name)
    assert (c.hidden_size, c.num_attention_heads, c.intermediate_size) == (width, heads, 4 * width)
    assert c.operators == operators
    assert c.num_hidden_layers == len(operators)
    assert (c.vocab_size, c.max_position_embeddings, c.rope_theta) == (50257, 256, 10000)
    assert (c.norm, c.embedding_norm, c.tie_word_embeddings) == ("post", False, True)
    assert (c.hidden_dropout, c.attention_dropout) == (0.1, 0.1)
    assert (c.router, c.meta_router, c.entropy_thresholds) == ("threshold", meta_router, thresholds)
    assert c.spectrum == "orthonormal"
    if c.routed_layers:
        assert c.calibration == "fixed"
    assert c.use_cache == (name != "v2-400m")


@pytest.mark.parametrize("name", REACH)
def test_the_presets_of_near_and_far(name: str) -> None:
    width, heads, layers, window, vocabulary, longest = REACH[name]
    c = ChiarConfig.preset(name)
    assert (c.hidden_size, c.num_attention_heads, c.vocab_size) == (width, heads, vocabulary)
    assert (c.operators, c.max_position_embeddings) == ([["local", "attention"]] * layers, longest)
    assert (c.window, c.sinks, c.attention_context) == (window, 4, "kept")
    assert (c.router, c.kv_router, c.attention_share, c.kv_share) == ("fitted", "fitted", 0.25, 0.25)
    assert (c.norm, c.embedding_norm, c.meta_router, c.use_cache) == ("pre", True, "none", True)
    assert ChiarConfig.preset(name, num_hidden_layers=3).operators == [["local", "attention"]] * 3


@pytest.mark.parametrize("name", OURS)
def test_our_presets(name: str) -> None:
    c = ChiarConfig.preset(name)
    assert (c.operators, c.meta_router) == OURS[name]
    assert (c.norm, c.embedding_norm, c.use_cache) == ("pre", True, True)
    assert (c.hidden_dropout, c.attention_dropout) == (0, 0)
    assert (c.calibration, c.entropy_thresholds, c.attention_share) == ("running", None, 0.25)
    partner = ChiarConfig.preset("small-baseline" if name == "small" else "small")
    allowed = {"operators", "meta_router"}
    assert {k for k, v in c.to_dict().items() if partner.to_dict()[k] != v} == allowed


def test_each_layer_gets_the_threshold_of_its_menu() -> None:
    assert ChiarConfig.preset("v1-three-operator").thresholds_of(1) == (0.855,)
    assert ChiarConfig.preset("v1-three-operator").thresholds_of(2) == (0.865,)
    assert ChiarConfig.preset("v1-all-three").thresholds_of(1) == (0.855, 0.865)
    assert ChiarConfig.preset("v1-dct-attention").thresholds_of(1) == pytest.approx((0.86,))
    assert ChiarConfig.preset("v2-400m").thresholds_of(5) == pytest.approx((0.8954,))
    assert ChiarConfig.preset("small").thresholds_of(1) is None


def test_a_preset_is_not_changed_by_what_one_does_to_a_copy() -> None:
    ChiarConfig.preset("small").operators[0].append("attention")
    assert ChiarConfig.preset("small").operators[0] == ["dct"]


@settings(max_examples=20)
@given(
    name=st.sampled_from(["small", "small-baseline", "v2-400m", "v2-400m-baseline", "v1-dct-attention", "v1-baseline"]),
    layers=st.integers(2, 40),
)
def test_another_depth_continues_a_preset_s_pattern(name: str, layers: int) -> None:
    c = ChiarConfig.preset(name, num_hidden_layers=layers)
    wanted = [[A]] * layers if "baseline" in name else [[D], *[[D, A]] * (layers - 2), [A]]
    assert c.operators == wanted


def test_what_hangs_on_a_changed_field_follows() -> None:
    for router in ("soft", "hard", "random", "learned"):
        c = ChiarConfig.preset("v1-dct-attention", router=router)
        assert (c.router, c.entropy_thresholds) == (router, None)
    running = ChiarConfig.preset("v2-400m", calibration="running")
    assert (running.calibration, running.entropy_thresholds) == ("running", None)
    assert ChiarConfig.preset("v2-400m", meta_router="causal").use_cache is True
    assert ChiarConfig.preset("small", meta_router="batch").use_cache is False
    assert ChiarConfig.preset("small", vocab_size=100).vocab_size == 100


def test_a_registered_router_without_thresholds_drops_a_preset_s_too() -> None:
    class Coin(Router):
        def forward(self, x: Any, entropy: Any, context: Any = None) -> Any:
            raise NotImplementedError

    class Loud(ScoreRouter):
        def score(self, x: Any, entropy: Any, context: Any) -> Any:
            raise NotImplementedError

    register_router("coin", Coin)
    register_router("loud", Loud)
    try:
        assert ChiarConfig.preset("v1-dct-attention", router="coin").entropy_thresholds is None
        assert ChiarConfig.preset("v1-dct-attention", router="loud").entropy_thresholds == [0.855, 0.865]
    finally:
        del ROUTERS["coin"], ROUTERS["loud"]


# What follows from what


def test_defaults() -> None:
    c = ChiarConfig()
    assert c.operators == [[D], *[[D, A]] * 4, [A]]
    assert c.intermediate_size == 4 * c.hidden_size
    assert ChiarConfig(feed_forward="swiglu").intermediate_size == 344  # 8/3 of 128, a multiple of 8
    assert (c.router, c.calibration, c.attention_share) == ("threshold", "running", 0.25)
    assert (c.meta_router, c.use_cache, c.collapse_penalty) == ("causal", True, 0)
    assert config(num_hidden_layers=1).operators == [[D, A]]
    assert config(num_hidden_layers=None, operators=[[A], [A]]).num_hidden_layers == 2
    assert config(operators=[[A]] * 3).meta_router == "none"
    assert config(operators=(("dct",), ("rbf",), ("attention",))).operators == [
        ["dct"],
        ["rbf"],
        ["attention"],
    ]


@pytest.mark.parametrize(
    ("changes", "use_cache"),
    [
        ({}, True),
        ({"meta_router": "batch"}, False),
        ({"meta_router": "sequence"}, False),
        ({"meta_router": "none"}, True),
        ({"operators": [[D], [D, R], [A]]}, True),
        ({"operators": [[D], [D, R], [A]], "rbf_causal": False}, False),
        ({"operators": [[D], [{"rbf": {"rbf_causal": False}}], [A]]}, False),
        ({"router": "soft"}, True),
        ({"use_cache": False}, False),
    ],
    ids=str,
)
def test_a_cache_where_there_can_be_one(changes: dict[str, Any], use_cache: bool) -> None:
    assert config(**changes).use_cache is use_cache


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "hidden_size": st.sampled_from([8, 16, 48]),
        "intermediate_size": st.integers(1, 99),
        "rope_theta": st.floats(1, 1e6),
        "hidden_dropout": st.floats(0, 0.99),
        "attention_share": st.floats(0, 1),
        "feed_forward": st.sampled_from(["gelu", "swiglu"]),
        "norm": st.sampled_from(["pre", "post"]),
        "router": st.sampled_from(["threshold", "random", "permuted", "learned", "soft", "hard"]),
        "meta_router": st.sampled_from(["none", "causal", "sequence", "batch"]),
        "spectrum": st.sampled_from(["orthonormal", "reference"]),
        "embedding_norm": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "operators": st.lists(st.sampled_from([[D], [A], [R], [D, A], [D, R], [D, R, A]]), min_size=3, max_size=3),
        "eos_token_id": st.one_of(st.integers(0, 39), st.lists(st.integers(0, 39), min_size=1, max_size=2)),
    },
)


@settings(max_examples=25)
@given(FIELDS)
def test_round_trips(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    c = config(**changes)
    folder = tmp_path_factory.mktemp("config")
    c.save_pretrained(folder)
    wanted = c.to_dict()
    assert {field: wanted[field] for field in changes} == changes
    for back in (
        ChiarConfig.from_dict(c.to_dict()),
        ChiarConfig(**{k: v for k, v in wanted.items() if k in ChiarConfig.__dataclass_fields__}),
        ChiarConfig.from_pretrained(folder),
        AutoConfig.from_pretrained(folder),
    ):
        assert type(back) is ChiarConfig
        # Saving adds where a process without the package finds the classes.
        assert back.to_diff_dict() | {"auto_map": None} == c.to_diff_dict() | {"auto_map": None}


@pytest.mark.parametrize("name", [*PAPER, *OURS])
def test_presets_survive_saving(tmp_path: Path, name: str) -> None:
    c = ChiarConfig.preset(name)
    c.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == c.to_diff_dict()


def test_a_saved_configuration_keeps_what_is_not_ours(tmp_path: Path) -> None:
    c = config()
    c.my_note, c.task_specific_params, c.pretraining_tp = "mine", {"a": 1}, 1
    c.save_pretrained(tmp_path)
    back = AutoConfig.from_pretrained(tmp_path)
    assert (back.my_note, back.task_specific_params, back.pretraining_tp) == ("mine", {"a": 1}, 1)
    assert not any("saved" in name for name in back.to_dict())


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    c = config(hidden_size=np.int64(32), attention_share=np.float32(0.5), num_attention_heads=np.int32(2))
    assert (c.hidden_size, c.attention_share, c.num_attention_heads) == (32, 0.5, 2)
    c.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == c.to_diff_dict()
    loaded = ChiarConfig.from_pretrained(tmp_path, attention_share=np.float32(0.25), window=np.int64(9))
    assert (type(loaded.attention_share), type(loaded.window), loaded.window) == (float, int, 9)
    assert len(ChiarConfig.preset("small", num_hidden_layers=np.int64(4)).operators) == 4


def test_rope_parameters_of_the_default_type_are_rope_theta() -> None:
    for changes in ({"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0}}):
        c = config(**changes)
        assert (c.rope_theta, c.rope_parameters) == (500.0, None)
    scaled = config(rope_parameters={"rope_type": "linear", "factor": 2.0}, rope_theta=500.0)
    assert scaled.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert ChiarConfig.from_dict(scaled.to_dict()).rope_parameters == scaled.rope_parameters


# What is refused

FIXED = {"calibration": "fixed", "entropy_thresholds": [0.8, 0.9]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hiden_size": 16}, "hiden_size=16.*did you mean 'hidden_size'"),
    ({"attention_context": "some"}, "attention_context='some'.*all, routed"),
    (
        {"attention_context": "routed", "router": "soft", "execution": "dense"},
        "attention_context='routed' with router='soft'",
    ),
    ({"execution": "fast"}, "execution='fast'.*sparse, dense"),
    ({"execution": "sparse", "router": "soft"}, "execution='sparse' with router='soft'"),
    ({"temperature": 3}, "temperature=3"),
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": 16.0}, r"hidden_size=16\.0"),
    ({"hidden_size": None}, "hidden_size=None"),
    ({"vocab_size": "40"}, "vocab_size='40'"),
    ({"vocab_size": True}, "vocab_size=True"),
    ({"vocab_size": -1}, "vocab_size=-1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"num_hidden_layers": 2.0}, r"num_hidden_layers=2\.0"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"intermediate_size": -4}, "intermediate_size=-4"),
    ({"feed_forward": "relu"}, "feed_forward='relu'.*gelu, swiglu"),
    ({"feed_forward": None}, "feed_forward=None.*gelu, swiglu"),
    ({"feed_forward": ["swiglu"]}, "feed_forward=.*gelu, swiglu"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    ({"rope_theta": 0}, "rope_theta=0"),
    ({"rope_parameters": {"rope_type": ["x"], "rope_theta": 5.0}}, "rope_parameters=.*give a mapping"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        "rope_parameters=.*all features of a head are rotated",
    ),
    ({"rope_theta": math.nan}, "rope_theta=nan"),
    ({"rope_theta": math.inf}, "rope_theta=inf"),
    ({"num_attention_heads": 3}, "hidden_size=16.*num_attention_heads=3"),
    ({"num_attention_heads": 16}, "hidden_size=16.*num_attention_heads=16.*even"),
    ({"hidden_dropout": -0.1}, r"hidden_dropout=-0\.1"),
    ({"hidden_dropout": 1.0}, "hidden_dropout=1"),
    ({"attention_dropout": math.nan}, "attention_dropout=nan"),
    ({"attention_share": 1.5}, r"attention_share=1\.5"),
    ({"attention_share": "0.25"}, "attention_share='0.25'"),
    ({"norm": "rms"}, "norm='rms'.*pre, post"),
    ({"norm": ["pre"]}, "norm="),
    ({"embedding_norm": 1}, "embedding_norm=1"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings=None"),
    ({"use_cache": "yes"}, "use_cache='yes'"),
    ({"attention_spread": [1, 2]}, "attention_spread has 2 weights, num_hidden_layers=3"),
    ({"attention_spread": 0.5}, "attention_spread=0.5: give a list of weights"),
    ({"kv_spread": [1, 2, -1]}, r"kv_spread=\[1, 2, -1\]: give a list of weights, 0 or more"),
    ({"spectrum": "fourier"}, "spectrum='fourier'.*orthonormal, reference"),
    ({"calibration": "moving"}, "calibration='moving'.*running, fixed"),
    ({"meta_router": "token"}, "meta_router='token'.*none, batch, sequence, causal"),
    ({"meta_router": False}, "meta_router=False"),
    ({"router": "sofd"}, "router 'sofd'.*did you mean 'soft'"),
    ({"router": None}, "router=None"),
    ({"router": ["soft"]}, "router="),
    ({"operators": "dct"}, "operators='dct'"),
    ({"operators": []}, r"operators=\[\]"),
    ({"operators": ["dct", "dct", "dct"]}, "operators="),
    ({"operators": [[D], [], [A]]}, r"operators\[1\]=\[\]"),
    ({"operators": [[D], [A, D], [A]]}, r"operators\[1\]=\['attention', 'dct'\].*cheapest"),
    ({"operators": [[D], [D, D], [A]]}, r"operators\[1\]=\['dct', 'dct'\].*twice"),
    ({"operators": [[D], ["fft", A], [A]]}, r"operators\[1\].*'fft'"),
    ({"operators": [[["dct"]], [D], [A]]}, r"operators\[0\]"),
    ({"operators": [[D], [D, None], [A]]}, r"operators\[1\]"),
    ({"operators": [[D], [A]]}, "2 menus, num_hidden_layers=3"),
    ({"entropy_thresholds": [0.8, 0.9]}, "entropy_thresholds=.*calibration='running'"),
    ({"calibration": "fixed"}, "calibration='fixed' without entropy_thresholds"),
    ({**FIXED, "entropy_thresholds": [0.9, 0.8]}, r"entropy_thresholds=\[0\.9, 0\.8\]"),
    ({**FIXED, "entropy_thresholds": [0.9]}, r"entropy_thresholds=\[0\.9\]"),
    ({**FIXED, "entropy_thresholds": [math.nan, 0.9]}, "entropy_thresholds="),
    ({**FIXED, "entropy_thresholds": 0.9}, r"entropy_thresholds=0\.9"),
    ({**FIXED, "router": "soft"}, "entropy_thresholds=.*router='soft'"),
    ({**FIXED, "router": "learned"}, "entropy_thresholds=.*router='learned', whose score is no entropy"),
    ({**FIXED, "router": "random"}, "entropy_thresholds=.*router='random', whose score is no entropy"),
    ({"router_seed": -1}, "router_seed=-1"),
    ({"router_seed": 0.5}, r"router_seed=0\.5"),
    ({"rbf_causal": 1}, "rbf_causal=1: must be true or false"),
    ({"collapse_penalty": -1, "router": "soft"}, "collapse_penalty=-1"),
    ({"collapse_penalty": math.nan, "router": "soft"}, "collapse_penalty=nan"),
    ({"collapse_penalty": 0.01}, r"collapse_penalty=0\.01.*router='threshold'"),
    (
        {"collapse_penalty": 0.01, "router": "soft", "operators": [[A]] * 3},
        r"collapse_penalty=0\.01.*no layer",
    ),
    ({"use_cache": True, "meta_router": "batch"}, "use_cache=True.*meta_router='batch'"),
    ({"use_cache": True, "meta_router": "sequence"}, "use_cache=True.*meta_router='sequence'"),
    (
        {"use_cache": True, "operators": [[D], [D, R], [A]], "rbf_causal": False},
        r"use_cache=True.*operators\[1\].*rbf",
    ),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
    ({"num_key_value_heads": 3}, "num_attention_heads=2 is not divisible by num_key_value_heads=3"),
    ({"head_dim": 3}, "heads of width 3.*even"),
    ({"bias": "no"}, "bias='no'"),
    ({"norm_type": "batch"}, "norm_type='batch'.*layer, rms"),
    ({"norm_epsilon": 0}, "norm_epsilon=0"),
    ({"rope_parameters": "llama3"}, "rope_parameters='llama3'"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral'.*known are"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters=.*'factor' is missing"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "rope_parameters=.*factor must be a positive number",
    ),
    ({"rope_parameters": {"factor": 2.0}}, "factor scales angles: give rope_type, such as linear"),
    ({"rope_parameters": {"rope_typ": "linear", "factor": 2.0}}, "unknown 'rope_typ': did you mean 'rope_type'"),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fats": 2}},
        "unknown 'beta_fats': did you mean 'beta_fast'",
    ),
    ({"rope_theta": 10**400}, "rope_theta=1000"),
    ({"norm_epsilon": 10**400}, "norm_epsilon=1000"),
    ({"attention_spread": [1, 1, 10**400]}, "attention_spread="),
    ({"calibration": "fixed", "entropy_thresholds": [0, 10**400]}, "entropy_thresholds="),
    ({"dtype": "bf16"}, "dtype='bf16': give the name of a type of torch, such as bfloat16"),
    ({"num_labels": "3"}, "num_labels='3': must be a whole number"),
    ({"num_labels": 2.5}, r"num_labels=2\.5: must be a whole number"),
    ({"id2label": ["neg", "pos"]}, r"id2label=\['neg', 'pos'\]: give a mapping"),
    ({"problem_type": "single_label"}, "problem_type='single_label': did you mean 'single_label_classification'"),
    ({"router": {"random": {"router_seed": "a"}}}, "router_seed='a': must be a whole number from 0"),
    ({"router": {"permuted": {"router_seed": -1}}}, "router_seed=-1: must be a whole number from 0"),
    ({"operators": [[D], [D, {"attention": {"heads": 2}}], [A]]}, r"operators\[1\].*unknown option heads=2"),
    (
        {"operators": [[D], [D, {"attention": {"num_attention_heads": 3}}], [A]]},
        r"operators\[1\].*num_attention_heads=3",
    ),
    ({"operators": [[D], [D, {"attention": {}, "rbf": {}}], [A]]}, r"operators\[1\]"),
    ({"router": {"threshold": {"sharpness": 2}}}, "unknown option sharpness=2 of ThresholdRouter"),
    ({"pad_token_id": 40}, "pad_token_id=40.*vocab_size=40"),
    ({"bos_token_id": "<s>"}, "bos_token_id='<s>'"),
    ({"eos_token_id": [3, 41]}, r"eos_token_id=\[3, 41\].*vocab_size=40"),
]


@pytest.mark.parametrize(("changes", "complaint"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_the_impossible_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        config(**changes)
    assert "\n" not in str(error.value)
    if not set(changes) <= set(ChiarConfig.__dataclass_fields__):
        return  # in a saved configuration another name is no mistake: it may be the user's own
    # The same where it was written into a saved configuration.
    fields = config().to_dict() | {"use_cache": None} | changes
    if "operators" not in changes:
        fields["operators"] = None
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=complaint):
        AutoConfig.from_pretrained(tmp_path)


CHANGED_LATER = [
    (changes, complaint)
    for changes, complaint in WRONG
    if set(changes) <= set(ChiarConfig.__dataclass_fields__) and "operators" not in changes
]


@pytest.mark.parametrize(("changes", "complaint"), CHANGED_LATER, ids=[str(c) for c, _ in CHANGED_LATER])
def test_the_impossible_is_found_when_it_was_set_later(changes: dict[str, Any], complaint: str) -> None:
    c = config(use_cache=False)
    c.check()
    for field, value in changes.items():
        setattr(c, field, value)
    with pytest.raises(UserError) as error:
        c.check()
    assert "\n" not in str(error.value)
    assert any(field in str(error.value) for field in changes)


def test_more_operators_than_two_thresholds_can_split() -> None:
    class Free(Operator):
        pass

    OPERATORS["free"] = Free
    try:
        with pytest.raises(UserError, match=r"operators\[1\].*entropy_thresholds.*at most three"):
            config(**FIXED, operators=[[D], [D, R, A, "free"], [A]])
        assert config(operators=[[D], ["free", D, R, A], [A]]).routed_layers == [1]
        # Nothing says that what it does can be cached.
        assert config(operators=[[D], [D, "free"], [A]]).use_cache is False
    finally:
        del OPERATORS["free"]


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("smal", {}, "unknown preset 'smal': did you mean 'small'"),
        (3, {}, "unknown preset 3"),
        ("small", {"depth": 3}, "depth=3"),
        ("v1-all-three", {"num_hidden_layers": 2}, "4 menus, num_hidden_layers=2"),
        ("small", {"calibration": "fixed"}, "'small'.*entropy_thresholds"),
        ("small", {"router": 3}, "router=3"),
        ("v2-400m", {"use_cache": True}, "use_cache=True.*meta_router='batch'"),
        ("small", {"hidden_size": 130}, "hidden_size=130.*num_attention_heads=4"),
    ],
)
def test_impossible_presets(name: Any, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        ChiarConfig.preset(name, **changes)
    assert "\n" not in str(error.value)


def test_a_share_for_fixed_thresholds_is_refused_and_for_running_ones_taken() -> None:
    with pytest.raises(UserError, match=r"attention_share=0\.5 with preset 'v2-400m'.*calibration='running'"):
        ChiarConfig.preset("v2-400m", attention_share=0.5)
    assert ChiarConfig.preset("v2-400m", attention_share=0.5, calibration="running").attention_share == 0.5


def test_windows_of_a_menu_s_own_serve_its_local_attention_too() -> None:
    """The two are one module there, which has the options that `attention` is given."""
    fields: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    menus: list[Any] = [["local", {"attention": {"window": 8, "sinks": 1}}], [{"local": {"window": 4}}]]
    own = ChiarConfig(**fields, operators=menus)
    assert own.windows == [8, 8, 4] and window_of(own) == 8 and near_of(own) == 9
    beside = ChiarConfig(
        **fields, operators=[["local", {"attention": {"window": 8}}], [{"local": {"window": 32}}]], window=64
    )
    assert window_of(beside) == 32 and near_of(beside) == 8  # the second layer has no choice
    menus = [["local", "attention"], [{"local": {"window": 4, "sinks": 0}}]]
    given = ChiarConfig(**fields, operators=menus, window=8, sinks=1)
    assert count_flops(own, 64).total == count_flops(given, 64).total
    models = [ChiarForCausalLM(config).eval() for config in (own, given)]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.arange(40)[None]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    with pytest.raises(UserError, match="operator 'local' without a window"):
        ChiarConfig(**fields, operators=[["local", "attention"], ["attention"]])
