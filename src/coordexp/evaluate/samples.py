"""Boxes of truth and prediction as arrays over all images: what every metric starts from."""

from __future__ import annotations

import math
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordexp.boxes import as_boxes, bounding_box
from coordexp.data.answers import PHRASE
from coordexp.data.records import Record, RecordObject
from coordexp.errors import ComparisonError
from coordexp.evaluate.predictions import Prediction
from coordexp.evaluate.registry import FILE_READOUT

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

NEGATIVE: Final = "neg_categories"
NOT_EXHAUSTIVE: Final = "not_exhaustive_categories"
FREQUENCY: Final = "category_frequency"


@lru_cache(maxsize=65536)
def normalise(description: str) -> str:
    """The form in which descriptions are compared: Unicode NFKC, case folded, runs of white space as one blank, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", description).casefold().split())


@dataclass(frozen=True)
class Federated:
    """What LVIS says of an image: categories known to be absent, categories not labelled in full, and frequencies (r, c, f)."""

    negative: frozenset[str]
    not_exhaustive: frozenset[str]
    frequency: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One image's truth and prediction. Boxes are ``[*, 4]`` xyxy in pixels; ``pred_boxes`` is by readout.

    ``pred_boxes["file"]`` is ``bbox_2d`` as it stands. ``scores`` is None where the file has none. Crowd regions are
    no truth to be found: see :func:`coordexp.evaluate.detection.count_matches`. Labels are compared as they are.
    """

    image_id: str
    width: int
    height: int
    true_labels: tuple[str, ...]
    true_boxes: FloatArray
    pred_labels: tuple[str, ...]
    pred_boxes: dict[str, FloatArray]
    scores: FloatArray | None
    crowd_labels: tuple[str, ...] = ()
    crowd_boxes: FloatArray = field(default_factory=lambda: np.zeros((0, 4)))
    federated: Federated | None = None


@dataclass(frozen=True)
class Flat:
    """The boxes of I images one after another: P predicted, T true, C crowd regions. Labels are indices into ``labels``.

    An image is one record; ``photo [I]`` numbers the picture it shows, which several records can share. ``boxes`` holds the predicted
    boxes by readout, and ``pred_boxes`` those that :meth:`at` chose. ``area [T]`` is what the annotations say, None where they say it
    not of every object. Objects that are marked as difficult are crowd regions, too: not to be found, and not false; ``difficult [C]``.
    """

    ids: tuple[str, ...]
    width: IntArray
    height: IntArray
    photo: IntArray
    labels: tuple[str, ...]
    pred_image: IntArray
    pred_label: IntArray
    pred_boxes: FloatArray
    boxes: dict[str, FloatArray]
    scores: FloatArray | None
    true_image: IntArray
    true_label: IntArray
    true_boxes: FloatArray
    area: FloatArray | None
    crowd_image: IntArray
    crowd_label: IntArray
    crowd_boxes: FloatArray
    difficult: BoolArray
    federated: tuple[Federated, ...] | None = None

    @property
    def images(self) -> int:
        return len(self.ids)

    def at(self, readout: str) -> Flat:
        """The same with the predicted boxes of a readout."""
        return replace(self, pred_boxes=self.boxes[readout])

    def by_image(self, image: IntArray, weights: FloatArray | None = None) -> FloatArray:
        """Count, or sum of ``weights``, by image ``[I]``."""
        return np.bincount(image, weights=weights, minlength=self.images).astype(np.float64)


