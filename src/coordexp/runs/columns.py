"""Log rows as columns: one array of steps and one of values a key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import DataError

_BOOKKEEPING: Final = frozenset({"step"})


@dataclass(frozen=True)
class Series:
    """``values`` at ``steps``, both ``[n]``, in order of step; values may be NaN or infinite."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.values)

    def finite(self) -> Series:
        """The points with a finite value."""
        kept = np.isfinite(self.values)
        return self if kept.all() else Series(self.steps[kept], self.values[kept])

    def at(self, steps: NDArray[np.int64]) -> Series:
        """The points at the given steps (of several at one step, all)."""
        kept = np.isin(self.steps, steps)
        return self if kept.all() else Series(self.steps[kept], self.values[kept])


EMPTY: Final = Series(np.empty(0, np.int64), np.empty(0))


class Columns:
    """The rows of one kind. Keys are looked up with ``prefix`` (``eval_``) first, then as they stand."""

    def __init__(self, rows: list[dict[str, Any]], prefix: str = "") -> None:
        self.rows = rows
        self.prefix = prefix
        self._found: dict[str, Series | None] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Step of every row."""
        return np.fromiter((row["step"] for row in self.rows), np.int64, len(self.rows))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys with numbers, as they stand in the rows, sorted."""
        names: set[str] = set().union(*self.rows) - _BOOKKEEPING if self.rows else set()
        return tuple(key for key in sorted(names) if self.raw(key) is not None)

    def series(self, key: str) -> Series:
        """Values of a key; empty where the log has none.

        Raises:
            DataError: the key holds numbers in some rows and something else in others.
        """
        found = self.raw(self.prefix + key) if self.prefix else None
        found = found if found is not None else self.raw(key)
        return EMPTY if found is None else found

    def raw(self, key: str) -> Series | None:
        """Values of a key by its exact name; null counts as absent; None where no row has a number there."""
        if key not in self._found:
            self._found[key] = self._extract(key)
        return self._found[key]

    def _extract(self, key: str) -> Series | None:
        column = [row.get(key) for row in self.rows]
        steps = self.steps
        if None in column:
            present = np.fromiter((value is not None for value in column), bool, len(column))
            column, steps = [value for value in column if value is not None], steps[present]
        if not column:
            return None
        try:
            values = np.array(column, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            values = np.empty(0)
        if values.ndim == 1 and len(values) == len(column):
            return Series(steps, values)
        odd = [i for i, value in enumerate(column) if not isinstance(value, (int, float))]
        if len(odd) == len(column):
            # A text such as a duration, or something nested: no metric.
            return None
        at = odd[0] if odd else 0
        raise DataError(f"log row of step {steps[at]}: {key}: expected a number, got {str(column[at])[:40]!r}")
