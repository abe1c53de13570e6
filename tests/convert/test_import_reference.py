"""Checkpoints in the author's format (`author_format`, written out by hand) come back as the models they were made of.

The oracle of an import is its source: the same configuration, the same parameters to the bit, the same logits. The
oracle of a mistake is one line that names the file and what is wrong with it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from author_format import author_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from chiaroscuro import ChiarConfig, ChiarForCausalLM, ChiarForSequenceClassification, UserError
from chiaroscuro.convert import import_reference, load_reference_checkpoint

DCT, CHOICE, ATTENTION = ["dct"], ["dct", "attention"], ["attention"]
PAPER = [DCT, CHOICE, CHOICE, ATTENTION]
BASELINE = [ATTENTION, ATTENTION]
THRESHOLDS = (0.6, 0.8)


def author_model(
    menus: list[list[str]] = PAPER, router: str = "threshold", labels: int = 0, **changes: Any
) -> ChiarForCausalLM | ChiarForSequenceClassification:
    """A model as the author's are, with every parameter drawn at random: none stands where it would by default."""
    fields: dict[str, Any] = {
        "vocab_size": 23,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "norm": "post",
        "embedding_norm": False,
        "spectrum": "reference",
        "operators": menus,
        "meta_router": "none" if menus == BASELINE else "batch",
    }
    if CHOICE in menus:
        by_threshold = {"calibration": "fixed", "entropy_thresholds": list(THRESHOLDS)}
        fields |= by_threshold if router == "threshold" else {"router": router}
    if labels:
        fields |= {"num_labels": labels, "classifier_head": "mlp"}
    config = ChiarConfig(**(fields | changes))
    model = (ChiarForSequenceClassification if labels else ChiarForCausalLM)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def saved(folder: Path, state: dict[str, Tensor], cfg: dict[str, Any] | None = None) -> Path:
    path = folder / "author.pt"
    checkpoint: dict[str, Any] = {"step": 7, "model": state, "val_ppl": 12.5}
    torch.save(checkpoint if cfg is None else checkpoint | {"cfg": cfg}, path)
    return path


def assert_same(ours: torch.nn.Module, source: torch.nn.Module) -> None:
    assert type(ours) is type(source) and not ours.training
    for field in ["num_labels", *ChiarConfig.__annotations__]:
        if field != "model_type":
            assert getattr(ours.config, field) == getattr(source.config, field), field
    parameters = dict(source.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, parameters.pop(name)), name
    assert not parameters
    ids = torch.randint(0, source.config.vocab_size, (3, source.config.max_position_embeddings))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, source(ids).logits)


# What is imported


@settings(max_examples=25)
@given(
    menus=st.lists(st.sampled_from([DCT, CHOICE, ATTENTION]), min_size=1, max_size=4),
    router=st.sampled_from(["threshold", "soft", "hard"]),
    heads=st.integers(1, 3),
    pairs=st.integers(2, 4),
    hidden=st.integers(1, 40),
    length=st.integers(1, 9),
    theta=st.sampled_from([500.0, 10000.0, 1e6]),
    gated=st.booleans(),
)
def test_any_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    menus: list[list[str]],
    router: str,
    heads: int,
    pairs: int,
    hidden: int,
    length: int,
    theta: float,
    gated: bool,
) -> None:
    baseline = all(menu == ATTENTION for menu in menus)
    attends = any("attention" in menu for menu in menus)
    source = author_model(
        menus,
        router,
        hidden_size=2 * heads * pairs,
        # What no attention layer tells is the author's default.
        num_attention_heads=heads if attends else 1,
        max_position_embeddings=length if attends else 256,
        rope_theta=theta if attends else 10000.0,
        intermediate_size=hidden,
        meta_router="batch" if gated and not baseline else "none",
    )
    cfg = {"vocab_size": 23, "routing_mode": router, "tau_low": THRESHOLDS[0], "tau_high": THRESHOLDS[1]}
    path = saved(tmp_path_factory.mktemp("author"), author_state(source), cfg)
    imported = import_reference(path)
    assert_same(imported.model, source)
    assert imported.remarks == ()