class _Rows:
    """Boxes of many rows, one after another: a few numbers each, no Python object."""

    def __init__(self, numbers: dict[str, int]) -> None:
        self.numbers = numbers
        self.count, self.label, self.values = array("q"), array("q"), array("d")

    def add(self, labels: Sequence[str], values: Iterable[float]) -> None:
        self.count.append(len(labels))
        self.label.extend(self.numbers.setdefault(label, len(self.numbers)) for label in labels)
        self.values.extend(values)

    def arrays(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Row and label of each box, and its four numbers."""
        count = np.array(self.count, dtype=np.int64)
        image = np.repeat(np.arange(len(count), dtype=np.int64), count)
        return image, np.array(self.label, dtype=np.int64), np.array(self.values, dtype=np.float64).reshape(-1, 4)


class Builder:
    """Gathers rows of truth and of predictions, each in the order they come, into :class:`Flat`."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.ids: list[str] = []
        self._pred, self._true, self._crowd = (_Rows(self.numbers) for _ in range(3))
        self._readouts: dict[str, array[float]] = {}
        self._scores, self._area, self._difficult = array("d"), array("d"), array("b")
        self._sides, self._photo = array("q"), array("q")
        self._photos: dict[str, int] = {}
        self._federated: list[Federated] = []

    def predicted(self, labels: Sequence[str], boxes: Mapping[str, Iterable[float]], scores: Iterable[float] | None) -> None:
        """A row of predictions; ``boxes`` by readout are flat lists of four numbers an object."""
        self._pred.add(labels, boxes[FILE_READOUT])
        for name in boxes.keys() - {FILE_READOUT}:
            self._readouts.setdefault(name, array("d")).extend(boxes[name])
        self._scores.extend(() if scores is None else scores)

    def true(
        self,
        image_id: str,
        sides: tuple[int, int],
        photo: str,
        boxes: tuple[Sequence[str], Iterable[float]],
        crowds: tuple[Sequence[str], Iterable[float]],
        federated: Federated | None,
        area: Iterable[float | None] = (),
        difficult: Iterable[bool] | None = None,
    ) -> None:
        """A row of truth, whose record shows the picture ``photo``: labels and values of its boxes and of its crowds, and which of
        the latter are difficult objects."""
        self.ids.append(image_id)
        self._sides.extend(sides)
        self._photo.append(self._photos.setdefault(photo, len(self._photos)))
        self._true.add(*boxes)
        self._crowd.add(*crowds)
        self._area.extend(math.nan if value is None else value for value in area)
        self._difficult.extend([False] * len(crowds[0]) if difficult is None else difficult)
        if federated is not None:
            self._federated.append(federated)

    def build(self, order: IntArray | None = None) -> Flat:
        """Truth as it came, beside it the rows of predictions at ``order [I]`` (None: as they came)."""
        image, label, boxes = self._pred.arrays()
        place = np.arange(len(label)) if order is None else places(np.array(self._pred.count, dtype=np.int64), order)
        if order is not None:
            image = np.repeat(np.arange(len(order), dtype=np.int64), np.array(self._pred.count, dtype=np.int64)[order])
        found = {FILE_READOUT: boxes[place], **{name: np.array(v).reshape(-1, 4)[place] for name, v in self._readouts.items()}}
        true_image, true_label, true_boxes = self._true.arrays()
        crowd_image, crowd_label, crowd_boxes = self._crowd.arrays()
        area = np.array(self._area, dtype=np.float64)
        sides = np.array(self._sides, dtype=np.int64).reshape(-1, 2)
        return Flat(
            ids=tuple(self.ids), width=sides[:, 0], height=sides[:, 1],
            photo=np.array(self._photo, dtype=np.int64), labels=tuple(self.numbers),
            pred_image=image, pred_label=label[place], pred_boxes=found[FILE_READOUT], boxes=found,
            scores=np.array(self._scores)[place] if len(self._scores) == len(place) > 0 else None,
            true_image=true_image, true_label=true_label, true_boxes=true_boxes,
            area=area if len(area) == len(true_label) and not np.isnan(area).any() else None,
            crowd_image=crowd_image, crowd_label=crowd_label, crowd_boxes=crowd_boxes, difficult=np.array(self._difficult, dtype=bool),
            federated=tuple(self._federated) if self._federated else None,
        )  # fmt: skip


def places(count: IntArray, order: IntArray) -> IntArray:
    """Indices of the objects of the rows ``order``, one row after another."""
    start, width = (np.cumsum(count) - count)[order], count[order]
    return np.asarray(np.repeat(start - (np.cumsum(width) - width), width) + np.arange(int(width.sum())), dtype=np.int64)


def flatten(samples: Sequence[Sample], readout: str = FILE_READOUT) -> Flat:
    """Samples as :class:`Flat` arrays, one photo for each id, with the predicted boxes of ``readout`` chosen."""
    builder = Builder()
    for s in samples:
        builder.predicted(s.pred_labels, {name: boxes.ravel() for name, boxes in s.pred_boxes.items()}, s.scores)
        true, crowds = (s.true_labels, s.true_boxes.ravel()), (s.crowd_labels, s.crowd_boxes.ravel())
        builder.true(s.image_id, (s.width, s.height), s.image_id, true, crowds, s.federated)
    return builder.build().at(readout)


def check_size(row: Prediction, record: Record) -> None:
    """Both files must mean the same pixels.

    Raises:
        ComparisonError: an image with another size in the predictions than in the records.
    """
    if (row.width, row.height) != (record.width, record.height):
        raise ComparisonError(
            f"{row.source}: image {row.image_id!r} is {row.width}x{row.height} in the predictions and {record.width}x{record.height} "
            f"in the records ({record.source}): predict again from these records"
        )


def check_images(
    rows: Sequence[Prediction], ids: Sequence[str], missing: Sequence[Record], predictions: Path, records: Path
) -> None:
    """Both files must hold the same images; ``ids`` are those of the records, ``missing`` the records without a prediction.

    Raises:
        ComparisonError: images in one of them only.
    """
    known = set(ids)
    unknown = [row for row in rows if row.image_id not in known]
    if unknown:
        raise ComparisonError(
            f"{predictions.name}: {len(unknown)} of {len(rows)} predictions have no record in {records.name}, first "
            f"{unknown[0].image_id!r} ({unknown[0].source}): evaluate against the records that were predicted"
        )
    if missing:
        raise ComparisonError(
            f"{records.name}: {len(missing)} of {len(ids)} records have no prediction in {predictions.name}, first "
            f"{missing[0].image_id!r} ({missing[0].source}): finish the prediction, or evaluate against the records that were predicted"
        )


def in_order(rows: Sequence[Prediction], truth: Sequence[Record], predictions: Path, records: Path) -> list[Prediction]:
    """Predictions in the order of the records.

    Raises:
        ComparisonError: the two files do not hold the same images.
    """
    by_id = {row.image_id: row for row in rows}
    check_images(rows, [r.image_id for r in truth], [r for r in truth if r.image_id not in by_id], predictions, records)
    return [by_id[record.image_id] for record in truth]


def make_samples(
    rows: Sequence[Prediction], truth: Sequence[Record], readouts: Sequence[str], rename: Callable[[str], str] = normalise
) -> list[Sample]:
    """Samples of paired rows and records. ``rename`` is applied to predicted descriptions, :func:`normalise` to true ones.

    Raises:
        ComparisonError: sizes that differ, a true object that is a point, malformed LVIS metadata.
    """
    found = []
    for row, record in zip(rows, truth, strict=True):
        check_size(row, record)
        scored = bool(row.objects) and row.objects[0].score is not None
        boxes = {name: as_boxes([item.readouts[name] for item in row.objects]) for name in readouts}
        found.append(
            replace(
                true_sample(record),
                pred_labels=tuple(rename(item.desc) for item in row.objects),
                pred_boxes={FILE_READOUT: as_boxes([item.box for item in row.objects]), **boxes},
                scores=np.array([item.score for item in row.objects], dtype=np.float64) if scored else None,
            )
        )
    return found


def true_sample(record: Record) -> Sample:
    """The truth of a record, nothing predicted.

    Raises:
        ComparisonError: an object that is a point, or malformed LVIS metadata.
    """
    (labels, values), (crowd_labels, crowd_values) = true_boxes(record)
    boxes, crowds = (np.array(v, dtype=np.float64).reshape(-1, 4) for v in (values, crowd_values))
    return Sample(
        record.image_id, record.width, record.height, tuple(labels), boxes, (), {}, None, tuple(crowd_labels), crowds, federated_of(record)
    )


def is_crowd(record: Record, item: RecordObject) -> bool:
    """Whether an object of a record is not to be found: a crowd, or one marked as difficult that no phrase refers to."""
    return item.crowd or (item.difficult and PHRASE not in record.metadata)


def true_boxes(record: Record) -> tuple[tuple[list[str], list[float]], tuple[list[str], list[float]]]:
    """Labels and values of the boxes of a record, and of its crowd regions (:func:`is_crowd`); a polygon stands for its box.

    Raises:
        ComparisonError: an object that is a point.
    """
    found: tuple[tuple[list[str], list[float]], tuple[list[str], list[float]]] = ([], []), ([], [])
    for i, item in enumerate(record.objects):
        if item.geometry == "point_2d":
            raise ComparisonError(f"{record.source}: objects[{i}] is a point_2d: a true object needs a region, give bbox_2d or poly")
        labels, values = found[is_crowd(record, item)]
        labels.append(normalise(item.desc))
        values.extend(item.values if item.geometry == "bbox_2d" else bounding_box(item.values))
    return found


def federated_of(record: Record) -> Federated | None:
    """What a record says of LVIS categories.

    Raises:
        ComparisonError: malformed metadata.
    """
    if NEGATIVE not in record.metadata:
        return None
    sets = []
    for key in (NEGATIVE, NOT_EXHAUSTIVE):
        value = record.metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
            raise ComparisonError(f"{record.source}: metadata.{key}: expected a list of descriptions, got {str(value)[:60]!r}")
        sets.append(frozenset(map(normalise, value)))
    frequency = record.metadata.get(FREQUENCY, {})
    if not isinstance(frequency, dict) or not all(value in ("r", "c", "f") for value in frequency.values()):
        raise ComparisonError(
            f"{record.source}: metadata.{FREQUENCY}: expected 'r', 'c' or 'f' by description, got {str(frequency)[:60]!r}"
        )
    clash = sets[0] & {normalise(item.desc) for item in record.objects}
    if clash:
        raise ComparisonError(f"{record.source}: metadata.{NEGATIVE}: expected categories without an object, got {min(clash)!r}")
    return Federated(sets[0], sets[1], {normalise(label): value for label, value in frequency.items()})


class FederatedCheck:
    """LVIS metadata stand on every record or on none, and never call a category rare here and common there."""

    def __init__(self) -> None:
        self._with = 0
        self._lacking: list[str] = []
        self._known: dict[str, str] = {}

    def add(self, record: Record, item: Federated | None) -> None:
        """Note a record.

        Raises:
            ComparisonError: another frequency than before.
        """
        if item is None:
            self._lacking.append(record.source)
            return
        self._with += 1
        for label, frequency in item.frequency.items():
            if self._known.setdefault(label, frequency) != frequency:
                raise ComparisonError(
                    f"{record.source}: metadata.{FREQUENCY}: expected {self._known[label]!r} for {label!r}, as before, got {frequency!r}"
                )

    def close(self) -> None:
        """After the last record.

        Raises:
            ComparisonError: metadata on some records only.
        """
        if self._with and self._lacking:
            raise ComparisonError(
                f"{self._lacking[0]}: metadata.{NEGATIVE}: expected a list, as {self._with} of {self._with + len(self._lacking)} records "
                "have, got none: LVIS rules need it on every record"
            )
