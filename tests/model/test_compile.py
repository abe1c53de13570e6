"""What torch.compile and torch.export make of a model: whole graphs where nothing depends on the data.

In processes of their own: the tracer is several times as slow in one that has imported much.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_checks import SPARSE, WHOLE

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("check", "cases"),
    [
        ("without_sparse_execution_a_model_is_one_graph", list(WHOLE)),
        ("a_training_step_is_one_graph_too", ["baseline", "llama", "soft", "convolutions"]),
        ("it_is_exported_for_any_length", list(WHOLE)),
        ("a_sparse_layer_breaks_the_graph_once", ["dct attention", "dct conv rbf attention"]),
        ("sparse_training_is_eager_training", list(SPARSE)),
        ("positions_are_cached_and_documents_refused", ["dct attention"]),
    ],
)
def test_compiled(check: str, cases: list[str]) -> None:
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, str(HERE / "compile_checks.py"), check, *cases]
    result = subprocess.run(run, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
