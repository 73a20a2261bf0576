"""How sure is a difference between two arms: images and seeds both vary, and both count.

Paired bootstrap over images for what an image brings, the spread over seeds for what training brings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from coordexp.evaluate.bootstrap import percentiles

ALPHA: Final = 0.05
POWER: Final = 0.8


@dataclass(frozen=True)
class Measured:
    """A metric of one arm: ``values`` by seed, and ``draws [S, R]``, the same over resamples of the images (None: not by image)."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    draws: NDArray[np.float64] | None = None
    images: int = 0

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline.

    ``by_seed`` pairs the seeds (empty if the two have different ones); ``seed_sd`` is their standard deviation, of one run.
    ``image_interval``: paired bootstrap over images, these seeds. ``interval``: images and seeds together. ``p`` two-sided, ``p_holm``
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
    """``mean(arm) - mean(baseline)`` with its uncertainty.

    Two variances of the mean difference: ``v_images`` over the paired resamples of the n images, and ``v_seeds = var(d_s) / S`` over the
    paired seeds. Each has its own half width, and they add in quadrature: ``sqrt(t_{n-1}^2 v_images + t_{S-1}^2 v_seeds)``. In simulation
    this holds its level down to two seeds, where one t quantile with pooled degrees of freedom does not; what images and seeds share is in
    both, so it is rather too wide. ``p`` is the level at which the interval would end at 0. Metrics without images, unpaired seeds: Welch.
    With one seed a side the interval is the bootstrap's percentile interval, and says nothing about other seeds.
    """
    value = arm.mean - baseline.mean
    paired = arm.seeds == baseline.seeds
    by_seed = tuple(a - b for a, b in zip(arm.values, baseline.values, strict=True)) if paired else ()
    parts: list[tuple[float, float]] = _seed_parts(arm, baseline, by_seed)
    seed_sd = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    image_interval, drawn = None, None
    if arm.draws is not None and baseline.draws is not None:
        drawn = arm.draws.mean(axis=0) - baseline.draws.mean(axis=0)
        image_interval = percentiles(drawn)
        if image_interval is None:
            return Difference(value, by_seed, seed_sd, None, None, None, None)
        finite = drawn[np.isfinite(drawn)]
        parts = [(float(finite.var(ddof=1)), arm.images - 1), *parts]
    if not parts or not math.isfinite(value):
        return Difference(value, by_seed, seed_sd, image_interval, None, None, None)
    if sum(v for v, _ in parts) == 0:
        return Difference(value, by_seed, seed_sd, image_interval, (value, value), 1.0 if value == 0 else None, 0.0)
    half = _half_width(parts, 1 - ALPHA / 2)
    detectable = half + _half_width(parts, POWER)
    if len(parts) == 1 and drawn is not None:
        return Difference(value, by_seed, seed_sd, image_interval, image_interval, _bootstrap_p(drawn), detectable)
    return Difference(value, by_seed, seed_sd, image_interval, (value - half, value + half), _p(abs(value), parts), detectable)


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
    """95 % interval of an arm's own mean, made like that of a difference; None with one seed and no images."""
    zero = np.zeros_like(measured.draws) if measured.draws is not None else None
    return difference(measured, Measured(measured.seeds, (0.0,) * len(measured.values), zero, measured.images)).interval
