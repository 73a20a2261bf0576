"""Whether the coordinate distributions are as wide as they should be: PIT and coverage of the true edges of matched boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from coordexp.codec import CoordCodec
from coordexp.errors import DataError
from coordexp.evaluate.distributions import SavedDistributions
from coordexp.evaluate.localisation import SLOTS
from coordexp.evaluate.samples import FloatArray, IntArray, Sample

COVERAGE: Final[tuple[int, ...]] = (50, 80, 90, 95)
HISTOGRAM: Final = 10


def pit(bins: IntArray, probs: FloatArray, center: float, num_bins: int) -> float:
    """``P_{k-1} + (c + .5 - k) p_k`` with k the bin that holds the truth c; kept probabilities are divided by their sum.

    As :func:`coordexp.distribution.pit`, on sparse rows.
    """
    p = probs / probs.sum()
    k = min(max(int(np.floor(center + 0.5)), 0), num_bins - 1)
    return float(p[bins < k].sum() + (center + 0.5 - k) * p[bins == k].sum())


def calibration_metrics(
    saved: Iterable[SavedDistributions], samples: Sequence[Sample], pairs: Sequence[tuple[IntArray, IntArray]], codec: CoordCodec
) -> dict[str, float | int | None]:
    """``{x1,y1,x2,y2,all}.{coverage_50,80,90,95, pit_ks, pit_mean, n}``, ``pit_histogram.<0..9>`` (shares) and ``rest_mean``.

    Over the edges of matched pairs only (see :func:`coordexp.evaluate.localisation.matched_pairs`): a box that met nothing has no
    true edge, so these numbers are a little too good. A polygon's edges have no distributions: it is left out.
    ``coverage_L``: the share with ``|PIT - .5| <= L/200``; ``pit_ks``: the largest distance of PIT's distribution function from the
    uniform one.

    Raises:
        DataError: a matched box without its distributions, or distributions over another number of bins.
    """
    by_image = {item.image_id: item.rows for item in _on_the_grid(saved, codec)}
    values: dict[str, list[float]] = {slot: [] for slot in SLOTS}
    rest: list[float] = []
    for sample, (predicted, true) in zip(samples, pairs, strict=True):
        sides = (sample.width, sample.height, sample.width, sample.height)
        rows = by_image.get(sample.image_id, {})
        for p, t in zip(predicted.tolist(), true.tolist(), strict=True):
            if (p, len(SLOTS)) in rows:
                continue  # more values than a box has
            for s, name in enumerate(SLOTS):
                row = rows.get((p, s))
                if row is None or not row.probs.sum() > 0:
                    raise DataError(
                        f"distributions of image {sample.image_id!r}: expected those of objects[{p}], {name}, got none: "
                        "predict again with --save-distributions"
                    )
                values[name].append(pit(row.bins, row.probs, float(codec.to_bin(float(sample.true_boxes[t, s]), sides[s])), codec.num_bins))
                rest.append(row.rest)
    metrics: dict[str, float | int | None] = {}
    pooled = {name: np.array(found, dtype=np.float64) for name, found in values.items()}
    pooled["all"] = np.concatenate(list(pooled.values()))
    for name, found in pooled.items():
        metrics |= {f"{name}.{key}": value for key, value in _uniformity(found).items()}
    everything = pooled["all"]
    shares = np.histogram(np.clip(everything, 0, 1), bins=HISTOGRAM, range=(0, 1))[0]
    metrics |= {f"pit_histogram.{k}": float(n) / everything.size if everything.size else None for k, n in enumerate(shares)}
    metrics["rest_mean"] = float(np.mean(rest)) if rest else None
    return metrics


def _on_the_grid(saved: Iterable[SavedDistributions], codec: CoordCodec) -> Iterator[SavedDistributions]:
    for item in saved:
        if item.num_bins != codec.num_bins:
            raise DataError(
                f"distributions of image {item.image_id!r}: expected {codec.num_bins} bins, those of {codec.convention}, "
                f"got {item.num_bins}: name the convention that the model was trained with"
            )
        yield item


def _uniformity(values: FloatArray) -> Mapping[str, float | int | None]:
    names = (*(f"coverage_{level}" for level in COVERAGE), "pit_ks", "pit_mean")
    if not values.size:
        return {**dict.fromkeys(names), "n": 0}
    ordered = np.sort(values)
    steps = np.arange(values.size + 1) / values.size
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    coverage = [float((np.abs(values - 0.5) <= level / 200).mean()) for level in COVERAGE]
    return {**dict(zip(names, (*coverage, distance, float(values.mean())), strict=True)), "n": int(values.size)}
