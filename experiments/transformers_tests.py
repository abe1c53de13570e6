"""transformers' own common tests, run on our models: all pass but those that are listed here with a reason.

    python -m experiments.transformers_tests [--sources FILE.tar.gz] [--only Reach]

The source distribution of the installed version brings most of them. It is downloaded by pip, unless `--sources` names
the file, and unpacked into a temporary folder; nothing of it is kept. What it lacks is put there: the mixins of
generation and of export, which are left empty, and the start of processes for FSDP2, which runs on two of gloo here.
A Llama is the control. The figures go to experiments/results/transformers-tests.json, and docs/compatibility.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS, PAGE = Path("experiments/results/transformers-tests.json"), Path("docs/compatibility.md")
JUDGED = Path(__file__).parent / "judged"
CONTROL = "LlamaTest"

FINISHED = (0, 1)
"""pytest's exit codes where it ran to the end; with all others, such as a failed import, nothing is known."""

MISSING = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "exporters/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "distributed_testing_utils.py": """
import torch
from torch.multiprocessing import start_processes


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    pass


def _start_rank_processes(function, args, nprocs):
    start_processes(function, args=args, nprocs=nprocs, start_method="spawn")


def run_distributed(*args, **kwargs):
    raise NotImplementedError
""",
}

NOT_IN_THE_SOURCES = {"test_generation_tester_mixin_inheritance": "the mixin that it looks for is not in the sources"}
SCALED = "it reads a sequence beyond max_position_embeddings, which our own models refuse"
OURS = {
    "test_model_rope_scaling_from_config_0_linear": SCALED,
    "test_model_rope_scaling_from_config_1_dynamic": SCALED,
    "test_model_rope_scaling_from_config_2_yarn": SCALED,
    "test_model_rope_with_partial_rotation": "our own models turn all of a head",
}
KNOWN = {
    "PublishedTest": OURS
    | {
        "test_fsdp2_plan_vs_ddp_0_untied": "in float32 a token lies so near a threshold that the last bit of a sum "
        "sends it elsewhere; in float64 it passes",
    },
    "ReachTest": OURS,
    "FittedTest": OURS,
    "RetrofittedTest": {
        "test_capture_outputs_decorator": "output_attentions is refused: no matrix of weights is ever computed",
    },
}
"""Tests that fail, and why, by model."""


def unpack(sources: Path, folder: Path) -> None:
    """Put transformers' `tests` into a folder, and beside them what they lack and our models."""
    with tarfile.open(sources) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if parts[1:2] == ("tests",):
                archive.extract(member, folder / "unpacked", filter="data")
    (tests,) = (folder / "unpacked").glob("*/tests")
    shutil.move(tests, folder / "tests")
    for name, text in MISSING.items():
        place = folder / "tests" / name
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            place.write_text(text)
    shutil.copy(JUDGED / "models.py", folder / "tests" / "test_chiaroscuro.py")


