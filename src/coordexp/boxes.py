"""Axis-aligned boxes as ``[x1, y1, x2, y2]`` arrays: validity, area, IoU, matching. Units follow the input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def as_boxes(boxes: ArrayLike) -> NDArray[np.float64]:
    """``[N, 4]`` float64 array; an empty input gives shape ``[0, 4]``.

    Raises:
        ValueError: any other shape.
    """
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must have shape [N, 4], got {list(array.shape)}")
    return array


def area(boxes: ArrayLike) -> NDArray[np.float64]:
    """Area of each box, ``(x2 - x1)(y2 - y1)``; a reversed box has area 0."""
    array = as_boxes(boxes)
    return np.maximum(array[:, 2] - array[:, 0], 0) * np.maximum(array[:, 3] - array[:, 1], 0)


def iou_matrix(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of every pair, ``[N, M]``; 0 where the union is empty."""
    first, second = as_boxes(a), as_boxes(b)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = np.prod(np.maximum(high - low, 0), axis=-1)
    union = area(first)[:, None] + area(second)[None, :] - overlap
    result = np.zeros_like(overlap)
    np.divide(overlap, union, out=result, where=union > 0)
    return result


def box_problem(box: Sequence[float], width: float, height: float) -> str | None:
    """Why a pixel box cannot be used, or None: wrong length, non-finite, reversed or empty, outside the image."""
    if len(box) != 4:
        return f"expected 4 numbers [x1, y1, x2, y2], got {len(box)}"
    if not all(math.isfinite(v) for v in box):
        return f"expected finite numbers, got {list(box)}"
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return f"expected x2 > x1 and y2 > y1, got {list(box)}"
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        return f"expected a box inside the {width:g}x{height:g} image, got {list(box)}"
    return None


def bounding_box(points: Sequence[float]) -> tuple[float, float, float, float]:
    """Smallest box around a flat list ``[x1, y1, x2, y2, ...]`` of points."""
    xs, ys = points[0::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def polygon_order(points: Sequence[float]) -> tuple[int, ...]:
    """Canonical order of the vertices of ``[x1, y1, x2, y2, ...]``, as indices into them.

    The walk along the outline is kept; only where it starts and which way it runs are chosen: from the topmost
    vertex (the leftmost of several), clockwise as seen on the screen (y down), so a positive shoelace sum
    ``sum(x_i y_{i+1} - x_{i+1} y_i)``. Where the sum is 0, or a vertex occurs twice, the smallest sequence by (y, x) decides.
    Equal for every rotation and reversal of a polygon.
    """
    corners = list(zip(points[1::2], points[0::2], strict=True))
    count = len(corners)
    pairs = [(corners[i], corners[(i + 1) % count]) for i in range(count)]
    # The exactly rounded sum has the same sign from every start, so the choice cannot flip.
    turn = math.fsum(term for (y1, x1), (y2, x2) in pairs for term in (x1 * y2, -x2 * y1))
    steps = (1, -1) if turn == 0 else (1,) if turn > 0 else (-1,)
    starts = [i for i in range(count) if corners[i] == min(corners)]
    walks = (tuple((start + step * i) % count for i in range(count)) for step in steps for start in starts)
    return min(walks, key=lambda walk: [corners[i] for i in walk])
