"""Inputs that are broken at random, given to the commands: each should end in success, or in one line and exit code 2.

    python -m experiments.fuzz [--inputs 10000] [--seed 0] [--only recipes,arguments]
    python -m experiments.fuzz --again                          # the inputs of the last findings, once more

Inputs are made of valid ones: recipes and configurations of which a value or a name is another, files of which bytes
are cut, flipped, doubled or others, and command lines of which words are others. A *finding* is a traceback, a signal,
a command that takes a core for 30 seconds or a gigabyte more than it had, or a mistake that is told in more than one
line. The figures go to experiments/results/fuzz.json and docs/reliability.md.

Each input is tried in a fork of one process, which has loaded everything.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
import zstandard

from chiaroscuro.model import ChiarForCausalLM
from experiments.commands import command, in_child
from experiments.reliability import INPUTS, write_page

SECONDS, MEMORY = 30, 2**30
"""Seconds of a core, and bytes beyond what was loaded, that a command may take. On the clock it may take ten times as
long: this machine may be busy."""

ENDS = ("succeeds", "refused in one line")
"""How a command should end."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1e-9, 1e300, 2**31, 2**63, 2**70, float("nan"), float("inf")),
    *(
        "",
        "x",
        "attention",
        "local",
        "dct",
        "0.5",
        "null",
        "../x",
        "/",
        "\0",
        "é" * 9,
        "\ud800".encode("utf-8", "replace"),
    ),
    *([], [0], ["attention"], [["attention"]], [[]], [[["attention"]]], {}, {"x": 1}, {"attention": {"window": -1}}),
)
WORDS = (
    *(
        "evaluate",
        "generate",
        "route",
        "info",
        "calibrate",
        "fit",
        "flops",
        "plan",
        "presets",
        "task",
        "collapse",
        "gates",
    ),
    *("--split", "--length", "--stride", "--window", "--share", "--kv-share", "--tokens", "--batch-size", "--seed"),
    *("--json", "--help", "--context", "--data", "--device", "--vocabulary", "--gpus", "--temperature", "--top-k"),
    *("0", "1", "-1", "0.5", "1e999", "nan", "validation", "kept", "small", "v2-400m", "reach-small", "mqar", "imdb"),
    *(
        "x",
        "",
        "-",
        "--",
        "=",
        "\u202e",
        "99999999999999999999",
        "model.window=4",
        "trainer.steps=x",
        "a=b",
        "..",
        "/dev/null",
    ),
)


