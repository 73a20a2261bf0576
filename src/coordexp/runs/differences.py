"""How sure is a difference between two arms: photos and seeds both vary, and both count.

Paired bootstrap over photos for what a photo brings, the spread over seeds for what training brings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from coordexp.evaluate.bootstrap import percentiles, same, wilson

ALPHA: Final = 0.05
POWER: Final = 0.8


@dataclass(frozen=True)
class Measured:
    """A metric of one arm: ``values`` by run, and ``draws [S, R]``, the same over resamples of the photos (None: not by photo).

    ``runs`` says which runs of two arms belong together: the seed, and which of its repeats. ``trials`` is how many trials a share stands
    for (:func:`coordexp.evaluate.bootstrap.trials`), None for what is no share.
    """

    runs: tuple[tuple[int, int], ...]
    values: tuple[float, ...]
    draws: NDArray[np.float64] | None = None
    photos: int = 0
    trials: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    def at(self, runs: Sequence[tuple[int, int]]) -> Measured:
        """The same at some of its runs, in that order."""
        index = [self.runs.index(run) for run in runs]
        draws = None if self.draws is None else self.draws[index]
        return replace(self, runs=tuple(runs), values=tuple(self.values[i] for i in index), draws=draws)


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline.

    ``by_seed`` pairs the seeds (empty if they share none); ``seed_sd`` is their standard deviation, of one run.
    ``image_interval``: paired bootstrap over photos, these seeds. ``interval``: photos and seeds together. ``p`` two-sided, ``p_holm``
    corrected; ``detectable``: the true difference that would be found in 80 % of such comparisons, at 5 %, uncorrected. None: unknown.
    """

    value: float
    by_seed: tuple[float, ...]
    seed_sd: float | None
    image_interval: tuple[float, float] | None
    interval: tuple[float, float] | None
    p: float | None
    detectable: float | None
    p_holm: float | None = None

    @property
    def shown(self) -> bool:
        """Whether the difference stands after correction."""
        return self.p_holm is not None and self.p_holm < ALPHA


def difference(arm: Measured, baseline: Measured) -> Difference:
    """``mean(arm) - mean(baseline)`` over the seeds that both have (all, where they share none) with its uncertainty.

    Two variances of the mean difference: ``v_photos`` over the paired resamples of the n photos, and ``v_seeds = var(d_s) / S`` over the
    paired seeds. Each has its own half width, and they add in quadrature: ``sqrt(t_{n-1}^2 v_photos + t_{S-1}^2 v_seeds)``. In simulation
    this holds its level down to two seeds, where one t quantile with pooled degrees of freedom does not; what photos and seeds share is in
    both, so it is rather too wide. ``p`` is the level at which the interval would end at 0. Metrics without photos, unpaired seeds: Welch.
    With one seed a side the interval is the bootstrap's percentile interval, and says nothing about other seeds.

    Without any variation nothing is known of other photos but that those which differ are rare: of n trials at most ``1 - .05^(1/n)``
    (about 3/n). A share may differ by that much more or less; p is then the sign test's. What is no share has no interval.
    """
    common = [run for run in baseline.runs if run in arm.runs]
    if common:
        arm, baseline = arm.at(common), baseline.at(common)
    value = arm.mean - baseline.mean
    by_seed = tuple(a - b for a, b in zip(arm.values, baseline.values, strict=True)) if common else ()
    parts: list[tuple[float, float]] = _seed_parts(arm, baseline, by_seed)
    seed_sd = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    image_interval, drawn = None, None
    if arm.draws is not None and baseline.draws is not None:
        drawn = arm.draws.mean(axis=0) - baseline.draws.mean(axis=0)
        image_interval = percentiles(drawn, arm.photos)
        if image_interval is None:
            return Difference(value, by_seed, seed_sd, None, None, None, None)
        finite = drawn[np.isfinite(drawn)]
        parts = [(float(finite.var(ddof=1)), arm.photos - 1), *parts]
    if not parts or not math.isfinite(value):
        return Difference(value, by_seed, seed_sd, image_interval, None, None, None)
    if all(same(0.0, v) for v, _ in parts):
        return _without_variation(Difference(value, by_seed, seed_sd, None, None, None, None), arm, baseline)
    half = _half_width(parts, 1 - ALPHA / 2)
    detectable = half + _half_width(parts, POWER)
    if len(parts) == 1 and drawn is not None:
        return Difference(value, by_seed, seed_sd, image_interval, image_interval, _bootstrap_p(drawn), detectable)
    return Difference(value, by_seed, seed_sd, image_interval, (value - half, value + half), _p(abs(value), parts), detectable)


