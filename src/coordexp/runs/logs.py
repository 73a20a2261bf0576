"""One reader for all kinds of log: :func:`read_log` gives the same :class:`RunLog` whatever wrote it.

A run directory or its ``logging.jsonl`` (first row a header), the ``logging.jsonl`` of ms-swift, the
``trainer_state.json`` of transformers, the ``trainer_log.jsonl`` of LLaMA-Factory, TensorBoard event files, CSV with a column of steps
(as W&B and Lightning export it). Old metric names come out under the kept ones.
"""

from __future__ import annotations

import csv
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from coordexp.errors import DataError
from coordexp.runs.manifest import read_json_object
from coordexp.runs.names import kept_name

EVAL_PREFIX: Final = "eval_"
EVENTS: Final = "*tfevents*"
Source = Literal["run", "ms-swift", "trainer_state", "tensorboard", "jsonl", "llama-factory", "csv"]

# What Trainer logs once, when training ends; never part of a series.
SUMMARY_KEYS: Final = frozenset({"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"})
# Differ between two copies of one row, because each is made at its own moment.
_CLOCKS: Final = frozenset({"elapsed_time", "remaining_time", "train_speed(iter/s)", "train_speed(s/it)", "memory(GiB)", "memory"})
_MOST_NOTES: Final = 50
_LARGEST_STEP: Final = 2**53
_LOGS: Final = ("logging.jsonl", "trainer_state.json", "trainer_log.jsonl", "metrics.csv")
# Columns of a CSV file that count steps.
_STEPS: Final = ("step", "_step", "global_step", "trainer/global_step", "train/global_step", "iteration", "current_steps")


@dataclass(frozen=True)
class RunLog:
    """``train`` and ``eval`` rows in order of step; ``notes`` says what was left out while reading, one line each.

    An evaluation row is one with a key that starts with ``eval_``; every row has its step as the integer
    ``step``. ``header`` is None when the log has none. ``summary`` is what the trainer logged once at the end,
    ``settings`` what the log says about the run itself (``max_steps``, ``gradient_accumulation_steps`` ...).
    ``duplicates`` rows were written twice and count once.
    """

    header: dict[str, Any] | None
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    source: Source = "jsonl"
    summary: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    duplicates: int = 0


def read_log(path: Path) -> RunLog:
    """Read a log, or the one log of a folder. ``NaN`` and ``Infinity`` literals are legal.

    A torn last line (no line end, not JSON: the run was killed while writing) is left out and noted. When a
    resumed run repeats steps, its rows take the place of the older ones; a row that is written twice counts
    once. Both are noted. Numbers written as text are numbers.

    Raises:
        DataError: no log there; a line that is not a flat JSON object with an integer step, as ``file:line``.
    """
    path = find_log(path)
    if path.is_dir() or "tfevents" in path.name:
        from coordexp.runs.tensorboard import read_events

        return read_events(path)
    if path.suffix == ".json":
        return _read_state(path)
    return _read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)


def find_log(path: Path) -> Path:
    """The log file that ``path`` means; a folder of event files stands for itself.

    A folder is searched for ``logging.jsonl``, ``trainer_state.json``, ``trainer_log.jsonl``, ``metrics.csv``, the ``trainer_state.json``
    of its last checkpoint, event files. Folders of hyperparameters beside event files, named by a time, are no runs.

    Raises:
        DataError: a folder without a log, or with event files of several runs.
    """
    if not path.is_dir():
        return path
    for name in _LOGS:
        if (path / name).is_file():
            return path / name
    states = [p for p in path.glob("checkpoint-*/trainer_state.json") if p.parent.name.rpartition("-")[2].isdigit()]
    if states:
        return max(states, key=lambda p: int(p.parent.name.rpartition("-")[2]))
    renamed = [p for name in _LOGS for p in path.glob(f"*{name}")]
    if len(renamed) == 1:
        return renamed[0]
    folders = sorted({p.parent for p in path.rglob(EVENTS) if p.is_file()})
    folders = [p for p in folders if not (p.parent in folders and _as_number(p.name) != p.name)]
    if not folders:
        raise DataError(f"{path}: no log: expected {', '.join(_LOGS)} or TensorBoard event files")
    if len(folders) > 1:
        names = ", ".join(str(p.relative_to(path)) for p in folders[:5])
        raise DataError(f"{path}: event files in {len(folders)} folders ({names}): name one of them")
    return folders[0]