def download(folder: Path) -> Path:
    """The source distribution of the installed transformers."""
    wanted = f"transformers=={version('transformers')}"
    command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", wanted]
    subprocess.run([sys.executable, "-m", "pip", *command, "--dest", str(folder)], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def known(model: str) -> dict[str, str]:
    """The tests of a model that fail for a reason."""
    return NOT_IN_THE_SOURCES | KNOWN.get(model, {})


def main() -> int:
    """Run them, print a line for each model, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, help="the source distribution, where it lies already")
    parser.add_argument("--only", default="", help="tests whose names match, as pytest's -k")
    given = parser.parse_args()
    if given.sources is not None and not given.sources.is_file():
        print(f"error: --sources {given.sources}: no such file", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(given.sources or download(folder), folder)
        here = os.environ | {"JUDGED": str(folder / "outcomes.json"), "PYTHONPATH": str(Path.cwd())}
        arguments = ["tests/test_chiaroscuro.py", "-q", "-p", "experiments.judged.record", "-p", "no:cacheprovider"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            *arguments,
            "--no-header",
            "--tb=no",
            "--disable-warnings",
            "-k",
            given.only,
        ]
        with (folder / "log").open("w") as log:
            ended = subprocess.run(command, cwd=folder, env=here, stdout=log, stderr=subprocess.STDOUT, check=False)
        noted = folder / "outcomes.json"
        outcomes = json.loads(noted.read_text()) if noted.exists() else {}
        if ended.returncode not in FINISHED or not outcomes:
            print((folder / "log").read_text()[-3000:])
            print(
                f"error: pytest ended with code {ended.returncode}, and {len(outcomes)} tests have an outcome",
                file=sys.stderr,
            )
            return 1
    by_model: dict[str, dict[str, tuple[str, str]]] = {}
    for test, (outcome, why) in outcomes.items():
        _, model, function = test.split("::")
        by_model.setdefault(model, {})[function] = (outcome, why)
    return report(by_model, whole=not given.only)


def report(by_model: dict[str, dict[str, tuple[str, str]]], whole: bool) -> int:
    """A line for each model, the tests that ended otherwise than was said, and the file."""
    control = by_model.get(CONTROL, {})
    table: dict[str, Any] = {}
    wrong: list[str] = []
    for model in WHAT if whole else ():
        if model not in by_model:
            wrong.append(f"{model}: none of its tests ran")
    for model, tests in by_model.items():
        expected = known(model)
        failed = {name: why for name, (outcome, why) in tests.items() if outcome == "failed"}
        passed_by_control = [
            f"{name}: {why}"
            for name, (outcome, why) in tests.items()
            if outcome == "skipped" and control.get(name, ("", ""))[0] == "passed"
        ]
        counts = Counter(outcome for outcome, _ in tests.values())
        table[model] = {
            "passed": counts["passed"],
            "failed, listed": {name: expected[name] for name in failed if name in expected},
            "skipped": counts["skipped"],
            "skipped, passed by the control": passed_by_control,
        }
        wrong += [f"{model}::{name} fails: {why}" for name, why in failed.items() if name not in expected]
        wrong += [
            f"{model}::{name} is listed, and ends {tests[name][0]}"
            for name in expected
            if name in tests and tests[name][0] != "failed"
        ]
        if whole:
            wrong += [f"{model}::{name} is listed, and there is no such test" for name in expected if name not in tests]
        print(
            f"{model:<16} {counts['passed']:>3} pass, {counts['failed']} fail ({len(table[model]['failed, listed'])} "
            f"listed), {counts['skipped']} don't apply ({len(passed_by_control)} of them to the control)"
        )
    print(*wrong, sep="\n")
    if whole:
        figures = {"transformers": version("transformers"), "models": table, "not as listed": wrong}
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
        PAGE.write_text(render(figures))
    return 1 if wrong else 0


WHAT = {
    "PublishedTest": "the paper's model, routed in every layer",
    "ReachTest": "near and far, by the norm of a token's vector",
    "FittedTest": "near and far, by scores that are to be fitted",
    "RetrofittedTest": "a retrofitted Llama",
    CONTROL: "a Llama, as the control",
}


HEAD = """# Judged by others

Written by `python -m experiments.transformers_tests` from `experiments/results/transformers-tests.json`; do not edit.

The source distribution of transformers {version} brings the tests that its own models have to pass. The command unpacks
it, and runs those of models, of training and of FSDP2 on our classes. Those of generation are not in it.
"""


def render(figures: dict[str, Any]) -> str:
    """The page of these figures."""
    models = figures["models"]
    lines = [
        HEAD.format(version=figures["transformers"]),
        "| model | pass | fail, with a reason | don't apply | of them, apply to the Llama |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {WHAT[name]} | {one['passed']} | {len(one['failed, listed'])} | {one['skipped']} | "
            f"{len(one['skipped, passed by the control'])} |"
            for name, one in models.items()
        ),
        "",
        f"Tests that fail without a reason in the list: {len(figures['not as listed'])}.",
        "",
        "## What fails, and why",
        "",
    ]
    failing = {name: why for one in models.values() for name, why in one["failed, listed"].items()}
    lines += [f"- `{name}`: {why}." for name, why in sorted(failing.items())]
    lines += ["", "## Tests that the Llama passes and that do not apply to ours, with their number", ""]
    skipped = [[each.partition(": ")[2] for each in one["skipped, passed by the control"]] for one in models.values()]
    most = {why: max(reasons.count(why) for reasons in skipped) for reasons in skipped for why in reasons}
    lines += [f"- {why.rstrip('.')}: {most[why]}." for why in sorted(most, key=lambda why: (-most[why], why))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
