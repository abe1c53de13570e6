"""What the pages promise: their Python runs, their command lines exist, their figures are drawn from the same facts."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest
import typer
from benchmarks import choices, speed
from pages import ROOT, blocks, pages

from chiaroscuro.cli import app
from chiaroscuro.ops import packed_attention
from chiaroscuro.report.performance_page import render_page
from chiaroscuro.studies import wikitext2

PAGES = pages()
WITH_PYTHON = [page for page in PAGES if blocks(page.read_text("utf-8"), "python")]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[int, str]]:
    """Every page with Python on it, run: its exit status and what it printed."""
    folder = tmp_path_factory.mktemp("pages")
    script = Path(__file__).with_name("pages.py")
    subprocess.run([sys.executable, script, folder, *WITH_PYTHON], check=True, cwd=ROOT)
    return {
        page: (int((folder / f"{n}.status").read_text()), (folder / f"{n}.log").read_text("utf-8"))
        for n, page in enumerate(WITH_PYTHON)
    }


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_the_pages_runs(page: Path, runs: dict[Path, tuple[int, str]]) -> None:
    status, printed = runs[page]
    assert status == 0, printed


# Command lines


def command_lines(text: str) -> list[str]:
    """The command lines of the shell blocks, joined over a backslash, and those in inline code without placeholders."""
    shell = [line for _, block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [code for code in re.findall(r"`([^`\n]+)`", prose) if not re.search(r"[…|]|\[[a-z-]", code)]
    lines = [part.strip() for line in shell + inline for part in line.split("&&")]
    return [line for line in lines if line.split() and line.split()[0] in ("chiaroscuro", "make", "$")]


def parse(line: str) -> None:
    """Hold a command line against the command that it names: every option known, every value of its type.

    Nothing is run.
    """
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        assert not unknown, f"make {unknown[0]}: no such target"
        return
    assert words[0] == "chiaroscuro", f"{line}: write commands without a prompt"
    group = typer.main.get_group(app)
    known = {name: parameter for parameter in group.params for name in parameter.opts}
    while words[1:2] and words[1].startswith("--"):
        assert words[1] == "--help" or words[1] in known, f"{line}: no option {words[1]} before the command"
        del words[1 : 2 if words[1] == "--help" or known[words[1]].is_flag else 3]
    if not words[1:]:
        return
    assert words[1] in group.commands, f"chiaroscuro {words[1]}: no such command"
    command = group.commands[words[1]]
    if len(words) == 2 and any(parameter.required for parameter in command.params):
        return  # the command is only named
    for parameter in command.params:
        parameter.callback = None  # those of ours look for the files that are named
    command.make_context(words[1], words[2:])


TEXTS = {name_of(page): page.read_text("utf-8") for page in PAGES}
TEXTS["docs/commands.md"] = runpy.run_path(str(ROOT / "docs/hooks.py"))["command_reference"]()
LINES = sorted({(name, line) for name, text in TEXTS.items() for line in command_lines(text)})


def test_command_lines_are_found() -> None:
    assert {"chiaroscuro", "make"} <= {line.split()[0] for _, line in LINES}
    assert len(LINES) > 30
    assert len([line for name, line in LINES if name == "docs/commands.md"]) > 10  # the examples of the commands' help


@pytest.mark.parametrize("page", sorted({page for page, _ in LINES}))
def test_every_command_line_is_one(page: str) -> None:
    for found, line in LINES:
        if found == page:
            parse(line)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("chiaroscuro paint runs/small", "no such command"),
        ("chiaroscuro route runs/small TEXT --gif page.gif", "--gif"),
        ("chiaroscuro generate runs/small TEXT --max-new-tokens many", "valid integer"),
        ("chiaroscuro info runs/small runs/other", "runs/other"),
        ("chiaroscuro calibrate --share 0.1", "(?i)missing"),
        ("make tea", "no such target"),
        ("$ chiaroscuro presets", "without a prompt"),
    ],
)
def test_a_wrong_command_line_is_caught(line: str, complaint: str) -> None:
    (found,) = command_lines(f"```sh\n{line}\n```")
    with pytest.raises(Exception, match=complaint):
        parse(found)


# Files


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    named = re.findall(r"`((?:\w+/)+[\w-]+\.(?:py|yaml|json|md))`", text)
    missing = [name for name in named if not any((base / name).is_file() for base in (ROOT, ROOT / "src/chiaroscuro"))]
    modules = set(re.findall(r"python -m ([a-z_0-9.]+[a-z0-9])", text)) - {"chiaroscuro"}
    missing += [name for name in modules if find_spec(name) is None]
    assert not missing


# Figures


def test_the_results_page_is_of_the_committed_results() -> None:
    assert (ROOT / wikitext2.PAGE).read_text("utf-8") == wikitext2.page(
        json.loads((ROOT / wikitext2.RESULTS).read_text())
    )


def test_the_committed_choices_are_those_that_the_code_makes() -> None:
    """Each against what it was chosen over, the chosen way first."""
    found = json.loads(choices.RESULTS.read_text(encoding="utf-8"))["ratio"]
    assert found.keys() == choices.CHOICES.keys()
    constants = {
        "ops/packed_attention.py, CHUNK, T = 1024": packed_attention.CHUNK,
        "ops/packed_attention.py, LONG_CHUNK, T = 8192": packed_attention.LONG_CHUNK,
        "ops/reach_attention.py, SHORT, T = 512": choices.REACH.SHORT,
        "ops/packed_attention.py, KEYS, T = 1024": packed_attention.KEYS,
        "ops/linear_cross_entropy.py, CHUNK": choices.LOSS.CHUNK,
    }
    for name, constant in constants.items():
        assert next(iter(found[name])) == f"{constant:,}"


def test_the_performance_page_is_of_the_committed_results() -> None:
    found = json.loads((ROOT / speed.RESULTS).read_text())
    page = (ROOT / speed.PAGE).read_text("utf-8")
    assert page == render_page(found, speed.PAGE.with_suffix(".png").name) + speed.closing(found)


def table_after(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a line that starts so, without its head."""
    (_, rest) = text.split(f"\n{heading}", 1)
    table = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


