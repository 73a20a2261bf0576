"""From a record to the instances of its answer, and back to pixels. numpy only: training, statistics and pictures share it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import numpy as np

from coordexp.boxes import bounding_box, polygon_order
from coordexp.codec import CoordCodec
from coordexp.data.options import PHRASE_FIELD, AnswerGeometry, unknown_field
from coordexp.data.rows import Record, RecordObject
from coordexp.errors import ConfigError, DataError
from coordexp.grammar import Geometry, Instance, geometries_of

_RESERVED = re.compile(r"<\|[^|<>]*\|>")
# Of a record's metadata: what refers to its one object.
PHRASE: Final = "phrase"


def ask(prompt: str, record: Record) -> str:
    """The question about a record: ``prompt`` with the record's ``metadata.phrase`` in the place of ``{phrase}``.

    Raises:
        ConfigError: another ``{word}`` in the prompt.
        DataError: a prompt that asks for a phrase and a record without one, or one that holds a reserved token.
    """
    if (unknown := unknown_field(prompt)) is not None:
        raise ConfigError(f"prompt {prompt!r}: {unknown} is no field of it: expected {PHRASE_FIELD}, the phrase of a record")
    if PHRASE_FIELD not in prompt:
        return prompt
    phrase = record.metadata.get(PHRASE)
    if not isinstance(phrase, str) or not phrase.strip():
        raise DataError(
            f"{record.source}: metadata.phrase: expected a text, got {'none' if phrase is None else repr(phrase)}: "
            f"the prompt {prompt!r} asks for it"
        )
    if _RESERVED.search(phrase):
        raise DataError(f"{record.source}: metadata.phrase: expected plain text, got {phrase!r}, which holds a reserved token")
    return prompt.replace(PHRASE_FIELD, phrase)


def record_instances(
    record: Record, codec: CoordCodec, *, geometry: AnswerGeometry = "recorded", order: str = "sorted", seed: int = 0, epoch: int = 0
) -> tuple[list[Instance], int]:
    """The record's objects as bins, in answer order, and how many boxes had to be reopened.

    Crowd regions are left out, they are no single object, and difficult objects. ``sorted`` is by (y1, x1) of the bounding box, of what
    is written; ``random`` is a pure function of ``seed``, ``epoch`` and image id. Polygons run in :func:`coordexp.boxes.polygon_order`.
    ``geometry``: see :class:`coordexp.data.options.DataOptions`.

    Raises:
        DataError: a description that holds a reserved token, or a point that is to be a box.
    """
    made = [_instance(record, item, codec) for item in answer_objects(record, geometry=geometry, order=order, seed=seed, epoch=epoch)]
    return [instance for instance, _ in made], sum(moved for _, moved in made)


def answer_geometries(records: Iterable[Record], geometry: AnswerGeometry = "recorded") -> tuple[Geometry, ...]:
    """The geometries that answers to these records hold, in the order of the grammar; without objects ``bbox_2d``."""
    if geometry != "recorded":
        return (geometry,)
    return geometries_of({item.geometry for record in records for item in record.objects if item.taught})


def answer_objects(
    record: Record, *, geometry: AnswerGeometry = "recorded", order: str = "sorted", seed: int = 0, epoch: int = 0
) -> list[RecordObject]:
    """The objects as :func:`record_instances` writes them, in its order."""
    objects = sorted((drawn_as(item, geometry, record.source) for item in record.objects if item.taught), key=_position)
    if order == "random":
        random.Random(f"{seed}:{epoch}:{record.image_id}").shuffle(objects)
    return objects


def drawn_as(item: RecordObject, geometry: AnswerGeometry, source: str = "") -> RecordObject:
    """The object as an answer writes it: as ``recorded``, its bounding box, or the centre of that.

    Raises:
        DataError: a point that is to be a box.
    """
    if geometry == "recorded" or geometry == item.geometry:
        return item
    if item.geometry == "point_2d":
        raise DataError(f"{source}: a point_2d has no box: set data.geometry to recorded or point_2d, or give a box for {item.desc!r}")
    x1, y1, x2, y2 = bounding_box(item.values)
    values = (x1, y1, x2, y2) if geometry == "bbox_2d" else ((x1 + x2) / 2, (y1 + y2) / 2)
    return replace(item, geometry=geometry, values=values)


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
