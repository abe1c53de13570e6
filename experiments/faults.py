"""What a run survives: kills, full and read-only disks, a clock that jumps, flipped bits, and two runs in one folder.

    python -m experiments.faults [--moments 50] [--only train,heal]

Every trial runs a command of chiaroscuro on a model of a few thousand weights, disturbs it, looks at what is left, goes
on, and compares the weights with those of a run that was left alone. Something is *lost* where a checkpoint or a model
that is there can't be read whole, where the command can't go on, or where it ends with other weights. The figures go to
experiments/results/faults.json and docs/reliability.md.

Trials are forks of one process, which has loaded everything, so that a kill falls into the work and not into imports.
It needs Linux, and for the disks the right to mount a file system (root, or user namespaces).
"""

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from chiaroscuro.training.checkpoints import checkpoints, newest_complete
from experiments.commands import command, in_child
from experiments.reliability import FAULTS, NAMES, write_page

STEPS = 12
WORDS = [
    "the",
    "light",
    "falls",
    "on",
    "a",
    "wall",
    "and",
    "what",
    "is",
    "dark",
    "stays",
    "until",
    "sun",
    "has",
    "gone",
]
SIZES = [2**12 * round(4 * 190 ** (step / 39)) for step in range(40)]
"""Bytes of the disks that run full, from one that holds nothing to one that holds nearly all, in whole pages."""

CLONE_NEWNS, CLONE_NEWUSER, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 1, 32, 16384, 1 << 18

Weights = dict[str, torch.Tensor]


# ---- running commands ------------------------------------------------------------------------------------------


def begin(*arguments: object) -> int:
    """Begin a command in a fork of this process."""
    child = os.fork()
    if child == 0:
        os._exit(command(*arguments)[0])
    return child


def killed(seconds: float, *arguments: object) -> None:
    """Begin a command, and kill it and all that it has started after so many seconds, if it is not done by then."""
    child = begin(*arguments)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.005)
    for process in [child, *descendants(child)]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os.waitpid(child, 0)


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(status.parent.name))
    return found + [deeper for each in found for deeper in descendants(each)]


def finish(*arguments: object) -> str:
    """Go on with a run to its end, or begin it where there is nothing to go on from; what went wrong."""
    code, said = command(*arguments, "--resume")
    if code == 2 and any(hint in said for hint in ("leave out --resume", "without --resume")):
        code, said = command(*arguments)
    return "" if code == 0 else said.strip().splitlines()[-1]


