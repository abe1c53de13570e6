"""The command `chiaroscuro`, and `python -m chiaroscuro`."""

import os
import sys

from chiaroscuro.errors import LabMissing
from chiaroscuro.threads import share_the_machine


def main() -> None:
    """Run the command line, or say in one line what it needs."""
    share_the_machine()  # before PyTorch is loaded
    if sys.stdin is None:  # closed: as if it were empty
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (it stays open)
    try:
        from chiaroscuro import lab  # noqa: F401
        from chiaroscuro.cli import main as run
    except LabMissing as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # the imports take a second or two
        print("error: interrupted", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
