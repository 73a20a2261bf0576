"""Percentile bootstrap over images for numbers that are ratios of sums over images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """``mean over k of (sum_i numerator[i, k] / sum_i denominator[i, k])``; the arrays are ``[I, K]``, by image.

    Without ``present`` every k must be defined. With it the mean is over those k with ``sum_i present[i, k] > 0``.
    """

    numerator: NDArray[np.float64]
    denominator: NDArray[np.float64]
    present: NDArray[np.float64] | None = None


def draws(images: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks ``[<=128, I]`` of how often each image is drawn: I images out of I with replacement, ``resamples`` rows in all.

    Raises:
        ValueError: fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        rows = min(_BLOCK, resamples - start)
        drawn = rng.integers(0, images, (rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)


def intervals(statistics: Mapping[str, Ratio], *, resamples: int, seed: int) -> dict[str, tuple[float, float] | None]:
    """95 % percentile interval of each statistic over ``resamples`` draws of the images.

    All statistics see the same draws, so the result depends on ``seed`` and the images only. Resamples in which a
    statistic has an empty denominator are left out; None where they are more than 5 %, or where there are fewer than two images.

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
    return {name: percentiles(values) for name, values in resampled(statistics, images, resamples=resamples, seed=seed).items()}


def resampled(statistics: Mapping[str, Ratio], images: int, *, resamples: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Each statistic ``[resamples]`` over draws of the images, NaN where undefined; the draws depend on ``seed`` and ``images`` only."""
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in statistics}
    for weights in draws(images, resamples=resamples, seed=seed):
        for name, statistic in statistics.items():
            found[name].append(_values(statistic, weights))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def point(statistic: Ratio) -> float:
    """The statistic of the images as they are; NaN where it is undefined."""
    return float(_values(statistic, np.ones((1, statistic.numerator.shape[0])))[0])


def _values(statistic: Ratio, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    below = weights @ statistic.denominator
    values = np.full(below.shape, np.nan)
    np.divide(weights @ statistic.numerator, below, out=values, where=below > 0)
    if statistic.present is None:
        return np.asarray(values.mean(axis=1))
    there = weights @ statistic.present > 0
    counted = there.sum(axis=1)
    result = np.full(len(weights), np.nan)
    np.divide(np.where(there, values, 0.0).sum(axis=1), counted, out=result, where=counted > 0)
    return result


def percentiles(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The 95 % percentile interval of resampled values, NaN left out; None with more than 5 % of them NaN."""
    defined = values[np.isfinite(values)]
    if defined.size < (1 - _UNDEFINED_SHARE) * values.size:
        return None
    low, high = np.percentile(defined, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)
