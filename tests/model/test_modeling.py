"""The model's arithmetic and what Hugging Face's ways of calling, training and compiling it give.

Oracle: the parts put together by hand, and the same forward asked for in another way.
"""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import PRESETS, ROUTERS, VOCABULARY, WIDTH, build, shrunk, tokens
from torch import Tensor, nn

from chiaroscuro import ChiarCache, ChiarConfig, ChiarForCausalLM, ChiarModel, UserError, calibrate
from chiaroscuro.layers import Context, HardRouter, SpectralMixing
from chiaroscuro.model import ChiarCausalLMOutput

ATOL = 1e-5

# Its new name is not in the oldest transformers that the package runs on.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")


def by_hand(model: ChiarForCausalLM, ids: Tensor) -> Tensor:
    """Embeddings, the layers one after the other, the gate on the first, the norm, the tied head."""
    base, config = model.model, model.config
    x = F.embedding(ids, base.embed_tokens.weight)
    if config.embedding_norm:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    if base.meta_router is not None:
        count = torch.arange(1, ids.shape[1] + 1)[:, None]
        mean = x.cumsum(1) / count
        if config.meta_router == "sequence":
            mean = x.mean(1, keepdim=True)
        elif config.meta_router == "batch":
            mean = x.mean((0, 1), keepdim=True)
        gate = torch.sigmoid((mean * base.meta_router.weight).sum(-1, keepdim=True) + base.meta_router.bias)
    for i, layer in enumerate(base.layers):
        y, _ = layer(x, Context(input_ids=ids))
        x = gate * y + (1 - gate) * x if i == 0 and base.meta_router is not None else y
    return F.layer_norm(x, x.shape[-1:], base.norm.weight, base.norm.bias) @ base.embed_tokens.weight.T


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_logits_are_the_parts_put_together(preset: str, router: str) -> None:
    model, ids = build(shrunk(preset, router=router)), tokens(0, 3, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, by_hand(model, ids), atol=1e-4, rtol=0)


def test_the_sequence_pooling_too() -> None:
    model, ids = build(shrunk("small", meta_router="sequence")), tokens(0, 3, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, by_hand(model, ids), atol=1e-4, rtol=0)


# Initialisation


@pytest.mark.parametrize("kind", [ChiarForCausalLM, ChiarModel])
def test_a_new_model(kind: type[ChiarForCausalLM] | type[ChiarModel]) -> None:
    torch.manual_seed(0)
    model = kind(ChiarConfig.preset("small"))
    base = model.base_model
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(module.weight.mean().item()) < 1e-3
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all()
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, SpectralMixing):
            assert (module.weight == 1).all()
    gate = model(torch.randint(0, 8192, (2, 5)), output_routing=True).meta_gate
    torch.testing.assert_close(gate, torch.full((2, 5), 0.8808), atol=1e-4, rtol=0)
    assert base.embed_tokens.weight.shape == (8192, 128)