@pytest.mark.parametrize("router", ["threshold", "soft"])
@pytest.mark.parametrize(
    ("menus", "bare"),
    [(PAPER, False), (BASELINE, False), (BASELINE, True)],
    ids=["chiar", "baseline", "baseline without backbone"],
)
def test_classifiers(tmp_path: Path, menus: list[list[str]], router: str, bare: bool) -> None:
    source = author_model(menus, router, labels=10)
    by_threshold = menus == PAPER and router == "threshold"
    path = saved(tmp_path, author_state(source, bare=bare))
    imported = import_reference(path, thresholds=THRESHOLDS if by_threshold else None)
    assert_same(imported.model, source)
    assert isinstance(imported.model, ChiarForSequenceClassification)
    if menus == PAPER and router == "soft":
        (remark,) = imported.remarks
        assert "soft or hard" in remark and "router='hard'" in remark
    else:
        assert imported.remarks == ()


def test_a_classifier_s_logits_by_the_author_s_formula(tmp_path: Path) -> None:
    source = author_model(BASELINE, labels=3)
    state = author_state(source)
    ours = load_reference_checkpoint(saved(tmp_path, state))
    ids = torch.randint(0, 23, (2, 9))
    with torch.no_grad():
        pooled = ours.model(ids).last_hidden_state.mean(1)
        inner = torch.nn.functional.gelu(pooled @ state["classifier.0.weight"].T + state["classifier.0.bias"])
        expected = inner @ state["classifier.3.weight"].T + state["classifier.3.bias"]
        torch.testing.assert_close(ours(ids).logits, expected)


def test_mixed_training_leaves_its_heads_and_says_which(tmp_path: Path) -> None:
    source = author_model()
    heads = {"_cls_head_imdb.weight": torch.ones(2, 16), "_cls_head_listops.0.bias": torch.ones(10)}
    path = saved(tmp_path, author_state(source) | heads)
    with pytest.warns(UserWarning, match=r"left out: _cls_head_imdb\.weight, _cls_head_listops\.0\.bias"):
        ours = load_reference_checkpoint(path, thresholds=THRESHOLDS)
    assert_same(ours, source)


def test_what_was_taken_as_soft_can_be_loaded_as_hard(tmp_path: Path) -> None:
    source = author_model(router="hard")
    with pytest.warns(UserWarning, match="router='hard'"):
        load_reference_checkpoint(saved(tmp_path, author_state(source))).save_pretrained(tmp_path / "ours")
    ours = ChiarForCausalLM.from_pretrained(tmp_path / "ours", router="hard").eval()
    ids = torch.randint(0, 23, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, source(ids).logits)


def test_given_thresholds_go_before_those_of_the_file(tmp_path: Path) -> None:
    source = author_model()
    path = saved(tmp_path, author_state(source), {"tau_low": 0.1, "tau_high": 0.2})
    assert load_reference_checkpoint(path).config.entropy_thresholds == [0.1, 0.2]
    assert_same(load_reference_checkpoint(path, thresholds=THRESHOLDS), source)


def test_heads_where_no_buffer_tells(tmp_path: Path) -> None:
    source = author_model(BASELINE, num_attention_heads=4, max_position_embeddings=256)
    state = {name: value for name, value in author_state(source).items() if ".rope." not in name}
    assert_same(load_reference_checkpoint(saved(tmp_path, state), heads=4), source)
    for heads in (None, 4):
        assert_same(load_reference_checkpoint(saved(tmp_path, state, {"n_heads": 4}), heads=heads), source)
    assert_refused(r"cfg has n_heads=4, not 2: drop --heads", saved(tmp_path, state, {"n_heads": 4}), heads=2)
    with pytest.raises(UserError, match="--heads"):
        load_reference_checkpoint(saved(tmp_path, state))
    with pytest.raises(UserError, match="hidden_size=16 is not divisible by num_attention_heads=3"):
        load_reference_checkpoint(saved(tmp_path, state), heads=3)


@settings(max_examples=20)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    pairs=st.integers(2, 32),
    theta=st.sampled_from([500.0, 10000.0]),
)
def test_half_precision(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, pairs: int, theta: float) -> None:
    source = author_model(BASELINE, hidden_size=4 * pairs, rope_theta=theta).to(dtype).float()
    state = {name: value.to(dtype) for name, value in author_state(source).items()}
    assert_same(load_reference_checkpoint(saved(tmp_path_factory.mktemp("half"), state)), source)


# What is refused


