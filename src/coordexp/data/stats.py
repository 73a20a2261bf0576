"""``coordexp data stats``: what a record file holds, and how good its boxes can get on a coordinate grid. numpy only."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordexp.codec import CoordCodec
from coordexp.data.answers import record_instances
from coordexp.data.records import Record
from coordexp.grammar import render

FloatArray = NDArray[np.float64]
# COCO's size buckets, by box area in pixels.
BUCKETS: Final = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}


def data_stats(records: Sequence[Record], codec: CoordCodec, count_tokens: Callable[[str], int] | None = None) -> dict[str, Any]:
    """Counts and distributions of records, JSON-ready.

    ``quantisation.<bucket>`` has ``boxes``, ``ceiling_iou`` (the best mean IoU that any answer on the grid can reach) and
    ``label_iou`` (that of the labels that training uses: nearest bins, collapsed boxes reopened), None without a box; buckets are
    ``all`` and COCO's ``small``, ``medium``, ``large``. Crowds are counted, but are no boxes. ``tokens`` is the answer's length
    by ``count_tokens``, one call a record; absent without it.
    """
    items = [item for record in records for item in record.objects]
    single = [[item for item in record.objects if item.taught] for record in records]
    boxes = [
        (item.values, record) for record, objects in zip(records, single, strict=True) for item in objects if item.geometry == "bbox_2d"
    ]
    values = np.array([box for box, _ in boxes], dtype=np.float64).reshape(-1, 4)
    sides = np.array([(r.width, r.height) * 2 for _, r in boxes], dtype=np.float64).reshape(-1, 4)
    answers = [record_instances(record, codec) for record in records]
    stats: dict[str, Any] = {
        "images": len(records),
        "images_without_objects": sum(not objects for objects in single),
        "objects": sum(map(len, single)),
        "crowd_regions": sum(item.crowd for item in items),
        "geometries": dict(Counter(item.geometry for objects in single for item in objects)),
        "classes": dict(Counter(item.desc for objects in single for item in objects).most_common()),
        "image_width": _summary([record.width for record in records]),
        "image_height": _summary([record.height for record in records]),
        "objects_per_image": _summary([len(objects) for objects in single]),
        "box_width": _summary(values[:, 2] - values[:, 0]),
        "box_height": _summary(values[:, 3] - values[:, 1]),
        "reopened_boxes": sum(moved for _, moved in answers),
        "convention": codec.convention,
        "quantisation": quantisation(values, sides, codec),
    }
    if count_tokens is not None:
        stats["tokens"] = _summary([count_tokens(render(instances).text) for instances, _ in answers])
    return stats


def quantisation(boxes: FloatArray, sides: FloatArray, codec: CoordCodec) -> dict[str, dict[str, Any]]:
    """By size bucket: how many boxes, and their mean IoU at best and as labelled. ``boxes`` and ``sides`` are ``[N, 4]``."""
    size = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    best, labelled = ceiling_iou(boxes, sides, codec), label_iou(boxes, sides, codec)
    found = {}
    for name, (low, high) in {"all": (0.0, float("inf")), **BUCKETS}.items():
        chosen = (size >= low) & (size < high)
        some = bool(chosen.any())
        found[name] = {
            "boxes": int(chosen.sum()),
            "ceiling_iou": float(best[chosen].mean()) if some else None,
            "label_iou": float(labelled[chosen].mean()) if some else None,
        }
    return found


def ceiling_iou(boxes: FloatArray, sides: FloatArray, codec: CoordCodec) -> FloatArray:
    """``[N]``: the largest IoU of each box with any box on the grid that extends in x and y.

    With the other three edges fixed, IoU falls on both sides of the true edge; so the best edge is one of the two bins
    around it, and 16 combinations hold the maximum.
    """
    position = np.asarray(codec.to_bin(boxes, sides))
    around = np.stack([np.floor(position), np.ceil(position)]).clip(0, codec.num_bins - 1)
    # An edge on a bin has one candidate, and both edges of a box may share it only if the box is empty.
    best = np.zeros(len(boxes))
    for pick in itertools.product((0, 1), repeat=4):
        bins = np.stack([around[choice, :, slot] for slot, choice in enumerate(pick)], axis=1)
        best = np.maximum(best, _iou(np.asarray(codec.to_pixel(bins, sides)), boxes))
    return best


def label_iou(boxes: FloatArray, sides: FloatArray, codec: CoordCodec) -> FloatArray:
    """``[N]``: IoU of each box with its own label, read back."""
    bins = [codec.quantize_box(box, side[0], side[1])[0] for box, side in zip(boxes, sides, strict=True)]
    return _iou(np.asarray(codec.to_pixel(np.array(bins, dtype=np.float64).reshape(-1, 4), sides)), boxes)


def _iou(a: FloatArray, b: FloatArray) -> FloatArray:
    """IoU row by row."""
    overlap = np.prod(np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0), axis=1)
    areas = [np.prod(np.maximum(c[:, 2:] - c[:, :2], 0), axis=1) for c in (a, b)]
    result: FloatArray = overlap / (areas[0] + areas[1] - overlap)
    return result


def _summary(values: Any) -> dict[str, float] | None:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return None
    quantiles = {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}
    return {"mean": float(array.mean()), **{name: float(np.percentile(array, q)) for name, q in quantiles.items()}}