@pytest.mark.parametrize(
    ("task", "heading"), [("training step", "## Training step"), ("prefill", "## Prefill"), ("decoding", "## Decoding")]
)
def test_the_readme_s_speed_is_the_measured_one(task: str, heading: str) -> None:
    measured = {row[0]: row[1:] for row in table_after((ROOT / "docs/performance.md").read_text("utf-8"), heading)}
    rows = [row for row in table_after((ROOT / "README.md").read_text("utf-8"), "## What it saves") if task in row[0]]
    assert len(rows) == 2
    for name, *cells in rows:
        (context,) = re.findall(r'"(\w+)"', name)
        wanted = [re.sub(r".*\*\*(.*)×\*\*", r"\1", cell) for cell in measured[f"{context}, ρ = 0.25"]]
        assert cells == wanted, name


QUOTED = {
    "passkeys": {
        "full attention": ("README.md", "docs/proven.md"),
        "both, fitted afterwards": ("README.md", "docs/proven.md"),
        "both, random afterwards": ("README.md", "docs/proven.md"),
        "static, 1 in 3": ("docs/concepts/near-and-far.md",),
        "static, the middle layer": ("docs/concepts/near-and-far.md",),
        "kept, fitted": ("docs/concepts/near-and-far.md",),
        "both, fitted": ("docs/concepts/near-and-far.md",),
    },
    "mqar": {
        "full attention": ("README.md", "docs/proven.md"),
        "kept, fitted afterwards": ("README.md", "docs/proven.md"),
        "kept, random afterwards": ("README.md",),
        "both, fitted afterwards": ("README.md", "docs/proven.md"),
        "both, fitted": ("docs/concepts/near-and-far.md",),
        "both, one layer, fitted afterwards": ("README.md", "docs/proven.md"),
        "both, learned": ("README.md", "docs/concepts/near-and-far.md"),
        "static, the middle layer": ("docs/concepts/near-and-far.md",),
    },
}
"""Accuracies of the study, by task and variant, and the pages that quote them."""

TABLED = {
    "full attention": ["full attention"],
    "local attention alone, trained on": ["local alone"],
    **{
        f"{row}: fitted, H, chance": [f"{name}, {by} afterwards" for by in ("fitted", "H", "random")]
        for row, name in (
            ("a quarter looks", "look"),
            ("a quarter is kept", "kept"),
            ("both", "both"),
            ("both, in the middle layer alone", "both, one layer"),
        )
    },
}
"""The variants of each row of the concept page's table."""


