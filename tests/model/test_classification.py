"""A classifier of texts: what it scores is of the real tokens alone, and the rest is the language model's trunk.

Oracle: `plain`, the head's formula row by row, on the trunk's tokens with the padding cut away.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PRESETS, VOCABULARY, Switches, build, padded, shrunk, tokens
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM, ChiarForSequenceClassification, UserError
from chiaroscuro.model.classification import pool_tokens

LABELS = 5
ATOL = 1e-5
POOLINGS = ["mean", "last"]


def plain(hidden: Tensor, mask: Tensor, pooling: str, weight: Tensor, bias: Tensor) -> Tensor:
    rows = []
    for tokens_, real in zip(hidden, mask.bool(), strict=True):
        kept = torch.stack([token for token, is_real in zip(tokens_, real, strict=True) if is_real])
        rows.append(weight @ (kept[-1] if pooling == "last" else sum(kept) / len(kept)) + bias)
    return torch.stack(rows)


def classifier(preset: str = "small", seed: int = 0, **changes: Any) -> ChiarForSequenceClassification:
    """A classifier on the trunk that `small_models` builds, with a head of large random weights."""
    changes = {"num_labels": LABELS, **changes}
    config = shrunk(preset, **changes)
    model = ChiarForSequenceClassification(config).eval()
    model.model.load_state_dict(build(config, seed).model.state_dict())
    nn.init.normal_(model.score.weight)
    nn.init.normal_(model.score.bias)
    return model


def masks(rows: int, time: int) -> st.SearchStrategy[list[list[bool]]]:
    row = st.lists(st.booleans(), min_size=time, max_size=time).filter(any)
    return st.lists(row, min_size=rows, max_size=rows)


@pytest.mark.parametrize("pooling", POOLINGS)
@given(
    data=st.data(), rows=st.integers(1, 4), time=st.integers(1, 6), width=st.integers(1, 5), seed=st.integers(0, 999)
)
def test_pooled_by_the_plain_formula(
    pooling: str, data: st.DataObject, rows: int, time: int, width: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.tensor(data.draw(masks(rows, time)))
    hidden = torch.randn(rows, time, width, generator=draw, dtype=torch.float64, requires_grad=True)
    eye, zero = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    cotangent = torch.randn(rows, width, generator=draw, dtype=torch.float64)
    results = []
    for pooled in (pool_tokens(hidden, mask, pooling), plain(hidden, mask, pooling, eye, zero)):
        (gradient,) = torch.autograd.grad((pooled * cotangent).sum(), hidden)
        results.append((pooled.detach(), gradient))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=0)
    if mask.all():
        assert torch.equal(pool_tokens(hidden, None, pooling), pool_tokens(hidden, mask, pooling))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("preset", ["small", "small-baseline", "v1-all-three", "v2-400m"])
def test_padding_on_either_side_changes_nothing(preset: str, pooling: str) -> None:
    # A gate over the batch mixes rows of different lengths by design.
    gate = {"meta_router": "sequence"} if shrunk(preset).meta_router == "batch" else {}
    model = classifier(preset, classifier_pooling=pooling, **gate).double()
    switches = Switches()

    @settings(max_examples=5)
    @given(
        seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 10), min_size=1, max_size=3), extra=st.integers(0, 3)
    )
    def holds(seed: int, sizes: list[int], extra: int) -> None:
        rows = [tokens(seed + i, 1, size)[0] for i, size in enumerate(sizes)]
        with torch.no_grad(), switches.watch(model) as distances:
            alone = torch.cat([model(row[None]).logits for row in rows])
            batches = [padded(rows, side, extra, seed + other) for side in ("left", "right") for other in (99, 100)]
            together = [model(ids, attention_mask=mask).logits for ids, mask in batches]
        if switches.clear(distances):
            for logits in together:
                torch.testing.assert_close(logits, alone, atol=ATOL, rtol=0)

    holds()
    switches.report()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_loss_and_gradients_are_the_formula_s(pooling: str) -> None:
    model = classifier(classifier_pooling=pooling).double()
    ids, mask = padded([tokens(i, 1, size)[0] for i, size in enumerate((3, 7, 5))], "left", 1, 9)
    labels = torch.tensor([4, 0, 2])
    out = model(ids, attention_mask=mask, labels=labels)
    hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = plain(hidden, mask, pooling, model.score.weight, model.score.bias)
    loss = -wanted.log_softmax(-1)[torch.arange(3), labels].mean()
    torch.testing.assert_close(out.logits, wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels), atol=1e-12, rtol=0)
    named = dict(model.named_parameters())
    ours = torch.autograd.grad(out.loss, list(named.values()))
    theirs = torch.autograd.grad(loss, list(named.values()))
    for name, one, other in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0, msg=name)
    assert named.keys() > {"score.weight", "score.bias"}


@pytest.mark.parametrize("context", ["all", "routed"])
def test_sparse_computes_what_dense_computes(context: str) -> None:
    sparse = classifier(attention_context=context, execution="sparse")
    dense = classifier(attention_context=context, execution="dense", use_cache=False)
    dense.load_state_dict(sparse.state_dict())
    ids, mask = padded([tokens(i, 1, size)[0] for i, size in enumerate((4, 9, 6))], "right", 2, 9)
    labels = torch.tensor([1, 2, 3])
    one, other = (model(ids, attention_mask=mask, labels=labels, output_routing=True) for model in (sparse, dense))
    torch.testing.assert_close(one.logits, other.logits, atol=ATOL, rtol=0)
    for ours, theirs in zip(one.routing, other.routing, strict=True):
        assert torch.equal(ours.operator_index, theirs.operator_index)
    one.loss.backward()
    other.loss.backward()
    theirs = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_and_loaded(tmp_path: Path, preset: str) -> None:
    names = {0: "bad", 1: "so so", 2: "good"}
    config = shrunk(preset, id2label=names, label2id={name: i for i, name in names.items()}, classifier_pooling="last")
    model = ChiarForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ChiarForSequenceClassification and not any(info.values())
    assert loaded.config.num_labels == 3 and loaded.config.id2label == names
    assert loaded.config.classifier_pooling == "last"
    assert torch.equal(loaded(tokens(0)).logits, model(tokens(0)).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_s_trunk_is_taken_over(tmp_path: Path, tied: bool) -> None:
    language_model = build(shrunk("small", tie_word_embeddings=tied))
    language_model.save_pretrained(tmp_path)
    loaded, info = ChiarForSequenceClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight", "score.bias"} and not info["unexpected_keys"]
    for name, tensor in language_model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.score.weight.shape == (4, loaded.config.hidden_size)
    assert 0.01 < loaded.score.weight.std() < 0.03 and not loaded.score.bias.any()
    assert type(ChiarForCausalLM.from_pretrained(tmp_path)) is ChiarForCausalLM


def test_the_collapse_penalty_is_the_language_model_s() -> None:
    changes = {"router": "soft", "collapse_penalty": 0.5, "meta_router": "none"}
    model = classifier("v1-all-three", **changes).train()
    ids, labels = tokens(0), torch.tensor([0, 1])
    out = model(ids, labels=labels, output_routing=True)
    spread = sum(
        -(weights * weights.log()).sum()
        for weights in (routing.weights.mean((0, 1)) for routing in out.routing if routing.weights is not None)
    )
    assert spread.item() > 0
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels) - 0.5 * spread, atol=1e-5, rtol=0)


def test_what_the_output_carries() -> None:
    model = classifier()
    out = model(tokens(0), output_routing=True, output_hidden_states=True)
    assert out.loss is None and out.logits.shape == (2, LABELS)
    assert len(out.hidden_states) == len(out.routing) + 1 == 5
    assert out.meta_gate.shape == (2, 12)
    assert model(tokens(0)).routing is None and model(tokens(0)).meta_gate is None
    plain_tuple = model(tokens(0), return_dict=False)
    assert type(plain_tuple) is tuple and torch.equal(plain_tuple[0], out.logits)
    embeds = model.model.embed_tokens(tokens(0))
    assert torch.equal(model(inputs_embeds=embeds).logits, out.logits)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: classifier()(tokens(0), attention_mask=torch.tensor([[1] * 12, [0] * 12])),
            "row 1 of the batch has no",
        ),
        (lambda: classifier()(tokens(0), labels=torch.tensor([0, LABELS])), "give labels from 0 to 4"),
        (lambda: classifier(num_labels=0), "num_labels=0: give at least 2"),
        (lambda: ChiarConfig(classifier_pooling="max"), "classifier_pooling='max': choose one of mean, last"),
    ],
)
def test_a_mistake_is_one_line(act: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (torch.tensor([[0], [1]]), r"shape \(2, 1\) and dtype torch.int64"),
        (torch.tensor([0.0, 1.0]), r"shape \(2,\) and dtype torch.float32"),
        (torch.zeros(2, LABELS, dtype=torch.long), r"shape \(2, 5\) and dtype torch.int64"),
        (torch.tensor(1), r"shape \(\) and dtype torch.int64"),
        (torch.tensor([0, 1, 2]), r"shape \(3,\) and dtype torch.int64"),
    ],
)
def test_labels_that_are_not_one_whole_number_a_row(labels: Tensor, what: str) -> None:
    wanted = rf"labels of {what}: need one whole number a row, shape \(2,\) and dtype torch\.int64"
    with pytest.raises(UserError, match=wanted) as caught:
        classifier()(tokens(0), labels=labels)
    assert "\n" not in str(caught.value)


def test_labels_in_fewer_bits() -> None:
    model, labels = classifier(), torch.tensor([0, 4])
    assert torch.equal(model(tokens(0), labels=labels.int()).loss, model(tokens(0), labels=labels).loss)


def test_another_pooling_is_another_model(tmp_path: Path) -> None:
    mean, last = classifier(), classifier(classifier_pooling="last")
    last.load_state_dict(mean.state_dict())
    ids = tokens(0)
    assert (mean(ids).logits - last(ids).logits).abs().max() > 0.01
    assert torch.equal(mean(ids[:, :1]).logits, last(ids[:, :1]).logits)
    mean.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["classifier_pooling"] == "mean"
    assert mean.config.vocab_size == VOCABULARY


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_one_label_is_a_regression(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = classifier(num_labels=1).train()
    labels = torch.tensor([3, -1], dtype=dtype).reshape(shape)
    output = model(tokens(0), labels=labels)
    assert model.config.problem_type == "regression"
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels.flatten()).square().mean())
    torch.testing.assert_close(model(tokens(0), labels=labels, num_items_in_batch=8).loss, output.loss / 4)
    output.loss.backward()
    assert model.score.weight.grad.abs().max() > 0


def test_floats_for_every_label_are_several_labels_a_row(tmp_path: Path) -> None:
    model = classifier().train()
    labels = torch.rand(2, LABELS)
    output = model(tokens(0), labels=labels)
    assert model.config.problem_type == "multi_label_classification"
    p = output.logits.sigmoid()
    torch.testing.assert_close(output.loss, -(labels * p.log() + (1 - labels) * (1 - p).log()).mean())
    model.save_pretrained(tmp_path)
    again = ChiarForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.problem_type == "multi_label_classification"
    torch.testing.assert_close(again(tokens(0), labels=labels).loss, output.loss)


def test_a_regression_of_several_numbers() -> None:
    model = classifier(problem_type="regression")
    labels = torch.randn(2, LABELS)
    output = model(tokens(0), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean())


@pytest.mark.parametrize(
    ("changes", "labels", "kind"),
    [
        ({"num_labels": 1}, torch.zeros(2, 2), "regression"),
        ({"num_labels": 1}, torch.zeros(3), "regression"),
        ({"problem_type": "multi_label_classification"}, torch.zeros(2), "multi_label_classification"),
        ({"problem_type": "regression"}, torch.zeros(2), "regression"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_labels_of_another_shape_than_the_problem_s(changes: dict[str, Any], labels: Tensor, kind: str) -> None:
    wanted = rf"labels of shape \({labels.shape[0]},.*problem_type='{kind}': need shape \(2, "
    with pytest.raises(UserError, match=wanted) as caught:
        classifier(**changes)(tokens(0), labels=labels)
    assert "\n" not in str(caught.value)


def test_what_others_pass_to_a_classifier() -> None:
    model, ids = classifier(), tokens(0)
    labels = torch.tensor([0, 4])
    wanted = model(ids, labels=labels)
    for extra in ({"use_cache": True}, {"past_key_values": None, "output_attentions": None}, {"logits_to_keep": 0}):
        assert torch.equal(model(ids, labels=labels, **extra).loss, wanted.loss)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=8).loss, wanted.loss / 4)
    with pytest.raises(UserError, match="past_key_values: a classifier"):
        model(ids, past_key_values=ChiarCache(model.config))
    with pytest.raises(UserError, match="cache: a classifier"):
        model(ids, cache=ChiarCache(model.config))
    with pytest.raises(UserError, match="unknown keyword label: did you mean labels"):
        model(ids, label=labels)


def test_hidden_states_by_the_config() -> None:
    model = classifier(output_hidden_states=True)
    assert len(model(tokens(0)).hidden_states) == model.config.num_hidden_layers + 1
