"""A model that is saved and loaded is the model that was saved, thresholds and all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import PRESETS, ROUTERS, build, shrunk, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

from byte_tokenizer import byte_tokenizer
from chiaroscuro import ChiarConfig, ChiarForCausalLM, ChiarModel, UserError, calibrate


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_logits_and_calibration(tmp_path: Path, preset: str, router: str) -> None:
    model, ids = build(shrunk(preset, router=router)), tokens(0)
    if model.thresholds():
        calibrate(model, [tokens(1, 4)], 0.4)
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".md", ".py", ".safetensors"]

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ChiarForCausalLM
    assert not any(info.values())
    for config in (loaded.config, AutoConfig.from_pretrained(tmp_path)):
        assert config.to_diff_dict() == model.config.to_diff_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        wanted = model(ids)
        assert torch.equal(loaded(ids).logits, wanted.logits)
        bare = AutoModel.from_pretrained(tmp_path)
        assert type(bare) is ChiarModel
        assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)
    for i, thresholds in loaded.thresholds().items():
        assert thresholds.share == 0.4
        assert torch.equal(thresholds.values, model.model.layers[i].thresholds)
        assert torch.equal(thresholds.quantiles, model.thresholds()[i].quantiles)


def test_untied_heads_and_several_files(tmp_path: Path) -> None:
    model, ids = build(shrunk("small", tie_word_embeddings=False)), tokens(0)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not list(tmp_path.glob("*.bin"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("way", ["from_pretrained", "bfloat16", "to", "half"])
def test_half_precision_leaves_the_thresholds_alone(tmp_path: Path, way: str) -> None:
    model = build(shrunk("small"))
    calibrate(model, [tokens(1, 4)])
    wanted = {i: (t.values.clone(), t.quantiles.clone()) for i, t in model.thresholds().items()}
    if way == "from_pretrained":
        model.save_pretrained(tmp_path)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        half = {"bfloat16": model.bfloat16, "half": model.half, "to": lambda: model.to(torch.bfloat16)}[way]()
    assert half.model.embed_tokens.weight.dtype in (torch.bfloat16, torch.float16)
    for i, thresholds in half.thresholds().items():
        assert thresholds.values.dtype == thresholds.quantiles.dtype == thresholds.steps.dtype == torch.float32
        assert torch.equal(thresholds.values, wanted[i][0])
        assert torch.equal(thresholds.quantiles, wanted[i][1])


def test_a_model_made_in_half_precision_has_the_same_thresholds() -> None:
    config = shrunk("small")
    half = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert half.model.norm.weight.dtype == torch.bfloat16
    for layer, ours in zip(half.model.layers, ChiarForCausalLM(config).model.layers, strict=True):
        if ours.thresholds is not None:
            assert torch.equal(layer.thresholds, ours.thresholds)
            assert torch.equal(layer.router.calibration.quantiles, ours.router.calibration.quantiles)
            assert layer.router.calibration.steps.dtype == torch.float32


def test_what_a_checkpoint_lacks_starts_as_in_a_new_model(tmp_path: Path) -> None:
    """A baseline's weights into a routed model: filters of one, an open gate, the null's thresholds."""
    source = build(shrunk("small-baseline", num_hidden_layers=3))
    source.save_pretrained(tmp_path)
    config = shrunk("small", num_hidden_layers=3)
    fresh = ChiarForCausalLM(config)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, config=config)
    assert torch.equal(loaded.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert (loaded.model.layers[1].operators["dct"].weight == 1).all()
    assert loaded.model.meta_router.bias.item() == 2
    assert torch.equal(loaded.model.layers[1].thresholds, fresh.model.layers[1].thresholds)
    assert loaded.model.layers[1].router.calibration.steps.item() == 0


def edited(folder: Path, **changes: Any) -> Path:
    build(shrunk("small")).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"router": "sofd"}, "router 'sofd'.*did you mean 'soft'"),
        ({"meta_router": "batch"}, "use_cache=True.*meta_router='batch'"),
        ({"num_hidden_layers": 7}, "4 menus, num_hidden_layers=7"),
        ({"operators": [["dct"], ["fft", "attention"], ["dct"], ["dct"]]}, r"operators\[1\].*'fft'"),
        ({"hidden_size": 33}, "hidden_size=33.*num_attention_heads=2"),
    ],
    ids=str,
)
def test_an_edited_config_is_checked_on_loading(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    folder = edited(tmp_path, **changes)
    for load in (
        AutoConfig.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        ChiarConfig.from_pretrained,
    ):
        with pytest.raises(UserError, match=complaint) as error:
            load(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["small", "v2-400m"])
def test_a_text_generation_pipeline_runs_on_it(tmp_path: Path, preset: str) -> None:
    tokenizer = byte_tokenizer()
    build(shrunk(preset, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = ["light and", "the dark between the"]
    answers = pipe(texts, max_new_tokens=6, do_sample=False, batch_size=1)
    assert all(a[0]["generated_text"].startswith(text) for a, text in zip(answers, texts, strict=True))
    alone = pipe.model.generate(**tokenizer(texts[0], return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert answers[0][0]["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)
    if preset == "small":  # a gate over the batch answers otherwise in a batch
        assert pipe(texts, max_new_tokens=6, do_sample=False, batch_size=2) == answers


def test_a_share_given_to_from_pretrained_turns_the_dial(tmp_path: Path) -> None:
    model = ChiarForCausalLM(ChiarConfig(vocab_size=40, hidden_size=32, num_hidden_layers=3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attention_share=0.9)
    model.set_attention_share(0.9)
    assert loaded.config.attention_share == 0.9
    assert torch.equal(loaded.model.layers[1].thresholds, model.model.layers[1].thresholds)


@pytest.mark.parametrize("as_config", [False, True])
@pytest.mark.parametrize("router", ["random", "permuted", "learned"])
def test_thresholds_of_one_score_mean_nothing_to_another(tmp_path: Path, router: str, as_config: bool) -> None:
    model = build(shrunk("small"))
    calibrate(model, [tokens(0)])
    model.save_pretrained(tmp_path)
    change = {"config": ChiarConfig.from_pretrained(tmp_path, router=router)} if as_config else {"router": router}
    loaded = ChiarForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path, **change)
    new = ChiarForCausalLM(shrunk("small", router=router))
    for i, thresholds in loaded.thresholds().items():
        assert not thresholds.calibrated
        assert torch.equal(thresholds.values, new.thresholds()[i].values)
    assert all(
        t.calibrated for t in ChiarForCausalLM.from_pretrained(tmp_path, router="threshold").thresholds().values()
    )


def test_weights_alone_load_with_the_config_that_is_given(tmp_path: Path) -> None:
    model = build(shrunk("small"))
    calibrate(model, [tokens(0)])
    model.save_pretrained(tmp_path)
    config = ChiarConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, config=config)
    assert all(thresholds.calibrated for thresholds in loaded.thresholds().values())


def test_a_file_is_no_folder_to_save_to(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("precious")
    model = build(shrunk("small"))
    for saved in (model, model.config):
        with pytest.raises(UserError, match=r"model\.bin is a file; name a folder"):
            saved.save_pretrained(tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_text() == "precious"


def test_a_misspelt_field_is_not_ignored_on_loading(tmp_path: Path) -> None:
    build(shrunk("small")).save_pretrained(tmp_path)
    for cls in (ChiarConfig, ChiarForCausalLM):
        with pytest.raises(UserError, match="unknown field attention_shar: did you mean attention_share"):
            cls.from_pretrained(tmp_path, attention_shar=0.1)


def test_another_seed_of_the_router_is_another_permutation(tmp_path: Path) -> None:
    build(shrunk("small", router="permuted")).save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, router_seed=5)
    new = ChiarForCausalLM(shrunk("small", router="permuted", router_seed=5))
    assert torch.equal(loaded.model.layers[1].router.permutation, new.model.layers[1].router.permutation)
    same = ChiarForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(same.model.layers[1].router.permutation, new.model.layers[1].router.permutation)


def test_another_seed_leaves_routers_that_draw_nothing_as_they_are(tmp_path: Path) -> None:
    model = build(shrunk("small", attention_context="kept", kv_router="random"))
    calibrate(model, [tokens(0)])
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, router_seed=5)
    for i, thresholds in model.thresholds().items():
        assert torch.equal(loaded.thresholds()[i].values, thresholds.values) and loaded.thresholds()[i].calibrated
    assert not any(one.calibrated for one in loaded.kv_thresholds().values())


def test_another_spectrum_is_another_entropy(tmp_path: Path) -> None:
    model = build(shrunk("small", attention_context="kept", kv_router="norm"))
    calibrate(model, [tokens(0)])
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, spectrum="reference")
    assert not any(one.calibrated for one in loaded.thresholds().values())
    for i, thresholds in model.kv_thresholds().items():  # of the norm, which has no spectrum
        assert torch.equal(loaded.kv_thresholds()[i].values, thresholds.values) and loaded.kv_thresholds()[i].calibrated


def test_a_router_written_otherwise_is_the_same(tmp_path: Path) -> None:
    model = build(shrunk("small", router="norm", attention_context="kept", kv_router="norm"))
    calibrate(model, [tokens(0)])
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, router={"norm": {"history": 9}}, kv_router={"norm": {}})
    for name in ("thresholds", "kv_thresholds"):
        for i, thresholds in getattr(model, name)().items():
            again = getattr(loaded, name)()[i]
            assert again.calibrated and torch.equal(again.values, thresholds.values)


FIXED = {"calibration": "fixed", "entropy_thresholds": [0.5, 0.6]}


def test_fixed_thresholds_are_those_of_the_config(tmp_path: Path) -> None:
    model = build(shrunk("small"))
    calibrate(model, [tokens(0)])
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path, **FIXED)
    wanted = ChiarForCausalLM(loaded.config)
    for again in (loaded, ChiarForCausalLM.from_pretrained(tmp_path, config=loaded.config)):
        assert again.config.entropy_thresholds == [0.5, 0.6]
        for i, thresholds in again.thresholds().items():
            assert not thresholds.running and torch.equal(thresholds.values, wanted.thresholds()[i].values)
    loaded.save_pretrained(tmp_path)
    edited(tmp_path, **FIXED | {"entropy_thresholds": [0.2, 0.3]})
    for thresholds in ChiarForCausalLM.from_pretrained(tmp_path).thresholds().values():
        assert thresholds.values.tolist() == pytest.approx([0.25])


def test_given_thresholds_stand_whatever_share_comes_with_them(tmp_path: Path) -> None:
    build(shrunk("small", attention_share=0.5)).save_pretrained(tmp_path)
    wanted = shrunk("small", **FIXED)  # whose share of 0.25 says nothing
    for loaded in (
        ChiarForCausalLM.from_pretrained(tmp_path, config=wanted),
        ChiarForCausalLM.from_pretrained(tmp_path, attention_share=0.1, **FIXED),
    ):
        assert (loaded.config.calibration, loaded.config.entropy_thresholds) == ("fixed", [0.5, 0.6])
        for thresholds in loaded.thresholds().values():
            assert not thresholds.running and thresholds.values.tolist() == pytest.approx([0.55])


@pytest.mark.parametrize("way", ["set_attention_share", "calibrate", "from_pretrained", "calibration"])
def test_thresholds_that_are_turned_are_fixed_no_longer(tmp_path: Path, way: str) -> None:
    model = build(shrunk("small", **FIXED))
    model.save_pretrained(tmp_path)
    if way == "set_attention_share":
        model.set_attention_share(0.5)
    elif way == "calibrate":
        calibrate(model, [tokens(0)], 0.5)
    elif way == "from_pretrained":
        model = ChiarForCausalLM.from_pretrained(tmp_path, attention_share=0.5)
    else:
        changes = {"calibration": "running", "entropy_thresholds": None, "attention_share": 0.5}
        model = ChiarForCausalLM.from_pretrained(tmp_path, **changes)
    assert (model.config.calibration, model.config.entropy_thresholds) == ("running", None)
    model.save_pretrained(tmp_path)
    loaded = ChiarForCausalLM.from_pretrained(tmp_path)
    null = ChiarForCausalLM(shrunk("small", attention_share=0.5))
    for i, thresholds in loaded.thresholds().items():
        assert thresholds.running and torch.equal(thresholds.values, model.thresholds()[i].values)
        if way != "calibrate":
            assert torch.equal(thresholds.values, null.thresholds()[i].values)


def test_a_share_of_one_layer_survives(tmp_path: Path) -> None:
    model = build(shrunk("small"))
    calibrate(model, [tokens(0)])
    model.thresholds()[1].set_share(0.9)
    model.save_pretrained(tmp_path)
    for i, thresholds in ChiarForCausalLM.from_pretrained(tmp_path).thresholds().items():
        assert torch.equal(thresholds.values, model.thresholds()[i].values)


QUANTIZED = {
    "quantization_config": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
}


@pytest.mark.parametrize(
    "attributes",
    [
        QUANTIZED,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"pretraining_tp": 1, "task_specific_params": {"summarization": {"max_length": 20}}, "mine": {"of": ["me"]}},
    ],
    ids=["torchao", "bitsandbytes", "others"],
)
def test_attributes_of_others_in_a_saved_config_are_kept(tmp_path: Path, attributes: dict[str, Any]) -> None:
    config = shrunk("small")
    for name, value in attributes.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    for load in (AutoConfig.from_pretrained, ChiarConfig.from_pretrained):
        for name, value in attributes.items():
            assert getattr(load(tmp_path), name) == value


# Activation checkpointing


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_layer_is_checkpointed(every: int) -> None:
    model, ids = build(shrunk("small")).train(), tokens(0)
    runs = [0] * len(model.model.layers)
    for i, layer in enumerate(model.model.layers):
        # Of a module inside: what is checkpointed is the layer's forward, so that its own hooks run once.
        layer.feed_forward_norm.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    model(ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert runs == [1, 1, 1, 1]
    model.zero_grad()
    model.activation_checkpointing_enable(every_n_layers=every)
    model(ids, labels=ids).loss.backward()
    assert runs == [1 + (2 if i % every == 0 else 1) for i in range(4)]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], msg=name)
    model.activation_checkpointing_disable()
    model(ids, labels=ids).loss.backward()
    assert runs == [2 + (2 if i % every == 0 else 1) for i in range(4)]
