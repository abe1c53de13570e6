"""The page of claims: made from results that are made up here, so that each verdict is seen to come out either way."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from chiaroscuro.report.sweep_table import write_results
from chiaroscuro.studies import reproduction
from chiaroscuro.studies.sweep import Sweep
from chiaroscuro.studies.sweep_results import describe_sweep
from chiaroscuro.training import Recipe

SWEEPS = ("wikitext2", "rbf", "imdb", "listops-flat", "listops-nested", "mixed")
NULL = [0.823, 0.852, 0.876]


def made_up(name: str, worse: float, rbf: float, median: float, gate: float) -> dict[str, Any]:
    """Results of a sweep in which whatever routes is worse by a factor than the variants that don't."""
    sweep, draw, figures = Sweep.load(f"recipes/sweeps/{name}.yaml"), Random(0), {}
    metric = "perplexity" if name in ("wikitext2", "rbf", "mixed") else "accuracy"
    for run in sweep.runs:
        thresholds = (0.0, 1.0) if run.recipe.uses_baseline else None
        menus = run.recipe.build_config(4096, thresholds).menus
        routes = any(len(menu) > 1 for menu in menus)
        layers = []
        for number, menu in enumerate(menus, start=1):
            share = [1 / len(menu)] * len(menu)
            if len(menu) == 3:
                share = [0.7 - rbf, rbf, 0.3]
            layers.append({"layer": number, "operators": menu, "share": share, "entropy": [0.8, median, 0.9]})
        value = {"perplexity": 60.0, "accuracy": 0.6}[metric] * (worse if routes or "no mask" in run.variant else 1.0)
        figures[run] = {
            metric: value * (1 + 1e-3 * draw.random()),
            "seconds": 1.0,
            "steps": 10,
            "share": 0.25 if routes else None,
            "parameters": 1,
            "flops_per_token": None,
            "curve": [],
            "layers": layers,
            "null_entropy": NULL,
        }
        if name == "mixed":
            own = gate + 1e-3 * draw.random()
            figures[run] |= {"gate": own, "tasks": {"imdb": {"gate": own}, "listops": {"gate": own - 0.1}}}
    return describe_sweep(sweep, figures, {})


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, str]]:
    """Makes the page; gives the verdict of every claim by its number."""

    def make(worse: float = 1.1, rbf: float = 0.0, median: float = 0.852, gate: float = 0.22) -> dict[int, str]:
        monkeypatch.setattr(reproduction, "RESULTS", tmp_path)
        for name in SWEEPS:
            (tmp_path / name).mkdir(exist_ok=True)
            write_results(made_up(name, worse, rbf, median, gate), tmp_path / name)
        rows = [line for line in reproduction.page().splitlines() if re.match(r"\| \d+ \|", line)]
        return {int(cells[0]): cells[-1] for row in rows if (cells := [c.strip() for c in row.strip("|").split("|")])}

    return make


def test_verdicts_come_out_one_way(page: Callable[..., dict[int, str]]) -> None:
    found = page(worse=1.1, rbf=0.0, median=NULL[1], gate=0.2195)
    assert set(found) == set(range(1, 17))
    assert [found[n] for n in (1, 2, 3, 16)] == [reproduction.FAILS] * 4
    assert [found[n] for n in (4, 5, 12, 13, 14)] == [reproduction.HOLDS] * 5
    assert found[9] == reproduction.FAILS  # white noise
    assert found[6] == reproduction.FAILS  # six points better than full attention is not within 1.2
    assert found[7] == reproduction.FAILS  # full attention is not better
    assert all(found[n] == reproduction.OPEN for n in (10, 11))  # all scores alike


def test_and_the_other(page: Callable[..., dict[int, str]]) -> None:
    found = page(worse=0.9, rbf=0.2, median=0.80, gate=0.6)
    assert [found[n] for n in (1, 2, 3, 16)] == [reproduction.HOLDS] * 4
    assert [found[n] for n in (4, 5, 12)] == [reproduction.FAILS] * 3
    assert [found[n] for n in (7, 8, 9)] == [reproduction.HOLDS] * 3
    assert found[6] == reproduction.FAILS
    assert page(worse=1.0)[6] == reproduction.HOLDS


def test_what_was_not_run_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "RESULTS", tmp_path)
    text = reproduction.page()
    assert text.count(reproduction.MISSING) > 20 and "nan" not in text


def test_every_command_on_the_page_is_one() -> None:
    commands = re.findall(r"`(chiaroscuro [^`]*)`", reproduction.page())
    assert len(commands) > 20
    for command in (part.strip() for line in commands for part in line.split("&&")):
        program, verb, *arguments = shlex.split(command)
        if verb == "train":
            Recipe.load(arguments[0], arguments[1:])
        elif verb == "sweep":
            Sweep.load(arguments[0])
        else:
            assert verb in ("collapse", "evaluate", "flops", "gates") or program == "python"


def test_the_committed_page_is_of_the_committed_results() -> None:
    assert reproduction.PAGE.read_text(encoding="utf-8") == reproduction.page()
