"""F1, precision and recall without scores: counts of matched boxes, and the numbers made of them.

Each threshold is matched on its own, see :mod:`coordexp.evaluate.matching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from coordexp.boxes import area
from coordexp.evaluate.bootstrap import Ratio
from coordexp.evaluate.matching import THRESHOLDS, Candidates, candidates, match, match_all
from coordexp.evaluate.samples import FILE_READOUT, BoolArray, Flat, FloatArray, IntArray, Sample, flatten

__all__ = ["FILE_READOUT", "REPORTED", "THRESHOLDS", "MatchCounts", "Sample", "count_matches", "macro_metrics", "match", "micro_metrics"]

# Names of the reported thresholds and their index in THRESHOLDS; "mean" is the plain mean over all of them.
REPORTED: Final[dict[str, int]] = {"50": 0, "75": 5, "90": 8, "95": 9}
# Most cells of an images x classes table that gets an interval: 160 MB of float64.
_MACRO_CELLS: Final = 20_000_000


@dataclass(frozen=True)
class MatchCounts:
    """Counts by image: ``tp [I, T]`` over THRESHOLDS, ``predicted [I, T]`` (ignored boxes are not among them), ``true [I]``.

    The ``class_*`` dicts hold the same counts summed over images by description (``class_tp`` and ``class_predicted`` are ``[T]``);
    they are filled by class-aware matching only. ``pairs`` are the matched predicted and true boxes at each threshold and
    ``ignored [P, T]`` the predicted boxes that do not count, both by index into ``flat``.
    """

    tp: IntArray
    predicted: IntArray
    true: IntArray
    class_tp: dict[str, IntArray] = field(default_factory=dict)
    class_predicted: dict[str, IntArray] = field(default_factory=dict)
    class_true: dict[str, int] = field(default_factory=dict)
    pairs: tuple[tuple[IntArray, IntArray], ...] = ()
    ignored: BoolArray | None = None


def count_matches(
    samples: Sequence[Sample], readout: str, *, class_aware: bool, flat: Flat | None = None, found: Candidates | None = None
) -> MatchCounts:
    """Match every image at every threshold and count. ``flat`` and ``found`` may be handed in by a caller that has them.

    A predicted box without a match is ignored at a threshold, not false, where that share of its own area lies in one
    crowd region (of its own description, class-aware): COCO's rule for ``iscrowd``. Class-aware with LVIS metadata it is
    ignored, too, where its category is neither labelled nor known to be absent in the image, or not labelled in full.
    """
    flat = flatten(samples, readout) if flat is None else flat
    found = candidates(flat) if found is None else found
    if class_aware:
        found = found.where(flat.pred_label[found.pred] == flat.true_label[found.true])
    images = flat.images
    ignored = ignorable(samples, readout, class_aware=class_aware)
    pairs = tuple(match_all(found, flat, threshold) for threshold in THRESHOLDS)
    tp = np.zeros((images, len(THRESHOLDS)), dtype=np.int64)
    for t, (pred, _) in enumerate(pairs):
        tp[:, t] = np.bincount(flat.pred_image[pred], minlength=images)
        ignored[pred, t] = False
    predicted = np.repeat(np.bincount(flat.pred_image, minlength=images)[:, None], len(THRESHOLDS), axis=1)
    if ignored.any():
        for t in range(len(THRESHOLDS)):
            predicted[:, t] -= np.bincount(flat.pred_image[ignored[:, t]], minlength=images)
    counts = MatchCounts(tp, predicted, np.bincount(flat.true_image, minlength=images), pairs=pairs, ignored=ignored)
    if class_aware:
        _by_class(counts, flat, ignored)
    return counts


def _by_class(counts: MatchCounts, flat: Flat, ignored: BoolArray) -> None:
    size = len(flat.labels)
    true = np.bincount(flat.true_label, minlength=size)
    some = np.bincount(flat.pred_label, minlength=size)
    tp = np.stack([np.bincount(flat.true_label[true_], minlength=size) for _, true_ in counts.pairs], axis=1)
    kept = np.stack([np.bincount(flat.pred_label[~ignored[:, t]], minlength=size) for t in range(len(THRESHOLDS))], axis=1)
    for k, label in enumerate(flat.labels):
        counts.class_tp[label] = tp[k]
        if true[k]:
            counts.class_true[label] = int(true[k])
        if some[k]:
            counts.class_predicted[label] = kept[k]


def ignorable(samples: Sequence[Sample], readout: str, *, class_aware: bool, federated: bool = True) -> BoolArray:
    """``[P, T]``: predicted boxes that would not count as false if they had no match; without ``federated`` by crowds alone."""
    ends = np.cumsum([0, *(len(s.pred_labels) for s in samples)])
    result = np.zeros((int(ends[-1]), len(THRESHOLDS)), dtype=bool)
    for i, sample in enumerate(samples):
        own = slice(int(ends[i]), int(ends[i + 1]))
        if sample.crowd_labels and sample.pred_labels:
            result[own] = _crowd_share(sample, readout, class_aware=class_aware)[:, None] >= np.array(THRESHOLDS)
        if federated and class_aware and sample.federated is not None:
            judged = (set(sample.true_labels) | sample.federated.negative) - sample.federated.not_exhaustive
            result[own] |= np.array([label not in judged for label in sample.pred_labels], dtype=bool)[:, None]
    return result


def _crowd_share(sample: Sample, readout: str, *, class_aware: bool) -> FloatArray:
    """``[P]``: the largest share of each predicted box's area that lies in one crowd region; 0 for a box without area."""
    boxes = sample.pred_boxes[readout]
    low = np.maximum(boxes[:, None, :2], sample.crowd_boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], sample.crowd_boxes[None, :, 2:])
    overlap = np.prod(np.maximum(high - low, 0), axis=-1)
    if class_aware:
        overlap = overlap * np.array([[p == c for c in sample.crowd_labels] for p in sample.pred_labels], dtype=bool)
    own = area(boxes)
    share = np.zeros(len(boxes))
    np.divide(overlap.max(axis=1, initial=0), own, out=share, where=own > 0)
    return share


