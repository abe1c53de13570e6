"""Importing this module raises `LabMissing` unless the packages of `chiaroscuro[lab]` are installed.

The model, its operators, calibration, conversion and measurements need few packages. Data, training, studies, reports
and the command line need more, and import this module first.
"""

from importlib.util import find_spec

from chiaroscuro.errors import LabMissing

PACKAGES = (
    "accelerate",
    "datasets",
    "jinja2",
    "matplotlib",
    "pydantic",
    "rich",
    "scipy",
    "tensorboard",
    "typer",
    "yaml",
)

_missing = [name for name in PACKAGES if find_spec(name) is None]
if _missing:
    raise LabMissing(f"this part of chiaroscuro needs {', '.join(_missing)}: pip install 'chiaroscuro[lab]'")
