"""The pages that a user reads, and the code on them. As a script it runs the Python of the pages that it is given."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w*).*$")


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page of the site that lies in docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks in a language, each with the number of its first line; an indented block loses its indent."""
    found: list[tuple[int, str]] = []
    inside: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if fence and inside is None:
            inside, indent, first, content = fence[2], len(fence[1]), number + 1, []
        elif fence:
            if inside == language:
                found.append((first, "\n".join(content) + "\n"))
            inside = None
        elif inside is not None:
            content.append(line[indent:])
    if inside is not None:
        raise ValueError(f"line {first - 1} opens a block that nothing closes")
    return found


def run_python(page: Path, folder: Path) -> None:
    """Run a page's Python from top to bottom in a folder; a traceback has the page's own line numbers."""
    os.chdir(folder)
    names = {"__name__": "__main__"}
    for first, code in blocks(page.read_text(encoding="utf-8"), "python"):
        exec(compile("\n" * (first - 1) + code, page, "exec"), names)


def main(folder: Path, names: list[str]) -> None:
    """Run each page in a process of its own, and leave what it printed and its exit status beside its folder.

    The processes are forks of this one, so that PyTorch and transformers are imported once.
    """
    from chiaroscuro.training import train  # noqa: F401 (names in a package are imported when they are asked for)

    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with open(place.with_suffix(".log"), "w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    run_python(Path(name), place)
                    status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        place.with_suffix(".status").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
