"""The evidence: what each question measures on small models, and what its rule makes of figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError, fit, retrofit
from chiaroscuro.studies.evidence import __main__ as evidence
from chiaroscuro.studies.evidence import classes, equal_time, gain, gate, layers, length
from chiaroscuro.studies.evidence.far_models import FarModel, far_context
from chiaroscuro.training import Recipe, train
from decoders import VOCABULARY, build
from small_runs import recipe_content, write_corpus

ROOT = Path(__file__).resolve().parents[2]
TIME, WINDOW, SINKS = 64, 8, 1
QUIET = Console(quiet=True)


def own() -> ChiarForCausalLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"operators": [["local", "attention"]] * 2, "window": WINDOW, "sinks": SINKS}
    config = ChiarConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TIME,
        router="random",
        meta_router="none",
        **fields,
    )
    model = ChiarForCausalLM(config).eval()
    fit(model, [torch.randint(VOCABULARY, (2, TIME)) for _ in range(4)], look=0.25)
    return model


def retrofitted(router: Any = "fitted") -> Any:
    model = build()
    retrofit(model, window=WINDOW, sinks=SINKS, attention_share=0.25, kv_share=1.0, router=router)
    fit(model, [torch.randint(VOCABULARY, (2, TIME)) for _ in range(4)], look=0.25, spread=False)
    return model


def by_head() -> Any:
    return retrofitted({"fitted": {"heads": 2}})


@pytest.mark.parametrize("make", [own, retrofitted, by_head])
def test_far_context_is_the_difference_between_two_models(make: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(3, VOCABULARY, (TIME,))
    far = FarModel(model, None, [ids], ids, WINDOW, SINKS)
    found = far_context(far, ids)
    losses = []
    for share in (1.0, 0.0):
        model.set_attention_share(share)
        with torch.no_grad():
            log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-log_p.gather(1, ids[1:, None])[:, 0])
    torch.testing.assert_close(found.loss, losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gain, losses[1] - losses[0], rtol=1e-3, atol=1e-4)
    model.set_attention_share(0.25)
    for name, tensor in model.state_dict().items():
        if "calibration" not in name:
            assert torch.equal(tensor, before[name]), name
    for layer in found.layers.values():
        assert (layer.part.moved[: found.first] == 0).all() and (layer.part.moved[found.first :] > 0).all()
        assert set(layer.scores) == set(gain.SCORES) - {"surprise", "frequency"}
        assert all(score.shape == (TIME,) for score in layer.scores.values())


def figures(entropy: list[float], shuffled: list[float]) -> dict[str, Any]:
    """Of a model with one layer, whose H and permuted H correlate so in each row."""
    layer: dict[str, Any] = {"layer": 0, "distance": [{"H": 0.1 * i, "distance": 9.0, "mass": 0.1} for i in range(10)]}
    for target in gain.TARGETS:
        for name in gain.SCORES:
            rows = {"H": entropy, "permuted H": shuffled}.get(name, [0.0] * len(entropy))
            layer[f"{target}, {name}"] = {"correlation": rows, "recall": [0.25] * len(entropy)}
    common = {"tokens": 10, "rows": len(entropy), "window": 8, "mean gain": 0.1, "half of the gain is of": 0.05}
    return {**common, "layers": [layer]}


@pytest.mark.parametrize(
    ("entropy", "shuffled", "verdict"),
    [
        ([0.30, 0.32, 0.31], [0.1, 0.1, 0.1], "**Yes**"),
        ([0.30, 0.32, 0.31], [0.3, 0.33, 0.31], "**No**"),  # no more than with features shuffled
        ([-0.30, -0.32, -0.31], [-0.6, -0.6, -0.6], "**No**"),
        ([0.9, -0.5, 0.3], [0.0, 0.0, 0.0], "**No**"),  # not with such a spread
    ],
)
def test_whether_h_knows_follows_from_its_rule(entropy: list[float], shuffled: list[float], verdict: str) -> None:
    found = {"a model": figures(entropy, shuffled)}
    assert gain.answer(found)[0].startswith(verdict)
    assert gain.draw(found)[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" the", "word start"),
        ("ing", "continuation"),
        (" 1984", "digit"),
        (",", "punctuation"),
        (" @-@", "punctuation"),
        (" \n", "newline"),
        (" <unk>", "unknown word"),
        ("…", "punctuation"),
        ("", "other"),
        ("  ", "other"),
        ("\N{REPLACEMENT CHARACTER}", "other"),  # such as the first byte of a Greek letter
        (" \N{REPLACEMENT CHARACTER}", "other"),
        (" É", "word start"),
    ],
)
def test_each_token_has_a_class(text: str, name: str) -> None:
    assert classes.token_class(text) == name


def test_two_seeds_that_choose_the_same_quarter_agree_four_times_as_often_as_chance() -> None:
    chosen = torch.tensor([1.0, 0, 0, 0] * 5)
    rows = [{"look": {0: chosen}}]
    assert classes._agreement(rows, rows) == {"look": pytest.approx(4.0)}
    assert classes._agreement(rows, [{"look": {0: chosen.roll(1)}}]) == {"look": 0.0}
    for nobody in ([{"look": {0: torch.zeros_like(chosen)}}], [{"kept": {0: chosen}}]):
        assert classes._agreement(rows, nobody) == {}


@pytest.mark.parametrize("make", [own, retrofitted])
def test_decisions_are_of_the_sides_that_choose(make: Callable[[], Any]) -> None:
    found = classes.decisions(make(), torch.randint(3, VOCABULARY, (TIME,)))
    assert list(found) == ["look"]
    assert all(chosen.shape == (TIME,) and 0 < float(chosen.mean()) < 1 for chosen in found["look"].values())


def test_shares_of_a_class_by_layer_and_over_all_layers() -> None:
    """A class is chosen in the first layer alone, wholly; the other one in the second layer, by half."""
    kinds = ["digit"] * 4 + ["word start"] * 4
    chosen = {0: torch.tensor([1.0] * 4 + [0.0] * 4), 1: torch.tensor([0.0] * 4 + [1.0, 0.0] * 2)}
    seed = json.loads(json.dumps(classes.summarise([{"look": chosen}], [kinds])))
    assert classes._layers({"seeds": {"0": seed}}, "look") == ["0", "1"]
    found = {"small": {"seeds": {"0": seed, "1": seed}, "agreement": []}}
    shares = {
        name: [classes._of_layer(found["small"], "look", layer, name) for layer in ("0", "1")] for name in set(kinds)
    }
    assert shares == {"digit": [1.0, 0.0], "word start": [0.0, 0.5]}
    assert classes._of_layer(found["small"], "look", "0", "newline") is None
    assert "| small: who looks | 38% | 25% | – | 50% |" in "\n".join(classes.answer(found))
    assert classes.draw(found).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small model of full attention."""
    folder = tmp_path_factory.mktemp("evidence")
    content = recipe_content(write_corpus(folder), folder / "run")
    content["model"] = {
        "operators": [["attention"]] * 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "meta_router": "none",
        "max_position_embeddings": 64,
    }
    content["data"]["sequence_length"] = 64
    train(Recipe.from_dict(content))
    return folder / "run"


