"""Log rows as columns: one array of steps and one of values a key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
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

    def without(self, steps: NDArray[np.int64]) -> Series:
        """The points at other steps than the given ones."""
        kept = ~np.isin(self.steps, steps)
        return self if kept.all() else Series(self.steps[kept], self.values[kept])

    def at(self, steps: NDArray[np.int64]) -> Series:
        """The points at the given steps (of several at one step, all)."""
        if self.steps is steps or np.array_equal(self.steps, steps):
            return self
        kept = np.isin(self.steps, steps)
        return self if kept.all() else Series(self.steps[kept], self.values[kept])


EMPTY: Final = Series(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class _Block:
    """Rows (by index) with the same keys: ``values`` ``[rows, keys]``, None if they hold more than numbers."""

    rows: NDArray[np.int64]
    place: dict[str, int]
    values: NDArray[np.float64] | None

    @classmethod
    def of(cls, keys: tuple[str, ...], indices: list[int], rows: list[dict[str, Any]]) -> _Block:
        chosen = rows if len(indices) == len(rows) else [rows[i] for i in indices]
        flat = chain.from_iterable(map(dict.values, chosen))
        try:
            values = np.fromiter(flat, np.float64, len(chosen) * len(keys)).reshape(len(chosen), len(keys))
        except (ValueError, TypeError, OverflowError):
            values = None
        return cls(np.array(indices, np.int64), {key: i for i, key in enumerate(keys)}, values)

    def column(self, key: str) -> NDArray[np.float64] | None:
        """The values of a key; None where a NaN may be a null."""
        if self.values is None:
            return None
        column = np.ascontiguousarray(self.values[:, self.place[key]])
        return None if np.isnan(column).any() else column


class Columns:
    """The rows of one kind. Keys are looked up with ``prefix`` (``eval_``) first, then as they stand."""

    def __init__(self, rows: list[dict[str, Any]], prefix: str = "") -> None:
        self.rows = rows
        self.prefix = prefix
        self._found: dict[str, Series | None] = {}
        self._blocks: list[_Block] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Step of every row."""
        return np.fromiter((row["step"] for row in self.rows), np.int64, len(self.rows))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys with numbers, as they stand in the rows, sorted."""
        names = {key for block in self._shapes() for key in block.place} - _BOOKKEEPING
        return tuple(key for key in sorted(names) if self.raw(key) is not None)

    def _shapes(self) -> list[_Block]:
        """The rows in groups of equal keys."""
        if self._blocks is None:
            groups: dict[tuple[str, ...], list[int]] = {}
            for i, row in enumerate(self.rows):
                groups.setdefault(tuple(row), []).append(i)
            self._blocks = [_Block.of(keys, rows, self.rows) for keys, rows in groups.items()]
        return self._blocks

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
        holding = [block for block in self._shapes() if key in block.place]
        parts = [block.column(key) for block in holding]
        if not holding:
            return None
        if any(part is None for part in parts):
            return self._checked(key)
        if len(holding) == 1:
            whole = len(holding[0].rows) == len(self.rows)
            return Series(self.steps if whole else self.steps[holding[0].rows], np.concatenate([p for p in parts if p is not None]))
        order = np.concatenate([block.rows for block in holding])
        ranks = np.argsort(order, kind="stable")
        return Series(self.steps[order[ranks]], np.concatenate([p for p in parts if p is not None])[ranks])

    def _checked(self, key: str) -> Series | None:
        """The slow way, for a column with null, text or anything else in it."""
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
