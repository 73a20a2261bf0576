"""Predictions and records, read row by row and joined image by image: a few numbers an object stay in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.records import iter_records
from coordexp.errors import ConfigError
from coordexp.evaluate.grounding import Task, TaskFinder
from coordexp.evaluate.origin import Basis, OriginHash
from coordexp.evaluate.predictions import Prediction, iter_predictions
from coordexp.evaluate.registry import FILE_READOUT, READOUT_NAMES
from coordexp.evaluate.samples import Builder, FederatedCheck, Flat, check_images, check_size, federated_of, is_crowd, normalise, true_boxes


@dataclass(frozen=True)
class Joined:
    """The rows of a prediction file without their objects, in the order of the records, and what follows from both files.

    ``polygons`` are the outlines of referred objects, by index of the true object; ``areas`` says how many true objects state one.
    """

    rows: list[Prediction]
    flat: Flat
    task: Task
    reason: str
    readouts: list[str]
    codec: CoordCodec
    polygons: dict[int, tuple[float, ...]]
    areas: int
    basis: Basis

    def renamed(self, names: dict[str, str]) -> Flat:
        """The arrays with predicted descriptions that are keys of ``names`` going by their values."""
        if not names:
            return self.flat
        labels = self.flat.labels
        number = {label: k for k, label in enumerate(labels)}
        to = np.array([number[names.get(label, label)] for label in labels], dtype=np.int64)
        return replace(self.flat, pred_label=to[self.flat.pred_label])

    @property
    def score_source(self) -> str | None:
        counts = np.bincount(self.flat.pred_image, minlength=len(self.rows))
        return next((row.score_source for row, count in zip(self.rows, counts.tolist(), strict=True) if count), None)


def join(predictions: Path, records: Path, convention: str, *, force: bool = False) -> Joined:
    """Read both files and pair them image by image. ``force``: predictions of other records are no error.

    Raises:
        DataError: a file that cannot be read.
        ComparisonError: files that do not fit together: other images, sizes, or truth that is not boxes.
        ConfigError: an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"unknown coordinate convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    finder, builder = TaskFinder(), Builder()
    rows, readouts = [], [FILE_READOUT]
    for row in iter_predictions(predictions):
        finder.prediction(row)
        if len(readouts) == 1 and row.objects:
            # The reader has checked that every object of the file has the same readouts.
            readouts += [name for name in READOUT_NAMES if name in row.objects[0].readouts]
        _predicted(builder, row, readouts)
        rows.append(replace(row, objects=()))
    place = {row.image_id: k for k, row in enumerate(rows)}
    federated, origin = FederatedCheck(), OriginHash()
    polygons: dict[int, tuple[float, ...]] = {}
    order, missing, objects, areas = [], [], 0, 0
    for record in iter_records(records):
        k = place.get(record.image_id, -1)
        order.append(k)
        origin.add(record)
        if k < 0:
            missing.append(record)
        else:
            check_size(rows[k], record)
        judged = federated_of(record)
        federated.add(record, judged)
        single = [item for item in record.objects if not is_crowd(record, item)]
        difficult = [not item.crowd for item in record.objects if is_crowd(record, item)]
        stated = [item.area for item in single]
        sides, photo = (record.width, record.height), str(record.image)
        builder.true(record.image_id, sides, photo, *true_boxes(record), judged, stated, difficult)
        areas += len(stated) - stated.count(None)
        if finder.record(record):
            polygons |= {objects + n: item.values for n, item in enumerate(single) if item.geometry == "poly"}
        objects += len(single)
    check_images(rows, builder.ids, missing, predictions, records)
    basis = origin.check(predictions, records, force=force)
    federated.close()
    task, reason = finder.task()
    flat = builder.build(np.array(order, dtype=np.int64))
    codec = CoordCodec(CONVENTIONS[convention].bins, convention)
    return Joined([rows[k] for k in order], flat, task, reason, readouts, codec, polygons, areas, basis)


def _predicted(builder: Builder, row: Prediction, readouts: Sequence[str]) -> None:
    boxes = {FILE_READOUT: [value for item in row.objects for value in item.box]}
    boxes |= {name: [value for item in row.objects for value in item.readouts[name]] for name in readouts[1:]}
    scores = [item.score for item in row.objects if item.score is not None]
    builder.predicted([normalise(item.desc) for item in row.objects], boxes, scores)
