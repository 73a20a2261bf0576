import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import DataError
from coordexp.runs.logs import read_log, series

HEADER = {"schema": 1, "kind": "header", "config_sha256": "00", "git": None, "versions": {}}


def write(folder: Path, *lines: str, end: str = "\n") -> Path:
    path = folder / "logging.jsonl"
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def test_rows_are_split_into_header_training_and_evaluation(tmp_path: Path) -> None:
    rows = [HEADER, {"step": 10, "loss": 2.0}, {"step": 10, "epoch": 0.1, "eval_loss": 3.0}, {"step": 20, "loss": 1.0}]
    log = read_log(write(tmp_path, *(json.dumps(row) for row in rows)))
    assert log.header == HEADER
    assert log.train == [rows[1], rows[3]]
    assert log.eval == [rows[2]]
    assert log.notes == ()
    assert series(log.train, "loss") == ([10, 20], [2.0, 1.0])


def test_nan_and_infinity_literals_are_values(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, '{"step": 1, "loss": NaN}', '{"step": 2, "loss": -Infinity}', '{"step": 3, "loss": null}'))
    steps, values = series(log.train, "loss")
    assert steps == [1, 2]
    assert math.isnan(values[0])
    assert values[1] == -math.inf


def test_torn_last_line_is_left_out_and_noted(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, '{"step": 1, "loss": 1.0}', '{"step": 2, "lo', end=""))
    assert [row["step"] for row in log.train] == [1]
    assert len(log.notes) == 1
    assert "logging.jsonl:2" in log.notes[0]


def test_whole_last_line_without_line_end_is_kept(tmp_path: Path) -> None:
    assert len(read_log(write(tmp_path, '{"step": 1, "loss": 1.0}', end="")).train) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "expected one JSON object"),
        ("[1]", "got list"),
        ('{"loss": 1}', "step: expected an integer"),
        ('{"step": 1.5}', "step: expected an integer"),
    ],
)
def test_bad_line_is_an_error_at_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, '{"step": 1, "loss": 1.0}', line, '{"step": 3, "loss": 1.0}')
    with pytest.raises(DataError, match=message) as caught:
        read_log(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_missing_file_and_non_number_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_log(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="step 4: loss: expected a number"):
        series([{"step": 4, "loss": "high"}], "loss")


def test_resumed_steps_replace_the_older_rows(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step)} for step in (10, 20, 30)] + [HEADER, {"step": 20, "loss": 0.5}, {"step": 30, "loss": 0.4}]
    log = read_log(write(tmp_path, json.dumps(HEADER), *(json.dumps(row) for row in rows)))
    assert series(log.train, "loss") == ([10, 20, 30], [10.0, 0.5, 0.4])
    assert len(log.notes) == 2


def test_log_without_rows_says_so(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, json.dumps(HEADER)))
    assert log.notes == ("logging.jsonl: no training or evaluation rows",)


@given(st.lists(st.integers(0, 40), max_size=30))
def test_a_restart_replaces_exactly_the_rows_from_its_step_on(tmp_path_factory: pytest.TempPathFactory, steps: list[int]) -> None:
    rows = [{"step": step, "loss": i} for i, step in enumerate(steps)]
    log = read_log(write(tmp_path_factory.mktemp("log"), *(json.dumps(row) for row in rows)))
    restarts = [j for j in range(1, len(steps)) if steps[j] < steps[j - 1]]
    assert log.train == [row for i, row in enumerate(rows) if not any(j > i and steps[j] <= steps[i] for j in restarts)]
    assert [row["step"] for row in log.train] == sorted(row["step"] for row in log.train)