def accuracy_of(task: str, name: str) -> float:
    found = json.loads((ROOT / f"experiments/results/near-and-far/{task}.json").read_text("utf-8"))
    return 100 * mean(seed["accuracy"] for seed in found[name].values())


def test_the_table_of_near_and_far_is_that_of_the_study() -> None:
    page = (ROOT / "docs/concepts/near-and-far.md").read_text("utf-8")
    rows = {row[0]: row[1:] for row in table_after(page, "## What is measured so far")}
    assert list(rows) == list(TABLED)
    for row, variants in TABLED.items():
        for task, cell in zip(("passkeys", "mqar"), rows[row], strict=True):
            assert cell == ", ".join(f"{accuracy_of(task, name):.1f}%" for name in variants), (row, task)


def test_the_perplexities_of_near_and_far_are_those_of_the_study() -> None:
    page = " ".join((ROOT / "docs/concepts/near-and-far.md").read_text("utf-8").split())
    study = {
        row[0].strip("*"): row[2] for row in table_after((ROOT / "docs/near-and-far.md").read_text("utf-8"), "## Text")
    }
    quoted = {
        "both, random afterwards": "costs {} in perplexity by chance {}",
        "both, fitted afterwards": "and {} by fitted scores {}",
        "conv, 1 in 6** (sc)": "on this text: {} {}",
        "conv or attention, random": "it is {} {}",
        "dct or attention, H": "by H, {} {}",
        "both, learned": "trained along cost {} {}",
    }
    for name, words in quoted.items():
        middle, interval = study[name].split(" ", 1)
        middle = middle.removeprefix("+")
        assert words.format(middle, interval).replace("-", "−") in page, name


@pytest.mark.parametrize("task", QUOTED)
def test_the_accuracies_that_pages_quote_are_those_of_the_study(task: str) -> None:
    for name, quoting in QUOTED[task].items():
        accuracy = accuracy_of(task, name)
        for page in quoting:
            text = (ROOT / page).read_text("utf-8")
            # "95.4 of 98.2%" quotes without a sign.
            assert re.search(rf"\b{accuracy:.1f}(%| of )", text), (page, name, accuracy)


def test_the_figures_of_smollm2_in_the_readme_are_those_of_the_tutorial() -> None:
    tutorial = (ROOT / "docs/retrofit.md").read_text("utf-8")
    rows = {row[0]: row[1:] for row in table_after((ROOT / "README.md").read_text("utf-8"), "SmolLM2-135M-Instruct")}
    columns = {
        "full attention": ("## Other texts", 0),
        "all look, a quarter kept, fitted": ("## Other texts", 1),
        "fitted on both sides, healed on 98,000 tokens; then all look, a quarter kept": ("## Both sides", 1),
        "a quarter looks, a quarter kept, window 256, fitted": ("### A longer window", 1),
        "the same copy, with thresholds that follow the row": ("around a needle. Thresholds that", 1),
    }
    assert list(rows) == list(columns)
    for name, (heading, column) in columns.items():
        measured = {row[0]: row[1:] for row in table_after(tutorial, heading)}
        for split, cell in zip(("validation", "test"), rows[name][:2], strict=True):
            found = measured[f"perplexity, WikiText-2 {split}"][column].strip("*").split()[0]
            assert found == cell.removesuffix(", an earlier fit"), (name, split)
        if column and heading.startswith(("###", "around")):
            assert rows[name][2] == f"{measured['needles found at 2,048'][column].strip('*')} of 20"
    assert [rows[name][2] for name in list(columns)[:3]] == ["90% of 20", "45% of 20", "100% of 50"]
    assert "finds 55 and 45%" in tutorial and "| 2,048 | 50 | 90% (20 tries) | **100%** |" in tutorial