def with_value(state: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    state[name].flatten()[1] = value
    return state


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


def theirs(**changes: Any) -> dict[str, Tensor]:
    return author_state(author_model(**changes))


FLAWED: list[tuple[str, Callable[[], dict[str, Tensor]], dict[str, Any], str]] = [
    (
        "unknown",
        lambda: theirs() | {"layers.1.rbf_mix.omega": torch.ones(3)},
        {},
        r"unknown: layers\.1\.rbf_mix\.omega",
    ),
    ("buffer of no attention", lambda: theirs() | {"rope.inv_freq": torch.ones(4)}, {}, r"unknown: rope\.inv_freq"),
    ("missing", lambda: without(theirs(), "layers.1.attn.qkv.bias"), {}, r"missing: layers\.1\.attn\.qkv\.bias"),
    ("no embedding", lambda: without(theirs(), "token_emb.weight"), {}, r"missing: token_emb\.weight"),
    ("embedding no matrix", lambda: theirs() | {"token_emb.weight": torch.ones(3)}, {}, r"token_emb\.weight, a matrix"),
    ("no head", lambda: without(theirs(), "lm_head.weight"), {}, r"missing: lm_head\.weight"),
    ("half a gate", lambda: without(theirs(), "meta_router.gate_proj.bias"), {}, r"meta_router\.gate_proj\.bias"),
    (
        "wrong shape",
        lambda: theirs() | {"layers.0.dct_mix.w": torch.ones(15), "norm.bias": torch.ones(16, 1)},
        {},
        r"wrong shape: layers\.0\.dct_mix\.w \(15,\), not \(16,\), norm\.bias \(16, 1\), not \(16,\)",
    ),
    (
        "qkv of another width",
        lambda: theirs() | {"layers.1.attn.qkv.weight": torch.ones(32, 16)},
        {},
        r"layers\.1\.attn\.qkv\.weight \(32, 16\), not \(48, 16\)",
    ),
    ("a scalar", lambda: theirs() | {"layers.2.ffn.0.weight": torch.ones(())}, {}, r"layers\.2\.ffn\.0\.weight \(\)"),
    ("all scalars", lambda: {k: v if "emb" in k else torch.ones(()) for k, v in theirs().items()}, {}, "rope.inv_freq"),
    (
        "a layer left out",
        lambda: {k.replace("layers.1", "layers.9"): v for k, v in theirs().items()},
        {},
        "layer 1 has",
    ),
    ("no layers", lambda: {"token_emb.weight": torch.ones(3, 2)}, {}, "layer 0 has"),
    ("another head", lambda: theirs() | {"lm_head.weight": torch.ones(23, 16)}, {}, "lm_head.weight is not token_emb"),
    (
        "NaN",
        lambda: with_value(theirs(), "token_emb.weight", torch.nan),
        {},
        r"holds NaN or infinite values, .*: token_emb\.weight, lm_head\.weight$",
    ),
    (
        "infinite angles",
        lambda: with_value(theirs(), "layers.1.attn.rope.inv_freq", torch.inf),
        {},
        r"infinite values, .*: layers\.1\.attn\.rope\.inv_freq$",
    ),
    ("other heads", theirs, {"heads": 4}, "are 2 heads, not 4"),
    (
        "angles that don't divide",
        lambda: theirs() | {"layers.1.attn.rope.inv_freq": torch.ones(3)},
        {},
        r"3 entries, .* of width 6 don't make up d=16",
    ),
    (
        "angles of another layer",
        lambda: theirs() | {"layers.2.attn.rope.inv_freq": torch.ones(4)},
        {},
        r"rope\.inv_freq is not θ",
    ),
    ("falling thresholds", theirs, {"thresholds": (0.9, 0.8)}, r"entropy_thresholds=\(0\.9, 0\.8\)"),
    ("thresholds of a soft one", lambda: theirs(router="soft"), {}, "routing_mode is soft: drop"),
    ("thresholds of a baseline", lambda: theirs(menus=BASELINE), {}, "none of its layers has a choice: drop"),
]


def assert_refused(complaint: str, path: Path, **arguments: Any) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        load_reference_checkpoint(path, **arguments)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "arguments", "complaint"), [row[1:] for row in FLAWED], ids=[row[0] for row in FLAWED]
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, make: Callable[[], dict[str, Tensor]], arguments: dict[str, Any], complaint: str
) -> None:
    assert_refused(complaint, saved(tmp_path, make()), **({"thresholds": THRESHOLDS} | arguments))


def test_thresholds_that_nobody_says(tmp_path: Path) -> None:
    state = theirs()
    for cfg in (None, {"vocab_size": 23, "routing_mode": "threshold"}, {"tau_low": 0.6}):
        assert_refused("--thresholds LOW HIGH", saved(tmp_path, state, cfg))


