"""How the MetaRouter's gate moves over training, task by task.

The paper's gate settles near 0.22 in mixed training, where it is meant to distinguish text from symbols. The records of
a run have g of every task that it learned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chiaroscuro.analysis.collapse import LAST_PART, of_training
from chiaroscuro.errors import UserError

TEXT = "text"
"""What the text is called beside the tasks of a mixture."""


@dataclass(frozen=True)
class TaskGate:
    """The gate of one task.

    Attributes:
        steps: The step of every record that has it.
        gate: Mean g of the batches since the record before.
        final: Mean over the last tenth of these records.
    """

    steps: list[int]
    gate: list[float]
    final: float


def trace_gates(records: Sequence[Mapping[str, Any]]) -> dict[str, TaskGate]:
    """Follow g over a run, by task: the text first, under the name `text`, then those of the mixture.

    Args:
        records: Of the run, oldest first; those of training steps are used.

    Raises:
        UserError: if the model has no MetaRouter, or a record is damaged.

    Source: arXiv 2606.08327, v2, MetaRouter and mixed training.
    """
    looks: dict[str, list[tuple[int, float]]] = {}
    for record in of_training(records):
        for task, gate in _gates(record).items():
            looks.setdefault(task, []).append((record["step"], gate))
    if not looks:
        raise UserError("this run's model has no MetaRouter, so there is no gate to follow")
    return {task: _task_gate(each) for task, each in looks.items()}


def _gates(record: Mapping[str, Any]) -> dict[str, float]:
    """The gates that a record has, by task."""
    tasks = record.get("tasks", {})
    if not isinstance(tasks, Mapping) or not all(isinstance(figures, Mapping) for figures in tasks.values()):
        raise UserError(f"the record of step {record['step']} is damaged: its tasks are not those of a run")
    each = {TEXT: record, **tasks}
    gates = {task: figures["gate"] for task, figures in each.items() if figures.get("gate") is not None}
    if not all(isinstance(gate, (int, float)) for gate in gates.values()):
        raise UserError(f"the record of step {record['step']} is damaged: a gate in it is not a number")
    return gates


def _task_gate(looks: Sequence[tuple[int, float]]) -> TaskGate:
    steps, gate = (list(each) for each in zip(*looks, strict=True))
    last = gate[-max(1, round(LAST_PART * len(gate))) :]
    return TaskGate(steps, gate, sum(last) / len(last))


def gates_as_dict(gates: Mapping[str, TaskGate]) -> dict[str, Any]:
    """The gates as plain data, ready for JSON."""
    return {task: asdict(gate) for task, gate in gates.items()}