def test_the_figures_of_the_copy_with_a_longer_window_are_the_measured_ones() -> None:
    page = (ROOT / "docs/retrofit.md").read_text("utf-8")
    found = json.loads((ROOT / "experiments/results/retrofit/smollm2-both-256.json").read_text("utf-8"))
    full = json.loads((ROOT / "experiments/results/retrofit/smollm2-texts.json").read_text("utf-8"))["texts"]
    rows = {row[0]: [cell.strip("*") for cell in row[1:]] for row in table_after(page, "### A longer window")}
    texts = {
        "WikiText-2 validation": ("wikitext-2 validation", "wikitext-2, validation"),
        "WikiText-2 test": ("wikitext-2 test", "wikitext-2, test"),
        "film reviews (IMDB, test)": ("imdb test", "imdb reviews, test"),
    }
    for name, (measured, original) in texts.items():
        before, copy = full[original]["original"]["perplexity"], found[measured]
        shares = [f"{mean(copy[side].values()):.0%}" for side in ("looked", "kept")]
        assert rows[f"perplexity, {name}"] == [f"{before:.2f}", _changed(copy["perplexity"], before), *shares], name
    single = {one["length"]: one for one in found["needles"] if one["keys"] == 1}
    calibrated = found["needles, calibrated on eight other rows with needles"]
    needles = {
        "needles found at 1,024 tokens, 20 tries": single[1024],
        "needles found at 2,048": single[2048],
        "needles found at 2,048, `--share 0.5`": found["needles, half look"][0],
        "needles found at 2,048, calibrated on rows with needles": calibrated,
    }
    for name, one in needles.items():
        shown = [f"{mean(one['by depth']):.0%}", f"{one['looked']:.0%}", f"{one['kept']:.0%}"]
        assert rows[name][1:] == shown, name
    following = found["thresholds that follow the row"]
    rows |= {
        row[0]: [cell.strip("*") for cell in row[1:]] for row in table_after(page, "around a needle. Thresholds that")
    }
    for name, (measured, original) in texts.items():
        before, copy = full[original]["original"]["perplexity"], following[measured]
        shares = [f"{mean(copy[side].values()):.0%}" for side in ("looked", "kept")]
        assert rows[f"perplexity, {name}"] == [f"{before:.2f}", _changed(copy["perplexity"], before), *shares], name
    several = {(one["length"], one["keys"]): one for one in following["needles"]}
    needles = {
        "needles found at 1,024 tokens, 20 tries": several[1024, 1],
        "needles found at 2,048": several[2048, 1],
        "one of four, 1,024": several[1024, 4],
    }
    for name, one in needles.items():
        shown = [f"{mean(one['by depth']):.0%}", f"{one['looked']:.0%}", f"{one['kept']:.0%}"]
        assert rows[name][1:] == shown, name
    before = full["wikitext-2, validation"]["original"]["perplexity"]
    words = " ".join(page.split())
    for name, one in found["all look, a quarter kept"].items():
        if isinstance(one, dict):
            after, needle = one["wikitext-2 test"], one["needles"][0]
            shown = _changed(after["perplexity"], full["wikitext-2, test"]["original"]["perplexity"])
            shown += f", with {mean(after['kept'].values()):.0%} of the tokens kept"
            assert f"{shown}, and {mean(needle['by depth']):.0%} of the needles" in words, name
    for value in found["others that look, wikitext-2 validation"].values():
        assert _changed(value, before) in words
    healed = following["healed"]
    texts_healed = [
        _changed(healed[f"wikitext-2 {split}"]["perplexity"], full[f"wikitext-2, {split}"]["original"]["perplexity"])
        for split in ("validation", "test")
    ]
    short, long = (f"{one['found']:.0%}" for one in healed["needles"])
    assert "it is at {} on the validation split and {} on the test split".format(*texts_healed) in words
    assert f"of 50 needles it finds {short} at 1,024 tokens and {long} at 2,048" in words


