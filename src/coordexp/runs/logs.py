"""Reader of a run's ``logging.jsonl``: a header row, then flat training and evaluation rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordexp.errors import DataError

EVAL_PREFIX: Final = "eval_"


@dataclass(frozen=True)
class RunLog:
    """``train`` and ``eval`` rows in order of step; ``notes`` says what was left out while reading, one line each.

    An evaluation row is one with a key that starts with ``eval_``. ``header`` is None when the log has none.
    """

    header: dict[str, Any] | None
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


def read_log(path: Path) -> RunLog:
    """Read a log. ``NaN`` and ``Infinity`` literals are legal.

    A torn last line (no line end, not JSON: the run was killed while writing) is left out and noted. When a
    resumed run repeats steps, its rows take the place of the older ones, and that is noted too.

    Raises:
        DataError: no such file; a line that is not a flat JSON object with an integer ``step``, as ``file:line``.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    header: dict[str, Any] | None = None
    train: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    notes: list[str] = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line, f"{path}:{number}")
        except DataError:
            if number < len(lines):
                raise
            notes.append(f"{path.name}:{number}: the last line is torn (the run stopped while writing it) and was left out")
            continue
        if row.get("kind") == "header":
            if header is not None:
                notes.append(f"{path.name}:{number}: a second header: the run was resumed here")
            header = header or row
            continue
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise DataError(f"{path}:{number}: step: expected an integer, got {step!r}")
        rows = evaluations if any(key.startswith(EVAL_PREFIX) for key in row) else train
        repeated = sum(1 for old in rows if old["step"] >= step) if rows and rows[-1]["step"] > step else 0
        if repeated:
            del rows[-repeated:]
            notes.append(f"{path.name}:{number}: steps restart at {step}: {repeated} earlier row{'s' * (repeated > 1)} replaced")
        rows.append(row)
    if not train and not evaluations:
        notes.append(f"{path.name}: no training or evaluation rows")
    return RunLog(header, train, evaluations, tuple(notes))


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{where}: expected one JSON object a line: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of ``key`` over the rows that have it; values may be NaN or infinite, null is left out.

    Raises:
        DataError: a value that is not a number.
    """
    steps: list[int] = []
    values: list[float] = []
    for row in rows:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DataError(f"log row of step {row['step']}: {key}: expected a number, got {value!r}")
        steps.append(int(row["step"]))
        values.append(float(value))
    return steps, values
