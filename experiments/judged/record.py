"""A plug-in of pytest that writes how each test ended, its subtests included, to the file that `JUDGED` names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

WORST = ("passed", "skipped", "failed")


class Outcomes:
    """How each test ended, and why it was skipped or failed."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of the reports on a test, the worst counts."""
        so_far = self.of.get(report.nodeid, ("passed", ""))
        if WORST.index(report.outcome) > WORST.index(so_far[0]):
            self.of[report.nodeid] = (report.outcome, _why(report))
        else:
            self.of.setdefault(report.nodeid, so_far)

    def pytest_sessionfinish(self) -> None:
        """Write them."""
        Path(os.environ["JUDGED"]).write_text(json.dumps(self.of))


def _why(report: Any) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr).strip().split("\n")[0][:200]


def pytest_configure(config: pytest.Config) -> None:
    """Listen; and let the marks be that transformers' own configuration would name."""
    config.option.strict_markers = False
    config.pluginmanager.register(Outcomes())
