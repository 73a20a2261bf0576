"""Windowed, robust statistics of noisy series, so that single rows do not decide anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordexp.runs.columns import Columns, Series

Array = NDArray[np.float64]
_MAD: Final = 1.4826  # makes the median absolute deviation a standard deviation under a normal law
TRAIN_WINDOW, EVAL_WINDOW = 3, 1


def spread(values: Array) -> float:
    """Robust standard deviation about the median: ``1.4826 median |x - median x|``."""
    return float(_MAD * np.median(np.abs(values - np.median(values))))


def noise(values: Array) -> float:
    """Robust standard deviation of the noise on a trend: ``1.4826 median |x_i - x_(i-1)| / sqrt 2``."""
    if len(values) < 2:
        return 0.0
    return float(_MAD * np.median(np.abs(np.diff(values))) / math.sqrt(2.0))


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a series: first and last step, median and its standard error, all ``[w]``."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    level: Array
    error: Array

    def where(self, i: int = 0, j: int = -1) -> str:
        """The steps from window ``i`` to window ``j`` in words."""
        return f"steps {self.first[i]} to {self.last[j]}"

    def change(self, i: int, j: int = -1) -> tuple[float, float]:
        """``level[j] - level[i]`` and its standard error."""
        return float(self.level[j] - self.level[i]), math.hypot(self.error[i], self.error[j])


def windows(series: Series, *, least: int, count: int = 10) -> Windows | None:
    """Up to ``count`` windows of at least ``least`` finite points each; None with fewer than four.

    The standard error is ``1.25 noise / sqrt n`` (a median's under a normal law), or what the second differences of
    the levels show where that is more: noise with a memory does not average out within a window.
    """
    kept = series.finite()
    parts = min(count, len(kept) // least)
    if parts < 4:
        return None
    steps, values = np.array_split(kept.steps, parts), np.array_split(kept.values, parts)
    level = np.array([np.median(v) for v in values])
    between = _MAD * float(np.median(np.abs(np.diff(level, 2)))) / math.sqrt(6.0)
    within = 1.25 * noise(kept.values) / np.sqrt([len(v) for v in values])
    return Windows(np.array([s[0] for s in steps]), np.array([s[-1] for s in steps]), level, np.maximum(within, between))


def kinds(train: Columns, evaluation: Columns, *keys: str) -> list[tuple[str, list[Windows]]]:
    """Windows of several keys over the same rows, for evaluation and for training where the log has all of them."""
    found = []
    for name, columns, least in (("evaluation", evaluation, EVAL_WINDOW), ("training", train, TRAIN_WINDOW)):
        all_series = [columns.series(key).finite() for key in keys]
        if any(not len(s) for s in all_series):
            continue
        for _ in range(2):
            for other in all_series:
                all_series = [s.at(other.steps) for s in all_series]
        made = [windows(s, least=least) for s in all_series]
        whole = [w for w in made if w is not None]
        if len(whole) == len(keys) and len({len(w.level) for w in whole}) == 1:
            found.append((name, whole))
    return found


@dataclass(frozen=True)
class Ratio:
    """Train over eval at the evaluation steps, in logs: median, robust spread, median of the first quarter."""

    logs: Array
    steps: NDArray[np.int64]
    median: float
    spread: float
    early: float

    @property
    def factor(self) -> float:
        """The median ratio."""
        return float(np.exp(self.median))

    def matches(self, factor: float) -> bool:
        """Whether the ratio is ``factor`` throughout: median, its beginning, and at least 70 % of the points.

        A gap that comes from learning starts at 1 and widens; a wrong scale is there from the beginning.
        """
        target = math.log(factor)
        near = 0.15 if abs(target) < math.log(3) else 0.22
        share = float(np.mean(np.abs(self.logs - target) < 0.35))
        return abs(self.median - target) < near and abs(self.early - target) < 0.35 and share >= 0.7


MIN_EVALUATIONS: Final = 3
_NEIGHBOURS: Final = 5


def train_over_eval(train: Series, evaluation: Series) -> Ratio | None:
    """Ratio of a positive key at every evaluation: geometric mean of up to five training rows on either side, over the value.

    At most half the way to the next evaluation. None with fewer than three evaluations that have training
    rows beside them, or where a value is not positive.
    """
    a, b = train.finite(), evaluation.finite()
    if len(b) < MIN_EVALUATIONS or len(a) < 2 * MIN_EVALUATIONS or (a.values <= 0).any() or (b.values <= 0).any():
        return None
    logs = np.log(a.values)
    reach = max(float(np.median(np.diff(b.steps))) / 2, float(np.median(np.diff(a.steps))))
    points, steps = [], []
    for step, value in zip(b.steps, b.values, strict=True):
        i = int(np.searchsorted(a.steps, step, side="right"))
        low = max(int(np.searchsorted(a.steps, step - reach)), i - _NEIGHBOURS)
        high = min(int(np.searchsorted(a.steps, step + reach, side="right")), i + _NEIGHBOURS)
        if high > low:
            points.append(float(np.mean(logs[low:high])) - math.log(value))
            steps.append(int(step))
    if len(points) < MIN_EVALUATIONS:
        return None
    found = np.array(points)
    early = float(np.median(found[: max(2, len(found) // 4)]))
    return Ratio(found, np.array(steps), float(np.median(found)), spread(found), early)