def _without_variation(d: Difference, arm: Measured, baseline: Measured) -> Difference:
    if arm.trials is None or baseline.trials is None or min(arm.trials, baseline.trials) < 1:
        return d
    trials = min(arm.trials, baseline.trials)
    unseen = 1 - ALPHA ** (1 / trials)
    p = 1.0 if same(0.0, abs(d.value)) else min(1.0, 2.0 ** (1 - trials))
    return replace(d, interval=(max(-1.0, d.value - unseen), min(1.0, d.value + unseen)), p=p)


def _half_width(parts: Sequence[tuple[float, float]], level: float) -> float:
    """``sqrt(sum of t_df(level)^2 v)`` over the (variance, degrees of freedom) of the parts."""
    return math.sqrt(sum(float(stats.t.ppf(level, df)) ** 2 * v for v, df in parts))


def _p(distance: float, parts: Sequence[tuple[float, float]]) -> float:
    """The two-sided level p with ``_half_width(1 - p/2) = distance``."""
    if len(parts) == 1:
        return float(2 * stats.t.sf(distance / math.sqrt(parts[0][0]), parts[0][1]))
    smallest = 1e-12
    if distance >= _half_width(parts, 1 - smallest / 2):
        return smallest
    return float(optimize.brentq(lambda p: _half_width(parts, 1 - p / 2) - distance, smallest, 1.0, xtol=1e-14))


def _seed_parts(arm: Measured, baseline: Measured, by_seed: Sequence[float]) -> list[tuple[float, float]]:
    """Variance of the mean difference that comes from seeds, with its degrees of freedom (unpaired: Welch's); none with one seed a side."""
    if by_seed:
        return [(float(np.var(by_seed, ddof=1)) / len(by_seed), len(by_seed) - 1)] if len(by_seed) > 1 else []
    sides = [side.values for side in (arm, baseline)]
    if min(map(len, sides)) < 2:
        return []
    variances = [float(np.var(values, ddof=1)) / len(values) for values in sides]
    total = sum(variances)
    freedom = sum(v**2 / (len(values) - 1) for v, values in zip(variances, sides, strict=True))
    return [(total, total**2 / freedom if freedom else len(sides[0]) - 1)]


def _bootstrap_p(drawn: NDArray[np.float64]) -> float:
    """Two-sided: twice the smaller share of resamples on one side of 0, at least one resample."""
    finite = drawn[np.isfinite(drawn)]
    tail = min(int((finite <= 0).sum()), int((finite >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (finite.size + 1))


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """The same with ``p_holm``: ``max over j <= i of (m - j) p_(j)``, at most 1, over the m that have a p-value."""
    order = sorted((i for i, d in enumerate(differences) if d.p is not None), key=lambda i: differences[i].p or 0.0)
    result, largest = list(differences), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * (differences[index].p or 0.0)))
        result[index] = replace(differences[index], p_holm=largest)
    return result


def interval_of(measured: Measured) -> tuple[float, float] | None:
    """95 % interval of an arm's own mean, made like that of a difference; None with one seed and no photos.

    A share without any variation has Wilson's.
    """
    draws, share_of = measured.draws, measured.trials
    values = [*measured.values, *([] if draws is None else (draws.min(), draws.max()))]
    if draws is not None and share_of and np.isfinite(values).all() and same(min(values), max(values)):
        return wilson(measured.mean, share_of)
    zero = None if draws is None else np.zeros_like(draws)
    return difference(measured, replace(measured, values=(0.0,) * len(measured.values), draws=zero, trials=None)).interval