class RowCollector:
    """Turns the rows of any source, in the order they were written, into a :class:`RunLog`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.header: dict[str, Any] | None = None
        self.rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        self.notes: list[str] = []
        self.summary: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.swift = self.factory = False
        self._duplicates = 0
        # Rows of one kind share their keys: what follows from the keys alone is worked out once.
        self._shapes: dict[tuple[str, ...], tuple[tuple[str, ...], bool, tuple[tuple[str, str], ...]]] = {}

    def add(self, row: dict[str, Any], where: str) -> None:
        """One row; ``where`` is its ``file:line``.

        Raises:
            DataError: a row without an integer step.
        """
        label = where.rpartition("/")[2]
        if row.get("kind") == "header":
            if self.header is not None:
                self.notes.append(f"{label}: a second header: the run was resumed here")
            self.header = self.header or row
            return
        if "log_history" in row:
            self.notes.append(f"{label}: the summary row of the trainer was left out")
            return
        step = self._take_step(row, where)
        row["step"] = step
        keys, evaluation, renames = self._shape(row)
        # The same key objects in every row: less memory, faster look-up.
        row = dict(zip(keys, row.values(), strict=True))
        for old, new in renames:
            value = row.pop(old)
            row.setdefault(new, value)
        if str in set(map(type, row.values())):
            row.update({key: _as_number(value) for key, value in row.items() if type(value) is str})
        if "train_runtime" in row:
            self.summary.update(row)
        else:
            self._place(row, step, self.rows[evaluation], label)

    def _take_step(self, row: dict[str, Any], where: str) -> int:
        """The step; ms-swift writes ``global_step/max_steps``, either as that key or as the value of ``global_step``."""
        value = row.get("step")
        if "step" not in row and "current_steps" in row:
            # LLaMA-Factory.
            self.factory = True
            value, total = row.pop("current_steps"), row.pop("total_steps", None)
            row.pop("percentage", None)
            if isinstance(total, int) and 0 < total < _LARGEST_STEP:
                self.settings["max_steps"] = total
        elif "step" not in row:
            both = row.pop("global_step/max_steps", None)
            self.swift = self.swift or both is not None
            value = row.pop("global_step", None) if both is None else both
            if isinstance(value, str):
                done, _, total = value.partition("/")
                value = int(done) if done.isascii() and done.isdigit() and len(done) < 16 else value
                if total.isascii() and total.isdigit() and len(total) < 16:
                    self.settings["max_steps"] = int(total)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LARGEST_STEP:
            raise DataError(f"{where}: step: expected an integer, got {str(value)[:60]!r}")
        return value

    def _shape(self, row: dict[str, Any]) -> tuple[tuple[str, ...], bool, tuple[tuple[str, str], ...]]:
        """The keys, whether they are of an evaluation, and the old ones among them with their kept names."""
        keys = tuple(row)
        found = self._shapes.get(keys)
        if found is None:
            kept = {key: kept_name(key) for key in keys}
            if "train_loss" in kept and "train_runtime" not in kept:
                kept["train_loss"] = "loss"  # a plain tag; of the trainer's own summary it is the mean over all steps
            renames = tuple((key, name) for key, name in kept.items() if name != key)
            found = self._shapes[keys] = (keys, any(name.startswith(EVAL_PREFIX) for name in kept.values()), renames)
        return found

    def _place(self, row: dict[str, Any], step: int, rows: list[dict[str, Any]], label: str) -> None:
        if rows and rows[-1]["step"] > step:
            first = bisect_left(rows, step, key=lambda old: old["step"])
            repeated = len(rows) - first
            del rows[first:]
            self.notes.append(f"{label}: steps restart at {step}: {repeated} earlier row{'s' * (repeated > 1)} replaced")
        if rows and rows[-1]["step"] == step and _agree(rows[-1], row):
            # Two halves of one event, or the same event twice.
            self._duplicates += not row.keys() - rows[-1].keys()
            rows[-1].update(row)
        else:
            rows.append(row)

    def finish(self, source: Source) -> RunLog:
        """The log."""
        if self._duplicates:
            self.notes.append(f"{self.name}: {self._duplicates} duplicated row{'s' * (self._duplicates > 1)} counted once")
        if not any(self.rows.values()):
            self.notes.append(f"{self.name}: no training or evaluation rows")
        rest = len(self.notes) - _MOST_NOTES
        if rest > 0:
            self.notes[_MOST_NOTES:] = [f"{self.name}: {rest} more notes of these kinds"]
        rows = self.rows[False], self.rows[True]
        return RunLog(self.header, *rows, tuple(self.notes), source, self.summary, self.settings, self._duplicates)


def _agree(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two rows of one step say the same wherever both say something (NaN agrees with NaN)."""
    shared = (old.keys() & new.keys()) - _CLOCKS
    return all(old[key] == new[key] or (old[key] != old[key] and new[key] != new[key]) for key in shared)