def test_the_figures_of_the_report_on_both_sides_are_the_measured_ones() -> None:
    page = (ROOT / "docs/retrofit.md").read_text("utf-8")
    folder = ROOT / "experiments/results/retrofit"
    found = json.loads((folder / "smollm2-both-256-report.json").read_text("utf-8"))
    costs = json.loads((folder / "smollm2-both-256-costs.json").read_text("utf-8"))
    before, kept, look = found["before"]["perplexity"], found["controls"], found["look controls"]
    names = ["received attention", "key norm", "random", "whole heads", "H", "whole layers", "window alone"]
    values = [found["after"]["perplexity"], look["random"], look["H"], *(kept[name] for name in names)]
    shown = [[cell.strip("*") for cell in row[1:]] for row in table_after(page, "### Other choices")]
    assert shown[0] == [f"{before:.2f}", "–"]
    assert shown[1:] == [[f"{value:.2f}", f"{value / before - 1:+.1%}".replace("-", "−")] for value in values]
    ratios = ("cache", "prefill", "prefill predicted", "decoding", "decoding predicted")
    assert table_after(page, "`--share 1.0` where all tokens look:") == [
        [f"{one['length']:,}", "all" if one["look"] == 1 else "a quarter", *(f"{one[name]:.2f}" for name in ratios)]
        for one in costs["costs"]
    ]
    (all_look,) = (one for one in costs["costs"] if (one["length"], one["look"]) == (8192, 1))
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"prefill is {all_look['prefill']:.2f} and decoding {all_look['decoding']:.2f} times as fast" in readme
    words = " ".join(page.split())
    default, tight = (
        costs[name]["routed"] / costs[name]["original"] for name in ("memory", "memory, freed blocks given back")
    )
    assert f"takes {default:.2f} of the original's memory, weights included, and {tight:.2f} if" in words
    assert f"the report says {found['costs'][1]['memory']:.2f}" in words
    single, several, longest, all_looking = (mean(one["by depth"]) for one in costs["needles"])
    assert f"at 4,096 tokens it finds {single:.0%} (full attention 100%), and {several:.0%} if one of four" in words
    assert (
        (longest, all_looking) == (0, 0.8)
        and "looking, it finds four of five" in words
        and "**At 8,192 tokens it finds none**" in words
    )


def _changed(after: float, before: float) -> str:
    return f"{after:.2f} ({after / before - 1:+.1%})".replace("-", "−")


def test_the_figures_of_smollm2_on_both_sides_are_the_measured_ones() -> None:
    page = (ROOT / "docs/retrofit.md").read_text("utf-8")
    found = json.loads((ROOT / "experiments/results/retrofit/smollm2-by-head.json").read_text("utf-8"))
    full = json.loads((ROOT / "experiments/results/retrofit/smollm2-texts.json").read_text("utf-8"))["texts"]
    texts = {
        "WikiText-2 validation": ("wikitext-2 validation", "wikitext-2, validation"),
        "WikiText-2 test": ("wikitext-2 test", "wikitext-2, test"),
        "film reviews (IMDB, test)": ("imdb test", "imdb reviews, test"),
    }
    tables = {"## Both sides": ["by head, healed, then all look"]}
    tables["### Fewer rows"] = [f"both sides, window 256, {name}" for name in ("fitted", "healed")]
    for heading, copies in tables.items():
        rows = {row[0]: row[1:] for row in table_after(page, heading)}
        for name, (measured, original) in texts.items():
            before = full[original]["original"]["perplexity"]
            after = [found[copy][measured]["perplexity"] for copy in copies]
            wanted = [f"{before:.2f}", *(f"{one:.2f} ({one / before - 1:+.1%})".replace("-", "−") for one in after)]
            cells = [cell.strip("*") for cell in rows[f"perplexity, {name}"]]
            assert cells[: len(wanted)] == wanted, (heading, name)
    further = json.loads((ROOT / "experiments/results/retrofit/smollm2-further.json").read_text("utf-8"))
    for name, measured in further.items():
        for split, figures in measured.items() if isinstance(measured, dict) else ():
            after, before = figures["perplexity"], full[split.replace(" ", ", ")]["original"]["perplexity"]
            assert f"{after:.2f} ({after / before - 1:+.1%})" in page, (name, split)
    needles = found["by head, healed, then all look"]
    rows_of = [*needles["needles, 10 tries a depth"], *needles["needles, 4 tries a depth"]]
    table = {row[0]: row[1:] for row in table_after(page, "| perplexity, film reviews (IMDB, test) | 42.54 | **42.44")}
    for one in rows_of:
        cells = table[f"{'one of four, ' if one['keys'] == 4 else ''}{one['length']:,}"]
        assert cells[2].strip("*") == f"{one['found']:.0%}" and cells[3] == f"{one['kept']:.0%}", one
