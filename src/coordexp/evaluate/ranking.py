"""Bootstrap intervals of COCO average precision: the greedy matching of COCO once, then the ranking anew for every resample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from coordexp.evaluate.bootstrap import draws
from coordexp.evaluate.matching import THRESHOLDS, Candidates, star_pairs
from coordexp.evaluate.samples import BoolArray, Flat, FloatArray, IntArray, Sample

# AP is ranked anew for every resample, so it gets fewer of them than the ratios do.
AP_RESAMPLES: Final = 100
# Most detections times draws held at a time: 32 MB an array.
_CELLS: Final = 4_000_000
_RECALLS: Final = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Ranked:
    """Detections of one class in rank order: images ``[D]``, hits and counted ones ``[D, T]``; true boxes by image ``[I]``."""

    image: IntArray
    hit: BoolArray
    counted: BoolArray
    true: FloatArray


def rank(
    samples: Sequence[Sample], flat: Flat, pairs: Candidates, ignored: BoolArray, *, constant: bool, lvis: bool = False
) -> list[Ranked]:
    """Detections of every class with a true box, as COCO ranks and matches them: all sizes, 100 boxes an image and class.

    ``pairs`` are candidates of equal labels, ``ignored [P, T]`` boxes that do not count where they have no match. With ``lvis``
    300 boxes of an image count, of whatever class.
    """
    none = np.zeros(0)
    given = none if constant else np.concatenate([none, *(s.scores for s in samples if s.scores is not None)])
    scores = np.ones(len(flat.pred_image)) if constant else given
    order = np.argsort(-scores, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    group = flat.pred_image if lvis else flat.pred_image * max(1, len(flat.labels)) + flat.pred_label
    kept = _best_of_group(group, order, 300 if lvis else 100)
    pairs = pairs.where(kept[pairs.pred])
    hit = np.zeros((len(scores), len(THRESHOLDS)), dtype=bool)
    for t, threshold in enumerate(THRESHOLDS):
        hit[_greedy(pairs.where(pairs.iou >= threshold), place), t] = True
    true = np.bincount(flat.true_label, minlength=len(flat.labels))
    found = []
    for label in np.flatnonzero(true):
        own = order[(flat.pred_label[order] == label) & kept[order]]
        images = np.bincount(flat.true_image[flat.true_label == label], minlength=flat.images).astype(np.float64)
        found.append(Ranked(flat.pred_image[own], hit[own], hit[own] | ~ignored[own], images))
    return found


def _best_of_group(group: IntArray, order: IntArray, most: int) -> BoolArray:
    """Predicted boxes that are among the ``most`` best-ranked of their group."""
    group = group[order]
    by_group = np.argsort(group, kind="stable")
    ordered = group[by_group]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if ordered.size else np.zeros(0, dtype=np.int64)
    within = np.arange(ordered.size) - np.repeat(starts, np.diff([*starts, ordered.size]))
    kept = np.zeros(len(order), dtype=bool)
    kept[order[by_group]] = within < most
    return kept


def _greedy(pairs: Candidates, place: IntArray) -> IntArray:
    """Predicted boxes with a match: in rank order each takes the free true box with the highest IoU, of equal ones the last."""
    at_true, at_pred = star_pairs(pairs.true, pairs.pred), star_pairs(pairs.pred, pairs.true)
    shared = pairs.where(at_true)
    # Around one true box the best-ranked box takes it; a box alone with several true boxes always gets one.
    first = shared.pred[np.argsort(place[shared.pred], kind="stable")]
    true = shared.true[np.argsort(place[shared.pred], kind="stable")]
    winners = first[np.unique(true, return_index=True)[1]]
    rest = pairs.where(~(at_true | at_pred))
    order = np.lexsort((-rest.true, -rest.iou, place[rest.pred]))
    matched: set[int] = set()
    taken: set[int] = set()
    for pred, true_ in zip(rest.pred[order].tolist(), rest.true[order].tolist(), strict=True):
        if pred not in matched and true_ not in taken:
            matched.add(pred)
            taken.add(true_)
    return np.concatenate([winners, np.unique(pairs.pred[at_pred]), np.array(sorted(matched), dtype=np.int64)])


def ap_intervals(
    classes: Sequence[Ranked], images: int, points: Mapping[str, float | None], *, resamples: int, seed: int
) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of ``ap``, ``ap50`` and ``ap75``: the number (``points``) plus and minus 1.96 bootstrap standard errors.

    The standard error is over at most 100 resamples of the images; an image drawn n times counts n times in the same
    ranking. Not percentiles: repeats make AP's precision envelope optimistic, so the resamples lie too high, by more
    than their spread on large sets. The ends are kept within 0 and 1. None where undefined.
    """
    if images < 2 or not classes:
        return dict.fromkeys(("ap", "ap50", "ap75"))
    found: list[FloatArray] = []
    for weights in draws(images, resamples=min(resamples, AP_RESAMPLES), seed=seed):
        by_class = np.stack([_in_parts(ranked, weights) for ranked in classes])
        there = np.isfinite(by_class)
        mean = np.full(by_class.shape[1:], np.nan)
        np.divide(np.where(there, by_class, 0.0).sum(axis=0), there.sum(axis=0), out=mean, where=there.any(axis=0))
        found.append(mean)
    by_threshold = np.concatenate(found)
    result: dict[str, tuple[float, float] | None] = {}
    for key, values in (("ap", by_threshold.mean(axis=1)), ("ap50", by_threshold[:, 0]), ("ap75", by_threshold[:, 5])):
        point, defined = points[key], values[np.isfinite(values)]
        if point is None or defined.size < max(2, 0.95 * values.size):
            result[key] = None
        else:
            half = 1.96 * float(defined.std(ddof=1))
            result[key] = (max(0.0, point - half), min(1.0, point + half))
    return result


