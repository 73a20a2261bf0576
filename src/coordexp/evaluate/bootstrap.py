"""Percentile bootstrap over images for numbers that are ratios of sums over images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

LEVEL: Final = 95.0
_BLOCK: Final = 128
# With more undefined resamples than this share, the rest no longer stands for the sampling distribution.
_UNDEFINED_SHARE: Final = 0.05


@dataclass(frozen=True)
class Ratio:
    """``mean over k of (sum_i numerator[i, k] / sum_i denominator[i, k])``; both arrays are ``[I, K]``, by image."""

    numerator: NDArray[np.float64]
    denominator: NDArray[np.float64]


def intervals(statistics: Mapping[str, Ratio], *, resamples: int, seed: int) -> dict[str, tuple[float, float] | None]:
    """95 % percentile interval of each statistic: ``resamples`` draws of I images out of I, with replacement.

    All statistics see the same draws (multinomial weights ``[resamples, I]``), so the result depends on
    ``seed`` and the images only. Resamples in which a statistic has an empty denominator are left out; None
    where they are more than 5 %, or where there are fewer than two images.

    COCO AP gets no interval: it is no ratio of sums over images, and ranking anew for every resample costs
    more than the number is worth.

    Raises:
        ValueError: fewer than one resample, or arrays that disagree about the number of images.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not statistics:
        return {}
    lengths = {array.shape[0] for s in statistics.values() for array in (s.numerator, s.denominator)}
    if len(lengths) != 1:
        raise ValueError(f"statistics must be over the same images, got {sorted(lengths)} images")
    images = lengths.pop()
    if images < 2:
        return dict.fromkeys(statistics)
    numerator = np.concatenate([s.numerator for s in statistics.values()], axis=1).astype(np.float64)
    denominator = np.concatenate([s.denominator for s in statistics.values()], axis=1).astype(np.float64)
    ends = np.cumsum([s.numerator.shape[1] for s in statistics.values()])
    rng = np.random.default_rng(seed)
    draws: dict[str, list[NDArray[np.float64]]] = {name: [] for name in statistics}
    for start in range(0, resamples, _BLOCK):
        weights = rng.multinomial(images, np.full(images, 1 / images), size=min(_BLOCK, resamples - start)).astype(np.float64)
        below = weights @ denominator
        values = np.full(below.shape, np.nan)
        np.divide(weights @ numerator, below, out=values, where=below > 0)
        for name, column in zip(statistics, np.split(values, ends[:-1], axis=1), strict=True):
            draws[name].append(column.mean(axis=1))
    return {name: _percentiles(np.concatenate(blocks)) for name, blocks in draws.items()}


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float] | None:
    defined = values[np.isfinite(values)]
    if defined.size < (1 - _UNDEFINED_SHARE) * values.size:
        return None
    low, high = np.percentile(defined, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)
