"""The command line, called as a user calls it: what it prints, and one line and exit code 2 for each mistake.

The oracle of a mistake is the same for all: exit code 2, standard output empty, standard error one line that starts
with "error: " and says what is wrong. Nothing is left half-written.
"""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from chiaroscuro import ChiarConfig, ChiarForCausalLM
from chiaroscuro.data import load_corpus, load_tokenizer
from chiaroscuro.model.calibration import paper_thresholds
from chiaroscuro.report.performance_terminal import print_performance
from chiaroscuro.report.tables import figures_table

SENTENCES = [
    "the light falls on the table",
    "a shadow lies behind the chair",
    "in the dark room a candle burns",
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split, repeats in (("train", 60), ("validation", 12), ("test", 12)):
        lines = [f"{sentence} {number}" for number in range(repeats) for sentence in SENTENCES]
        (folder / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as training leaves it, with an untrained model in it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    corpus = load_corpus(str(text_folder))
    tokenizer = load_tokenizer("bpe:300", corpus)
    torch.manual_seed(0)
    config = ChiarConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, max_position_embeddings=64)
    model = ChiarForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(
        "model: {preset: small}\n"
        f"data: {{source: '{text_folder}', sequence_length: 32}}\n"
        f"tokenizer: bpe:300\ntrainer: {{output_dir: '{folder}', steps: 100}}\n"
    )
    return folder


# What the commands do


def test_an_interrupted_command_says_so_and_does_not_succeed(
    run: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chiaroscuro.studies.evaluation.evaluate", interrupt)
    assert run("evaluate", run_folder) == (2, "", "error: interrupted\n")


def test_presets_lists_every_preset_with_its_size(run: Run) -> None:
    code, out, _ = run("presets")
    assert code == 0
    assert all(name in out for name in ChiarConfig.presets())
    assert "400.04 M" in out and "16.03 M" in out
    code, out, _ = run("presets", "--json")
    assert set(json.loads(out)) == set(ChiarConfig.presets())


def test_without_a_command_there_is_the_help_and_no_empty_error(run: Run) -> None:
    code, out, err = run()
    assert code == 2 and "evaluate" in out and err == ""


def test_a_warning_is_one_line_without_a_place_in_the_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before, shown = warnings.formatwarning, []

    def warn(**_: Any) -> None:
        shown.append(warnings.formatwarning("the share\n is a guess", UserWarning, "module.py", 9))

    monkeypatch.setattr("chiaroscuro.cli.app", warn)
    run("presets")
    assert shown == ["warning: the share is a guess\n"] and warnings.formatwarning is before


def test_info_says_what_a_checkpoint_is(run: Run, run_folder: Path) -> None:
    code, out, _ = run("info", run_folder)
    assert code == 0 and "dct · attention" in out
    source = json.loads(run("info", run_folder, "--json")[1])["recipe"]["data"]["source"]
    assert f"tasklanguage-modellingdata{source}tokenizerbpe:300steps100seed0" in "".join(out.split())
    facts = json.loads(run("info", run_folder, "--json")[1])
    model = ChiarForCausalLM.from_pretrained(run_folder / "model")
    assert facts["parameters"] == model.num_parameters()
    assert facts["layers"][1]["thresholds"] == pytest.approx(model.model.layers[1].thresholds.tolist())
    assert facts["recipe"]["data"]["sequence_length"] == 32


def test_evaluate_agrees_with_the_loss_written_out(run: Run, run_folder: Path) -> None:
    code, out, _ = run("evaluate", run_folder, "--split", "test", "--json")
    assert code == 0
    figures = json.loads(out)
    from chiaroscuro.data import TokenBlocks, tokenize_corpus

    model = ChiarForCausalLM.from_pretrained(run_folder / "model").eval()
    corpus = load_corpus(figures["data"])
    tokens = tokenize_corpus(corpus, load_tokenizer(str(run_folder / "model"), corpus))["test"]
    blocks = TokenBlocks(tokens, 32)
    losses = []
    for i in range(len(blocks)):
        with torch.no_grad():
            log_p = model(blocks[i]["input_ids"][None], use_cache=False).logits.double().log_softmax(-1)[0]
        losses.append(-log_p[torch.arange(32), blocks[i]["shift_labels"]])
    loss = torch.cat(losses).mean().item()
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    bits = loss / torch.log(torch.tensor(2.0)).item() * tokens.count / tokens.bytes
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert figures["tokens"] == 32 * len(blocks)


def test_evaluate_turns_the_dial_and_strides(run: Run, run_folder: Path) -> None:
    figures = json.loads(run("evaluate", run_folder, "--share", 1, "--stride", 8, "--json")[1])
    assert figures["layers"][1]["share"] == [0.0, 1.0]
    assert figures["stride"] == 8
    code, out, _ = run("evaluate", run_folder, "--share", "0")
    assert code == 0 and "attention 0.0%" in out


def test_generate_continues_the_prompt(run: Run, run_folder: Path) -> None:
    first = json.loads(run("generate", run_folder, "the light", "--max-new-tokens", 5, "--json")[1])
    again = json.loads(run("generate", run_folder, "the light", "--max-new-tokens", 5, "--json")[1])
    assert first["continuation"] == again["continuation"]
    assert 1 <= first["tokens"] <= 5
    code, out, _ = run("generate", run_folder, "the [light]", "--max-new-tokens", 3, "--temperature", 0)
    assert code == 0 and out.startswith("the [light]")


def test_calibrate_sets_the_share_and_leaves_the_checkpoint_alone(run: Run, run_folder: Path, tmp_path: Path) -> None:
    before = (run_folder / "model/model.safetensors").read_bytes()
    code, out, _ = run("calibrate", run_folder, "--share", 0.4, "--output", tmp_path / "cal", "--json")
    assert code == 0
    # Coarse: this text has few distinct tokens, and H of the first routed layer depends on the token alone. Ties.
    assert json.loads(out)["layers"][1]["share"][1] == pytest.approx(0.4, abs=0.05)
    assert (run_folder / "model/model.safetensors").read_bytes() == before
    calibrated = ChiarForCausalLM.from_pretrained(tmp_path / "cal")
    assert calibrated.config.attention_share == 0.4
    assert calibrated.thresholds()[1].calibrated
    # The copy knows its text and the length of a sequence, and leaves the folder around it alone.
    assert json.loads(run("evaluate", tmp_path / "cal", "--json")[1])["length"] == 32
    assert [path.name for path in tmp_path.iterdir()] == ["cal"]


def test_calibrate_as_published_prints_two_thresholds(run: Run, run_folder: Path) -> None:
    code, out, _ = run("calibrate", run_folder, "--method", "paper", "--json")
    low, high = json.loads(out)["entropy_thresholds"]
    assert code == 0 and 0 < low < high < 1
    code, out, _ = run("calibrate", run_folder, "--method", "paper")
    assert out.startswith("calibration: {method: fixed, thresholds: [")


def test_published_thresholds_are_of_the_model_s_own_spectrum(run: Run, run_folder: Path, tmp_path: Path) -> None:
    usual = json.loads(run("calibrate", run_folder, "--method", "paper", "--json")[1])
    shutil.copytree(run_folder, tmp_path / "run")
    config = tmp_path / "run/model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"spectrum": "reference"}))
    found = json.loads(run("calibrate", tmp_path / "run", "--method", "paper", "--json")[1])["entropy_thresholds"]
    model = ChiarForCausalLM.from_pretrained(run_folder / "model")
    corpus = load_corpus(json.loads(run("info", run_folder, "--json")[1])["recipe"]["data"]["source"])
    tokenizer = load_tokenizer(str(run_folder / "model"), corpus)
    rows = [tokenizer(row)["input_ids"] for row in corpus.splits["validation"]["text"]]
    assert found == pytest.approx(paper_thresholds(model, rows, spectrum="reference"))
    assert found != pytest.approx(usual["entropy_thresholds"], abs=1e-4)


def test_route_shows_every_token_and_writes_the_pictures(run: Run, run_folder: Path, tmp_path: Path) -> None:
    text = "the light falls on a chair"
    page, picture = tmp_path / "page.html", tmp_path / "figure.png"
    code, out, _ = run("route", run_folder, text, "--html", page, "--png", picture)
    assert code == 0 and "attention" in out and "null" in out
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert picture.read_bytes().startswith(b"\x89PNG")
    trace = json.loads(run("route", run_folder, text, "--json")[1])
    assert "".join(trace["tokens"]) == text
    assert len(trace["layers"]) == 3


def test_train_evaluate_and_resume_from_a_recipe(run: Run, text_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {preset: small, hidden_size: 32, num_hidden_layers: 3}\n"
        f"data: {{source: '{text_folder}', sequence_length: 16}}\n"
        f"tokenizer: bpe:300\ntrainer: {{output_dir: '{tmp_path / 'run'}', steps: 4, warmup_steps: 1, batch_size: 2}}\n"
    )
    code, out, _ = run("train", recipe, "model.attention_share=0.5", "--json")
    assert code == 0, out
    result = json.loads(out)
    assert result["steps"] == 4 and result["tokens"] == 4 * 2 * 16
    figures = json.loads(run("evaluate", tmp_path / "run", "--json")[1])
    assert figures["loss"] == pytest.approx(result["validation_loss"], rel=1e-5)
    code, _, err = run("train", recipe, "model.attention_share=0.5")
    assert code == 2 and "--resume" in err
    code, out, _ = run("train", recipe, "model.attention_share=0.5", "--resume", "--json")
    assert code == 0 and json.loads(out)["perplexity"] == result["perplexity"]


def test_flops_of_a_preset_and_of_a_checkpoint(run: Run, run_folder: Path) -> None:
    code, out, _ = run("flops", "v2-400m", "--length", 256, "--share", 0.5)
    assert code == 0
    assert all(word in out for word in ("exact", "no-head", "paper", "attention scores", "feed-forward", "35–40%"))
    assert "at no ρ, not even at 0" in out.replace("\n", " ")
    code, out, _ = run("flops", run_folder, "--length", 4000, "--share", 0.1, "--context", "routed", "--json")
    figures = json.loads(out)
    assert code == 0 and figures["attention_context"] == "routed" and figures["share"] == 0.1
    exact = figures["protocols"]["exact"]["forward"]
    assert exact["flops"] == pytest.approx(sum(figures["by_operator"]["forward"]["ours"].values()))
    assert exact["baseline"] == pytest.approx(sum(figures["by_operator"]["forward"]["full attention"].values()))
    assert figures["shortest_length"] < 4000


def test_benchmark_measures_what_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    small = ["--layers", 3, "--width", 16, "--heads", 2, "--vocabulary", 50, "--tokens", 32, "--seconds", 0]
    cells = ["--length", 16, "--share", 0.5, "--context", "routed", "--task", "forward", "--output", tmp_path / "out"]
    code, out, _ = run("benchmark", *small, *cells, "--json")
    assert code == 0
    assert [cell["candidate"] for cell in json.loads(out)["cells"]][-1] == "routed, ρ = 0.5"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "performance.md",
        "performance.png",
        "speed.json",
    ]
    code, again, _ = run("benchmark", *small, *cells)
    assert code == 0 and "wrote" in again
    for line in ("prefill", "full attention", "Hugging Face Llama", "routed, ρ = 0.5"):
        assert f"\n{line}" in again
    assert "1.00× [1.00]" in again


def test_tables_fit_into_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for length in ("256", "1000000000"):
        _, out, _ = run("flops", "v2-400m", "--length", length)
        tables = out[: out.index("\nAt T")] if "\nAt T" in out else out
        assert max(map(len, tables.splitlines())) <= 80 and "…" not in tables
        for name in ("attention projections", "paper, multiply-adds"):
            assert f"\n {name}" in tables


def test_the_benchmark_s_table_fits_too(capsys: pytest.CaptureFixture[str]) -> None:
    cell = {"task": "train", "candidate": "Hugging Face Llama", "median": 0.4655, "ratio": 10.5, "predicted": 12.25}
    found = {"cells": [cell | {"length": 2**n} for n in range(8, 15)]}
    print_performance(found, Console(width=80))
    out = capsys.readouterr().out
    assert out.count("466 ms 10.50× [12.25]") == 7 and max(map(len, out.splitlines())) <= 80


def test_the_profiler_is_quiet() -> None:
    """It writes to the file descriptor, which no capturing of ours sees; so in a process of its own."""
    code = (
        "import torch; from chiaroscuro.analysis.speed import profile_by_kind; profile_by_kind(lambda: torch.ones(2))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and "profiler_start" not in found.stderr, found.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["--version"], ["trian"], ["evaluate"], ["flops", "small", "--length", "0"]],
)
def test_help_and_a_mistake_wait_for_no_library(arguments: list[str]) -> None:
    code = "import sys, atexit; atexit.register(lambda: print('HEAVY' * ('torch' in sys.modules)))"
    code += f"; sys.argv = ['chiaroscuro', *{arguments}]; from chiaroscuro.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode in (0, 2) and "HEAVY" not in found.stdout, found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *(["flops", "small", option] for option in ("--length", "--vocabulary")),
        *(
            ["benchmark", "--task", "forward", option]
            for option in ("--length", "--layers", "--width", "--heads", "--vocabulary", "--tokens")
        ),
        *(["task", "listops-flat", option] for option in ("--examples", "--heldout")),
        *(["evaluate", "RUN", option] for option in ("--length", "--stride", "--batch-size")),
        ["generate", "RUN", "light", "--top-k"],
        ["calibrate", "RUN", "--output", "out", "--tokens"],
        ["sweep", "GOOD", "--jobs"],
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[-1:]),
)
@pytest.mark.parametrize("size", ["1" + "0" * 12, "1" + "0" * 30])
def test_a_size_beyond_all_machines_is_one_line(
    arguments: list[str], size: str, run: Run, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*[places.get(argument, argument) for argument in arguments], size)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["1" + "0" * zeros for zeros in (9, 12, 30)])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_model_beyond_all_machines_is_one_line(
    field: str, size: str, run: Run, text_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 3}\n"
        f"data: {{source: '{text_folder}', sequence_length: 16}}\ntokenizer: bpe:300\n"
        f"trainer: {{output_dir: '{tmp_path / 'run'}', steps: 4, warmup_steps: 1, batch_size: 2}}\n"
    )
    code, out, err = run("train", recipe, f"model.{field}={size}")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"{field}={size}: must be at most" in err