def micro_metrics(counts: MatchCounts) -> dict[str, float | None]:
    """``{f1,precision,recall}.{50,75,90,95,mean}`` over all boxes of all images.

    ``precision = tp / predicted``, ``recall = tp / true``, ``f1 = 2 tp / (predicted + true)``. Where there is nothing on
    one side, what is 0/0 counts as 0: no prediction has precision 0, no true box has recall 0. Where there is nothing
    on either side all three are None.
    """
    tp, predicted, true = counts.tp.sum(axis=0), counts.predicted.sum(axis=0), np.full(len(THRESHOLDS), counts.true.sum())
    nothing = predicted + true == 0
    metrics: dict[str, float | None] = {}
    for name, numerator, denominator in (("f1", 2 * tp, predicted + true), ("precision", tp, predicted), ("recall", tp, true)):
        values = np.divide(numerator, denominator, out=np.zeros(len(THRESHOLDS)), where=denominator > 0)
        for key, index in REPORTED.items():
            metrics[f"{name}.{key}"] = None if nothing[index] else float(values[index])
        metrics[f"{name}.mean"] = None if nothing.any() else float(values.mean())
    return metrics


def class_f1(counts: MatchCounts) -> dict[str, FloatArray]:
    """F1 ``[T]`` of every class of the ground truth; 0 for one without predictions."""
    none = np.zeros(len(THRESHOLDS), dtype=np.int64)
    return {label: 2 * counts.class_tp[label] / (n + counts.class_predicted.get(label, none)) for label, n in counts.class_true.items()}


def macro_metrics(counts: MatchCounts) -> dict[str, float | None]:
    """``macro_f1.{50,75,90,95,mean}``: the plain mean of F1 over the classes of the ground truth.

    A class without predictions stays in with 0. A predicted description that the truth never uses is no
    class of its own: it lowers micro precision instead. None where the truth has no box.
    """
    if not counts.class_true:
        return {f"macro_f1.{key}": None for key in (*REPORTED, "mean")}
    values = np.mean(list(class_f1(counts).values()), axis=0)
    metrics: dict[str, float | None] = {f"macro_f1.{key}": float(values[index]) for key, index in REPORTED.items()}
    metrics["macro_f1.mean"] = float(values.mean())
    return metrics


def micro_ratio(counts: MatchCounts, name: str, *, first_only: bool = False) -> Ratio:
    """The statistic behind ``<name>.50`` (``first_only``) or ``<name>.mean``, by image: ``f1``, ``precision`` or ``recall``."""
    kept = slice(0, 1) if first_only else slice(None)
    tp, predicted = counts.tp[:, kept].astype(np.float64), counts.predicted[:, kept].astype(np.float64)
    true = np.repeat(counts.true[:, None], tp.shape[1], axis=1).astype(np.float64)
    numerator, denominator = {"f1": (2 * tp, predicted + true), "precision": (tp, predicted), "recall": (tp, true)}[name]
    return Ratio(numerator, denominator)


def macro_ratio(counts: MatchCounts, flat: Flat) -> Ratio | None:
    """The statistic behind ``macro_f1.50``, by image and class; a class takes part in the resamples that hold a true box of it.

    None where the table of images by classes would be too large, and without a true box.
    """
    classes = np.flatnonzero(np.bincount(flat.true_label, minlength=len(flat.labels)))
    if not classes.size or flat.images * classes.size > _MACRO_CELLS:
        return None
    column = np.full(len(flat.labels), -1, dtype=np.int64)
    column[classes] = np.arange(classes.size)

    def table(image: IntArray, label: IntArray) -> FloatArray:
        own = column[label] >= 0
        cells = image[own] * classes.size + column[label[own]]
        return np.bincount(cells, minlength=flat.images * classes.size).reshape(flat.images, classes.size).astype(np.float64)

    true = table(flat.true_image, flat.true_label)
    kept = np.ones(len(flat.pred_image), dtype=bool) if counts.ignored is None else ~counts.ignored[:, 0]
    predicted = table(flat.pred_image[kept], flat.pred_label[kept])
    pairs = counts.pairs[0][1]
    return Ratio(2 * table(flat.true_image[pairs], flat.true_label[pairs]), predicted + true, present=true)
