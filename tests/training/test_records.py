"""A record's line fits a terminal; a file of records is read back, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiaroscuro.errors import UserError
from chiaroscuro.training import read_records
from chiaroscuro.training.records import append_record, legend, terminal_line, write_records


def layer(number: int, share: float, middle: float) -> dict[str, Any]:
    menu = ["dct", "attention"]
    return {"layer": number, "operators": menu, "share": [1 - share, share], "entropy": [0.1, middle, 0.9]}


TRAIN = {
    "kind": "train",
    "step": 99_999,
    "loss": 9.1234,
    "perplexity": 24_900.0,
    "tokens_per_second": 123_456.0,
    "learning_rate": 2e-3,
    "layers": [layer(1, 0.19, 0.7), layer(2, 0.25, 0.72), layer(3, 0.31, 0.74)],
    "null_entropy": [0.89, 0.912, 0.93],
    "gate": 0.84,
}


def test_a_training_record_is_one_line_of_80_columns() -> None:
    line = terminal_line(TRAIN, 99_999)
    assert line == "step 99999/99999  loss 9.1234  123,456 tok/s  attention 19–31%  H 0.720  g 0.840"
    assert len(line) == 80


@given(
    st.integers(1, 10**6),
    st.floats(0, 20),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=12),
    st.integers(0, 4),
)
def test_every_line_fits(steps: int, loss: float, layers: list[tuple[float, float]], tasks: int) -> None:
    record = TRAIN | {"step": steps, "loss": loss, "kind": "validation", "bits_per_byte": 12.3456, "perplexity": 4e8}
    record |= {"layers": [layer(number, *each) for number, each in enumerate(layers)]}
    record |= {"tasks": {f"task_{i}": {"accuracy": 1.0, "gate": 0.5} for i in range(tasks)}}
    lines = terminal_line(record, steps).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "".join(lines).count("task_") == tasks
    assert all(len(line) <= 80 for line in legend(record).splitlines())


def test_one_share_is_no_range_and_a_record_without_a_choice_has_none() -> None:
    assert "attention 25%  H 0.700" in terminal_line(TRAIN | {"layers": [layer(1, 0.25, 0.7)]}, 10)
    fixed = {"layer": 1, "operators": ["attention"], "share": [1.0], "entropy": [0.1, 0.7, 0.9]}
    assert "attention" not in terminal_line(TRAIN | {"layers": [fixed]}, 10)


def test_the_legend_explains_what_the_lines_say() -> None:
    said = " ".join(legend(TRAIN).split())
    assert said == (
        "attention: share of the tokens, lowest to highest of the routed layers. "
        "H: their median spectral entropy (the null, white noise: 0.912). g: mean gate of the MetaRouter."
    )


# Files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in range(3):
        append_record(file, TRAIN | {"step": step, "grad_norm": float("inf")})
    records = read_records(file)
    assert records == [TRAIN | {"step": step, "grad_norm": None} for step in range(3)]
    write_records(file, records[:2])
    assert read_records(file) == records[:2]


@given(st.integers(1, 400))
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    file = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    line = json.dumps(TRAIN) + "\n"
    content = line + line
    file.write_text(content[: -min(cut, len(line))])
    assert len(read_records(file)) == (1 if cut > 1 else 2)


@pytest.mark.parametrize(
    "content",
    [
        b"step,loss\n1,2\n",
        b"notes",
        b'{"loss": 1}\n',
        b"[1, 2]\n",
        b"\n\n",
        b"\xff\xfe\x00\n",
        b"[" * 100_000 + b"\n",
        b'{"kind": "train", "step": "one"}\n',
        b'{"kind": "train", "step": 1, "layers": 3}\n',
        b'{"kind": "train", "step": 1, "layers": [{"operators": 4}]}\n',
        b'{"kind": "train", "step": 1, "tasks": [1]}\n',
        b'{"kind": "train", "step": 1}\n{"kind": "tra\n{"kind": "train", "step": 2}\n',
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is not the record of a training run: line \d") as caught:
        read_records(file)
    assert "\n" not in str(caught.value)


def test_a_folder_is_not_a_file_of_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        read_records(tmp_path)
    assert read_records(tmp_path / "missing") == []