class Samples:
    """Valid inputs, in a folder.

    Args:
        root: the folder.

    """

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "text").mkdir()
        line = "the light falls on a wall and what is dark stays dark until the sun has gone round\n"
        for split in ("train", "validation"):
            (root / "text" / f"{split}.txt").write_text(line * 60)
        (root / "tables").mkdir()
        for split in ("train", "validation"):
            rows = datasets.Dataset.from_dict({"text": [line] * 60})
            rows.to_parquet(root / "tables" / f"{split}.parquet")
        (root / "shards").mkdir()
        lines = "".join(json.dumps({"text": line, "number": i}) + "\n" for i in range(60)).encode()
        for name, content in (("train-0.jsonl", lines), ("train-1.jsonl", lines), ("validation.jsonl", lines)):
            (root / "shards" / f"{name}.zst").write_bytes(zstandard.compress(content))
        self.recipe: dict[str, Any] = {
            "model": {
                **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "window": 8, "sinks": 1},
                **{"operators": [["local", "attention"]] * 2, "attention_share": 0.5, "attention_context": "kept"},
                **{"kv_share": 0.5, "router": "threshold", "norm": "pre", "max_position_embeddings": 64},
            },
            "data": {"source": str(root / "text"), "sequence_length": 16},
            "tokenizer": "bpe:300",
            "trainer": {
                **{"output_dir": str(root / "run"), "steps": 2, "batch_size": 2, "warmup_steps": 1, "log_every": 1},
                **{"learning_rate": 1e-3, "seed": 0, "precision": "fp32", "save_every": 2, "ema": 0.9},
            },
            "schedule": {"attention_share": {"from": 1.0, "to": 0.5, "steps": 1}},
        }
        (root / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        code, said = in_child(lambda: command("train", root / "recipe.yaml"))
        if code:
            raise SystemExit(said)
        self.config = json.loads((root / "run/model/config.json").read_text())
        vectors = Path("../shared/vectors/chiar-threshold.checkpoint.pt")
        self.reference = vectors.read_bytes() if vectors.is_file() else b""
        if not self.reference:
            torch.save({"model": ChiarForCausalLM.from_pretrained(root / "run/model").state_dict()}, root / "x.pt")
            self.reference = (root / "x.pt").read_bytes()


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested dictionaries and lists."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for name, value in inner for place in _places(value, (*path, name)))]


def changed(content: Any, draw: random.Random) -> Any:
    """Nested content of which one to three values or names are others, or gone."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        path = draw.choice([place for place in _places(content) if place] or [()])
        if not path:
            return draw.choice(VALUES)
        inner = content
        for name in path[:-1]:
            inner = inner[name]
        what = draw.random()
        if what < 0.1:
            del inner[path[-1]]
        elif what < 0.2 and isinstance(inner, dict):
            inner[draw.choice(("x", "", "hidden_size", "window", "steps", "é"))] = inner.pop(path[-1])
        else:
            inner[path[-1]] = draw.choice(VALUES)
    return content


def broken(content: bytes, draw: random.Random) -> bytes:
    """Bytes of which some are cut, flipped, doubled or others."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        where = draw.randrange(len(data) + 1)
        what = draw.randrange(5)
        if what == 0:
            del data[where:]
        elif what == 1 and where < len(data):
            data[where] ^= 1 << draw.randrange(8)
        elif what == 2:
            data[where:where] = data[where : where + draw.randrange(64)]
        elif what == 3:
            data[where:where] = draw.randbytes(draw.randrange(9))
        else:
            del data[where : where + draw.randrange(64)]
    return bytes(data)


# ---- kinds of inputs -------------------------------------------------------------------------------------------

Trial = tuple[list[object], str]
"""A command, and what is broken in it."""


def _recipes(samples: Samples, draw: random.Random, place: Path) -> Trial:
    text = yaml.safe_dump(changed(samples.recipe, draw)).encode()
    (place / "recipe.yaml").write_bytes(text if draw.random() < 0.7 else broken(text, draw))
    return ["train", place / "recipe.yaml", f"trainer.output_dir={place / 'run'}"], text.decode("utf-8", "replace")


def _plans(samples: Samples, draw: random.Random, place: Path) -> Trial:
    text = yaml.safe_dump(changed(samples.recipe, draw))
    (place / "recipe.yaml").write_text(text)
    return ["plan", place / "recipe.yaml", "--json"], text


def _copied(samples: Samples, place: Path) -> Path:
    shutil.copytree(samples.root / "run", place / "run")
    return place / "run"


def _configs(samples: Samples, draw: random.Random, place: Path) -> Trial:
    file = _copied(samples, place) / "model/config.json"
    text = json.dumps(changed(samples.config, draw), default=str)
    file.write_text(text)
    return [draw.choice(("info", "flops")), place / "run/model"], text


def _checkpoints(samples: Samples, draw: random.Random, place: Path) -> Trial:
    run = _copied(samples, place)
    file = draw.choice([path for path in sorted((run / "model").iterdir()) if path.is_file() and path.stat().st_size])
    file.write_bytes(broken(file.read_bytes(), draw))
    return draw.choice(
        (
            ["generate", run, "the light", "--max-new-tokens", 2],
            ["evaluate", run, "--length", 16],
            ["route", run, "the light falls", "--json"],
        )
    ), file.name


def _references(samples: Samples, draw: random.Random, place: Path) -> Trial:
    (place / "x.pt").write_bytes(broken(samples.reference, draw))
    return ["import-reference", place / "x.pt", place / "out", "--thresholds", 0.5, 0.9], "bytes"


def _corpora(samples: Samples, draw: random.Random, place: Path) -> Trial:
    shutil.copytree(samples.root / draw.choice(("text", "tables")), place / "text")
    file = draw.choice(sorted((place / "text").iterdir()))
    file.write_bytes(broken(file.read_bytes(), draw))
    return ["evaluate", samples.root / "run", "--data", place / "text", "--length", 16], file.name


def _streams(samples: Samples, draw: random.Random, place: Path) -> Trial:
    source = place / "text"
    shutil.copytree(samples.root / draw.choice(("text", "tables", "shards")), source)
    recipe = copy.deepcopy(samples.recipe)
    recipe["data"] |= {"source": str(source), "streaming": True, "shuffle": 4, "documents": draw.random() < 0.5}
    if draw.random() < 0.5:
        recipe["data"] = changed(recipe["data"], draw)
    if draw.random() < 0.7:
        file = draw.choice(sorted(source.iterdir()))
        file.write_bytes(broken(file.read_bytes(), draw))
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["train", place / "recipe.yaml", f"trainer.output_dir={place / 'run'}"], str(recipe["data"])


def _records(samples: Samples, draw: random.Random, place: Path) -> Trial:
    run = _copied(samples, place)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    number = draw.randrange(len(lines))
    lines[number] = json.dumps(changed(json.loads(lines[number]), draw), default=str)
    text = "\n".join(lines).encode()
    (run / "metrics.jsonl").write_bytes(text if draw.random() < 0.6 else broken(text, draw))
    return [draw.choice(("collapse", "gates", "info")), run], lines[number]


def _arguments(samples: Samples, draw: random.Random, place: Path) -> Trial:
    words: list[object] = [draw.choice(WORDS[:12])]
    if draw.random() < 0.8:
        words.append(draw.choice((samples.root / "run", samples.root / "recipe.yaml", samples.root / "text", "small")))
    words += [draw.choice(WORDS) for _ in range(draw.randrange(7))]
    return words, ""


KINDS: dict[str, Callable[[Samples, random.Random, Path], Trial]] = {
    "recipes": _recipes,
    "plans": _plans,
    "configs": _configs,
    "checkpoints": _checkpoints,
    "references": _references,
    "corpora": _corpora,
    "streams": _streams,
    "records": _records,
    "arguments": _arguments,
}


# ---- trying them -----------------------------------------------------------------------------------------------


MOST_SAID = 5_000
"""Characters of what a command said: with escapes they fit into a pipe."""


def _watched(arguments: list[object]) -> list[Any]:
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS + 5))
    os.chdir(tempfile.mkdtemp())  # what a command writes without being told where is not left in the repository
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, said = command(*arguments)
    return [code, said, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)]


