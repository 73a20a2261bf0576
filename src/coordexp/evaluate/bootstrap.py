"""Bootstrap over photos for numbers that are ratios of sums: intervals, and what is said where there is none.

The unit is the photo: all records of one picture are drawn together, for what makes a picture hard makes all of them hard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

LEVEL: Final = 95.0
# Most numbers of a block of draws: 32 MB of float64.
_CELLS: Final = 4_000_000
# With more undefined resamples than this share, the rest no longer stands for the sampling distribution.
_UNDEFINED_SHARE: Final = 0.05
# Resamples that differ by less than this, relative to their size, do not vary: it is rounding.
_SAME: Final = 1e-12

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """``mean over k of (sum_i numerator[i, k] / sum_i denominator[i, k])``; the arrays are ``[I, K]``, by image (record) or photo.

    Without ``present`` every k must be defined. With it (all three sparse then) the mean is over those k with ``sum_i present[i, k] > 0``.
    ``rate``: no numerator is above its denominator or below 0, so that the number is a share.
    """

    numerator: Any
    denominator: Any
    present: Any = None
    rate: bool = True


class Interval(NamedTuple):
    """The 95 % interval, None where there is none; ``note`` says why, or how it was made where it is no percentile bootstrap."""

    bounds: tuple[float, float] | None
    note: str | None = None


def by_photo(ratio: Ratio, photo: NDArray[np.int64]) -> Ratio:
    """The same with rows of one ``photo [I]`` added up: its rows are the photos."""
    photos = int(photo.max(initial=-1)) + 1
    if photos == len(photo):
        return ratio
    add = sparse.csr_array((np.ones(len(photo)), (photo, np.arange(len(photo)))), shape=(photos, len(photo)))
    return Ratio(add @ ratio.numerator, add @ ratio.denominator, None if ratio.present is None else add @ ratio.present, ratio.rate)


def draws(photos: int, *, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks ``[B, G]`` of how often each photo is drawn: G photos out of G with replacement, ``resamples`` rows in all.

    Raises:
        ValueError: fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    block = max(1, min(128, _CELLS // max(1, photos)))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, photos, (rows, photos)) + photos * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * photos).reshape(rows, photos).astype(np.float64)


def intervals(statistics: Mapping[str, Ratio], *, resamples: int, seed: int) -> dict[str, Interval]:
    """95 % interval of each statistic (its rows are photos) over ``resamples`` draws of the photos: :func:`share_interval` of shares,
    :func:`mean_interval` of other numbers.

    All statistics see the same draws, so the result depends on ``seed`` and the photos only.

    Raises:
        ValueError: fewer than one resample, or arrays that disagree about the number of photos.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not statistics:
        return {}
    lengths = {array.shape[0] for s in statistics.values() for array in (s.numerator, s.denominator)}
    if len(lengths) != 1:
        raise ValueError(f"statistics must be over the same photos, got {sorted(lengths)} photos")
    photos = lengths.pop()
    if photos < 2:
        return dict.fromkeys(statistics, Interval(None, f"none: {photos} photo"))
    moments = {f"{name}/{key}": ratio for name, s in statistics.items() if not s.rate for key, ratio in _moments(s).items()}
    drawn = resampled({**statistics, **moments}, photos, resamples=resamples, seed=seed)
    found = {}
    for name, s in statistics.items():
        value, counted, values = point(s), trials(s), drawn[name]
        spread = None if s.rate else _spread(values, *(drawn[f"{name}/{key}"] for key in _MOMENTS))
        own = None if s.rate else _spread(np.array([value]), *(np.array([point(moments[f"{name}/{key}"])]) for key in _MOMENTS))
        fault = _fault(values, counted)
        if fault is not None:
            found[name] = Interval(None, fault)
        elif spread is None or own is None:
            found[name] = share_interval(value, values, counted)
        else:
            found[name] = mean_interval(value, values, float(own[0]), spread)
    return found


def trials(ratio: Ratio) -> float:
    """How many photos a number stands on: those that count in it; of a mean over K parts ``K^2 / sum_k(1/n_k)``, at most the photos."""
    counted = ratio.denominator if ratio.present is None else ratio.present
    by_part = np.asarray((counted > 0).sum(axis=0), dtype=np.float64).ravel()
    by_part = by_part[by_part > 0]
    if not by_part.size:
        return 0.0
    if ratio.present is None:
        return float(by_part.min())
    return float(min(counted.shape[0], by_part.size**2 / (1 / by_part).sum()))


def _fault(values: Floats, counted: float) -> str | None:
    """Why there can be no interval: fewer than two photos count, or more than 5 % of the draws leave the number undefined."""
    undefined = int(values.size - np.isfinite(values).sum())
    if undefined > _UNDEFINED_SHARE * values.size:
        return f"none: undefined in {undefined} of {values.size} draws"
    return f"none: {counted:.1f} photos count" if counted < 2 else None


def share_interval(value: float, values: Floats, counted: float) -> Interval:
    """The interval of a share that is ``value``, and ``values [R]`` over draws of the photos, of which ``counted`` count.

    Wilson's, of as many trials as give the variance of the draws, ``p(1 - p) / v`` with ``v = var G/(G - 1)``, and Student's t of
    ``G - 1`` in place of 1.96, with G = ``counted``: as is done for rates of clustered surveys (Dean and Pagano 2015). It ends within 0
    and 1 and holds its level for rates near them, where percentiles do not. Without any variation Wilson's own, of G trials.
    """
    finite = values[np.isfinite(values)]
    if same(float(finite.min()), float(finite.max())):
        return Interval(wilson(value, counted), f"Wilson's, of {counted:.0f} trials: no variation between photos")
    variance = float(finite.var(ddof=1)) * counted / (counted - 1)
    return Interval(wilson(value, value * (1 - value) / variance, float(stats.t.ppf((100 + LEVEL) / 200, counted - 1))))


