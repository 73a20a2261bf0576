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
from scipy import stats

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
    corrected; ``detectable``: the true difference that would be found in 80 % of such comparisons, at 5 %, uncorrected. None: cannot be said.
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

    Variance of the mean difference: ``v_images + v_seeds``, with ``v_images`` the variance over the paired resamples of the images and
    ``v_seeds = var(d_s) / S`` over the paired seeds (``var(a)/S_a + var(b)/S_b`` unpaired). What images and seeds share is in both, so the
    interval is rather too wide. Its t quantile has Welch and Satterthwaite's degrees of freedom. With one seed a side the interval is the
    bootstrap's percentile interval, and says nothing about other seeds.
    """
    value = arm.mean - baseline.mean
    paired = arm.seeds == baseline.seeds
    by_seed = tuple(a - b for a, b in zip(arm.values, baseline.values, strict=True)) if paired else ()
    parts = _seed_parts(arm, baseline, by_seed)
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
    variance = sum(v for v, _ in parts)
    if variance == 0:
        return Difference(value, by_seed, seed_sd, image_interval, (value, value), 1.0 if value == 0 else None, 0.0)
    freedom = variance**2 / sum(v**2 / df for v, df in parts)
    error = math.sqrt(variance)
    quantile = float(stats.t.ppf(1 - ALPHA / 2, freedom))
    detectable = (quantile + float(stats.t.ppf(POWER, freedom))) * error
    if len(parts) == 1 and drawn is not None:
        return Difference(value, by_seed, seed_sd, image_interval, image_interval, _bootstrap_p(drawn), detectable)
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Difference(value, by_seed, seed_sd, image_interval, (value - quantile * error, value + quantile * error), p, detectable)


def _seed_parts(arm: Measured, baseline: Measured, by_seed: Sequence[float]) -> list[tuple[float, int]]:
    """Variances of the mean difference that come from seeds, each with its degrees of freedom; none with one seed a side."""
    if by_seed:
        return [(float(np.var(by_seed, ddof=1)) / len(by_seed), len(by_seed) - 1)] if len(by_seed) > 1 else []
    sides = [side.values for side in (arm, baseline)]
    if min(map(len, sides)) < 2:
        return []
    return [(float(np.var(values, ddof=1)) / len(values), len(values) - 1) for values in sides]


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