@pytest.mark.parametrize("size", ["intermediate_size: 67108864", "hidden_size: 10000000"])
def test_weights_beyond_the_memory_are_refused(run: Run, text_folder: Path, tmp_path: Path, size: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{{size}, num_attention_heads: 2, num_hidden_layers: 48}}\n"
        f"data: {{source: '{text_folder}', sequence_length: 16}}\ntokenizer: bpe:300\n"
        f"trainer: {{output_dir: '{tmp_path / 'run'}', steps: 4, warmup_steps: 1, batch_size: 2}}\n"
    )
    code, out, err = run("train", recipe)
    assert (code, out, err.count("\n")) == (2, "", 1) and "the model's weights would take" in err


def test_a_benchmark_beyond_the_memory_is_refused(run: Run, tmp_path: Path) -> None:
    large = ["--layers", "1024", "--width", "131072", "--length", "256", "--task", "forward"]
    code, out, err = run("benchmark", *large, "--output", tmp_path / "out")
    assert (code, out) == (2, "") and "GiB or more, and this machine has" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "evaluate",
        "generate",
        "calibrate",
        "fit",
        "route",
        "flops",
        "benchmark",
        "presets",
        "info",
        "quickstart",
        "sweep",
        "collapse",
    ],
)
def test_every_command_has_a_help_that_teaches(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and "Usage" in out and len(out) > 400
    if command not in ("presets", "quickstart", "info"):
        assert "Example" in out


@pytest.mark.parametrize(("command", "defaults"), [("benchmark", ["(both)", "(all six)"]), ("sweep", ["(one per GPU"])])
def test_help_shows_the_defaults(command: str, defaults: list[str], run: Run) -> None:
    shown = " ".join(run(command, "--help")[1].replace("│", " ").split())
    assert all(default in shown for default in defaults), shown


def test_it_says_its_version(run: Run) -> None:
    assert run("--version") == (0, f"{metadata.version('chiaroscuro')}\n", "")


def test_evaluate_needs_the_split_that_it_reads_and_no_other(
    run: Run, run_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        shutil.copy(text_folder / f"{split}.txt", folder)
        code, out, _ = run("evaluate", run_folder, "--data", folder, "--split", split, "--json")
        assert code == 0 and json.loads(out)["split"] == split
    code, _, err = run("evaluate", run_folder, "--data", tmp_path / "test")
    assert code == 2 and "--split validation: " in err and "has test" in err


def test_a_recipe_around_a_model_that_is_no_run_s_is_not_its_recipe(run: Run, run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "model", tmp_path / "mine")
    (tmp_path / "recipe.yaml").write_text("name: something else\n")
    assert run("info", tmp_path / "mine")[0] == 0


def test_train_leaves_another_s_records_alone(run: Run, text_folder: Path, tmp_path: Path) -> None:
    records = tmp_path / "out" / "metrics.jsonl"
    records.parent.mkdir()
    records.write_text('{"loss": 2.3, "step": 10}\n')
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{preset: small}}\ntrainer: {{output_dir: '{records.parent}', steps: 200}}"
    )
    code, _, err = run("train", tmp_path / "recipe.yaml")
    assert code == 2 and "this run would replace it; name another trainer.output_dir" in err and err.count("\n") == 1
    assert records.read_text() == '{"loss": 2.3, "step": 10}\n' and list(records.parent.iterdir()) == [records]


