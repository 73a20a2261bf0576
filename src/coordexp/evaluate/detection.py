"""F1, precision and recall without scores: counts of matched boxes, and the numbers made of them.

Each threshold is matched on its own, see :mod:`coordexp.evaluate.matching`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from coordexp.boxes import area
from coordexp.evaluate.bootstrap import Ratio
from coordexp.evaluate.matching import THRESHOLDS, Candidates, candidates, match_all, overlap, overlapping, same_label
from coordexp.evaluate.registry import REPORTED, REX_OMNI
from coordexp.evaluate.samples import BoolArray, Flat, FloatArray, IntArray


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


def count_matches(flat: Flat, *, class_aware: bool, found: Candidates | None = None) -> MatchCounts:
    """Match every image at every threshold and count. ``found`` (of all labels) may be handed in by a caller that has it.

    A predicted box without a match is ignored at a threshold, not false, where that share of its own area lies in one
    crowd region (of its own description, class-aware): COCO's rule for ``iscrowd``. Class-aware with LVIS metadata it is
    ignored, too, where its category is neither labelled nor known to be absent in the image, or not labelled in full.
    """
    found = candidates(flat) if found is None else found
    if class_aware:
        found = same_label(flat, found)
    images = flat.images
    ignored = ignorable(flat, class_aware=class_aware)
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


def ignorable(flat: Flat, *, class_aware: bool, federated: bool = True) -> BoolArray:
    """``[P, T]``: predicted boxes that would not count as false if they had no match; without ``federated`` by crowds alone."""
    result = _crowd_share(flat, class_aware=class_aware)[:, None] >= np.array(THRESHOLDS)
    if federated and class_aware and flat.federated is not None:
        result |= ~_judged(flat)[:, None]
    return result


def _judged(flat: Flat) -> BoolArray:
    """``[P]``: predicted boxes whose category is labelled in their image, or known to be absent, and labelled in full."""
    number = {label: k for k, label in enumerate(flat.labels)}
    stride = len(flat.labels)

    def cells(sets: Iterable[tuple[int, frozenset[str]]]) -> IntArray:
        return np.array([i * stride + number[label] for i, names in sets for label in names if label in number], dtype=np.int64)

    rules = flat.federated or ()
    wanted = flat.pred_image * stride + flat.pred_label
    known = np.concatenate([flat.true_image * stride + flat.true_label, cells((i, rule.negative) for i, rule in enumerate(rules))])
    open_ = cells((i, rule.not_exhaustive) for i, rule in enumerate(rules))
    return np.asarray(np.isin(wanted, known) & ~np.isin(wanted, open_), dtype=bool)


def _crowd_share(flat: Flat, *, class_aware: bool) -> FloatArray:
    """``[P]``: the largest share of each predicted box's area that lies in one crowd region; 0 for a box without area."""
    own = area(flat.pred_boxes)
    share = np.zeros(len(own))
    for pred, crowd in overlapping(flat, flat.crowd_image, flat.crowd_boxes) if len(flat.crowd_image) else ():
        counts = own[pred] > 0
        if class_aware:
            counts &= flat.pred_label[pred] == flat.crowd_label[crowd]
        pred, crowd = pred[counts], crowd[counts]
        np.maximum.at(share, pred, overlap(flat.pred_boxes[pred], flat.crowd_boxes[crowd]) / own[pred])
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


def rex_omni_metrics(counts: MatchCounts) -> dict[str, float | None]:
    """``f1_rex_omni.{50,95,mean}``: the mean of F1 over the classes of the ground truth *whose F1 is above 0* at that threshold.

    ``mean`` is over IoU .5:.05:.95 of that. Classes that are never found are left out, so it is at least macro F1. Written after the
    description of Rex-Omni's evaluation (2510.12798), whose figures LocateAnything (2605.27365) prints beside its own.
    """
    values = np.stack(list(class_f1(counts).values())) if counts.class_true else np.zeros((0, len(THRESHOLDS)))
    found = (values > 0).sum(axis=0)
    if not len(values):
        return dict.fromkeys(f"f1_rex_omni.{key}" for key in REX_OMNI)
    mean = values.sum(axis=0) / np.maximum(found, 1)
    return {f"f1_rex_omni.{key}": float(mean.mean() if key == "mean" else mean[REPORTED[key]]) for key in REX_OMNI}


def micro_ratio(counts: MatchCounts, name: str, *, first_only: bool = False) -> Ratio:
    """The statistic behind ``<name>.50`` (``first_only``) or ``<name>.mean``, by image: ``f1``, ``precision`` or ``recall``."""
    kept = slice(0, 1) if first_only else slice(None)
    tp, predicted = counts.tp[:, kept].astype(np.float64), counts.predicted[:, kept].astype(np.float64)
    true = np.repeat(counts.true[:, None], tp.shape[1], axis=1).astype(np.float64)
    numerator, denominator = {"f1": (2 * tp, predicted + true), "precision": (tp, predicted), "recall": (tp, true)}[name]
    return Ratio(numerator, denominator)


def macro_ratio(counts: MatchCounts, flat: Flat) -> Ratio | None:
    """The statistic behind ``macro_f1.50``, by image and class; a class takes part in the resamples that hold a true box of it.

    None without a true box.
    """
    classes = np.flatnonzero(np.bincount(flat.true_label, minlength=len(flat.labels)))
    if not classes.size:
        return None
    column = np.full(len(flat.labels), -1, dtype=np.int64)
    column[classes] = np.arange(classes.size)

    def table(image: IntArray, label: IntArray) -> sparse.csr_array:
        own = column[label] >= 0
        cells = (np.ones(int(own.sum())), (image[own], column[label[own]]))
        return sparse.csr_array(sparse.coo_array(cells, shape=(flat.images, classes.size)))

    true = table(flat.true_image, flat.true_label)
    kept = np.ones(len(flat.pred_image), dtype=bool) if counts.ignored is None else ~counts.ignored[:, 0]
    predicted = table(flat.pred_image[kept], flat.pred_label[kept])
    pairs = counts.pairs[0][1]
    return Ratio(2 * table(flat.true_image[pairs], flat.true_label[pairs]), predicted + true, present=true)
