"""Numbers of ``results.json`` as text, in the tables that the registry declares: for ``table.md`` and for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from coordexp.evaluate.registry import FILE_READOUT, READOUT_NAMES, SHEETS, Sheet, by_key

NONE: Final = "–"
_ORDER: Final = (*READOUT_NAMES, FILE_READOUT)
_KINDS: Final = {"share": "ratio", "bins": "bins", "px": "px", "count": "whole", "boxes": "count", "tokens": "count"}


@dataclass(frozen=True)
class Cell:
    """A number as text, its 95 % interval as text, and whether it is the best of its column."""

    text: str
    interval: str | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """``rows`` pairs a row's name with one cell per column (the columns after the first)."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


class Metrics:
    """Lookup in flat results: numbers at dotted keys, intervals under ``intervals.<the same key>``."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results

    def value(self, key: str) -> float | None:
        """The finite number at ``key``, or None."""
        return _number(self.results.get(key))

    def cell(self, key: str, *, kind: str | None = None, best: bool = False) -> Cell:
        """The number at ``key`` with its interval; ``kind`` is that of :func:`number`, by the registry's unit if not given."""
        return Cell(number(self.value(key), kind or kind_of(key)), self.interval(key, kind), best)

    def interval(self, key: str, kind: str | None = None) -> str | None:
        """The interval of ``key`` as text, or None."""
        kind = kind or kind_of(key)
        bounds = self.results.get(f"intervals.{key}")
        if not isinstance(bounds, list) or len(bounds) != 2:
            return None
        low, high = _number(bounds[0]), _number(bounds[1])
        if low is None or high is None:
            return None
        joint = " to " if low < 0 else "–"
        return f"{number(low, kind).removesuffix(' %')}{joint}{number(high, kind)}"

    def readouts(self) -> list[str]:
        """Names of the readouts in the results, ``file`` (the boxes as they stand in the file) last."""
        found = {key.split(".")[1] for key in self.results if key.startswith("detection.") and key.count(".") >= 3}
        return [r for r in _ORDER if r in found] + sorted(found - set(_ORDER))

    def best(self, pattern: str, *, lowest: bool = False) -> str | None:
        """The readout with the best value of ``pattern`` (``{}`` stands for its name).

        ``file`` repeats one of the others or comes from elsewhere: it counts only where it is alone.
        """
        values = {r: v for r in self.readouts() if (v := self.value(pattern.format(r))) is not None}
        if len(values) > 1:
            values.pop("file", None)
        if not values:
            return None
        return (min if lowest else max)(values, key=lambda r: values[r])


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def number(value: float | None, kind: str = "ratio") -> str:
    """A number as text: ``ratio`` 3 decimals, ``percent`` 1, ``bins`` 1, ``px`` 2, ``count`` 1, ``whole`` 0, ``plain`` 4 digits."""
    if value is None or not math.isfinite(value):
        return NONE
    if kind == "percent":
        return f"{100 * value:.1f} %"
    if kind == "plain":
        return f"{value:.4g}"
    return f"{value:.{ {'ratio': 3, 'bins': 1, 'px': 2, 'count': 1, 'whole': 0}[kind] }f}"


def kind_of(key: str) -> str:
    """How a number is written, by its unit."""
    metric = by_key().get(key)
    return "plain" if metric is None else _KINDS[metric.unit]


def readout_name(readout: str) -> str:
    """A readout as a reader knows it."""
    return {"file": "as predicted (file)", "topk_mean": "top-k mean"}.get(readout, readout)


def tables(metrics: Metrics, readout: str) -> list[Table]:
    """The tables of the registry, of ``readout`` where there are several; rows, columns and tables without a number are left out."""
    made = [_filled(metrics, sheet, readout) for sheet in SHEETS]
    return [table for table in [*made, _health(metrics)] if table.rows]


def _filled(metrics: Metrics, sheet: Sheet, readout: str) -> Table:
    rows = [(label, prefix.format(readout)) for label, prefix in sheet.rows if label]
    # A row without a name stands for one row a readout.
    rows += [(readout_name(r), prefix.format(r)) for label, prefix in sheet.rows if not label for r in metrics.readouts()]
    # A bucket in which nothing is counted fills no row.
    filled = [(label, key) for label, key in rows if metrics.value(f"{key}.n") != 0]
    there = [(label, key) for label, key in filled if any(metrics.value(f"{key}.{column}") is not None for _, column in sheet.columns)]
    columns = [(label, column) for label, column in sheet.columns if any(metrics.value(f"{key}.{column}") is not None for _, key in there)]
    cells = tuple((label, tuple(metrics.cell(f"{key}.{column}") for _, column in columns)) for label, key in there)
    return Table(_of(sheet, readout, metrics), tuple(label for label, _ in columns), cells)


def _of(sheet: Sheet, readout: str, metrics: Metrics) -> str:
    several = len(metrics.readouts()) > 1 and any(label and "{}" in prefix for label, prefix in sheet.rows)
    return f"{sheet.caption}, {readout_name(readout)}" if several else sheet.caption


def _health(metrics: Metrics) -> Table:
    rows = []
    for key in metrics.results:
        name = key.removeprefix("health.")
        if name != key and metrics.value(key) is not None:
            label = "Problem: " + name.removeprefix("problems.") if name.startswith("problems.") else name.capitalize()
            rows.append((label.replace("_", " "), (metrics.cell(key),)))
    return Table("Health of the answers", ("value",), tuple(rows))
