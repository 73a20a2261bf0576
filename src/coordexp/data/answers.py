"""From a record to the instances of its answer, and back to pixels. numpy only: training, statistics and pictures share it."""

from __future__ import annotations

import random
import re

import numpy as np

from coordexp.boxes import bounding_box, polygon_order
from coordexp.codec import CoordCodec
from coordexp.data.rows import Record, RecordObject
from coordexp.errors import DataError
from coordexp.grammar import Instance

_RESERVED = re.compile(r"<\|[^|<>]*\|>")


def record_instances(
    record: Record, codec: CoordCodec, *, order: str = "sorted", seed: int = 0, epoch: int = 0
) -> tuple[list[Instance], int]:
    """The record's objects as bins, in answer order, and how many boxes had to be reopened.

    Crowd regions are left out: they are no single object. ``sorted`` is by (y1, x1) of the bounding box; ``random``
    is a pure function of ``seed``, ``epoch`` and image id. Polygons run in :func:`coordexp.boxes.polygon_order`.

    Raises:
        DataError: a description that holds a reserved token.
    """
    made = [_instance(record, item, codec) for item in answer_objects(record, order=order, seed=seed, epoch=epoch)]
    return [instance for instance, _ in made], sum(moved for _, moved in made)


def answer_objects(record: Record, *, order: str = "sorted", seed: int = 0, epoch: int = 0) -> list[RecordObject]:
    """The objects that :func:`record_instances` writes, in its order."""
    objects = sorted((item for item in record.objects if not item.crowd), key=_position)
    if order == "random":
        random.Random(f"{seed}:{epoch}:{record.image_id}").shuffle(objects)
    return objects


def answer_values(item: RecordObject) -> tuple[float, ...]:
    """The object's pixel values in the order in which the answer writes their bins."""
    if item.geometry != "poly":
        return item.values
    return tuple(v for i in polygon_order(item.values) for v in item.values[2 * i : 2 * i + 2])


def instance_pixels(instance: Instance, codec: CoordCodec, width: int, height: int) -> list[float]:
    """Pixel values of an instance's bins, x and y in turn."""
    return [float(codec.to_pixel(b, (width, height)[j % 2])) for j, b in enumerate(instance.bins)]


def _instance(record: Record, item: RecordObject, codec: CoordCodec) -> tuple[Instance, bool]:
    if _RESERVED.search(item.desc):
        raise DataError(f"{record.source}: desc: expected plain text, got {item.desc!r}, which holds a reserved token")
    values = answer_values(item)
    sides = np.where(np.arange(len(values)) % 2 == 0, record.width, record.height)
    moved = False
    if item.geometry == "bbox_2d":
        quantized, moved = codec.quantize_box(values, record.width, record.height)
        bins = tuple(quantized)
    else:
        bins = tuple(int(codec.quantize(v, s)) for v, s in zip(values, sides, strict=True))
    centers = tuple(float(codec.to_bin(v, s)) for v, s in zip(values, sides, strict=True))
    x1, y1, x2, y2 = bounding_box(values)
    spans = (float(codec.to_bin(x2 - x1, record.width)), float(codec.to_bin(y2 - y1, record.height)))
    extents = tuple(spans[j % 2] for j in range(len(bins)))
    return Instance(item.desc, bins, item.geometry, centers, extents), moved


def _position(item: RecordObject) -> tuple[float, float]:
    x1, y1, _, _ = bounding_box(item.values)
    return y1, x1