def test_a_mode_that_the_weights_belie(tmp_path: Path) -> None:
    assert_refused("missing: layers.1.router.gate_proj", saved(tmp_path, theirs(), {"routing_mode": "hard"}))
    soft = saved(tmp_path, theirs(router="soft"), {"routing_mode": "threshold"})
    assert_refused("unknown: layers.1.router.gate_proj", soft, thresholds=THRESHOLDS)
    assert_refused("routing_mode='sofd'", saved(tmp_path, theirs(router="soft"), {"routing_mode": "sofd"}))


def test_a_cfg_that_the_tensors_belie(tmp_path: Path) -> None:
    for cfg, complaint in [
        ({"vocab_size": 24}, r"cfg has vocab_size=24, but token_emb\.weight has 23 rows"),
        ({"n_heads": 4}, r"4 entries, which at d=16 are 2 heads, not 4 as n_heads in cfg says"),
    ]:
        assert_refused(complaint, saved(tmp_path, theirs(), cfg), thresholds=THRESHOLDS)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert_refused("no such file", tmp_path / "nowhere.pt")
    assert_refused("no such file", tmp_path)
    whole = saved(tmp_path, theirs()).read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"step: 7\n"}.items():
        (tmp_path / name).write_bytes(content)
        assert_refused("cut short, or was not written by torch.save", tmp_path / name)
    for other in ([1, 2], {"state_dict": {}}, {"model": [1]}, {"model": {"token_emb.weight": 3}}):
        torch.save(other, tmp_path / "other.pt")
        assert_refused("no state dict under 'model'", tmp_path / "other.pt")


@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to_sparse_csr(),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: tensor.to(torch.float8_e4m3fn),
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.nested.nested_tensor(list(tensor)),
    ],
    ids=["sparse", "csr", "quantised", "8 bits", "meta", "nested"],
)
@pytest.mark.filterwarnings("ignore")  # what PyTorch has to say on such tensors
def test_tensors_that_are_no_plain_arrays(
    make: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    weights = theirs()
    path = saved(tmp_path, weights | {"token_emb.weight": make(weights["token_emb.weight"].detach().clone())})
    # From PyTorch 2.15 on, a nested tensor is not even read with `weights_only=True`.
    unread = "|holds objects beside tensors" if request.node.callspec.id == "nested" else ""
    assert_refused(rf"sparse, quantised, nested or without values: token_emb\.weight{unread}", path)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"model": theirs(), "cfg": Bomb(mark)}, tmp_path / "bomb.pt")
    assert_refused("code is not run", tmp_path / "bomb.pt")
    assert not mark.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert mark.exists()  # so it was a bomb


# The command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run) -> Run:
    """The command of this file."""
    return lambda *arguments: run("import-reference", *arguments)


@pytest.mark.parametrize("router", ["threshold", "hard"])
def test_the_folder_loads_and_gives_the_same_logits(run: Run, tmp_path: Path, router: str) -> None:
    source = author_model(router=router)
    state = author_state(source) | {"_cls_head_imdb.weight": torch.ones(2, 16)}
    path = saved(tmp_path, state, {"routing_mode": router})
    thresholds = ["--thresholds", *THRESHOLDS] if router == "threshold" else []
    code, out, err = run(path, tmp_path / "new" / "ours", "--heads", 2, *thresholds)
    assert (code, err) == (0, "") and "left out: _cls_head_imdb.weight" in out and "ChiarForCausalLM" in out
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "ours").eval(), source)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["ours"]


def test_a_classifier_s_folder_and_json(run: Run, tmp_path: Path) -> None:
    source = author_model(labels=2)
    path = saved(tmp_path, author_state(source))
    code, out, _ = run(path, tmp_path / "ours", "--thresholds", *THRESHOLDS, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["model"] == "ChiarForSequenceClassification" and facts["remarks"] == []
    assert facts["parameters"] == source.num_parameters() and facts["entropy_thresholds"] == list(THRESHOLDS)
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval(), source)


def test_a_mistake_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, theirs())
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.iterdir())
    for arguments, complaint in [
        ([path, tmp_path / "taken", "--thresholds", 0.6, 0.8], "exists already"),
        ([path, tmp_path / "ours"], "--thresholds LOW HIGH"),
        ([path, tmp_path / "ours", "--thresholds", 0.6, 0.8, "--heads", 3], "are 2 heads, not 3"),
        ([path, tmp_path / "ours", "--thresholds", 0.6], "--thresholds"),
        ([tmp_path / "nowhere.pt", tmp_path / "ours"], "no such file"),
    ]:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and complaint in err, err
        assert err.startswith("error: ") and err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