def weights(folder: Path) -> Weights:
    """Of a saved model."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def unlike(folder: Path, wanted: Weights) -> str:
    """How a saved model differs from the weights that it should have; nothing if it does not."""
    try:
        found = weights(folder)
    except Exception as error:
        return f"{folder.name} can't be read: {error}"
    if found.keys() != wanted.keys():
        return f"{folder.name} has other tensors"
    other = [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])]
    return f"{folder.name}: {len(other)} tensors have other values" if other else ""


def half_written(run: Path) -> str:
    """A checkpoint of a run that has its name and is not whole; nothing where there is none."""
    passed: list[str] = []
    newest_complete(run, passed.append)
    return passed[0] if passed else ""


# ---- what is run -----------------------------------------------------------------------------------------------


class Place:
    """A folder with a text, recipes, and what they end with when they are left alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        draw = random.Random(0)
        (root / "text").mkdir()
        for split, lines in (("train", 400), ("validation", 60)):
            text = "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(lines))
            (root / "text" / f"{split}.txt").write_text(text + "\n")
        self.content: dict[str, Any] = {
            "model": {
                **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "hidden_dropout": 0.1},
                **{"operators": [["local", "attention"]] * 3, "window": 8, "attention_context": "kept"},
            },
            "data": {"source": str(root / "text"), "sequence_length": 64},
            "tokenizer": "bpe:300",
            "trainer": {
                **{"output_dir": str(root / "whole"), "steps": STEPS, "batch_size": 4, "warmup_steps": 2},
                **{"log_every": 1, "evaluate_every": 4, "save_every": 3, "ema": 0.9},
            },
        }
        self.train = self.recipe("train", self.content)
        small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48}
        trainer = {"output_dir": str(root / "llama"), "steps": 4, "batch_size": 4, "warmup_steps": 1}
        llama = self.content | {"model": {"architecture": "llama", **small}, "trainer": trainer}
        self.llama = self.recipe("llama", llama)
        healed = self.content["trainer"] | {"output_dir": str(root / "healed-whole"), "batch_size": 2, "ema": None}
        self.heal = self.recipe(
            "heal",
            {
                "model": {"architecture": "retrofit", "checkpoint": str(root / "routed"), "lora": None},
                "data": {"source": str(root / "text"), "sequence_length": 512},
                "trainer": healed,
            },
        )
        sweep = {
            **{"recipe": str(self.train), "output_dir": str(root / "sweep"), "results": str(root / "sweep-results")},
            **{"seeds": [0], "baseline": "one", "variants": {"one": {}, "two": {"model.attention_share": 0.5}}},
        }
        self.sweep = root / "sweep.yaml"
        self.sweep.write_text(yaml.safe_dump(sweep))

    def recipe(self, name: str, content: dict[str, Any]) -> Path:
        """Write a recipe."""
        (self.root / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return self.root / f"{name}.yaml"

    def prepare(self, only: set[str]) -> None:
        """Make what the trials begin with, and are compared with."""
        self.must("train", self.train)
        self.whole = weights(self.root / "whole" / "model")
        if only & {"fit"}:
            self.must(*self.fit(self.root / "fitted-whole"))
            self.fitted = weights(self.root / "fitted-whole")
        if only & {"heal"}:
            self.must("train", self.llama)
            few = ["--rows", 10, "--length", 512, "--window", 16, "--needles", 512, "--costs", 512, "--tries", 1]
            few += ["--text-rows", 2, "--text-length", 512, "--seconds", 0, "--data", self.root / "text"]
            self.must("retrofit", self.root / "llama" / "model", self.root / "routed", *few)
            self.must("heal", self.heal)
            self.healed = weights(self.root / "healed-whole" / "model")

    def fit(self, output: Path) -> list[object]:
        """The arguments of a fit."""
        return ["fit", self.root / "whole", "--look", 0.25, "--kept", 0.25, "--output", output, "--length", 64]

    def must(self, *arguments: object) -> None:
        """Run a command that is left alone.

        Raises:
            SystemExit: it fails all the same.

        """
        code, said = in_child(lambda: command(*arguments))
        if code:
            raise SystemExit(f"left alone, {arguments[0]} fails: {said}")

    def seconds(self, *arguments: object) -> float:
        """How long a command takes here."""
        start = time.monotonic()
        in_child(lambda: command(*arguments))
        return time.monotonic() - start

    @contextmanager
    def output(self, name: str = "trial") -> Iterator[Path]:
        """A place where nothing is, before and after."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


# ---- kills -----------------------------------------------------------------------------------------------------


def kills_of_a_run(place: Place, name: str, recipe: Path, wanted: Weights, moments: int) -> Iterator[str]:
    """Kill a run at random moments, and go on with it."""
    with place.output() as folder:
        whole = place.seconds(name, recipe, f"trainer.output_dir={folder}")
    draw = random.Random(name)
    for _ in range(moments):
        with place.output() as folder:
            arguments = (name, recipe, f"trainer.output_dir={folder}")
            killed(draw.uniform(0, whole), *arguments)
            lost = half_written(folder) or (unlike(folder / "model", wanted) if (folder / "model").exists() else "")
            lost = lost or in_child(lambda given=arguments: finish(*given))
            yield lost or unlike(folder / "model", wanted)


def kills_of_fit(place: Place, moments: int) -> Iterator[str]:
    """Kill a fit at random moments, and begin it again where it left nothing."""
    with place.output() as folder:
        whole = place.seconds(*place.fit(folder))
    draw = random.Random("fit")
    for _ in range(moments):
        with place.output() as folder:
            killed(draw.uniform(0, whole), *place.fit(folder))
            if not folder.exists():
                code, said = in_child(lambda at=folder: command(*place.fit(at)))
                if code:
                    yield said
                    continue
            yield unlike(folder, place.fitted)


def kills_of_a_sweep(place: Place, moments: int) -> Iterator[str]:
    """Kill a sweep, with its runs, at random moments, and go on with it."""
    arguments = ("sweep", place.sweep, "--jobs", 2)
    with place.output("sweep"), place.output("sweep-results"):
        whole = place.seconds(*arguments)
        wanted = {name: weights(place.root / "sweep" / name / "seed-0" / "model") for name in ("one", "two")}
    draw = random.Random("sweep")
    for _ in range(moments):
        with place.output("sweep") as folder, place.output("sweep-results"):
            killed(draw.uniform(0, whole), *arguments)
            runs = [folder / name / "seed-0" for name in wanted]
            lost = next((found for run in runs if (found := half_written(run))), "")
            code, said = in_child(lambda: command(*arguments))
            lost = lost or ("" if code == 0 else said.strip().splitlines()[-1])
            yield lost or "".join(unlike(run / "model", wanted[run.parent.name]) for run in runs)


# ---- disks -----------------------------------------------------------------------------------------------------


def _mount(at: Path, size: int, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(at).encode(), b"tmpfs", flags, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def _apart() -> None:
    """A name space of mounts of this process's own."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = 0 if os.geteuid() == 0 else CLONE_NEWUSER
    if libc.unshare(CLONE_NEWNS | own):
        raise OSError(ctypes.get_errno(), "unshare")
    libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def _on_a_small_disk(place: Place, size: int, changes: Sequence[str], wanted: Weights) -> str:
    _apart()
    disk = place.root / "disk"
    disk.mkdir(exist_ok=True)
    _mount(disk, size)
    folder = disk / "run"
    arguments = ("train", place.train, f"trainer.output_dir={folder}", *changes)
    code, said = command(*arguments)
    if code == 0:
        return unlike(folder / "model", wanted)
    if code != 2 or said.strip().count("\n") or "Traceback" in said:
        return f"exit code {code}: {said}"
    if lost := half_written(folder):
        return lost
    _mount(disk, 2**26, MS_REMOUNT)
    return finish(*arguments) or unlike(folder / "model", wanted)


def full_disks(place: Place) -> Iterator[str]:
    """Run on disks that are full sooner or later, with whole checkpoints and with shards; then make room, and go on."""
    for changes in ((), ("trainer.fsdp=true", "trainer.ema=null")):
        folder = place.root / f"undisturbed-{len(changes)}"
        if said := finish("train", place.train, f"trainer.output_dir={folder}", *changes):
            raise SystemExit(said)
        wanted = weights(folder / "model")
        for size in SIZES:
            yield in_child(lambda size=size, how=changes, wanted=wanted: _on_a_small_disk(place, size, how, wanted))


def _on_a_read_only_disk(place: Place, arguments: Callable[[Path], list[object]]) -> str:
    _apart()
    disk = place.root / "disk"
    disk.mkdir(exist_ok=True)
    _mount(disk, 2**20)
    _mount(disk, 2**20, MS_REMOUNT | MS_RDONLY)
    code, said = command(*arguments(disk / "out"))
    said = said.strip()
    return "" if code == 2 and "\n" not in said and os.strerror(errno.EROFS) in said else f"exit code {code}: {said}"


def read_only_disks(place: Place) -> Iterator[str]:
    """Every command that writes, where nothing can be written: one line, and exit code 2."""
    whole = place.root / "whole"
    commands: list[Callable[[Path], list[object]]] = [
        lambda out: ["train", place.train, f"trainer.output_dir={out}"],
        lambda out: ["quickstart", "--output", out],
        lambda out: ["calibrate", whole, "--output", out],
        lambda out: ["route", whole, "the light", "--html", out],
        lambda out: ["route", whole, "the light", "--png", f"{out}.png"],
        lambda out: ["collapse", whole, "--png", f"{out}.png"],
        lambda out: ["benchmark", "--output", out, "--length", 64, "--seconds", 0],
        place.fit,
    ]
    for arguments in commands:
        yield in_child(lambda given=arguments: _on_a_read_only_disk(place, given))


# ---- clocks, bits, two runs ------------------------------------------------------------------------------------


def jumping_clocks(place: Place, moments: int) -> Iterator[str]:
    """A system clock that jumps by up to a day, forward and back, whenever it is read."""

    def run(folder: Path, seed: int) -> str:
        draw, real = random.Random(seed), time.time
        time.time = lambda: real() + draw.uniform(-86_400, 86_400)
        code, said = command("train", place.train, f"trainer.output_dir={folder}")
        return "" if code == 0 else said

    for seed in range(moments):
        with place.output() as folder:
            yield in_child(lambda at=folder, seed=seed: run(at, seed)) or unlike(folder / "model", place.whole)


def flipped_bits(place: Place, moments: int) -> Iterator[str]:
    """One bit of the newest checkpoint is another one: the run goes on from the one before."""
    draw = random.Random("bits")
    for _ in range(moments):
        with place.output() as folder:
            shutil.copytree(place.root / "whole", folder)
            shutil.rmtree(folder / "model")
            newest = checkpoints(folder)[-1][1]
            file = draw.choice([path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size])
            content = bytearray(file.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            if not half_written(folder):
                yield f"a flipped bit in {file.name} was not seen"
                continue
            arguments = ("train", place.train, f"trainer.output_dir={folder}")
            yield in_child(lambda given=arguments: finish(*given)) or unlike(folder / "model", place.whole)


def two_runs(place: Place, moments: int) -> Iterator[str]:
    """A second run is begun in the folder of one that is at work."""
    draw = random.Random("two")
    for _ in range(moments):
        with place.output() as folder:
            arguments = ("train", place.train, f"trainer.output_dir={folder}")
            first = begin(*arguments)
            while not folder.exists():
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.3))
            code, said = in_child(lambda given=arguments: command(*given))
            _, status = os.waitpid(first, 0)
            done = os.waitstatus_to_exitcode(status)
            if code != 2 or said.strip().count("\n"):
                yield f"the second ended with {code}: {said}"
            else:
                yield ("" if done == 0 else f"the first ended with {done}") or unlike(folder / "model", place.whole)


