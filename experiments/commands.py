"""Commands of chiaroscuro, run in this process or in forks of it, which has loaded everything once."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import chiaroscuro.cli


def command(*arguments: object) -> tuple[int, str]:
    """Run a command in this process; its exit code, and what it wrote to standard error."""
    sys.argv = ["chiaroscuro", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as said, open(os.devnull, "w") as nowhere:
        before, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), nowhere, said
        try:
            chiaroscuro.cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            print(f"Traceback: {type(error).__name__}: {error}", file=said)
            code = 1
        finally:
            sys.stdout, sys.stderr = before
        said.seek(0)
        return code, said.read()


def in_child(work: Callable[[], Any]) -> Any:
    """The result of some work, ready for JSON, in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else "it died"
