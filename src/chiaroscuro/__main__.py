"""The command `chiaroscuro`, and `python -m chiaroscuro`."""

import sys

from chiaroscuro.errors import LabMissing


def main() -> None:
    """Run the command line, or say in one line what it needs."""
    try:
        from chiaroscuro import lab  # noqa: F401
        from chiaroscuro.cli import main as run
    except LabMissing as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