def test_the_head_is_the_embedding_unless_untied() -> None:
    tied, untied = (ChiarForCausalLM(shrunk("small", tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == VOCABULARY * WIDTH


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("v1-dct-attention", 15.76), ("v1-baseline", 16.03), ("v2-400m", 400.04), ("v2-400m-baseline", 404.16)],
)
def test_the_published_parameter_counts(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = ChiarForCausalLM(ChiarConfig.preset(preset))
    assert round(model.num_parameters() / 1e6, 2) == millions


def test_the_presets_of_ours_are_of_one_size() -> None:
    counts = [ChiarForCausalLM(ChiarConfig.preset(p)).num_parameters() for p in ("small", "small-baseline")]
    assert abs(counts[0] / counts[1] - 1) < 0.05


@pytest.mark.usefixtures("unchecked")
def test_a_config_is_checked_again_by_the_model() -> None:
    for field, value, complaint in [
        ("hidden_size", 33, "hidden_size=33"),
        ("router", "nearest", "'nearest'"),
        ("operators", [["dct"]], "1 menus, num_hidden_layers=4"),
        ("meta_router", "batch", "use_cache=True"),
        ("attention_share", 1.5, "attention_share=1.5"),
        ("collapse_penalty", 0.1, "collapse_penalty=0.1.*router='threshold'"),
    ]:
        for kind in (ChiarModel, ChiarForCausalLM):
            config = shrunk("small")
            setattr(config, field, value)
            with pytest.raises(UserError, match=complaint) as error:
                kind(config)
            assert "\n" not in str(error.value)


# The ways to call it


@pytest.mark.parametrize("preset", ["small", "v1-all-three", "v2-400m"])
def test_the_same_forward_asked_for_otherwise(preset: str) -> None:
    model, ids = build(shrunk(preset)), tokens(0, 2, 9)
    positions = torch.arange(9)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        others = {
            "inputs_embeds": model(inputs_embeds=model.model.embed_tokens(ids)),
            "mask": model(ids, attention_mask=torch.ones_like(ids)),
            "bool mask": model(ids, attention_mask=torch.ones_like(ids).bool()),
            "positions": model(ids, position_ids=positions),
            "positions of every row": model(ids, position_ids=positions.expand(2, -1)),
            "no cache": model(ids, use_cache=False),
        }
        for name, out in others.items():
            torch.testing.assert_close(out.logits, wanted, atol=ATOL, rtol=0, msg=name)
        # RoPE is relative: all positions moved alike are the same.
        moved = model(ids, position_ids=positions + 7).logits
        torch.testing.assert_close(moved, wanted, atol=1e-4, rtol=0)
        assert (model(ids, position_ids=3 * positions).logits - wanted).abs().max() > 1e-2
        last = torch.tensor([0, 4])
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, wanted[:, -3:], atol=ATOL, rtol=0)
        torch.testing.assert_close(model(ids, logits_to_keep=last).logits, wanted[:, last], atol=ATOL, rtol=0)


@pytest.mark.parametrize("router", ROUTERS)
def test_eager_attention_is_sdpa(router: str) -> None:
    model, ids = build(shrunk("small", router=router)), tokens(0, 2, 9)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    with torch.no_grad():
        sdpa = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        eager = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(eager[mask.bool()], sdpa[mask.bool()], atol=ATOL, rtol=0)


def test_eager_from_the_config() -> None:
    model = ChiarForCausalLM(shrunk("small", attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_returned(preset: str) -> None:
    model, ids = build(shrunk(preset)), tokens(0, 2, 9)
    with torch.no_grad():
        plain = model(ids, use_cache=False)
        full = model(ids, labels=ids, output_routing=True, output_hidden_states=True, logits_to_keep=2)
    assert set(plain) == {"logits"}
    assert [tuple(h.shape) for h in full.hidden_states] == [(2, 9, WIDTH)] * 5
    assert torch.equal(full.hidden_states[-1], model.model(ids).last_hidden_state)
    assert full.logits.shape == (2, 2, VOCABULARY)
    assert [routing.operators for routing in full.routing] == [tuple(menu) for menu in model.config.operators]
    for routing, layer in zip(full.routing, model.model.layers, strict=True):
        assert routing.operators == layer.operator_names
        assert (routing.entropy.dtype, routing.operator_index.dtype) == (torch.float32, torch.int64)
        assert routing.entropy.shape == routing.operator_index.shape == (2, 9)
        assert ((routing.entropy > 0) & (routing.entropy < 1)).all()
        counts = [(routing.operator_index == k).float().mean() for k in range(len(routing.operators))]
        torch.testing.assert_close(routing.share, torch.stack(counts))
    pooled = {"none": None, "batch": (1, 1), "sequence": (2, 1), "causal": (2, 9)}[model.config.meta_router]
    assert (None if full.meta_gate is None else tuple(full.meta_gate.shape)) == pooled


@pytest.mark.parametrize("by_config", [False, True])
def test_a_plain_tuple(by_config: bool) -> None:
    model, ids = build(shrunk("small")), tokens(0)
    wanted = model(ids, labels=ids, use_cache=False)
    if by_config:
        model.config.return_dict = False
    out = model(ids, labels=ids, use_cache=False, **({} if by_config else {"return_dict": False}))
    assert isinstance(out, tuple)
    assert torch.equal(out[0], wanted.loss) and torch.equal(out[1], wanted.logits)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": tokens(0), "inputs_embeds": torch.zeros(2, 12, WIDTH)}, "not both"),
        ({"input_ids": tokens(0) + VOCABULARY}, f"vocab_size={VOCABULARY}"),
        ({"input_ids": tokens(0) - VOCABULARY}, f"vocab_size={VOCABULARY}"),
        ({"input_ids": tokens(0)[:, :0]}, r"shape \(2, 0\) has no tokens"),
        ({"input_ids": tokens(0, 1, 49)}, "49 tokens, but max_position_embeddings=48"),
        ({"input_ids": tokens(0), "attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\)"),
        ({"input_ids": tokens(0), "attention_mask": torch.ones(1, 1, 12, 12)}, r"attention_mask has shape"),
        ({"input_ids": tokens(0)[0]}, r"input_ids of shape \(12,\) and dtype torch.int64"),
        ({"input_ids": tokens(0).float()}, r"input_ids of shape \(2, 12\) and dtype torch.float32"),
        ({"input_ids": tokens(0), "position_ids": torch.arange(5)[None]}, r"position_ids of shape \(1, 5\): need"),
        ({"input_ids": tokens(0), "position_ids": torch.arange(12)}, r"position_ids of shape \(12,\): need \(2, 12\)"),
        ({"input_ids": tokens(0), "labels": tokens(0) + VOCABULARY}, "is neither a token id, from 0 to .* nor -100"),
        ({"input_ids": tokens(0), "labels": tokens(0) - 200}, "labels: -.* is neither a token id"),
        ({"input_ids": tokens(0), "labels": tokens(0) * 0 - 1}, "labels: -1 is neither a token id"),
    ],
    ids=[
        "nothing",
        "both",
        "token too large",
        "negative token",
        "no tokens",
        "too long",
        "short mask",
        "mask of four axes",
        "one axis",
        "floats",
        "short positions",
        "positions of one axis",
        "label too large",
        "label too small",
        "label of minus one",
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        build(shrunk("small"))(**arguments)
    assert "\n" not in str(error.value)


# The loss


def test_the_loss_by_hand_in_every_form() -> None:
    model, ids = build(shrunk("small")), tokens(0, 3, 9)
    labels = ids.clone()
    labels[0, 4] = labels[2, :6] = -100
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    with torch.no_grad():
        log = model(ids).logits.log_softmax(-1)
        picked = [-log[b, t, shifted[b, t]] for b in range(3) for t in range(9) if shifted[b, t] != -100]
        total = torch.stack(picked).sum()
        assert len(picked) == 18
        for given in (
            {"labels": labels},
            {"shift_labels": shifted},
            {"labels": ids, "shift_labels": shifted},
        ):
            torch.testing.assert_close(model(ids, **given).loss, total / 18)
            for items in (36, torch.tensor(36)):
                torch.testing.assert_close(model(ids, **given, num_items_in_batch=items).loss, total / 36)
        kept = model(ids, shift_labels=shifted, logits_to_keep=2).loss
        torch.testing.assert_close(kept, F.cross_entropy(log[:, -2:].flatten(0, 1), shifted[:, -2:].flatten()))


@pytest.mark.parametrize("preset", ["small", "small-baseline"])
def test_a_loss_in_training_is_made_without_logits_unless_they_are_asked_for(preset: str) -> None:
    model, ids = build(shrunk(preset)), tokens(0, 3, 9)
    results = {}
    for training, asked in [(True, None), (True, True), (True, False), (False, None), (False, True), (False, False)]:
        model.train(training).zero_grad()
        out = model(ids, labels=ids, output_logits=asked)
        assert (out.logits is not None) == (asked if asked is not None else not training)
        out.loss.backward()
        results[training, asked] = [out.loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for found in results.values():
        torch.testing.assert_close(found, results[False, True], atol=1e-6, rtol=1e-4)
    for training in (True, False):
        assert model.train(training)(ids, output_logits=False).logits.shape == (3, 9, VOCABULARY)


def test_another_head_or_another_loss_gets_its_logits() -> None:
    """An adapter around the head, or a loss of the user's, would be passed over without a word."""
    ids = tokens(0, 3, 9)
    adapted = build(shrunk("small")).train()
    plain = adapted(ids, labels=ids)
    adapted.lm_head = nn.Sequential(adapted.lm_head, nn.Tanh())
    out = adapted(ids, labels=ids)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    assert not torch.isclose(out.loss, plain.loss, rtol=1e-3)
    own = build(shrunk("small")).train()
    own.loss_function = lambda logits, **rest: logits.square().mean()
    out = own(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.logits.square().mean())


def utilisation(out: ChiarCausalLMOutput, real: Tensor) -> Tensor:
    means = [routing.weights[real].mean(0) for routing in out.routing if routing.weights is not None]
    return sum(-(mean * mean.clamp(min=1e-8).log()).sum() for mean in means)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("router", ["soft", "hard"])
def test_the_collapse_penalty_is_lambda_u_in_training_alone(router: str, padded: bool) -> None:
    model, ids = build(shrunk("small", router=router, collapse_penalty=0.5)), tokens(0, 2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    found = {}
    for training in (True, False):
        for penalty in (0.5, 0.0):
            model.train(training)
            model.config.collapse_penalty = penalty
            found[training, penalty] = model(ids, attention_mask=mask, labels=ids, output_routing=True)
    u = utilisation(found[True, 0.5], mask.bool())
    assert 0.1 < u < 2 * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(found[True, 0.5].loss, found[True, 0.0].loss - 0.5 * u)
    torch.testing.assert_close(found[True, 0.0].loss, found[False, 0.0].loss)
    assert torch.equal(found[False, 0.5].loss, found[False, 0.0].loss)


@pytest.mark.parametrize("router", ["soft", "hard"])
def test_the_collapse_penalty_teaches_the_router_and_is_returned_without_routing(router: str) -> None:
    model, ids = build(shrunk("small", router=router)).train(), tokens(0, 2, 9)
    gradients = []
    for penalty in (0.0, 0.5):
        model.config.collapse_penalty = penalty
        model.zero_grad()
        out = model(ids, labels=ids)
        assert out.routing is None
        out.loss.backward()
        gradients.append(model.model.layers[1].router.proj.weight.grad.clone())
    model.config.collapse_penalty = 0.5
    weights = [*(layer.router.proj.weight for layer in model.model.layers if layer.router is not None)]
    out = model(ids, output_routing=True)
    wanted = torch.autograd.grad(-0.5 * utilisation(out, torch.ones_like(ids).bool()), weights)[0]
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(gradients[1] - gradients[0], wanted, atol=1e-5, rtol=1e-3)


def test_forwards_that_are_accumulated_penalise_once() -> None:
    model = build(shrunk("small", router="soft", collapse_penalty=0.5)).train()
    ids = tokens(0, 1, 9)
    whole = model(ids, labels=ids).loss
    parts = [model(ids, labels=ids, num_items_in_batch=16).loss for _ in range(2)]
    torch.testing.assert_close(sum(parts), whole)


def test_a_penalty_that_can_teach_nothing_is_refused() -> None:
    model = build(shrunk("small", router="soft", collapse_penalty=0.5)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UserError, match=r"collapse_penalty=0\.5.*use_reentrant=True"):
        model(tokens(0), labels=tokens(0))


# Training and what makes it cheaper


def gradients(model: ChiarForCausalLM, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("preset", ["small", "v1-all-three", "v2-400m"])
def test_gradient_checkpointing_changes_nothing(preset: str, router: str, use_reentrant: bool) -> None:
    model, ids = build(shrunk(preset, router=router)).train(), tokens(0, 2, 9)
    loss, wanted = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    again, found = gradients(model, ids)
    torch.testing.assert_close(again, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_gradient_checkpointing_notes_every_token_once() -> None:
    tables = []
    for checkpointing in (False, True):
        model = build(shrunk("small")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        gradients(model, tokens(0, 3, 9))
        assert [t._noted_count for t in model.thresholds().values()] == [27, 27]
        model.step_calibration()
        tables.append([t.quantiles.clone() for t in model.thresholds().values()])
    torch.testing.assert_close(*tables)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("preset", ["small", "small-baseline", "v1-three-operator", "v2-400m"])
def test_a_few_steps_on_one_batch_lower_its_loss(preset: str, router: str) -> None:
    torch.manual_seed(0)
    model, ids = ChiarForCausalLM(shrunk(preset, router=router)).train(), tokens(0, 4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.step_calibration()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.log(torch.tensor(float(VOCABULARY))).item(), abs=0.4)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_parameter_gets_a_gradient(router: str) -> None:
    model = build(shrunk("v1-all-three", router=router, meta_router="causal")).train()
    if router in ("norm", "learned"):  # at such weights their scores lie far from where a new model's do
        calibrate(model, [tokens(0, 4, 12)])
    _, found = gradients(model, tokens(0, 4, 12))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    # A key's bias adds the same to all of a query's scores, so it has no gradient by nature.
    silent = {name for name, g in found.items() if g.abs().max() == 0 and "k_proj.bias" not in name}
    assert not silent


def test_hard_routing_in_training_is_that_of_inference() -> None:
    model, ids = build(shrunk("small", router="hard")), tokens(0, 2, 9)
    assert any(isinstance(module, HardRouter) for module in model.modules())
    torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_is_near(preset: str) -> None:
    # Soft, so that no rounding switches an operator.
    model, ids = build(shrunk(preset, router="soft")), tokens(0, 2, 9)
    with torch.no_grad():
        wanted = model(ids).logits
        model.bfloat16()
        found = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert found.dtype == torch.bfloat16
    assert ((found.float() - wanted).norm() / wanted.norm()) < 0.1


def test_bfloat16_trains_with_thresholds_too() -> None:
    model, ids = build(shrunk("small")).bfloat16().train(), tokens(0, 2, 9)
    out = model(ids, labels=ids, output_routing=True)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(routing.entropy.dtype == torch.float32 for routing in out.routing)


def test_autocast_keeps_the_entropy_in_float32() -> None:
    model, ids = build(shrunk("small", num_hidden_layers=3)), tokens(0, 2, 9)
    with torch.no_grad():
        wanted = model(ids, output_routing=True).routing[1].entropy
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids, output_routing=True)
    assert out.logits.isfinite().all()
    assert out.routing[1].entropy.dtype == torch.float32
    torch.testing.assert_close(out.routing[1].entropy, wanted, atol=0.02, rtol=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("router", ROUTERS)
def test_compiled_logits_are_the_same(router: str) -> None:
    model, ids = build(shrunk("small", router=router)), tokens(0, 2, 9)
    wanted = model(ids, use_cache=False).logits
    # The graphs are captured and run as captured; code generation is the compiler's own business, and slow.
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, atol=ATOL, rtol=0)
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_no_layer_s_output_is_kept_alive_for_nothing() -> None:
    model, alive = build(shrunk("small")), []

    def note(layer: object, inputs: object, output: tuple[Tensor, object]) -> None:
        gc.collect()
        alive.append(sum(kept() is not None for kept in outputs))
        outputs.append(weakref.ref(output[0]))

    outputs: list[weakref.ref[Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(note)
    with torch.no_grad():
        model(tokens(0), use_cache=False)
    assert max(alive) <= 1  # the input of the layer that is running


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": [[1, 2, 3]]}, "input_ids is a list: give a tensor"),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask is a list: give a tensor"),
        ({"position_ids": [[0, 1, 2]]}, "position_ids is a list: give a tensor"),
        ({"labels": [[1, 2, 3]]}, "labels is a list: give a tensor"),
        ({"attention_mask": torch.tensor([[0.0, 0.0, -1e9]])}, "attention_mask with numbers below 0"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 7)}, r"inputs_embeds of shape \(1, 3, 7\)"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(3, 16)}, r"need shape \(B, T, 16\)"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 16).long()}, "a floating-point dtype"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 1, 3])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 1.5, 3.0])}, "cu_seq_lens_q"),
    ],
)
def test_inputs_of_another_kind_are_one_line(unchecked: None, given: dict[str, Any], message: str) -> None:
    model = ChiarForCausalLM(ChiarConfig(vocab_size=20, hidden_size=16, num_attention_heads=2, num_hidden_layers=2))
    with pytest.raises(UserError, match=message):
        model.eval()(**{"input_ids": torch.tensor([[1, 2, 3]]), **given})


