"""One-to-one matching of boxes by IoU, of one image or of all images at once.

At a threshold ``t`` the pairs with ``IoU >= t`` are candidates; among all one-to-one matchings the one with the most
pairs is taken, and among those the one with the largest sum of IoU. So the result depends on no order of the boxes
(but for exact ties) and on no score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import linear_sum_assignment

from coordexp.boxes import area
from coordexp.evaluate.samples import BoolArray, Flat, FloatArray, IntArray

THRESHOLDS: Final[tuple[float, ...]] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
# Pairs whose IoU is computed at a time: bounds memory where images have thousands of boxes.
_BLOCK: Final = 2_000_000


@dataclass(frozen=True)
class Candidates:
    """Pairs of a predicted and a true box of one image with ``IoU >= .5``: indices into :class:`Flat` and the IoU, by predicted box."""

    pred: IntArray
    true: IntArray
    iou: FloatArray

    def where(self, mask: BoolArray) -> Candidates:
        """The pairs that ``mask`` keeps."""
        return Candidates(self.pred[mask], self.true[mask], self.iou[mask])


def match(iou: FloatArray, threshold: float) -> tuple[IntArray, IntArray]:
    """Row and column indices of the best one-to-one matching of ``iou [N, M]`` (see the module's text).

    ``threshold`` must be above 0: a pair without overlap is never a match. Solved as an assignment with
    weight ``min(N, M) + 1 + IoU`` per candidate, so that one more pair outweighs any gain in IoU.

    Raises:
        ValueError: a threshold outside ``(0, 1]``.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    candidates = iou >= threshold
    by_row, by_column = candidates.sum(axis=1), candidates.sum(axis=0)
    if (by_row <= 1).all() and (by_column <= 1).all():
        rows, columns = np.nonzero(candidates)
        return rows.astype(np.int64), columns.astype(np.int64)
    keep_rows, keep_columns = np.nonzero(by_row)[0], np.nonzero(by_column)[0]
    grid = np.ix_(keep_rows, keep_columns)
    weight = np.where(candidates[grid], min(iou.shape) + 1 + iou[grid], 0.0)
    rows, columns = linear_sum_assignment(weight, maximize=True)
    chosen = candidates[grid][rows, columns]
    return keep_rows[rows[chosen]].astype(np.int64), keep_columns[columns[chosen]].astype(np.int64)


def candidates(flat: Flat) -> Candidates:
    """All candidate pairs at the lowest threshold. The arithmetic is that of :func:`coordexp.boxes.iou_matrix`, to the last bit."""
    found: list[tuple[IntArray, IntArray, FloatArray]] = []
    for pred, true in overlapping(flat, flat.true_image, flat.true_boxes):
        a, b = flat.pred_boxes[pred], flat.true_boxes[true]
        shared = overlap(a, b)
        union = area(a) + area(b) - shared
        iou = np.zeros(len(a))
        np.divide(shared, union, out=iou, where=union > 0)
        near = iou >= THRESHOLDS[0]
        found.append((pred[near], true[near], iou[near]))
    if not found:
        none = np.zeros(0, dtype=np.int64)
        return Candidates(none, none, np.zeros(0))
    pred, true, iou = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Candidates(pred, true, iou)


def same_label(flat: Flat, pairs: Candidates) -> Candidates:
    """The pairs of equal labels."""
    return pairs.where(flat.pred_label[pairs.pred] == flat.true_label[pairs.true])


def overlapping(flat: Flat, other_image: IntArray, other_boxes: FloatArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Blocks of pairs of a predicted box and another box of its image that overlap along x, by predicted box."""
    count = np.bincount(other_image, minlength=flat.images)
    first_of = np.cumsum(count) - count
    width = count[flat.pred_image]
    ends = np.cumsum(width)
    (left, right), (other_left, other_right) = (boxes[:, [0, 2]].T.copy() for boxes in (flat.pred_boxes, other_boxes))
    start = 0
    while start < len(width):
        done = ends[start] - width[start]
        stop = max(start + 1, int(np.searchsorted(ends, done + _BLOCK, side="right")))
        pred = np.repeat(np.arange(start, stop), width[start:stop])
        first = np.repeat(ends[start:stop] - width[start:stop] - done, width[start:stop])
        other = first_of[flat.pred_image[pred]] + np.arange(len(pred)) - first
        # Most pairs lie apart already along x: they need no more arithmetic.
        meet = (right[pred] > other_left[other]) & (other_right[other] > left[pred])
        yield pred[meet], other[meet]
        start = stop


def overlap(a: FloatArray, b: FloatArray) -> FloatArray:
    """Shared area ``[N]`` of the boxes ``a [N, 4]`` and ``b [N, 4]``, one by one."""
    shared = np.maximum(np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0]), 0)
    shared *= np.maximum(np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1]), 0)
    return np.asarray(shared)


def match_all(pairs: Candidates, flat: Flat, threshold: float) -> tuple[IntArray, IntArray]:
    """Indices of matched predicted and true boxes of all images: :func:`match` of every image, in arrays.

    A group of overlapping pairs in which all share one box is a star: its best pair is the matching. Only what is
    left (a few crowded images) goes through the assignment solver.
    """
    pairs = pairs.where(pairs.iou >= threshold)
    stars = star_pairs(pairs.true, pairs.pred) | star_pairs(pairs.pred, pairs.true)
    star = pairs.where(stars)
    # Pairs of one star have the same centre: the box with the most pairs, here known by either side.
    order = np.lexsort((np.arange(len(star.iou)), -star.iou))
    pred, true = star.pred[order], star.true[order]
    # A pair alone is first of both its boxes; in a star the centre repeats and its first pair wins.
    first = _first(pred, len(flat.pred_image)) & _first(true, len(flat.true_image))
    rest = pairs.where(~stars)
    more_pred, more_true = _assign(rest, flat, threshold)
    return np.concatenate([pred[first], more_pred]), np.concatenate([true[first], more_true])


def _first(box: IntArray, size: int) -> BoolArray:
    """Where each box occurs for the first time."""
    place = np.full(size, len(box), dtype=np.int64)
    place[box[::-1]] = np.arange(len(box))[::-1]
    return np.asarray(place[box] == np.arange(len(box)), dtype=bool)


def star_pairs(centre: IntArray, leaf: IntArray) -> BoolArray:
    """Pairs whose ``centre`` box has only pairs with boxes that have no other pair."""
    single = np.bincount(leaf)[leaf] == 1 if leaf.size else np.zeros(0, dtype=bool)
    shared = np.bincount(centre, weights=~single) if centre.size else np.zeros(0)
    return np.asarray(shared[centre] == 0, dtype=bool) if centre.size else single


def _assign(pairs: Candidates, flat: Flat, threshold: float) -> tuple[IntArray, IntArray]:
    image = flat.pred_image[pairs.pred]
    edges = np.flatnonzero(np.diff(image)) + 1
    pred, true = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for part in np.split(np.arange(len(image)), edges) if len(image) else ():
        rows, row = np.unique(pairs.pred[part], return_inverse=True)
        columns, column = np.unique(pairs.true[part], return_inverse=True)
        iou = np.zeros((len(rows), len(columns)))
        iou[row, column] = pairs.iou[part]
        found = match(iou, threshold)
        pred.append(rows[found[0]])
        true.append(columns[found[1]])
    return np.concatenate(pred), np.concatenate(true)
