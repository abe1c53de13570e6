"""What a recipe reads it gives back, and what nobody knows is an error of one line that names it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from chiaroscuro import ChiarConfig
from chiaroscuro.data.tasks import task_options
from chiaroscuro.errors import UserError
from chiaroscuro.training import Recipe
from chiaroscuro.training.recipe import (
    CalibrationSection,
    DataSection,
    DistillSection,
    FitSection,
    MixtureSection,
    ScheduleSection,
    TrainerSection,
    override_field,
    read_yaml,
)

SMALL: dict[str, Any] = {"model": {"preset": "small"}, "trainer": {"output_dir": "runs/x", "steps": 100}}
LLAMA = {
    "architecture": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
}
RECIPES = Path(__file__).parents[2] / "recipes"
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def with_changes(**sections: Any) -> dict[str, Any]:
    return {**SMALL, **sections}


def assert_refused(content: dict[str, Any], *fragments: str) -> None:
    """The content is no recipe, and one line says all of this."""
    with pytest.raises(UserError) as caught:
        Recipe.from_dict(content)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def trainer(**fields: Any) -> dict[str, Any]:
    return with_changes(trainer={**SMALL["trainer"], **fields})


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**31),
    "batch_size": st.integers(1, 512),
    "gradient_accumulation": st.integers(1, 64),
    "learning_rate": st.floats(1e-5, 1.0),
    "weight_decay": st.floats(0, 1.0),
    "warmup_steps": st.integers(0, 99),
    "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(list),
    "clip": st.floats(1e-3, 1e3),
    "precision": st.sampled_from(["fp32", "bf16"]),
    "keep_checkpoints": st.integers(1, 9),
    "gradient_checkpointing": st.booleans(),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_what_is_written_is_read_back(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(trainer(**fields))
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    for name, value in fields.items():
        kept = getattr(recipe.trainer, name)
        assert (list(kept) if isinstance(value, list) else kept) == value


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_an_override_is_as_good_as_the_file(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("recipe") / "x.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    overrides = [f"trainer.{name}={yaml.safe_dump(value, default_flow_style=True)}" for name, value in fields.items()]
    overrides = [text.replace("...", "").strip() for text in overrides]
    assert Recipe.load(path, overrides) == Recipe.from_dict(trainer(**fields))


@given(st.integers(1, 10**9), st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.integers(1, 512))
def test_tokens_become_the_fewest_steps_that_reach_them(
    tokens: int, batch: int, accumulation: int, processes: int, length: int
) -> None:
    content = with_changes(
        data={"sequence_length": length},
        trainer={
            "output_dir": "x",
            "tokens": tokens,
            "batch_size": batch,
            "gradient_accumulation": accumulation,
            "warmup_steps": 0,
        },
    )
    recipe = Recipe.from_dict(content)
    each = batch * accumulation * processes * length
    assert recipe.tokens_per_step(processes) == each
    assert (recipe.steps(processes) - 1) * each < tokens <= recipe.steps(processes) * each


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {preset: small}\ntrainer: {output_dir: x, tokens: 1_000_000, learning_rate: 2e-3}\n")
    recipe = Recipe.load(path, ["trainer.min_learning_rate=1E-5", "model.attention_share=.5"])
    assert (recipe.trainer.tokens, recipe.trainer.learning_rate) == (1_000_000, 0.002)
    assert recipe.trainer.min_learning_rate == 1e-5
    config = recipe.build_config(300)
    assert isinstance(config, ChiarConfig)
    assert (config.attention_share, config.vocab_size) == (0.5, 300)


def test_llama_is_tied_and_starts_as_ours_does() -> None:
    config = Recipe.from_dict(with_changes(model=LLAMA)).build_config(300)
    assert config.model_type == "llama"
    assert (config.tie_word_embeddings, config.initializer_range, config.vocab_size) == (True, 0.02, 300)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 2)


@pytest.mark.parametrize(
    ("section", "measured", "expected"),
    [
        (None, None, ("running", None)),
        ({"method": "running"}, None, ("running", None)),
        ({"method": "fixed", "thresholds": [0.8, 0.9]}, None, ("fixed", [0.8, 0.9])),
        ({"method": "paper", "baseline": "x"}, (0.7, 0.75), ("fixed", [0.7, 0.75])),
    ],
)
def test_calibration_reaches_the_model(section: Any, measured: Any, expected: tuple[str, Any]) -> None:
    config = Recipe.from_dict(with_changes(calibration=section)).build_config(300, measured)
    assert isinstance(config, ChiarConfig)
    assert (config.calibration, config.entropy_thresholds) == expected


def test_resuming_allows_other_looks_and_nothing_else() -> None:
    begun = Recipe.from_dict(SMALL)
    free = {"output_dir": "y", "log_every": 3, "evaluate_every": 4, "save_every": 5, "keep_checkpoints": 1}
    free |= {"validation_tokens": 7, "report_to": ["wandb"], "validation_texts": {"other": "x"}}
    free |= {"gradient_accumulation": 2}  # where the processes make up for it, as the run sees to
    Recipe.from_dict(trainer(**free)).refuse_to_resume(begun)
    others = {
        "seed": 1,
        "steps": 101,
        "batch_size": 3,
        "learning_rate": 0.1,
        "min_learning_rate": 0.0,
        "warmup_steps": 3,
        "weight_decay": 0.5,
        "betas": [0.9, 0.99],
        "clip": 2.0,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "compile": True,
        "init_from": "z",
        "learning_rate_schedule": "wsd",
        "ema": 0.9,
        "fsdp": True,
        "training_texts": {"other": 0.5},
    }
    assert free.keys() | others.keys() | {"tokens", "epochs", "decay_steps"} == set(type(begun.trainer).model_fields)
    for name, value in others.items():
        with pytest.raises(UserError, match=rf"trainer\.{name}(\.other)? was .* when this run began and is .* now"):
            Recipe.from_dict(trainer(**{name: value})).refuse_to_resume(begun)
    for other in (
        with_changes(model={"preset": "small", "attention_share": 0.5}),
        with_changes(tokenizer="bpe:300"),
        with_changes(data={"sequence_length": 64}),
        with_changes(model=LLAMA),
        with_changes(calibration={"method": "fixed", "thresholds": [0.8, 0.9]}),
    ):
        with pytest.raises(UserError, match="when this run began"):
            Recipe.from_dict(other).refuse_to_resume(begun)


BUILT_IN_TASKS = ("language-modelling", "imdb", "listops-flat", "listops-nested", "mqar", "passkey")

WRONG: list[tuple[dict[str, Any], list[str]]] = [
    (trainer(batchsize=3), ["trainer.batchsize=3", "batch_size"]),
    (trainer(colour="red"), ["trainer.colour='red'", "known are", "learning_rate"]),
    (with_changes(trainr={}), ["trainr", "'trainer'"]),
    (with_changes(data={"sequence_lenght": 4}), ["data: sequence_lenght=4", "did you mean 'sequence_length'"]),
    (with_changes(data={"sequence_length": "long"}), ["data.sequence_length='long'", "integer"]),
    (
        with_changes(data={"sequence_length": 10**6}),
        ["data.sequence_length=1000000", "max_position_embeddings"],
    ),
    (with_changes(tokenizer=3), ["tokenizer=3", "string"]),
    (with_changes(tokenizer="words"), ["tokenizer='words'", "take bpe:8192"]),
    (trainer(training_texts={"a": 0.5, "b": 0.5}), ["trainer.training_texts are 1 of the rows in all", "data.source"]),
    (trainer(training_texts={"a": 0}), ["trainer.training_texts.a=0", "greater than 0"]),
    (trainer(batch_size=0), ["trainer.batch_size=0", "greater than 0"]),
    (trainer(batch_size=True), ["trainer.batch_size=True", "integer"]),
    (trainer(batch_size="8"), ["trainer.batch_size='8'", "integer"]),
    (trainer(learning_rate=float("nan")), ["trainer.learning_rate=nan"]),
    (trainer(precision="fp16"), ["trainer.precision='fp16'", "bf16"]),
    (trainer(betas=[1]), ["trainer.betas: [1] needs two numbers"]),
    (trainer(betas="both"), ["trainer.betas: 'both' needs two numbers"]),
    (trainer(betas=[0.9, "x"]), ["trainer.betas.1='x'"]),
    (trainer(betas=[0.9, 1.0]), ["trainer", "betas=[0.9, 1.0]"]),
    (trainer(min_learning_rate=1.0), ["min_learning_rate=1.0", "learning_rate=0.002"]),
    (trainer(tokens=1000), ["trainer", "steps=100", "tokens=1000", "exactly one"]),
    (with_changes(trainer={"output_dir": "x"}), ["steps=None", "tokens=None"]),
    (with_changes(trainer={"steps": 3}), ["trainer.output_dir is missing"]),
    (trainer(output_dir=""), ["trainer.output_dir=''", "is empty; give at least 1"]),
    ({"trainer": SMALL["trainer"]}, ["model is missing"]),
    (with_changes(model="small"), ["model"]),
    (with_changes(model={"preset": "smal"}), ["model", "smal", "'small'"]),
    (
        with_changes(model={"preset": "small", "atention_share": 0.1}),
        ["model", "atention_share", "attention_share"],
    ),
    *(
        (with_changes(model={"preset": "small", name: value}), [f"model: unknown field {name}={value!r}"])
        for name, value in {
            "num_labels": "abc",
            "dtype": "foo",
            "id2label": "x",
            "architectures": "x",
            "attn_implementation": "sdpa",
            "model_type": "chiar",
        }.items()
    ),
    (with_changes(model={"preset": "small", "attention_share": 2}), ["model", "attention_share=2"]),
    (with_changes(model={"preset": "small", "vocab_size": 10}), ["model.vocab_size=10", "tokenizer"]),
    (with_changes(model={"architecture": "mamba"}), ["model.architecture='mamba'", "chiar"]),
    (with_changes(model={**LLAMA, "preset": "small"}), ["model.preset='small'", "known are"]),
    (with_changes(model={**LLAMA, "hidden_size": 65}), ["model.hidden_size=65", "num_attention_heads=4"]),
    (with_changes(model=LLAMA, calibration={"method": "running"}), ["calibration", "llama"]),
    (with_changes(calibration={"method": "fixed"}), ["calibration", "thresholds=None"]),
    (
        with_changes(calibration={"method": "running", "thresholds": [0.1, 0.2]}),
        ["thresholds=[0.1, 0.2]", "'fixed'"],
    ),
    (with_changes(calibration={"method": "fixed"}), ["method='fixed'", "thresholds=None"]),
    (with_changes(calibration={"method": "running", "baseline": "x"}), ["method='running'", "baseline='x'"]),
    (with_changes(model={"architecture": "lama"}), ["model.architecture='lama'", "did you mean 'llama'?"]),
    (
        with_changes(
            model={"preset": "small", "attention_share": 0.1}, calibration={"method": "fixed", "thresholds": [0.8, 0.9]}
        ),
        ["model.attention_share=0.1", "calibration.method='fixed'", "follow no share"],
    ),
    (
        with_changes(mixture={"ratio": 0.5, "tasks": {"recall": {"task": "mqar"}}}),
        ["mixture.tasks.recall: tokenizer='bpe:8192' with the task mqar", "remove the task"],
    ),
    (with_changes(model={"preset": "small", "rope_theta": 10**400}), ["model: rope_theta=1000"]),
    (
        with_changes(model={"preset": "small", "calibration": "fixed"}, calibration={"method": "running"}),
        ["model.calibration='fixed'", "calibration.method='running'"],
    ),
]


@pytest.mark.parametrize(("content", "fragments"), WRONG, ids=[fragments[0] for _, fragments in WRONG])
def test_a_mistake_is_one_line_that_names_it(content: dict[str, Any], fragments: list[str]) -> None:
    assert_refused(content, *fragments)


def test_a_merge_key_gives_fields_that_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: &model {preset: small, attention_share: 0.5}\n"
        "other: {<<: *model, attention_share: 0.1}\n"
        "twice: {<<: *model, preset: small, preset: small}\n"
    )
    with pytest.raises(UserError, match="'preset' is given more than once"):
        read_yaml(path, "recipe", "")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert read_yaml(path, "recipe", "")["other"] == {"preset": "small", "attention_share": 0.1}


def test_an_override_changes_one_section_though_another_is_an_alias_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &one {b: {c: 1}}\nother: *one\n")
    content = read_yaml(path, "recipe", "")
    override_field(content, "other.b.c=2")
    assert content == {"a": {"b": {"c": 1}}, "other": {"b": {"c": 2}}}


def test_null_takes_a_length_of_time_back() -> None:
    fields = {"learning_rate_schedule": "cosine", "decay_steps": None}
    assert Recipe.from_dict(trainer(**fields)).trainer.decay_steps is None


@pytest.mark.parametrize(
    ("text", "overrides", "fragment"),
    [
        (None, [], "can't be read: No such file"),
        ("model: {preset: small", [], "is not valid YAML"),
        ("- 1\n- 2\n", [], "has no sections"),
        ("", [], "has no sections"),
        ("trainer: {steps: 1}\ntrainer: {steps: 2}\n", [], "'trainer' is given more than once"),
        ("model: {preset: small}\n", ["trainer.steps"], "is not of the form section.field=value"),
        ("model: {preset: small}\n", ["=3"], "is not of the form"),
        ("model: {preset: small}\n", ["model.preset.name=3"], "'preset' holds 'small'"),
        ("model: {preset: small}\n", ["trainer.betas=[0.9"], "is not valid YAML"),
        ("trainer: {steps: 2001-99-99}\n", [], "is not valid YAML"),
        ("model: " + "[" * 5000, [], "is not valid YAML"),
        ("model: {preset: small}\n", ["trainer.steps=" + "1" * 5000], "is not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", [], "is not valid YAML"),
    ],
)
def test_a_file_or_override_that_is_none(tmp_path: Path, text: str | None, overrides: list[str], fragment: str) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        Recipe.load(path, overrides)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_number_of_tokens_is_too_large_to_count() -> None:
    tokens = 2**63 - 1  # beyond what a float holds exactly
    content = with_changes(trainer={"output_dir": "x", "tokens": tokens, "batch_size": 1})
    assert 0 <= Recipe.from_dict(content).steps() * 256 - tokens < 256
    with pytest.raises(UserError, match=r"trainer.tokens=1000.*: input should be less than 9223372036854775808"):
        Recipe.from_dict(trainer(tokens=10**400, steps=None))


def test_a_warm_up_without_end_is_refused() -> None:
    with pytest.raises(UserError, match="warmup_steps=100 is not shorter than the 100 steps of the run"):
        Recipe.from_dict(trainer(warmup_steps=100)).steps()


def test_the_two_small_recipes_differ_in_the_model_alone() -> None:
    small, baseline = (Recipe.load(RECIPES / f"{name}.yaml") for name in ("small", "small-baseline"))
    ours, theirs = small.model_dump(), baseline.model_dump()
    assert ours.pop("model")["preset"] == "small"
    assert theirs.pop("model")["preset"] == "small-baseline"
    assert ours["trainer"].pop("output_dir") != theirs["trainer"].pop("output_dir")
    assert ours == theirs


# The page


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("data", DataSection),
        ("trainer", TrainerSection),
        ("calibration", CalibrationSection),
        ("mixture", MixtureSection),
        ("schedule", ScheduleSection),
        ("distill", DistillSection),
        ("fit", FitSection),
    ],
)
def test_the_page_has_every_field_and_its_default(name: str, section: type[BaseModel]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition(f"**`{name}`**")[2].partition("\n**`")[0].partition("\n## ")[0]
    said = {}
    for fields, default in re.findall(r"^\| (`.*?`) \| (.*?) \|", table, re.MULTILINE):
        said |= {field.strip("`"): default.strip("`") for field in fields.split(", ")}
    wanted = {}
    for field, info in section.model_fields.items():
        value = None if info.is_required() else info.default
        shown = list(value) if isinstance(value, tuple) else value
        wanted[field] = "–" if shown is None else shown if isinstance(shown, str) else json.dumps(shown)
    if name == "data":  # the options of tasks too, each task with its own defaults
        wanted |= {option: "–" for task in BUILT_IN_TASKS for option in task_options(task)}
    assert said == wanted


def test_the_page_s_recipe_is_one_and_what_is_added_to_it_another(tmp_path: Path) -> None:
    text, amid, added = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(text)
    assert Recipe.load(tmp_path / "recipe.yaml").trainer.tokens == 5_000_000
    content = yaml.safe_load(text)
    del content["model"]["attention_share"]  # the schedule says where it ends
    for section, fields in yaml.safe_load(added).items():
        content[section] = {**content.get(section, {}), **fields}
    assert Recipe.from_dict(content).courses(100)["attention_share"].after(50) == 0.25
    fitted = Recipe.from_dict(yaml.safe_load(text) | {"model": {"preset": "reach-small"}} | yaml.safe_load(amid))
    assert [fitted.courses(100)["kv_share"].after(n) for n in (40, 70)] == [1.0, 0.25]


def test_a_null_over_a_preset_s_value_is_kept() -> None:
    """v2's MetaRouter pools over the batch; null is for the choice that a model without a preset would make."""
    model = {"preset": "v2-400m", "calibration": "running", "meta_router": None}
    recipe = Recipe.from_dict(with_changes(model=model))
    assert recipe.build_config(300).meta_router == "causal"
    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe and again.build_config(300).meta_router == "causal"
    again.refuse_to_resume(recipe)
    other = Recipe.from_dict(with_changes(model={name: model[name] for name in ("preset", "calibration")}))
    with pytest.raises(UserError, match=r"model\.meta_router was None .* and is 'not said' now"):
        other.refuse_to_resume(recipe)


def test_the_home_of_the_user_is_found_in_the_run_s_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe.from_dict(with_changes(trainer={**SMALL["trainer"], "output_dir": "~/runs/one"}))
    assert recipe.trainer.output_dir == str(tmp_path / "runs/one")


def test_more_layers_than_can_be_are_refused_at_once() -> None:
    many = {"preset": "reach-small", "num_hidden_layers": 10**20}
    assert_refused(with_changes(model=many), "num_hidden_layers", "must be at most 10,000")