def asked(monkeypatch: pytest.MonkeyPatch, folder: Path, recipe: dict[str, Any]) -> int:
    """Run the command in an empty folder, on one recipe."""
    monkeypatch.chdir(folder)
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "question.yaml").write_text(yaml.safe_dump(recipe))
    return evidence.main(["question.yaml"])


def test_questions_are_measured_and_written_down(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = {"checkpoint": str(place), "window": WINDOW, "sinks": SINKS}
    recipes: list[dict[str, Any]] = [
        {"question": "gain", "share": 0.25, "length": 64, "rows": 2, "models": {"small": near}},
        {"question": "length", "tokens": 512, "lengths": [64, 128], "seeds": [0], "models": {"small": str(place)}},
        {"question": "layers", "share": 0.25, "length": 64, "models": {"small": near}, "retrofitted": {}},
        equal_time_of({64: {"small": {"run": str(place), "seeds": [0]}}}),
    ]
    for recipe in recipes:
        assert asked(monkeypatch, tmp_path, recipe) == 0, recipe
    written = (tmp_path / "docs/evidence.md").read_text()
    for name, question in evidence.QUESTIONS.items():
        assert question.QUESTION in written
        assert (tmp_path / f"experiments/results/evidence/{name}.png").is_file() == (name not in ("gate", "classes"))
    assert written.count("Not measured yet.") == 2
    found = json.loads((tmp_path / "experiments/results/evidence/length.json").read_text())
    assert set(found["small"]["0"]) == {"64", "128"}
    found = json.loads((tmp_path / "experiments/results/evidence/layers.json").read_text())
    assert found["small"]["full"] > 0 and len(found["small"]["kept"]) == 2


def test_a_model_that_chooses_nothing_has_no_classes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"small": {"checkpoint": str(place)}}
    assert asked(monkeypatch, tmp_path, {"question": "classes", "rows": 2, "length": 64, "models": models}) == 2
    assert "small: no layer of" in capsys.readouterr().err