def finding(arguments: list[object]) -> tuple[str, int]:
    """What is wrong with how a command ended, nothing if it is as it should be; and its exit code."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code, said, memory = _watched(arguments)
        os.write(writing, json.dumps([code, said[-MOST_SAID:], memory]).encode())
        os._exit(0)
    os.close(writing)
    end = time.monotonic() + 10 * SECONDS
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return "it waited, for nothing that was going on", -1
        time.sleep(0.002)
    status = done[1]
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    if not answer:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return f"it took more than {SECONDS} s" if number == signal.SIGXCPU else f"it was ended by signal {number}", -1
    code, said, memory = json.loads(answer)
    lines = [line for line in said.splitlines() if line.strip()]
    if "Traceback" in said:
        return lines[-1], code
    if memory > MEMORY:
        return f"it took {memory / 2**30:.1f} GiB", code
    if code not in (0, 2):
        return f"exit code {code}: {said}", code
    if code == 2 and (not lines or not lines[-1].startswith("error: ") or len(lines) > 1):
        return f"{len(lines)} lines: {' / '.join(lines)}", code
    return "", code


@contextmanager
def made_samples() -> Iterator[Samples]:
    """Valid inputs in a temporary folder, which holds all that the commands write too."""
    with tempfile.TemporaryDirectory() as root:
        os.environ["CHIAROSCURO_CACHE"], tempfile.tempdir = f"{root}/cache", root
        yield Samples(Path(root))


@contextmanager
def trial(samples: Samples, seed: int, kind: str, number: int) -> Iterator[Trial]:
    """Input `number` of a kind, whose files are there inside the block."""
    place = samples.root / "trial"
    place.mkdir()
    yield KINDS[kind](samples, random.Random(f"{seed} {kind} {number}"), place)
    shutil.rmtree(place, ignore_errors=True)


OTHER = "the generators have changed, and draw another input under this number"


def _shown(arguments: list[object], root: str) -> str:
    """A command, without the place of its files."""
    return " ".join(map(str, arguments)).replace(root, "")


def again() -> int:
    """Try the inputs of the findings that are noted once more, and note how they end now."""
    results = json.loads(INPUTS.read_text())
    with made_samples() as samples:
        root = str(samples.root)
        for one in results["findings"]:
            with trial(samples, results["seed"], one["kind"], one["number"]) as (arguments, what):
                same = _shown(arguments, root) == one["command"] and what.replace(root, "")[:2000] == one["input"]
                wrong, code = finding(arguments) if same else (OTHER, -1)
            one["now"] = wrong or ENDS[bool(code)]
            print(f"{one['kind']} {one['number']}: {one['finding']}; now: {one['now']}")
    INPUTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page()
    return int(any(one["now"] not in ENDS for one in results["findings"]))


def main() -> int:
    """Try the inputs, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--again", action="store_true", help="try the inputs of the findings that are noted")
    given = parser.parse_args()
    if given.again:
        return again()
    only = given.only.split(",")
    if given.inputs < 1 or not set(only) <= KINDS.keys():
        print(f"error: --inputs {given.inputs} --only {given.only}: one or more of {', '.join(KINDS)}", file=sys.stderr)
        return 2
    counts: dict[str, dict[str, int]] = {kind: {"succeeded": 0, "refused": 0, "findings": 0} for kind in only}
    found = []
    with made_samples() as samples:
        root = str(samples.root)
        for number in range(given.inputs):
            kind = only[number % len(only)]
            with trial(samples, given.seed, kind, number) as (arguments, what):
                wrong, code = finding(arguments)
            counts[kind]["findings" if wrong else "refused" if code else "succeeded"] += 1
            if wrong:
                words = _shown(arguments, root)
                found.append(
                    {
                        "kind": kind,
                        "number": number,
                        "command": words,
                        "input": what.replace(root, "")[:2000],
                        "finding": wrong[:600],
                    }
                )
                print(f"\r{kind} {number}: {words[:90]}: {wrong[:200]}")
            print(f"\r{number + 1} inputs, {len(found)} findings", end="", flush=True)
            if (number + 1) % 100 == 0 or number + 1 == given.inputs:  # an interruption loses a minute
                results = {"seed": given.seed, "inputs": counts, "findings": found}
                INPUTS.write_text(json.dumps(results, indent=1) + "\n")
    print()
    write_page()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