@pytest.mark.usefixtures("unchecked")
def test_inputs_of_other_types_are_refused_in_one_line(tmp_path: Path) -> None:
    model = build(shrunk("small"))
    ids = tokens(0, 2, 6)
    embeds = model.get_input_embeddings()(ids).detach()
    with pytest.raises(UserError, match=r"inputs_embeds of dtype torch\.float64, and weights of torch\.float32"):
        model(inputs_embeds=embeds.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs_embeds=embeds.bfloat16()).logits.isfinite().all()
    with pytest.raises(UserError, match=r"position_ids of dtype torch\.float32: give whole numbers"):
        model(ids, position_ids=torch.arange(6.0)[None])
    whole = model(ids).logits
    for kept in (2, np.int64(2), torch.tensor([4, 5])):
        assert torch.equal(model(ids, logits_to_keep=kept).logits, whole[:, -2:])
    cache = ChiarCache(model.config)
    for wrong in (-1, True, torch.tensor(3), torch.tensor([1.0]), "2"):
        with pytest.raises(UserError, match="logits_to_keep"):
            model(ids, logits_to_keep=wrong, cache=cache)
    assert cache.tokens_seen == 0 and not cache.unfinished
    shrunken = build(shrunk("small", eos_token_id=VOCABULARY - 1))
    shrunken.resize_token_embeddings(20)
    with pytest.raises(UserError, match="eos_token_id=52: must be a token of the vocabulary, vocab_size=20"):
        shrunken.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="attention_context='routed' with router='soft'"):
        ChiarConfig(router="soft", operators=[["dct", {"attention": {"attention_context": "routed"}}]])