def test_what_goes_on_from_another_run_costs_both() -> None:
    ends = {str(seed): {"curve": [[10, 5.0], [20, 4.0]], "tokens": 20, "loss": 4.0 + seed} for seed in range(2)}
    one = {"seconds a token": 2.0, "operations a token": 1.0, "seeds": ends}
    more = {seed: end | {"loss": end["loss"] + 0.25 + int(seed) / 8} for seed, end in ends.items()}
    models = {"first": {"begins after": None, **one}, "second": {"begins after": "first", **one, "seeds": more}}
    found = {"machine": {"cpu": "a CPU", "threads": 1}, "baseline": "first", "lengths": {"8": models, "16": models}}
    assert equal_time.totals(models, "first", "seconds a token") == 40
    assert equal_time.totals(models, "second", "seconds a token") == 80
    said = equal_time.answer(found)
    assert "**T = 8**, 2 seeds:" in said and "**T = 16**, 2 seeds:" in said
    assert "| first | – | 1.00 | 1.00 | 1.00 | 1.00 | 4.500 ± 0.707 | – |" in said
    assert "| second | first | 1.00 | 1.00 | 2.00 | 2.00 | 4.812 ± 0.795 | +0.312 (-0.482 to +1.107) |" in said
    assert equal_time.draw(found)[1:4] == b"PNG"


def equal_time_of(lengths: Any) -> dict[str, Any]:
    return {"question": "equal_time", "seconds": 0.1, "baseline": "small", "lengths": lengths}