def mean_interval(value: float, values: Floats, own: float, spread: Floats) -> Interval:
    """The interval of a number that is no share: bootstrap-t, ``value - own t`` for both quantiles t of ``(values - value) / spread``.

    ``own`` and ``spread [R]`` are the standard errors of the number and of each draw, from that draw's photos alone: errors have long
    tails, and a draw without the worst photos shows too small a spread together with too small a mean. Without any variation: none.
    """
    good = np.isfinite(values) & (spread > 0)
    if not good.any() or not own > 0 or same(float(values[good].min()), float(values[good].max())):
        return Interval(None, "none: no variation between photos")
    low, high = np.percentile((values[good] - value) / spread[good], [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Interval((value - own * float(high), value - own * float(low)))


_MOMENTS: Final = ("xx", "xd", "dd", "d")


def _moments(s: Ratio) -> dict[str, Ratio]:
    """Sums of squares of numerator x and denominator d by photo, each over the sum of d, and that over the photos: for :func:`_spread`."""
    x, d = s.numerator, s.denominator
    return {"xx": Ratio(x * x, d), "xd": Ratio(x * d, d), "dd": Ratio(d * d, d), "d": Ratio(d, np.ones(d.shape))}


def _spread(ratio: Floats, xx: Floats, xd: Floats, dd: Floats, d: Floats) -> Floats:
    """Standard error of a ratio by linearisation, but for a factor that all draws share: ``sqrt(sum (x - ratio d)^2) / sum d``."""
    return np.sqrt(np.maximum(xx - 2 * ratio * xd + ratio**2 * dd, 0.0) / d)


def same(low: float, high: float) -> bool:
    """Whether two values differ by no more than rounding."""
    return high - low <= _SAME * max(1.0, abs(high))


def resampled(statistics: Mapping[str, Ratio], photos: int, *, resamples: int, seed: int) -> dict[str, Floats]:
    """Each statistic ``[resamples]`` over draws of the photos, NaN where undefined; the draws depend on ``seed`` and ``photos`` only."""
    dense = {name: s for name, s in statistics.items() if s.present is None}
    parts = [array for s in dense.values() for array in (s.numerator, s.denominator)]
    table = np.concatenate([np.zeros((photos, 0)), *parts], axis=1)
    turned = {
        name: Ratio(*(array.T.tocsr() for array in (s.numerator, s.denominator, s.present)))
        for name, s in statistics.items()
        if s.present is not None
    }
    found: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weights in draws(photos, resamples=resamples, seed=seed):
        sums, at = weights @ table, 0
        for name, s in dense.items():
            width = s.numerator.shape[1]
            found[name].append(_divide(sums[:, at : at + width], sums[:, at + width : at + 2 * width]))
            at += 2 * width
        columns = np.ascontiguousarray(weights.T) if turned else weights
        for name, s in turned.items():
            found[name].append(_divide_present(s.numerator @ columns, s.denominator @ columns, s.present @ columns))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def point(statistic: Ratio) -> float:
    """The statistic of the images as they are; NaN where it is undefined."""
    above, below = (np.asarray(array.sum(axis=0), dtype=np.float64) for array in (statistic.numerator, statistic.denominator))
    if statistic.present is None:
        return float(_divide(above[None], below[None])[0])
    return float(_divide_present(above[:, None], below[:, None], np.asarray(statistic.present.sum(axis=0))[:, None])[0])


def points(statistics: Mapping[str, Ratio]) -> dict[str, float | None]:
    """The numbers themselves; None where undefined."""
    found = {key: point(ratio) for key, ratio in statistics.items()}
    return {key: None if math.isnan(value) else value for key, value in found.items()}


def _divide(above: Floats, below: Floats) -> Floats:
    """Mean over k of the quotients ``[B, K]``."""
    values = np.full(below.shape, np.nan)
    np.divide(above, below, out=values, where=below > 0)
    return np.asarray(values.mean(axis=1))


def _divide_present(above: Floats, below: Floats, present: Floats) -> Floats:
    """Mean over the present k of the quotients ``[K, B]``."""
    there = present > 0
    values = np.zeros(below.shape)
    np.divide(above, below, out=values, where=there)
    counted = there.sum(axis=0)
    result = np.full(counted.shape, np.nan)
    np.divide(values.sum(axis=0), counted, out=result, where=counted > 0)
    return result


def percentiles(values: Floats, photos: float) -> tuple[float, float] | None:
    """The percentile interval of resampled values, NaN left out; None with more than 5 % of them NaN, or fewer than two photos.

    At the levels ``Phi(-sqrt(G / (G - 1)) t_(G-1))`` in place of 2.5 %, which makes up for what G photos lack in spread (Hesterberg 2015).
    """
    defined = values[np.isfinite(values)]
    if defined.size < (1 - _UNDEFINED_SHARE) * values.size or photos < 2:
        return None
    tail = tail_percent(photos)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def tail_percent(photos: float) -> float:
    """Percent of the draws outside each end: 2.5 for very many photos, fewer for few."""
    t = stats.t.ppf((100 + LEVEL) / 200, photos - 1)
    return float(100 * stats.norm.cdf(-math.sqrt(photos / (photos - 1)) * t))


def wilson(rate: float, total: float, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of ``total`` trials: ``(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`` (Wilson 1927)."""
    middle = rate + z * z / (2 * total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return 0.0 if rate <= 0 else (middle - half) / scale, 1.0 if rate >= 1 else (middle + half) / scale
