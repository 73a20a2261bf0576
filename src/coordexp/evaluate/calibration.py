"""Whether the coordinate distributions are as wide as they should be: PIT and coverage of the true edges of matched boxes.

Reads what ``coordexp predict --save-distributions`` leaves beside a prediction file: a folder ``<file>.distributions`` of
``*.npz`` with ``image_ids``, and for each of R rows ``image`` (index into ``image_ids``), ``object``, ``slot``; row r has the bins
``bins[indptr[r]:indptr[r + 1]]`` with the probabilities ``probs``, and ``rest [R]`` is the probability that was left out.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from coordexp.codec import CoordCodec
from coordexp.errors import DataError
from coordexp.evaluate.localisation import SLOTS
from coordexp.evaluate.samples import FloatArray, IntArray, Sample

COVERAGE: Final[tuple[int, ...]] = (50, 80, 90, 95)
HISTOGRAM: Final = 10
_ARRAYS: Final = ("image_ids", "image", "object", "slot", "indptr", "bins", "probs", "rest")

Slots = dict[tuple[str, int, int], tuple[IntArray, FloatArray, float]]


def distributions_folder(predictions: Path) -> Path:
    """Where the distributions of a prediction file lie, if they were kept."""
    return predictions.with_name(predictions.name + ".distributions")


def read_distributions(folder: Path) -> Slots:
    """Bins, probabilities and what was left out, by ``(image_id, object, slot)``.

    Raises:
        DataError: a file that is not what :mod:`coordexp.evaluate.calibration` describes.
    """
    found: Slots = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays: dict[str, Any] = {name: file[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{folder.name}/{path.name}: expected distributions of a prediction, got a file that fails with: {error}"
            ) from error
        ends = arrays["indptr"]
        count = len(arrays["image"])
        fits = len(ends) == count + 1 and all(len(arrays[name]) == count for name in ("object", "slot", "rest"))
        fits = fits and int(ends[-1]) == len(arrays["bins"]) == len(arrays["probs"]) and bool((np.diff(ends) >= 0).all())
        if not fits or (count and not 0 <= int(arrays["image"].min()) <= int(arrays["image"].max()) < len(arrays["image_ids"])):
            raise DataError(f"{folder.name}/{path.name}: expected arrays that fit together, got {len(ends) - 1} rows: predict again")
        for r, (image, item, slot) in enumerate(zip(arrays["image"], arrays["object"], arrays["slot"], strict=True)):
            own = slice(int(ends[r]), int(ends[r + 1]))
            values = arrays["bins"][own].astype(np.int64), arrays["probs"][own].astype(np.float64), float(arrays["rest"][r])
            found[str(arrays["image_ids"][image]), int(item), int(slot)] = values
    return found


def pit(bins: IntArray, probs: FloatArray, center: float, num_bins: int) -> float:
    """``P_{k-1} + (c + .5 - k) p_k`` with k the bin that holds the truth c; kept probabilities are divided by their sum.

    As :func:`coordexp.distribution.pit`, on sparse rows.
    """
    p = probs / probs.sum()
    k = min(max(int(np.floor(center + 0.5)), 0), num_bins - 1)
    return float(p[bins < k].sum() + (center + 0.5 - k) * p[bins == k].sum())


def calibration_metrics(
    slots: Slots, samples: Sequence[Sample], pairs: Sequence[tuple[IntArray, IntArray]], codec: CoordCodec
) -> dict[str, float | int | None]:
    """``{x1,y1,x2,y2,all}.{coverage_50,80,90,95, pit_ks, pit_mean, n}``, ``pit_histogram.<0..9>`` (shares) and ``rest_mean``.

    Over the edges of matched pairs only (see :func:`coordexp.evaluate.localisation.matched_pairs`): a box that met nothing has no
    true edge, so these numbers are a little too good. ``coverage_L``: the share with ``|PIT - .5| <= L/200``; ``pit_ks``: the largest
    distance of PIT's distribution function from the uniform one.

    Raises:
        DataError: a matched box without its distributions.
    """
    values: dict[str, list[float]] = {slot: [] for slot in SLOTS}
    rest: list[float] = []
    for sample, (predicted, true) in zip(samples, pairs, strict=True):
        sides = (sample.width, sample.height, sample.width, sample.height)
        for p, t in zip(predicted.tolist(), true.tolist(), strict=True):
            for s, name in enumerate(SLOTS):
                row = slots.get((sample.image_id, p, s))
                if row is None or not row[1].size or not row[1].sum() > 0:
                    raise DataError(
                        f"distributions of image {sample.image_id!r}: expected those of objects[{p}], {name}, got none: "
                        "predict again with --save-distributions"
                    )
                values[name].append(pit(row[0], row[1], float(codec.to_bin(float(sample.true_boxes[t, s]), sides[s])), codec.num_bins))
                rest.append(row[2])
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


def _uniformity(values: FloatArray) -> Mapping[str, float | int | None]:
    names = (*(f"coverage_{level}" for level in COVERAGE), "pit_ks", "pit_mean")
    if not values.size:
        return {**dict.fromkeys(names), "n": 0}
    ordered = np.sort(values)
    steps = np.arange(values.size + 1) / values.size
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    coverage = [float((np.abs(values - 0.5) <= level / 200).mean()) for level in COVERAGE]
    return {**dict(zip(names, (*coverage, distance, float(values.mean())), strict=True)), "n": int(values.size)}
