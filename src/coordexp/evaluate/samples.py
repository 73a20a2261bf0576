"""Predictions and records joined image by image, as arrays: what every metric starts from."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordexp.boxes import as_boxes, bounding_box
from coordexp.data.records import Record, RecordObject
from coordexp.errors import ComparisonError
from coordexp.evaluate.predictions import Prediction

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

FILE_READOUT: Final = "file"
NEGATIVE: Final = "neg_categories"
NOT_EXHAUSTIVE: Final = "not_exhaustive_categories"
FREQUENCY: Final = "category_frequency"


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
    """The boxes of all samples one after another: P predicted, T true. Labels are indices into ``labels``."""

    images: int
    labels: tuple[str, ...]
    pred_image: IntArray
    pred_label: IntArray
    pred_boxes: FloatArray
    true_image: IntArray
    true_label: IntArray
    true_boxes: FloatArray


def flatten(samples: Sequence[Sample], readout: str) -> Flat:
    """Samples as :class:`Flat` arrays, predicted boxes by ``readout``."""
    number: dict[str, int] = {}
    true = [number.setdefault(label, len(number)) for s in samples for label in s.true_labels]
    pred = [number.setdefault(label, len(number)) for s in samples for label in s.pred_labels]
    index = np.arange(len(samples), dtype=np.int64)
    none = np.zeros((0, 4))
    return Flat(
        images=len(samples),
        labels=tuple(number),
        pred_image=np.repeat(index, [len(s.pred_labels) for s in samples]),
        pred_label=np.array(pred, dtype=np.int64),
        pred_boxes=np.concatenate([none, *(s.pred_boxes[readout] for s in samples)]),
        true_image=np.repeat(index, [len(s.true_labels) for s in samples]),
        true_label=np.array(true, dtype=np.int64),
        true_boxes=np.concatenate([none, *(s.true_boxes for s in samples)]),
    )


def in_order(rows: Sequence[Prediction], truth: Sequence[Record], predictions: Path, records: Path) -> list[Prediction]:
    """Predictions in the order of the records.

    Raises:
        ComparisonError: the two files do not hold the same images.
    """
    by_id = {row.image_id: row for row in rows}
    known = {record.image_id for record in truth}
    unknown = [row for row in rows if row.image_id not in known]
    if unknown:
        raise ComparisonError(
            f"{predictions.name}: {len(unknown)} of {len(rows)} predictions have no record in {records.name}, first "
            f"{unknown[0].image_id!r} ({unknown[0].source}): evaluate against the records that were predicted"
        )
    missing = [record for record in truth if record.image_id not in by_id]
    if missing:
        raise ComparisonError(
            f"{records.name}: {len(missing)} of {len(truth)} records have no prediction in {predictions.name}, first "
            f"{missing[0].image_id!r} ({missing[0].source}): finish the prediction, or evaluate against the records that were predicted"
        )
    return [by_id[record.image_id] for record in truth]


def check_sizes(rows: Sequence[Prediction], truth: Sequence[Record]) -> None:
    """Both files must mean the same pixels.

    Raises:
        ComparisonError: an image with another size in the predictions than in the records.
    """
    for row, record in zip(rows, truth, strict=True):
        if (row.width, row.height) != (record.width, record.height):
            raise ComparisonError(
                f"{row.source}: image {row.image_id!r} is {row.width}x{row.height} in the predictions and {record.width}x{record.height} "
                f"in the records ({record.source}): predict again from these records"
            )


def make_samples(
    rows: Sequence[Prediction], truth: Sequence[Record], readouts: Sequence[str], rename: Callable[[str], str] = normalise
) -> list[Sample]:
    """Samples of paired rows and records. ``rename`` is applied to predicted descriptions, :func:`normalise` to true ones.

    Raises:
        ComparisonError: sizes that differ, a true object that is a point, LVIS metadata on some records only or malformed.
    """
    check_sizes(rows, truth)
    federated = _federated(truth)
    return [_sample(*pair, readouts, rename) for pair in zip(rows, truth, federated, strict=True)]


def _sample(row: Prediction, record: Record, federated: Federated | None, readouts: Sequence[str], rename: Callable[[str], str]) -> Sample:
    scored = bool(row.objects) and row.objects[0].score is not None
    single = [(i, item) for i, item in enumerate(record.objects) if not item.crowd]
    crowd = [item for item in record.objects if item.crowd]
    boxes = {name: as_boxes([item.readouts[name] for item in row.objects]) for name in readouts}
    return Sample(
        image_id=row.image_id,
        width=row.width,
        height=row.height,
        true_labels=tuple(normalise(item.desc) for _, item in single),
        true_boxes=as_boxes([_true_box(item, record, i) for i, item in single]),
        pred_labels=tuple(rename(item.desc) for item in row.objects),
        pred_boxes={FILE_READOUT: as_boxes([item.box for item in row.objects]), **boxes},
        scores=np.array([item.score for item in row.objects], dtype=np.float64) if scored else None,
        crowd_labels=tuple(normalise(item.desc) for item in crowd),
        crowd_boxes=as_boxes([bounding_box(item.values) for item in crowd]),
        federated=federated,
    )


def _true_box(item: RecordObject, record: Record, index: int) -> tuple[float, float, float, float]:
    if item.geometry == "point_2d":
        raise ComparisonError(f"{record.source}: objects[{index}] is a point_2d: boxes are evaluated, give records with bbox_2d or poly")
    return bounding_box(item.values)


def _federated(truth: Sequence[Record]) -> list[Federated | None]:
    carrying = [record for record in truth if NEGATIVE in record.metadata]
    if not carrying:
        return [None] * len(truth)
    if len(carrying) < len(truth):
        lacking = next(record for record in truth if NEGATIVE not in record.metadata)
        raise ComparisonError(
            f"{lacking.source}: metadata.{NEGATIVE}: expected a list, as {len(carrying)} of {len(truth)} records have, got none: "
            "LVIS rules need it on every record"
        )
    found: list[Federated | None] = [_read_federated(record) for record in truth]
    known: dict[str, str] = {}
    for record, item in zip(truth, found, strict=True):
        for label, frequency in item.frequency.items() if item is not None else ():
            if known.setdefault(label, frequency) != frequency:
                raise ComparisonError(
                    f"{record.source}: metadata.{FREQUENCY}: expected {known[label]!r} for {label!r}, as before, got {frequency!r}"
                )
    return found


def _read_federated(record: Record) -> Federated:
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