# ---- figures ---------------------------------------------------------------------------------------------------


def trials(place: Place, name: str, moments: int) -> Iterator[str]:
    """What each trial of a fault lost."""
    few = max(1, moments // 5)
    kinds: dict[str, Callable[[], Iterator[str]]] = {
        "train": lambda: kills_of_a_run(place, "train", place.train, place.whole, moments),
        "fit": lambda: kills_of_fit(place, moments),
        "heal": lambda: kills_of_a_run(place, "heal", place.heal, place.healed, moments),
        "sweep": lambda: kills_of_a_sweep(place, moments),
        "disk": lambda: full_disks(place),
        "read-only": lambda: read_only_disks(place),
        "clock": lambda: jumping_clocks(place, few),
        "bits": lambda: flipped_bits(place, moments),
        "two": lambda: two_runs(place, few),
    }
    return kinds[name]()


def main() -> int:
    """Run the trials, and write figures and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--moments", type=int, default=50, help="trials of each kill (50); a fifth of them of the slow ones"
    )
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {', '.join(NAMES)}")
    given = parser.parse_args()
    only = given.only.split(",")
    if given.moments < 1 or not set(only) <= NAMES.keys():
        print(
            f"error: --moments {given.moments} --only {given.only}: one or more of {', '.join(NAMES)}", file=sys.stderr
        )
        return 2
    torch.set_num_threads(1)
    found = json.loads(FAULTS.read_text()) if FAULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as root:
        os.environ["CHIAROSCURO_CACHE"] = f"{root}/cache"
        place = Place(Path(root))
        place.prepare(set(only))
        for name in only:
            lost = []
            count = 0
            for count, what in enumerate(trials(place, name, given.moments), start=1):
                if what:
                    lost.append(" ".join(what.replace(root, "").split()))
                print(f"\r{NAMES[name]}: {count} trials, {len(lost)} lost", end="", flush=True)
            print()
            for line in lost:
                print(f"  {line}")
            found[name] = {"trials": count, "lost": lost}
            FAULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_page()
    return 1 if any(one["lost"] for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