def _as_number(text: str) -> float | str:
    """ms-swift formats some numbers as text; durations and the like stay text."""
    try:
        return float(text)
    except ValueError:
        return text


def _read_jsonl(path: Path) -> RunLog:
    collector = RowCollector(path.name)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = _parse(line, where)
                except DataError:
                    if line.endswith(b"\n"):
                        raise
                    collector.notes.append(
                        f"{path.name}:{number}: the last line is torn (the run stopped while writing it) and was left out"
                    )
                    continue
                collector.add(row, where)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    other: Source = "ms-swift" if collector.swift else "llama-factory" if collector.factory else "jsonl"
    return collector.finish("run" if collector.header is not None else other)


def _read_csv(path: Path) -> RunLog:
    """A table with a column of steps. W&B puts the run's name before a metric's (``NAME - loss``), and a smallest and largest value
    beside."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a CSV log in UTF-8, got one that fails with: {' '.join(str(error).split())}") from error
    header = [name.strip() for name in rows[0]] if rows else []
    step = next((i for i, name in enumerate(header) if name.lower() in _STEPS), None)
    names = {i: name.rpartition(" - ")[2] for i, name in enumerate(header) if i != step and not name.endswith(("__MIN", "__MAX"))}
    if step is None or len(set(names.values())) < len(names) or "Value" in header:
        got = ", ".join(header)[:120] or "none"
        raise DataError(f"{path}: expected a column step and one for each metric of one run, got {got}: name the columns so")
    collector = RowCollector(path.name)
    for number, row in enumerate(rows[1:], start=2):
        if len(row) <= step or not row[step].strip():
            continue
        count = _as_number(row[step])
        values = {names[i]: _as_number(cell) for i, cell in enumerate(row) if i in names and cell.strip()}
        whole = int(count) if isinstance(count, float) and count.is_integer() else row[step]
        if values:
            collector.add({"step": whole, **values}, f"{path}:{number}")
    return collector.finish("csv")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object a line: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _read_state(path: Path) -> RunLog:
    """``trainer_state.json``: rows under ``log_history``, settings beside it."""
    state = read_json_object(path)
    history = state.get("log_history")
    if not isinstance(history, list):
        raise DataError(f"{path}: log_history: expected a list, got {type(history).__name__}: is this a trainer_state.json?")
    collector = RowCollector(path.name)
    for number, row in enumerate(history):
        if not isinstance(row, dict):
            raise DataError(f"{path}: log_history[{number}]: expected an object, got {type(row).__name__}")
        collector.add(row, f"{path}: log_history[{number}]")
    collector.settings.update({k: v for k, v in state.items() if isinstance(v, (int, float)) and not isinstance(v, bool)})
    return collector.finish("trainer_state")


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