def broken(folder: Path, tmp_path: Path, name: str, value: float = math.nan) -> Path:
    """A copy of a run whose tensors of that name are full of a value."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model/model.safetensors")
    found = [key for key in weights if name in key]
    assert found
    save_file(weights | {key: torch.full_like(weights[key], value) for key in found}, copy / "model/model.safetensors")
    return copy


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_generate_nothing(value: float, run: Run, run_folder: Path, tmp_path: Path) -> None:
    folder = broken(run_folder, tmp_path, "feed_forward", value)
    for temperature in ("0", "0.8"):
        code, out, err = run("generate", folder, "the light", "--temperature", temperature)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "its weights hold NaN or infinity" in err


def test_weights_that_are_not_finite_calibrate_nothing(run: Run, run_folder: Path, tmp_path: Path) -> None:
    folder = broken(run_folder, tmp_path, "embed")
    code, out, err = run("calibrate", folder, "--output", tmp_path / "out")
    assert (code, out) == (2, "") and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_flops_of_a_model_without_attention(run: Run, run_folder: Path, tmp_path: Path) -> None:
    """The paper's formula counts nothing of it, so that full attention has infinitely many times as many."""
    config = json.loads((run_folder / "model/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"operators": [["dct"]] * 3}))
    code, out, _ = run("flops", tmp_path)
    assert code == 0 and "∞" in out and "100.0%" in out
    code, out, _ = run("flops", tmp_path, "--json")
    assert code == 0 and json.loads(out)["protocols"]["paper"]["forward"]["ratio"] is None


def test_info_says_that_a_threshold_is_not_a_number(run: Run, run_folder: Path, tmp_path: Path) -> None:
    folder = broken(run_folder, tmp_path, "router.calibration.values")
    assert json.loads(run("info", folder, "--json")[1])["layers"][1]["thresholds"] == ["NaN"]
    out = run("info", folder)[1]
    assert "NaN" in out and "∞" not in out


@pytest.mark.parametrize("temperature", ["1e-300", "1e-7", "nan", "inf"])
def test_a_temperature_that_no_logit_survives(temperature: str, run: Run, run_folder: Path) -> None:
    code, out, err = run("generate", run_folder, "the light", "--temperature", temperature)
    assert (code, out, err.count("\n")) == (2, "", 1) and "temperature" in err
    assert run("generate", run_folder, "the light", "--temperature", "1e-6", "--max-new-tokens", 2)[0] == 0


def test_no_control_character_reaches_the_terminal(run: Run, run_folder: Path) -> None:
    prompt = "the \x1b[31mlight\x9b2J\x07"
    for arguments in (["generate", run_folder, prompt, "--max-new-tokens", 40], ["route", run_folder, prompt]):
        code, out, _ = run(*arguments)
        assert code == 0 and not set(out) & {"\x1b", "\x9b", "\x07"} and "␛" in out
        code, out, _ = run(*arguments, "--json")
        assert code == 0 and not set(out) & {"\x1b", "\x9b", "\x07"}
    assert json.loads(run("generate", run_folder, prompt, "--json")[1])["prompt"] == prompt
    _, _, err = run("info", "no\x1bwhere")
    assert "\x1b" not in err


def test_a_run_is_evaluated_from_any_directory(
    run: Run, run_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe of a run names its text as it was seen from where the run was started."""
    started, elsewhere = tmp_path / "started", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(text_folder, started / "text")
    shutil.copytree(run_folder, started / "runs/tiny")
    recipe = (started / "runs/tiny/recipe.yaml").read_text()
    recipe = recipe.replace(str(text_folder), "text").replace(str(run_folder), "runs/tiny")
    (started / "runs/tiny/recipe.yaml").write_text(recipe)
    monkeypatch.chdir(started)
    wanted = json.loads(run("evaluate", "runs/tiny", "--json")[1])["loss"]
    monkeypatch.chdir(elsewhere)
    for name in (started / "runs/tiny", "../started/runs/tiny/model"):
        code, out, err = run("evaluate", name, "--json")
        assert code == 0 and json.loads(out)["loss"] == wanted, err
    # A folder that was moved does not tell where it was started.
    shutil.move(started / "runs/tiny", elsewhere / "moved")
    code, _, err = run("evaluate", "moved")
    assert code == 2 and "relative to the directory in which the run was started; --data names another" in err
    assert run("evaluate", "moved", "--data", started / "text", "--json")[0] == 0


def test_tokenisation_is_parallel_unless_the_user_says_otherwise() -> None:
    ask = "import os; import chiaroscuro.cli; print(os.environ.get('TOKENIZERS_PARALLELISM'))"
    usual = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    for environment, answer in ((usual, "None"), (usual | {"TOKENIZERS_PARALLELISM": "false"}, "false")):
        found = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
        assert found.stdout == f"{answer}\n", found.stderr


SOUND = {
    "kind": "train",
    "step": 1,
    "gate": 0.5,
    "layers": [{"layer": 1, "operators": ["dct", "attention"], "share": [0.5, 0.5], "entropy": [0.1, 0.2, 0.3]}],
}
LAYER = SOUND["layers"][0]


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        *(("gates", {"gate": value}) for value in ("x", [1], {})),
        *(("gates", {"tasks": value}) for value in (5, {"a": 5}, {"a": {"gate": "x"}})),
        *(("collapse", {"layers": value}) for value in (5, [5], [{}], [LAYER, LAYER])),
        *(("collapse", {"layers": [LAYER | {"share": value}]}) for value in (5, [0.5], ["a", None], [None, 0.5])),
        *(("collapse", {"layers": [LAYER | {"operators": value}]}) for value in (5, ["dct"], [])),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_record_is_one_line(
    command: str, damage: dict[str, Any], place: int, run: Run, tmp_path: Path
) -> None:
    records = [SOUND | {"step": 1}, SOUND | {"step": 2}]
    records[place] |= damage
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    code, out, err = run(command, tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    assert "is damaged" in err or "is something else" in err


@pytest.mark.parametrize("value", [-1, 1e30, True, [[5]], {"a": 1}, "ChiarForCausalLM"])
def test_architectures_that_name_no_class(value: Any, run: Run, run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "model", tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": value}))
    for command in ("info", "flops"):
        code, out, err = run(command, tmp_path / "model")
        assert (code, out, err.count("\n")) == (2, "", 1) and "architectures=" in err


def test_generate_says_why_it_stopped_early(run: Run, run_folder: Path) -> None:
    code, out, err = run("generate", run_folder, "the light", "--max-new-tokens", 1000, "--json")
    assert code == 0 and json.loads(out)["full"] is True
    _, _, err = run("generate", run_folder, "the light", "--max-new-tokens", 1000)
    assert err == "stopped: the model reads at most 64 tokens, prompt included\n"
    _, out, err = run("generate", run_folder, "the light", "--max-new-tokens", 5, "--json")
    assert err == "" and json.loads(out)["full"] is False


def test_it_runs_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "chiaroscuro", "info", "nowhere"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr.count("\n") == 1


def test_collapse_follows_the_shares_of_a_run(run: Run, tmp_path: Path) -> None:
    menus = [["dct"], ["dct", "rbf", "attention"]]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 21):
            shares = [[1.0], [0.5, 0.5 / step**2, 0.5 - 0.5 / step**2]]
            layers = [
                {"layer": n, "operators": menu, "share": share}
                for n, (menu, share) in enumerate(zip(menus, shares, strict=True), start=1)
            ]
            file.write(json.dumps({"kind": "train", "step": step, "layers": layers}) + "\n")
    code, out, _ = run("collapse", tmp_path, "--png", tmp_path / "collapse.png")
    assert code == 0 and "collapsed: rbf" in out
    survives = [line.split()[-1] for line in out.splitlines() if "%" in line and "all routed" not in line]
    assert survives == ["yes", "no", "yes"] and all(len(line) <= 80 for line in out.splitlines())
    assert (tmp_path / "collapse.png").read_bytes().startswith(b"\x89PNG")
    (layer,) = json.loads(run("collapse", tmp_path, "--floor", "0.001", "--json")[1])["layers"]
    assert layer["surviving"] == menus[1] and layer["final_share"][0] == 0.5


# Mistakes

RECIPE = "model: {{preset: small}}\ntrainer: {{output_dir: out, steps: 100}}\n{}"

WRONG: dict[str, tuple[list[str], str]] = {
    "no such command": (["trian", "x"], "No such command 'trian'"),
    "a missing argument": (["evaluate"], "Missing argument"),
    "an unknown option": (["info", "RUN", "--jsn"], "No such option"),
    "an option of the wrong type": (["evaluate", "RUN", "--length", "many"], "Invalid value for '--length'"),
    "a missing recipe": (["train", "nowhere.yaml"], "recipe nowhere.yaml can't be read: No such file"),
    "a missing checkpoint": (["info", "nowhere"], "no such checkpoint: nowhere"),
    "a folder without a model": (["info", "EMPTY"], "holds no model"),
    "weights cut short": (["info", "CUT"], "missing or damaged"),
    "weights missing": (["info", "BARE"], "missing or damaged"),
    "a config that is no JSON": (["info", "GARBLED"], "missing or damaged"),
    "an impossible config": (["info", "IMPOSSIBLE"], "hidden_size=30"),
    "weights of another shape": (["info", "MISFIT"], "don't fit"),
    "no tokenizer": (["generate", "MUTE", "hello"], "no tokenizer"),
    "a split that isn't there": (["evaluate", "RUN", "--split", "dev"], "--split dev"),
    "text that isn't there": (["evaluate", "RUN", "--data", "./nowhere"], "nowhere"),
    "no text named": (["evaluate", "LONE"], "--data"),
    "a block longer than the model": (["evaluate", "RUN", "--length", "65"], "max_position_embeddings=64"),
    "a stride longer than the block": (["evaluate", "RUN", "--stride", "33"], "stride is 33"),
    "a device that is none": (["evaluate", "RUN", "--device", "tpu"], "--device tpu: choose cpu or cuda"),
    "a section that is none": (["train", "GOOD", "model=small"], "model='small': give fields, as in model: {"),
    "a section with nothing in it": (["train", "GOOD", "data=null"], "data=None: give fields, as in data: {"),
    "a run of another trainer": (["gates", "FOREIGN"], "metrics.jsonl is not the record of a training run: line 1"),
    "another's recipe beside a model": (["info", "STRANGE"], "recipe.yaml: "),
    "an impossible share": (
        ["evaluate", "RUN", "--share", "1.5"],
        "(see chiaroscuro evaluate --help)",
    ),
    "a share to keep where nobody decides it": (
        ["evaluate", "RUN", "--kv-share", "0.5"],
        "no layer decides who is kept",
    ),
    "an impossible share to keep": (["generate", "RUN", "a", "--kv-share", "-1"], "Invalid value for '--kv-share'"),
    "an empty prompt": (["generate", "RUN", ""], "the prompt is empty"),
    "a seed below none": (["generate", "RUN", "light", "--seed", "-1"], "Invalid value for '--seed'"),
    "a seed too large": (["generate", "RUN", "light", "--seed", str(2**32)], "Invalid value for '--seed'"),
    "a recipe's seed too large": (["train", "GOOD", "trainer.seed=99999999999999"], "trainer.seed=99999999999999: "),
    "a prompt too long": (["generate", "RUN", "light " * 200], "the model reads at most 64"),
    "an empty text": (["route", "RUN", ""], "the text is empty"),
    "a text too long": (["route", "RUN", "light " * 200], "max_position_embeddings"),
    "a page where no folder is": (["route", "RUN", "light", "--html", "nowhere/page.html"], "nowhere"),
    "a page and a picture where no folder is": (
        ["route", "RUN", "light", "--html", "page.html", "--png", "bad/x.png"],
        "the folder bad does not exist",
    ),
    "a picture that is none": (["route", "RUN", "light", "--png", "x.jpg"], "--png x.jpg: the figure is a PNG file"),
    "a collapse's picture that is none": (["collapse", "EMPTY", "--png", "x"], "--png x: the figure is a PNG file"),
    "an unknown calibration": (["calibrate", "RUN", "--method", "magic"], "choose data or paper"),
    "calibration without a place": (["calibrate", "RUN"], "--output is missing"),
    "calibration where nothing can be": (
        ["calibrate", "RUN", "--output", f"{__file__}/cal"],
        "is a file; name a folder",
    ),
    "no name of a checkpoint": (["evaluate", ""], "the name is empty"),
    "no name of a recipe": (["train", ""], "the name is empty"),
    "no name of a preset": (["flops", ""], "the name is empty"),
    "a run in a file": (["train", "GOOD", f"trainer.output_dir={__file__}/run"], "is a file; name a folder"),
    "a benchmark in a file": (["benchmark", "--output", "GOOD"], "is a file; name a folder"),
    "quickstart in a file": (["quickstart", "--output", "GOOD"], "is a file; name a folder"),
    **{
        f"published calibration with {option}": (
            ["calibrate", "RUN", "--method", "paper", option, value],
            f"{option} {value} goes with --method data",
        )
        for option, value in {
            "--share": "0.0",
            "--kv-share": "0.5",
            "--tokens": "65536",
            "--split": "train",
            "--output": "x",
        }.items()
    },
    "calibration over a model": (["calibrate", "RUN", "--output", "EMPTY"], "exists already"),
    "an override without a value": (["train", "GOOD", "model.preset"], "section.field=value"),
    "an unknown field": (["train", "GOOD", "trainer.stepz=3"], "did you mean 'steps'"),
    "an unknown field of the model": (["train", "GOOD", "model.atention_share=0.1"], "attention_share"),
    "an unknown preset": (["train", "GOOD", "model.preset=smal"], "did you mean 'small'"),
    "a width the heads don't divide": (["train", "GOOD", "model.hidden_size=130"], "num_attention_heads=4"),
    "a sequence too long": (["train", "GOOD", "data.sequence_length=5000"], "max_position_embeddings=1024"),
    "a plan with an impossible tokenizer": (["plan", "GOOD", "tokenizer=bpe:8k"], "258 to 1,048,576 after 'bpe:'"),
    "an unknown tokenizer": (["train", "GOOD", "tokenizer=bpe:12"], "bpe:12"),
    "a tokenizer too large": (["train", "GOOD", "tokenizer=bpe:1000000000000"], "258 to 1,048,576 after 'bpe:'"),
    "nothing to resume": (["train", "GOOD", "--resume"], "holds no run to resume"),
    "neither preset nor checkpoint": (["flops", "smal"], "is not a preset"),
    "a length of nothing": (["flops", "small", "--length", "0"], "--length"),
    "a share above one": (
        ["flops", "small", "--share", "2"],
        "(see chiaroscuro flops --help)",
    ),
    "an unknown context": (["flops", "small", "--context", "some"], "choose all, routed or kept"),
    "a share where nothing is routed": (["flops", "small-baseline", "--share", "0.1"], "has a choice; drop it"),
    "a kept share where nobody is kept": (["flops", "small", "--kv-share", "0.5"], "give --context kept too"),
    "a kept share above one": (["flops", "small", "--context", "kept", "--kv-share", "2"], "--kv-share 2.0: must be"),
    "a config that can't be counted": (["flops", "GARBLED"], "config.json can't be read"),
    "an unknown task": (["benchmark", "--task", "sleep"], "--task sleep: choose among"),
    "a width the heads of a benchmark don't divide": (["benchmark", "--heads", "3"], "num_attention_heads=3"),
    "a missing sweep": (["sweep", "nowhere.yaml"], "sweep nowhere.yaml can't be read: No such file"),
    "a recipe in a sweep's place": (["sweep", "GOOD"], "recipe is missing from the sweep"),
    "no run at a time": (["sweep", "GOOD", "--jobs", "0"], "--jobs"),
    "a collapse of no run": (["collapse", "EMPTY"], "not the folder of a run"),
    "a floor above one": (["collapse", "EMPTY", "--floor", "2"], "--floor"),
    "quickstart elsewhere": (["quickstart"], "top of a clone"),
}


@pytest.mark.parametrize("command", ["generate", "route"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # which of them Python takes hangs on the locale
def test_standard_input_that_is_no_text(
    command: str, errors: str, run: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"light \xff"), "utf-8", errors))
    code, out, err = run(command, run_folder, "-")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and err.endswith(" 6; give it as UTF-8\n")


@pytest.fixture(scope="module")
def places(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with one thing wrong each."""
    folder = tmp_path_factory.mktemp("wrong")
    made = {"RUN": run_folder, "EMPTY": folder / "empty", "GOOD": folder / "good.yaml"}
    made["EMPTY"].mkdir()
    made["FOREIGN"] = folder / "foreign"
    made["FOREIGN"].mkdir()
    (made["FOREIGN"] / "metrics.jsonl").write_text('{"loss": 2.3, "step": 10, "epoch": 0.1}\n')
    made["STRANGE"] = folder / "strange"
    shutil.copytree(run_folder / "model", made["STRANGE"])
    (made["STRANGE"] / "recipe.yaml").write_text("name: something else\n")
    made["GOOD"].write_text(RECIPE.format(""))
    for name in ("CUT", "BARE", "GARBLED", "IMPOSSIBLE", "MISFIT", "MUTE", "LONE"):
        made[name] = folder / name.lower()
        shutil.copytree(run_folder / "model", made[name])
    weights = made["CUT"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (made["BARE"] / "model.safetensors").unlink()
    (made["GARBLED"] / "config.json").write_text('{"model_type": "chiar",')
    for name, width in (("IMPOSSIBLE", 30), ("MISFIT", 64)):
        config = json.loads((made[name] / "config.json").read_text())
        (made[name] / "config.json").write_text(json.dumps(config | {"hidden_size": width}))
    for file in made["MUTE"].glob("tokenizer*"):
        file.unlink()
    return made


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: str, run: Run, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[mistake]
    code, out, err = run(*[places.get(argument, argument) for argument in arguments])
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_names_with_brackets_are_written_as_they_are(
    run: Run, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("calibrate", run_folder, "--share", 0.4, "--output", "cal[/b]")
    assert code == 0, err
    assert "saved as cal[/b]" in out
    code, out, err = run("flops", "cal[/b]", "--length", 16)
    assert code == 0, err
    assert out.startswith("cal[/b], T = 16")


def test_a_long_path_is_written_whole() -> None:
    path = "runs/" + "a-long-name-of-a-folder-" * 8
    console = Console(file=io.StringIO(), width=60)
    console.print(figures_table({"folder": path, "steps": 3}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "".join(line.strip() for line in lines[:-1]).removeprefix("folder").strip() == path
