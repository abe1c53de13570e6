"""A progress bar for work that may take long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

# Seconds of work before the bar is shown.
PATIENCE = 2.0


@contextmanager
def patient_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function to call with the amount of work done; after `PATIENCE` seconds a bar appears on standard error.

    Args:
        description: what is being done.
        total: the amount of work, in the unit that the function is called with.

    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(description, total=total)
    began = time.monotonic()

    def advance(amount: int) -> None:
        progress.advance(task, amount)
        if time.monotonic() - began > PATIENCE:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:  # otherwise stopping it would print an empty line
            progress.stop()
