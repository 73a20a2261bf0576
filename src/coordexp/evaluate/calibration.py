"""Whether the coordinate distributions are as wide as they should be: PIT and coverage of the true edges of matched boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from coordexp.codec import CoordCodec
from coordexp.errors import DataError
from coordexp.evaluate.bootstrap import Ratio
from coordexp.evaluate.distributions import SavedDistributions
from coordexp.evaluate.registry import COVERAGE, HISTOGRAM, SLOTS
from coordexp.evaluate.samples import Flat, FloatArray, IntArray


def pit(bins: IntArray, probs: FloatArray, center: float, num_bins: int) -> float:
    """``P_{k-1} + (c + .5 - k) p_k`` with k the bin that holds the truth c; kept probabilities are divided by their sum.

    As :func:`coordexp.distribution.pit`, on sparse rows.
    """
    p = probs / probs.sum()
    k = min(max(int(np.floor(center + 0.5)), 0), num_bins - 1)
    return float(p[bins < k].sum() + (center + 0.5 - k) * p[bins == k].sum())


def calibration_scores(
    saved: Iterable[SavedDistributions], flat: Flat, pairs: tuple[IntArray, IntArray], codec: CoordCodec
) -> tuple[dict[str, float | int | None], dict[str, Ratio]]:
    """``{x1,y1,x2,y2,all}.{coverage_50,80,90,95, pit_ks, pit_mean, n}``, ``pit_histogram.<0..9>`` (shares) and ``rest_mean``.

    Over the edges of matched pairs only (see :func:`coordexp.evaluate.localisation.matched`): a box that met nothing has no
    true edge, so these numbers are a little too good. A polygon's edges have no distributions: it is left out.
    ``coverage_L``: the share with ``|PIT - .5| <= L/200``; ``pit_ks``: the largest distance of PIT's distribution function from the
    uniform one. Second: what of ``all`` gets an interval, by image. ``saved`` is read once, nothing of it is kept.

    Raises:
        DataError: a matched box without its distributions, or distributions over another number of bins.
    """
    number = {image_id: i for i, image_id in enumerate(flat.ids)}
    edges = np.cumsum(np.bincount(flat.pred_image, minlength=flat.images))
    partner = np.full(len(flat.pred_image), -1, dtype=np.int64)
    partner[pairs[0]] = pairs[1]
    values: list[list[float]] = [[] for _ in SLOTS]
    images, rest, read = [], [], np.zeros(flat.images, dtype=bool)
    for item in _on_the_grid(saved, codec):
        i = number.get(item.image_id)
        if i is None:
            continue
        start = int(edges[i - 1]) if i else 0
        read[i] = True
        sides = (int(flat.width[i]), int(flat.height[i])) * 2
        for p, t in enumerate(partner[start : edges[i]].tolist()):
            if t < 0 or (p, len(SLOTS)) in item.rows:
                continue  # met nothing, or more values than a box has
            images.append(i)
            for s, name in enumerate(SLOTS):
                row = item.rows.get((p, s))
                if row is None or not row.probs.sum() > 0:
                    raise _missing(item.image_id, p, name)
                values[s].append(pit(row.bins, row.probs, float(codec.to_bin(float(flat.true_boxes[t, s]), sides[s])), codec.num_bins))
                rest.append(row.rest)
    unread = [p for p in pairs[0].tolist() if not read[flat.pred_image[p]]]
    if unread:
        i = int(flat.pred_image[unread[0]])
        raise _missing(flat.ids[i], unread[0] - (int(edges[i - 1]) if i else 0), SLOTS[0])
    table = np.array(values, dtype=np.float64)
    metrics: dict[str, float | int | None] = {}
    pooled = dict(zip(SLOTS, table, strict=True)) | {"all": table.ravel()}
    for slot, found in pooled.items():
        metrics |= {f"{slot}.{key}": value for key, value in _uniformity(found).items()}
    everything = pooled["all"]
    shares = np.histogram(np.clip(everything, 0, 1), bins=HISTOGRAM, range=(0, 1))[0]
    metrics |= {f"pit_histogram.{k}": float(n) / everything.size if everything.size else None for k, n in enumerate(shares)}
    metrics["rest_mean"] = float(np.mean(rest)) if rest else None
    where = np.array(images, dtype=np.int64)
    of = 4 * flat.by_image(where)[:, None]
    ratios = {
        f"all.coverage_{level}": Ratio(flat.by_image(where, (np.abs(table - 0.5) <= level / 200).sum(axis=0))[:, None], of)
        for level in COVERAGE
    }
    return metrics, ratios | {"all.pit_mean": Ratio(flat.by_image(where, table.sum(axis=0))[:, None], of, rate=False)}


def _missing(image_id: str, place: int, slot: str) -> DataError:
    return DataError(
        f"distributions of image {image_id!r}: expected those of objects[{place}], {slot}, got none: "
        "predict again with --save-distributions"
    )


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
