"""F1, precision and recall by size and shape of the object and by how crowded the image is, each with its n."""

from __future__ import annotations

import numpy as np

from coordexp.boxes import area
from coordexp.codec import CoordCodec
from coordexp.evaluate.detection import MatchCounts, micro_metrics
from coordexp.evaluate.matching import THRESHOLDS
from coordexp.evaluate.registry import ASPECTS, BIN_SIZES, COCO_SIZES, CROWDING, SHOWN
from coordexp.evaluate.samples import BoolArray, Flat, FloatArray, IntArray


def sides_px(boxes: FloatArray) -> FloatArray:
    """Side ``[N]`` of the square of the same area, in pixels."""
    return np.asarray(np.sqrt(area(boxes)))


def sides_bins(boxes: FloatArray, image: IntArray, flat: Flat, codec: CoordCodec) -> FloatArray:
    """Geometric mean ``[N]`` of width and height in bins of the image's sides."""
    return np.asarray(sides_px(boxes) * (codec.scale / np.sqrt(flat.width * flat.height))[image])


def aspects(boxes: FloatArray) -> FloatArray:
    """Longer side over shorter one ``[N]``, at least 1; infinite for a box without extent in one direction."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    ratio = np.full(len(boxes), np.inf)
    np.divide(sides.max(axis=1, initial=0), sides.min(axis=1, initial=np.inf), out=ratio, where=sides.min(axis=1, initial=np.inf) > 0)
    return ratio


def bucket_metrics(counts: MatchCounts, flat: Flat, codec: CoordCodec) -> dict[str, float | int | None]:
    """``{size,bins,aspect,crowding}.<bucket>.{f1.50,f1.mean,precision.50,recall.50,n}``; ``crowding`` has ``images`` too.

    ``size``: the box's side ``sqrt(area)`` in pixels, small ``< 32 <=`` medium ``< 96 <=`` large. ``bins``: the same in bins of the
    grid. ``aspect``: :func:`aspects`. A matched predicted box belongs to the bucket of its true box, any other to its own; n is the number
    of true boxes. ``crowding``: all boxes of the images with that many true boxes.
    """
    result: dict[str, float | int | None] = {}
    sizes = (
        ("size", COCO_SIZES, sides_px(flat.true_boxes), sides_px(flat.pred_boxes)),
        (
            "bins",
            BIN_SIZES,
            sides_bins(flat.true_boxes, flat.true_image, flat, codec),
            sides_bins(flat.pred_boxes, flat.pred_image, flat, codec),
        ),
        ("aspect", ASPECTS, aspects(flat.true_boxes), aspects(flat.pred_boxes)),
    )
    for kind, buckets, true_side, pred_side in sizes:
        for name, low, high in buckets:
            true, pred = ((side >= low) & (side < high) for side in (true_side, pred_side))
            values = micro_metrics(_within(counts, true, pred))
            result |= {f"{kind}.{name}.{key}": values[key] for key in SHOWN} | {f"{kind}.{name}.n": int(true.sum())}
    for name, least, most in CROWDING:
        images = (counts.true >= least) & (counts.true <= most)
        values = micro_metrics(MatchCounts(counts.tp[images], counts.predicted[images], counts.true[images]))
        result |= {f"crowding.{name}.{key}": values[key] for key in SHOWN}
        result |= {f"crowding.{name}.n": int(counts.true[images].sum()), f"crowding.{name}.images": int(images.sum())}
    return result


def _within(counts: MatchCounts, true: BoolArray, pred: BoolArray) -> MatchCounts:
    """Counts over all images of one bucket; ``true [T]`` and ``pred [P]`` say which boxes have its size."""
    tp, predicted = (np.zeros((1, len(THRESHOLDS)), dtype=np.int64) for _ in range(2))
    for t, (pred_, true_) in enumerate(counts.pairs):
        free = pred.copy() if counts.ignored is None else pred & ~counts.ignored[:, t]
        free[pred_] = False
        tp[0, t] = true[true_].sum()
        predicted[0, t] = tp[0, t] + free.sum()
    return MatchCounts(tp, predicted, np.array([true.sum()]))
