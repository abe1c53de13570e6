"""A sweep runs what is missing, once, and a mistake in its file is one line before anything runs.

Most runs here are those of a stand-in for the interpreter, a shell script that leaves what a run leaves, at once, and
does by the name of its variant what a run may do: fail, be killed, wait for a signal. One test, marked slow, trains.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from chiaroscuro.errors import UserError
from chiaroscuro.files import alone_in
from chiaroscuro.studies.run_sweep import run_sweep
from chiaroscuro.studies.sweep import Sweep, SweepFile, SweepRun, carry_out
from chiaroscuro.training import read_records
from chiaroscuro.training.recipe import Recipe

STAND_IN = """#!/bin/sh
recipe=$4
folder=$(dirname "$recipe")
echo "$5 threads $OMP_NUM_THREADS gpu $CUDA_VISIBLE_DEVICES"
echo "begin $folder" >> "$ORDER"
case "$folder" in
  */fails/*) echo "working"; echo "error: it can't be trained so" >&2; exit 2 ;;
  */dies/*) kill -KILL $$ ;;
  */forgets/*) exit 0 ;;
  */waits/*)
    trap 'mkdir -p "$folder/checkpoint-7"; exit 2' TERM
    touch "$folder/waiting"
    while :; do sleep 0.05; done ;;
esac
sleep 0.2
mkdir -p "$folder/model"
echo '{"kind": "validation", "step": 12, "perplexity": 5.0}' > "$folder/metrics.jsonl"
echo "end $folder" >> "$ORDER"
"""


class Recorder:
    def __init__(self) -> None:
        self.outcomes: dict[str, str | None] = {}
        self.at_once = self.most_at_once = 0

    def started(self, run: SweepRun) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)

    def ended(self, run: SweepRun, error: str | None) -> None:
        self.at_once -= 1
        self.outcomes[run.title] = error

    def looked(self) -> None:
        pass


@pytest.fixture
def write(content: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep with changes, and its recipe; gives the path."""

    def go(**changes: Any) -> Path:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        asked = {
            "recipe": "recipe.yaml",
            "output_dir": str(tmp_path / "sweep"),
            "seeds": [0, 1],
            "baseline": "plain",
            "variants": {"plain": {}, "other": {"trainer.learning_rate": 1e-3}},
            **changes,
        }
        path = tmp_path / "sweep.yaml"
        given = {name: value for name, value in asked.items() if value is not None}
        path.write_text(yaml.safe_dump(given, sort_keys=False))
        return path

    return go


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts the stand-in in the interpreter's place; gives what began and ended, in order."""
    script, order = tmp_path / "python", tmp_path / "order"
    script.write_text(STAND_IN)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("ORDER", str(order))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("chiaroscuro.studies.sweep._POLL", 0.02)
    return lambda: order.read_text().splitlines() if order.exists() else []


def go_through(sweep: Sweep, jobs: int = 2) -> Recorder:
    recorder = Recorder()
    with alone_in(sweep.folder) as lock:
        carry_out([run for run in sweep.runs if not run.is_done()], jobs=jobs, lock=lock, watcher=recorder)
    return recorder


def test_all_data_folders_are_looked_for_before_anything_runs(write: Callable[..., Path], tmp_path: Path) -> None:
    for field, value in (
        ("trainer.validation_texts", {"a": "./nowhere"}),
        ("trainer.training_texts", {"./nowhere": 0.5}),
        ("data.source", "./nowhere"),
    ):
        sweep = Sweep.load(write(variants={"plain": {}, "other": {field: value}}))
        with pytest.raises(UserError, match=r"variant 'other': no such folder: './nowhere'"):
            sweep.refuse_missing_sources()


# The file


AXES = st.dictionaries(
    st.sampled_from(["model.attention_share", "trainer.learning_rate", "trainer.clip", "data.sequence_length"]),
    st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True),
    min_size=1,
)


@given(AXES, st.lists(st.sampled_from("abcdef"), unique=True))
def test_the_variants_are_those_named_and_every_combination_of_the_grid(
    grid: dict[str, list[int]], named: list[str]
) -> None:
    count = 1
    for values in grid.values():
        count *= len(values)
    content = {"recipe": "r", "output_dir": "o", "seeds": [0], "grid": grid, "variants": {name: {} for name in named}}
    first = ",".join(f"{name.split('.')[1]}={values[0]}" for name, values in grid.items())
    changes = SweepFile.model_validate({**content, "baseline": first}).changes()
    assert list(changes)[: len(named)] == named
    assert len(changes) == len(named) + count
    assert len({json.dumps(change) for name, change in changes.items() if name not in named}) == count
    assert changes[first] == {name: values[0] for name, values in grid.items()}


def test_every_run_is_its_recipe_with_changes_seed_and_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    sweep = Sweep.load(write(grid={"model.attention_context": ["all", "routed"]}, seeds=[3, 5]))
    names = ["plain", "other", "attention_context=all", "attention_context=routed"]
    assert [(run.variant, run.seed) for run in sweep.runs] == [(name, seed) for seed in (3, 5) for name in names]
    last = sweep.runs[-1]
    assert last.folder == tmp_path / "sweep" / "attention_context=routed" / "seed-5"
    assert last.recipe == Recipe.load(
        tmp_path / "recipe.yaml",
        ["model.attention_context=routed", "trainer.seed=5", f"trainer.output_dir={last.folder}"],
    )
    assert Recipe.from_dict(last.content) == last.recipe
    assert sweep.runs[1].recipe.trainer.learning_rate == 1e-3  # and nothing of one variant is left in the next
    assert sweep.runs[2].recipe.trainer.learning_rate == 2e-3


def test_a_variant_goes_on_from_another_one_with_its_seed(write: Callable[..., Path]) -> None:
    sweep = Sweep.load(write(variants={"plain": {}, "on": {"trainer.init_from": "runs/plain/seed-{seed}/model"}}))
    starts = [run.recipe.trainer.init_from for run in sweep.runs]
    assert starts == [None, "runs/plain/seed-0/model", None, "runs/plain/seed-1/model"]


def test_a_run_waits_for_the_model_that_it_begins_with_and_others_go_before_it(
    write: Callable[..., Path], order: Callable[[], list[str]], tmp_path: Path
) -> None:
    variants = {
        "plain": {},
        "on": {"trainer.init_from": f"{tmp_path}/sweep/plain/seed-{{seed}}"},
        "further": {"tokenizer": f"{tmp_path}/sweep/on/seed-{{seed}}/model"},
        "other": {"trainer.learning_rate": 1e-3},
        "after a failure": {"trainer.init_from": f"{tmp_path}/sweep/fails/seed-{{seed}}"},
        "fails": {},
    }
    sweep = Sweep.load(write(variants=variants))
    recorder = go_through(sweep, jobs=4)
    happened = [line.replace(f"{tmp_path}/sweep/", "") for line in order()]
    for seed in (0, 1):
        for first, then in (("plain", "on"), ("on", "further")):
            assert happened.index(f"end {first}/seed-{seed}") < happened.index(f"begin {then}/seed-{seed}")
    # What comes later in the file is not waited for, if there is a process free, and neither is what has failed.
    assert happened.index("begin other/seed-0") < happened.index("end plain/seed-0")
    assert {title for title, error in recorder.outcomes.items() if error} == {"fails seed 0", "fails seed 1"}
    assert len(recorder.outcomes) == 12 and recorder.most_at_once <= 4


def test_fields_on_the_command_are_the_common_recipe_s(write: Callable[..., Path]) -> None:
    path = write(variants={"plain": {}, "other": {"trainer.learning_rate": 1e-3}})
    sweep = Sweep.load(path, ["trainer.learning_rate=5e-4", "data.source=python-docs"])
    assert [run.recipe.trainer.learning_rate for run in sweep.runs[:2]] == [5e-4, 1e-3]
    assert {run.recipe.data.source for run in sweep.runs} == {"python-docs"}
    with pytest.raises(UserError, match=r"trainer\.stepz=3: unknown field"):
        Sweep.load(path, ["trainer.stepz=3"])


def test_lists_and_what_no_folder_may_be_called_have_names_in_the_grid(write: Callable[..., Path]) -> None:
    menus = [[["dct"], ["attention"], ["attention"]], [["dct"], ["dct", "attention"], ["attention"]]]
    sweep = Sweep.load(
        write(
            grid={"model.operators": menus, "tokenizer": ["bpe:300", "bpe:400"]},
            variants={},
            baseline=("operators=((dct),(attention),(attention)),tokenizer=bpe-300"),
        )
    )
    assert [run.variant for run in sweep.runs][3] == "operators=((dct),(dct,attention),(attention)),tokenizer=bpe-400"
    assert sweep.runs[3].recipe.tokenizer == "bpe:400"
    assert sweep.runs[3].recipe.build_config(300).operators == menus[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": [0]}, "seedz=[0]: unknown field; did you mean 'seeds'?"),
        ({"recipe": None}, "recipe is missing from the sweep"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml can't be read: No such file"),
        ({"seeds": []}, "seeds=[]: is empty; give at least 1"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: each once"),
        ({"seeds": [0.5]}, "valid integer"),
        ({"baseline": "plane"}, "baseline='plane' is not a variant; the variants are plain, other"),
        ({"variants": {}}, "nothing to run"),
        ({"grid": {"trainer.clip": []}}, "is empty; give at least 1"),
        ({"variants": {"plain": {}, "x": {"data.source": "./nowhere"}}}, "variant 'x': no such folder: './nowhere'"),
        ({"grid": {"trainer.clip": [1, 1]}}, "'clip=1' is there twice"),
        ({"variants": {"plain": {}, "a/b": {}}}, "variant 'a/b': a name is letters"),
        ({"variants": {"plain": {}, "..": {}}}, "variant '..'"),
        ({"variants": {"plain": {"trainer.seed": 1}}}, "variant 'plain': trainer.seed is set by the sweep"),
        ({"variants": {"plain": {"trainer.stepz": 1}}}, "variant 'plain': trainer.stepz=1: unknown field"),
        ({"variants": {"plain": {}, "x": {"model.router": "magic"}}}, "variant 'x': model: unknown router 'magic'"),
        ({"variants": {"plain": {}, "x": {"tokenizer.size": 1}}}, "variant 'x': tokenizer.size=1"),
        ({"variants": {"plain": {}, "x": {"trainer.": 1}}}, "'trainer.' is not of the form section.field"),
        ({"variants": {"plain": {}, "x": {"trainer.warmup_steps": 12}}}, "variant 'x': trainer.warmup_steps=12"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_runs(
    write: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        run_sweep(write(**changes), Console(quiet=True))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("field", ["trainer.output_dir", "trainer.seed"])
def test_a_field_that_the_sweep_sets_is_not_changed_on_the_command_line(write: Callable[..., Path], field: str) -> None:
    with pytest.raises(UserError, match=f"{field}=7: {field} is set by the sweep; change seeds or output_dir in"):
        Sweep.load(write(), ["trainer.clip=1", f"{field}=7"])


def test_a_source_that_can_be_nothing_is_found_before_anything_runs(write: Callable[..., Path]) -> None:
    sweep = Sweep.load(write(variants={"plain": {}, "x": {"data.source": "nope"}}))
    with pytest.raises(UserError, match="variant 'x': no such corpus: 'nope'"):
        sweep.refuse_missing_sources()


def test_a_variant_said_twice_is_a_mistake(write: Callable[..., Path]) -> None:
    path = write()
    path.write_text(path.read_text().replace("  other:", "  plain: {}\n  other:"))
    with pytest.raises(UserError, match="'plain' is given more than once"):
        Sweep.load(path)


# Running


def test_runs_go_seed_by_seed_so_many_at_once_with_one_thread_each(
    write: Callable[..., Path], order: Callable[[], list[str]]
) -> None:
    sweep = Sweep.load(write(variants={name: {} for name in ("plain", "b", "c")}))
    one_by_one = go_through(sweep, jobs=1)
    assert one_by_one.most_at_once == 1
    assert order() == [f"{what} {run.folder}" for run in sweep.runs for what in ("begin", "end")]
    assert set(one_by_one.outcomes.values()) == {None}
    for run in sweep.runs:
        assert " threads 1 gpu \n" in (run.folder / "log.txt").read_text()
        shutil.rmtree(run.folder)
    assert go_through(sweep, jobs=2).most_at_once == 2
    assert all(run.is_done() for run in sweep.runs)


def test_a_run_that_fails_stops_no_other_and_says_why(
    write: Callable[..., Path], order: Callable[[], list[str]]
) -> None:
    sweep = Sweep.load(write(variants={name: {} for name in ("fails", "plain", "dies", "forgets")}, seeds=[0]))
    outcomes = go_through(sweep).outcomes
    assert outcomes["plain seed 0"] is None
    assert outcomes["fails seed 0"] == "it can't be trained so"
    assert outcomes["dies seed 0"] == "killed by SIGKILL"
    assert "without its last validation" in str(outcomes["forgets seed 0"])


def test_each_gpu_gets_a_run(
    write: Callable[..., Path], order: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    sweep = Sweep.load(write(seeds=[0]))
    go_through(sweep)
    assert [(run.folder / "log.txt").read_text().split("gpu ")[1] for run in sweep.runs] == ["4\n", "7\n"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_lets_the_runs_stop_and_they_are_resumed(
    write: Callable[..., Path], order: Callable[[], list[str]], number: signal.Signals
) -> None:
    sweep = Sweep.load(write(variants={"plain": {}, "waits": {}}, seeds=[0]))
    waits = sweep.runs[1].folder

    def interrupt() -> None:
        while not ((waits / "waiting").exists() and sweep.runs[0].is_done()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    usual = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        go_through(sweep)
    assert signal.getsignal(number) == usual
    assert (waits / "checkpoint-7").is_dir()
    done = (sweep.runs[0].folder / "metrics.jsonl").stat().st_mtime_ns
    script = Path(sys.executable)
    script.write_text(STAND_IN.replace("*/waits/*", "*/never/*"))
    assert go_through(sweep).outcomes == {"waits seed 0": None}
    assert "--resume threads" in (waits / "log.txt").read_text()
    assert (sweep.runs[0].folder / "metrics.jsonl").stat().st_mtime_ns == done
    assert go_through(sweep).outcomes == {}


def test_a_run_that_somebody_else_is_at_is_refused_before_anything_is_written(write: Callable[..., Path]) -> None:
    sweep = Sweep.load(write())
    folder = sweep.runs[0].folder
    folder.mkdir(parents=True)
    with alone_in(folder), pytest.raises(UserError, match="is in use: a run or a sweep is at work there"):
        sweep.refuse_other_recipes()
    assert list(folder.iterdir()) == []
    sweep.refuse_other_recipes()


def test_a_folder_with_another_run_is_refused_by_the_field_that_differs(
    write: Callable[..., Path], order: Callable[[], list[str]]
) -> None:
    sweep = Sweep.load(write())
    go_through(sweep)
    sweep.refuse_other_recipes()
    changed = write(variants={"plain": {}, "other": {"trainer.learning_rate": 5e-4}})
    with pytest.raises(UserError, match=r"other/seed-0 holds another run: trainer.learning_rate was 0.001 .* 0.0005"):
        run_sweep(changed, Console(quiet=True))
    for run in sweep.runs[1::2]:
        shutil.rmtree(run.folder / "model")  # a run that never got anywhere holds nothing to lose
    Sweep.load(changed).refuse_other_recipes()


def test_a_change_of_the_recipe_meanwhile_changes_no_run(
    write: Callable[..., Path], order: Callable[[], list[str]], tmp_path: Path
) -> None:
    sweep = Sweep.load(write(seeds=[0]))
    (tmp_path / "recipe.yaml").write_text("gone")
    go_through(sweep)
    for run in sweep.runs:
        assert Recipe.load(run.folder / "recipe.yaml") == run.recipe


def test_the_last_look_is_read_from_the_end(write: Callable[..., Path]) -> None:
    run = Sweep.load(write()).runs[0]
    assert run.last_look() == (0, 0.0)
    run.folder.mkdir(parents=True)
    lines = [
        json.dumps({"kind": "train", "step": step, "seconds": step / 2, "filler": "x" * 3000}) for step in range(99)
    ]
    metrics = run.folder / "metrics.jsonl"
    metrics.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    assert run.last_look() == (98, 49.0)


# The real thing


@pytest.mark.slow
def test_a_sweep_trains_resumes_and_marks_what_diverged(write: Callable[..., Path], tmp_path: Path) -> None:
    variants = {
        "plain": {},
        "attention": {"model.operators": [["attention"]] * 3},
        "absurd": {"trainer.learning_rate": 1e30, "trainer.clip": 1e30},
    }
    path = write(variants=variants, seeds=[0])
    found = run_sweep(path, Console(quiet=True), jobs=2)
    assert [line.split(":")[0] for line in found["failed"]] == ["absurd seed 0"]
    assert all("training diverged" in line for line in found["failed"])
    by_name = {variant["name"]: variant for variant in found["variants"]}
    assert by_name["absurd"]["seeds_done"] == [] and "training diverged" in by_name["absurd"]["failed"]["0"]
    sweep = tmp_path / "sweep"
    for name in ("plain", "attention"):
        for seed, run in enumerate(by_name[name]["runs"]):
            last = read_records(sweep / name / f"seed-{seed}" / "metrics.jsonl")[-1]
            assert (run["seed"], run["perplexity"], run["steps"]) == (seed, last["perplexity"], 12)
            assert run["curve"][-1]["perplexity"] == last["perplexity"]
    assert "effect" not in by_name["plain"] and by_name["attention"]["effect"]["count"] == 1
    assert by_name["attention"]["flops_ratio"] > 1 == by_name["plain"]["flops_ratio"]
    assert json.loads((sweep / "results.json").read_text()) == found

    times = {file: file.stat().st_mtime_ns for file in sweep.rglob("model/*")}
    shutil.rmtree(sweep / "attention")
    (sweep / "absurd").rename(tmp_path / "aside")
    both = {name: variants[name] for name in ("plain", "attention")}
    again = run_sweep(write(variants=both, seeds=[0]), Console(quiet=True))
    assert again["failed"] == []
    trained = {run["seed"]: run["perplexity"] for run in again["variants"][1]["runs"]}
    assert trained == {run["seed"]: run["perplexity"] for run in by_name["attention"]["runs"]}
    for file, written in times.items():
        if "sweep/attention" not in str(file):
            assert file.stat().st_mtime_ns == written