def _least_hits(true: FloatArray) -> FloatArray:
    """``[B, 101]``: the fewest hits whose share of ``true [B]`` boxes reaches each recall, in the floating-point terms of the engine."""
    boxes = np.maximum(true, 1.0)[:, None]
    least = np.floor(boxes * _RECALLS) - 1
    for _ in range(3):
        least += least / boxes < _RECALLS
    return np.maximum(least, 0.0)


def _in_parts(ranked: Ranked, weights: FloatArray) -> FloatArray:
    parts = -(-len(weights) * len(ranked.image) // _CELLS) or 1
    return np.concatenate([weighted_ap(ranked, part) for part in np.array_split(weights, min(parts, len(weights)))])


def weighted_ap(ranked: Ranked, weights: FloatArray) -> FloatArray:
    """101-point interpolated AP ``[B, T]`` with each image counted ``weights [B, I]`` times; NaN without a true box."""
    true = weights @ ranked.true
    # Hits of all draws are searched at once, as whole numbers: those of draw b lie from b * stride on.
    stride = float(true.max(initial=0)) + 3
    offset = stride * np.arange(len(weights))[:, None]
    wanted = (_least_hits(true) + offset).ravel()
    result = np.zeros((len(weights), len(THRESHOLDS)))
    drawn = weights[:, ranked.image]
    everything = np.cumsum(drawn, axis=1)
    for t in range(len(THRESHOLDS)):
        # Precision only rises at a hit: the envelope needs no other place.
        hits = np.flatnonzero(ranked.hit[:, t])
        if not hits.size:
            continue
        found = np.cumsum(drawn[:, hits], axis=1)
        counted = everything if ranked.counted[:, t].all() else np.cumsum(drawn * ranked.counted[:, t], axis=1)
        # A last column of precision 0 stands for a recall that is never reached. Before the first hit that is drawn both are 0.
        precision = np.zeros((len(weights), hits.size + 1))
        np.divide(found, np.maximum(counted[:, hits], 1.0), out=precision[:, :-1])
        reached = np.full(precision.shape, stride - 1)
        reached[:, :-1] = found
        at = np.searchsorted((reached + offset).ravel(), wanted, side="left")
        best = np.maximum.reduceat(precision.ravel(), at).reshape(len(weights), -1)
        result[:, t] = np.maximum.accumulate(best[:, ::-1], axis=1).mean(axis=1)
    result[true == 0] = np.nan
    return result