@pytest.mark.parametrize(
    ("lengths", "complaint"),
    [
        (5, "lengths=5: give each length its models, by name"),
        ({64: {}}, "give each length its models"),
        ({64: {"large": {"run": "x"}}}, "lengths.64: no model is called 'small'; have large"),
        (
            {64: {"small": {"run": "x", "seeds": [0], "after": "large"}}},
            "lengths.64: no model is called 'large'; have small",
        ),
        ({64: {"small": {"seeds": [0], "after": "small"}}}, "lengths.64.small: give its run"),
        ({64: {"small": {"run": "x", "seeds": []}}}, "lengths.64.small: give its run and its seeds"),
        ({64: {"small": {"run": "x", "seeds": [0], "seed": 1}}}, "lengths.64.small: give its run"),
        ({64: {"small": {"run": "nowhere/at/all", "seeds": [0]}}}, "nowhere/at/all"),
        ({64: {"small": "x"}}, "lengths.64.small: give its run and its seeds"),
        ({64: {"small": {"run": "x", "seeds": [0], "after": "small"}}}, "it begins after itself, by way of 'small'"),
    ],
)
def test_a_mistake_in_what_is_compared_is_one_line(
    lengths: Any,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert asked(monkeypatch, tmp_path, equal_time_of(lengths)) == 2
    said = capsys.readouterr().err.strip()
    assert complaint in said and len(said.splitlines()) == 1


def test_the_gate_of_a_model_that_pools_over_its_batch_moves_with_its_neighbours() -> None:
    one = {"alone": 0.5, "with rows of its own task": {"g": 0.5, "moved": 0.0}}
    moves = {"text": one | {"with rows of other tasks": {"g": 0.8, "moved": 0.31}}}
    found = {"gates": {"pooled": {"0": {"text": 0.5}, "1": {"text": 0.7}}}, "moves": {"pooled": moves}}
    assert "by up to 0.310 (pooled)" in gate.answer(found)[0]
    assert "| pooled | 0.600 ± 0.141 | 2 |" in gate.answer(found)
    assert gate.draw(found)[1:4] == b"PNG"


def test_the_page_says_what_the_committed_figures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert evidence.PAGE.read_text() == evidence.page(evidence.measured())


def test_the_recipes_ask_what_is_known() -> None:
    files = sorted((ROOT / "recipes/evidence").glob("*.yaml"))
    assert {evidence.read(file)["question"] for file in files} == set(evidence.QUESTIONS)
    assert {file.stem for file in files} == set(evidence.QUESTIONS)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ("question: [", "question.yaml: "),
        ("question: why", "question: why; choose one of gain"),
        ("[1, 2]", "choose one of gain"),
        ("question: gain", "share is missing"),
        ("question: length\ntokens: 1\nlengths: [1]\nseeds: [0]\nmodels: {}\nseed: 1", "seed: unknown field"),
        ("question: length\ntokens: 64\nlengths: [64]\nseeds: [0]\nmodels: {small: no/such/model}", "no/such/model"),
        ("question: length\ntokens: 64\nlengths: [64]\nseeds: [0]\nmodels: {}", "give one or more, by name"),
        ("question: length\ntokens: 64\nlengths: [64]\nseeds: [0]\nmodels: 5", "give one or more, by name"),
        (
            "question: gain\nshare: 0.25\nlength: 64\nrows: 1\nmodels: {small: {checkpoint: x, windo: 3}}",
            "models.small.windo: unknown field; did you mean 'window'",
        ),
        (
            "question: length\ntokens: 64\nlengths: [64]\nseeds: []\nmodels: {a: b}",
            "seeds=[]: give a list of one or more",
        ),
        (
            "question: length\ntokens: x\nlengths: [64]\nseeds: [0]\nmodels: {a: b}",
            "tokens='x': give a positive whole number",
        ),
        (
            "question: length\ntokens: 64\nlengths: [64]\nseeds: [0]\nmodels: {a: {checkpoint: b}}",
            "models.a={'checkpoint': 'b'}: give the name of its checkpoint",
        ),
        ("question: classes\nrows: 2\nlength: 64\nmodels: {a: {chekpoint: b}}", "models.a.chekpoint: unknown field"),
        ("question: classes\nrows: 2\nlength: 64\nmodels: {a: {seeds: [0]}}", "models.a.checkpoint is missing"),
        (
            "question: layers\nshare: 0.25\nlength: 64\nretrofitted: {}\nmodels: {a: {checkpoint: b, sinks: 1}}",
            "models.a.window is missing",
        ),
        (
            "question: gate\nresults: not/there.json\nrows: 1\nlength: 8\ntasks: [a]\nmodels: {a: b}",
            "not/there.json can't be read",
        ),
        (
            "question: gain\nshare: 0.25\nlength: 64\nrows: 1\nmodels: {small: {checkpoint: nowhere/at/all, window: 8, "
            "sinks: 1}}",
            "nowhere/at/all",
        ),
    ],
)
def test_a_mistake_is_one_line(
    content: str | None,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "question.yaml").write_text(content)
    assert evidence.main(["question.yaml"]) == 2
    said = capsys.readouterr().err.strip()
    assert complaint in said and len(said.splitlines()) == 1


def test_of_harms_the_largest_come_first() -> None:
    sides = {"look": {str(i): {"harm": harm, "share": 0.25} for i, harm in enumerate((0.1, 0.4, 0.2, 0.3))}}
    (line,) = (line for line in layers.answer({"small": {"full": 10.0, "look, flat": 11.0} | sides}) if "small" in line)
    assert "11.00 (+10.0%) | – | 1: 0.4000, 25%, 3: 0.3000, 25%, 2: 0.2000, 25% | 0: 0.1000, 25%" in line


def test_the_change_with_length_is_of_the_same_tokens() -> None:
    one = {"positions": [{"last": 64, "perplexity": 9.0}], "look": 0.25, "kept": None}
    ends = {"0": (10.0, 11.0), "1": (20.0, 22.0)}
    seeds = {seed: {"64": {"perplexity": a, **one}, "128": {"perplexity": b, **one}} for seed, (a, b) in ends.items()}
    said = length.answer({"small": seeds})
    assert "+10.0% (small) to +10.0% (small), the mean over 2 seeds" in said[0]
    assert "| small | 15.00 | 16.50 | +10.0% (+10.0% to +10.0%) | 25.0% → 25.0% |  |" in said
    assert length.draw({"small": seeds})[1:4] == b"PNG"


