"""The benchmark as a whole, at a size of nothing: what it writes, that it goes on, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from chiaroscuro import UserError
from chiaroscuro.analysis.flops import count_flops
from chiaroscuro.analysis.speed import code_version
from chiaroscuro.studies import benchmark
from chiaroscuro.studies.benchmark import Candidate, Plan, run_benchmark

PLAN = Plan(3, 16, 2, 60, lengths=(16, 40), shares=(0.25, 0.5), tokens=64, seconds=0, tasks=("train", "decode"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("benchmark")
    return run_benchmark(PLAN, folder / "new" / "speed.json", folder / "page.md", Console(quiet=True)), folder


def test_every_candidate_is_measured_at_every_length(measured: tuple[dict[str, Any], Path]) -> None:
    found, folder = measured
    cells = found["cells"]
    assert found == json.loads((folder / "new" / "speed.json").read_text())
    names = ["full attention", "Hugging Face Llama", "dense execution"]
    names += ["routed, ρ = 0.25", "routed, ρ = 0.5", "all, ρ = 0.25", "all, ρ = 0.5"]
    wanted = [(task, length, name) for length in PLAN.lengths for task in PLAN.tasks for name in names]
    assert [(c["task"], c["length"], c["candidate"]) for c in cells] == wanted
    for cell in cells:
        base = next(c for c in cells if c["kind"] == "baseline" and all(c[k] == cell[k] for k in ("task", "length")))
        assert cell["ratio"] == base["median"] / cell["median"]
        assert cell["predicted"] == base["flops_a_token"] / cell["flops_a_token"]
        assert cell["batch"] == {16: 4, 40: 1}[cell["length"]]


def test_the_prediction_is_the_count_of_operations(measured: tuple[dict[str, Any], Path]) -> None:
    cell = next(c for c in measured[0]["cells"] if (c["task"], c["length"], c["kind"]) == ("train", 40, "sparse"))
    config = PLAN.config(Candidate("sparse", 0.25, "routed"))
    assert cell["flops_a_token"] * 40 == pytest.approx(count_flops(config, 40, share=0.25, training=True).total)


def test_the_cache_is_a_part_of_the_baseline_s(measured: tuple[dict[str, Any], Path]) -> None:
    ratios = {
        c["candidate"]: c["cache_ratio"]
        for c in measured[0]["cells"]
        if c["task"] == "decode" and c["length"] == 40 and "cache_ratio" in c
    }
    assert ratios["full attention"] == 1
    # Of three layers the first keeps nothing, the last all, the middle one all or a quarter.
    assert ratios["all, ρ = 0.25"] == pytest.approx(2 / 3)
    assert ratios["routed, ρ = 0.25"] == pytest.approx(1.25 / 3, abs=0.02)


def test_the_page_shows_every_cell_and_the_plot(measured: tuple[dict[str, Any], Path]) -> None:
    found, folder = measured
    page = (folder / "page.md").read_text(encoding="utf-8")
    assert "## Training step" in page and "## Decoding" in page and "## Prefill" not in page
    for cell in found["cells"]:
        assert f"**{cell['ratio']:.2f}×** [{cell['predicted']:.2f}]" in page
    assert "![" in page and "(page.png)" in page
    assert f"with version {code_version()}." in page
    assert (folder / "page.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_not_measured_again(
    measured: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = measured
    results = folder / "again.json"
    half = [c for c in found["cells"] if c["task"] == "train"]
    results.write_text(json.dumps(found | {"cells": half}))
    asked = []

    def note(plan: Plan, task: str, length: int) -> list[dict[str, Any]]:
        asked.append((task, length))
        return [c for c in found["cells"] if (c["task"], c["length"]) == (task, length)]

    monkeypatch.setattr(benchmark, "_measure", note)
    again = run_benchmark(PLAN, results, folder / "again.md", Console(quiet=True))
    assert asked == [("decode", 16), ("decode", 40)]
    assert sorted(map(str, again["cells"])) == sorted(map(str, found["cells"]))


def closing(found: dict[str, Any]) -> str:
    return f"\nOf {len(found['cells'])} cells.\n"


def test_an_interruption_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = benchmark._measure

    def stop(plan: Plan, task: str, length: int) -> list[dict[str, Any]]:
        if length == 40:
            raise KeyboardInterrupt
        return real(plan, task, length)

    monkeypatch.setattr(benchmark, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(PLAN, tmp_path / "speed.json", tmp_path / "page.md", Console(quiet=True), closing)
    cells = json.loads((tmp_path / "speed.json").read_text())["cells"]
    assert {c["length"] for c in cells} == {16}
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert all(f"**{c['ratio']:.2f}×** [{c['predicted']:.2f}]" in page for c in cells)
    assert page.endswith(f"\nOf {len(cells)} cells.\n")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_an_interruption_before_anything_was_measured_leaves_an_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text("old")

    def stop(plan: Plan, task: str, length: int) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(PLAN, tmp_path / "speed.json", tmp_path / "page.md", Console(quiet=True))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.md", "old")]


def test_results_of_another_plan_are_neither_mixed_in_nor_lost(measured: tuple[dict[str, Any], Path]) -> None:
    results = measured[1] / "new" / "speed.json"
    before = results.read_bytes()
    with pytest.raises(UserError, match="of another plan or machine"):
        run_benchmark(replace(PLAN, width=32), results, measured[1] / "other.md", Console(quiet=True))
    assert results.read_bytes() == before
    broken = measured[1] / "broken.json"
    broken.write_text('{"plan": ')
    with pytest.raises(UserError, match="not a results file"):
        run_benchmark(PLAN, broken, measured[1] / "other.md", Console(quiet=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tasks": ("sleep",)}, "--task sleep: choose among router"),
        ({"contexts": ("some",)}, "--context some"),
        ({"lengths": (256, 1)}, "--length 1: need 2"),
        ({"shares": (1.5,)}, "--share 1.5"),
        ({"layers": 2}, "--layers 2"),
        ({"device": "tpu"}, "--device tpu"),
        ({"dtype": "int8"}, "--dtype int8|dtype int8"),
        ({"heads": 3}, "3"),
    ],
)
def test_a_plan_that_can_t_be_measured_is_refused_before_anything_is(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        run_benchmark(replace(PLAN, **change), tmp_path / "speed.json", tmp_path / "page.md", Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_no_quiet_cpu() -> None:
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        replace(PLAN, device="cuda").check()


def test_the_models_are_of_one_size() -> None:
    plan = Plan(layers=3, lengths=(64,), shares=(0.25,), contexts=("routed",), tokens=64)
    ids, sizes = plan.ids(64), {}
    for candidate in plan.candidates():
        sizes[candidate.kind] = plan.build(candidate, ids).num_parameters()
    assert sizes["dense"] == sizes["sparse"] < sizes["baseline"]
    assert sizes["llama"] == pytest.approx(sizes["baseline"], rel=0.01)


@pytest.mark.parametrize(("shares", "one"), [((0.5, 0.25), 0.25), ((0.5, 0.1), 0.5)])
def test_what_takes_long_is_measured_at_one_share(shares: tuple[float, ...], one: float) -> None:
    found = replace(PLAN, shares=shares).candidates_at_one_share()
    assert [(c.kind, c.context) for c in found] == [
        ("baseline", None),
        ("llama", None),
        ("dense", "all"),
        ("sparse", "routed"),
        ("sparse", "all"),
    ]
    assert {c.share for c in found if c.kind == "sparse"} == {one}


@pytest.mark.slow
def test_memory_and_router_in_processes_and_tables(tmp_path: Path) -> None:
    plan = replace(PLAN, lengths=(32,), tasks=("memory", "router", "profile"), contexts=("routed",))
    cells = run_benchmark(plan, tmp_path / "speed.json", tmp_path / "page.md", Console(quiet=True))["cells"]
    memory = [c for c in cells if c["task"] == "memory"]
    assert [c["candidate"] for c in memory] == [
        "full attention",
        "Hugging Face Llama",
        "dense execution",
        "routed, ρ = 0.25",
    ]
    assert all(c["bytes"] > 0 and c["ratio"] == c["bytes"] / memory[0]["bytes"] for c in memory)
    routers = [c for c in cells if c["task"] == "router"]
    # Where a layer runs forward alone, what the router takes is told in its three parts.
    assert [len(c["parts"]) for c in routers] == [0 if c["training"] else 3 for c in routers]
    shares = [c["share_of_layer"] for c in routers]
    assert len(shares) == 4 and all(share > 0 for share in shares)
    profiles = [c for c in cells if c["task"] == "profile"]
    assert [(c["step"], c["candidate"]) for c in profiles] == [
        (step, name)
        for name in ("full attention", "Hugging Face Llama", "routed, ρ = 0.25")
        for step in ("train", "forward")
    ]
    assert all(c["seconds"]["matrix products"] > 0 for c in profiles)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert all(f"## {title}" in page for title in ("Peak memory", "Router and transform", "Where the time goes"))