def test_losses_are_compared_seed_by_seed_whatever_their_order_and_number() -> None:
    def model(**losses: float) -> dict[str, Any]:
        return {"seeds": {seed[1:]: {"loss": loss} for seed, loss in losses.items()}}

    same = equal_time.against(model(s0=5.0, s1=6.0), model(s1=6.0, s0=5.0))
    assert same is not None
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    fewer = equal_time.against(model(s1=6.5, s2=7.0), model(s0=5.0, s1=6.0))
    assert fewer is not None
    assert (fewer.count, fewer.mean) == (1, 0.5)
    assert equal_time.against(model(s3=1.0), model(s0=5.0)) is None


def test_one_seed_has_no_spread_and_a_variant_without_runs_is_left_out(tmp_path: Path) -> None:
    report = {"variants": [{"name": "begun", "runs": []}, {"name": "done", "runs": [_run_of_a_mixture()]}]}
    (tmp_path / "results.json").write_text(json.dumps(report))
    found = gate.measure({"results": tmp_path / "results.json", "models": {}}, Console(quiet=True))
    assert found["gates"].keys() == {"done"}
    assert any(line.startswith("| done | 0.800 | 0.700 | 1 |") for line in gate.answer(found))


def _run_of_a_mixture() -> dict[str, Any]:
    return {"seed": 0, "gate": 0.8, "tasks": {"sums": {"gate": 0.7}}}


def test_the_perplexity_of_a_copy_with_both_sides_is_that_of_neither(tmp_path: Path) -> None:
    layer = {"layer": 0, "look": {"harm": 0.1, "share": 0.25}, "kept": {"harm": 0.2, "share": 0.25}}
    for sides, shown in ((("look", "kept"), False), (("kept",), True)):
        own = {name: value for name, value in layer.items() if name in ("layer", *sides)}
        report = {"before": {"perplexity": 10.0}, "after": {"perplexity": 11.0}, "fit": {"layers": [own]}}
        (tmp_path / "retrofit.json").write_text(json.dumps(report))
        recipe = {"share": 0.25, "length": 8, "models": {}, "retrofitted": {"copy": tmp_path / "retrofit.json"}}
        found = layers.measure(recipe, Console(quiet=True))
        assert ("kept, spread" in found["copy"]) is shown
        assert found["copy"]["kept"]["0" if "0" in found["copy"]["kept"] else 0]["share"] == 0.25


def test_figures_that_cannot_be_drawn_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.yaml").write_text("question: length\ntokens: 64\nlengths: [64]\nseeds: [0]\nmodels: {a: b}")
    monkeypatch.setattr(length, "measure", lambda recipe, console: {})
    with pytest.raises(ValueError):
        evidence.main(["q.yaml"])
    assert not (evidence.RESULTS / "length.json").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lengths": 1024}, "lengths=1024: give a list"),
        ({"lengths": [64.5]}, r"lengths=\[64.5\]: give whole numbers"),
        ({"tokens": 65536.0}, r"tokens=65536\.0: give a positive whole number"),
        ({"seeds": 3}, "seeds=3: give a list"),
    ],
)
def test_a_recipe_of_the_wrong_kind_is_refused_before_anything_is_measured(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    recipe = {"question": "length", "tokens": 64, "lengths": [64], "seeds": [0], "models": {"a": "b"}}
    (tmp_path / "q.yaml").write_text(json.dumps(recipe | changes))
    with pytest.raises(UserError, match=complaint):
        evidence.read(tmp_path / "q.yaml")


@pytest.mark.parametrize("retrofitted", [None, ["a.json"], {"a": 1}])
def test_results_of_copies_have_names(tmp_path: Path, retrofitted: Any) -> None:
    recipe: Any = {"question": "layers", "share": 0.25, "length": 64, "models": {"a": {"checkpoint": "b"}}}
    recipe["models"]["a"] |= {"window": 8, "sinks": 1}
    (tmp_path / "q.yaml").write_text(json.dumps(recipe | {"retrofitted": retrofitted}))
    with pytest.raises(UserError, match=r"retrofitted=.*give files of results, by name"):
        evidence.read(tmp_path / "q.yaml")
