"""One referred object an image: the share of answers that meet it (grounding), and points that fall on it (pointing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from coordexp.boxes import as_boxes, bounding_box, iou_matrix
from coordexp.data.answers import PHRASE
from coordexp.data.records import Record, RecordObject
from coordexp.errors import ComparisonError
from coordexp.evaluate.bootstrap import Ratio
from coordexp.evaluate.predictions import PredictedObject, Prediction
from coordexp.evaluate.samples import FILE_READOUT, FloatArray

Task = Literal["detection", "grounding", "pointing"]
ACCURACY: Final[dict[str, float]] = {"50": 0.5, "80": 0.8, "90": 0.9}


def find_task(rows: Sequence[Prediction], truth: Sequence[Record]) -> tuple[Task, str]:
    """What the records ask for, and a sentence that says why.

    ``metadata.phrase`` with exactly one object on every record: ``grounding``, or ``pointing`` where every predicted object is a
    point. Anything else is ``detection``.

    Raises:
        ComparisonError: a phrase on some records only or with another number of objects; boxes and points in one file.
    """
    referring = [record for record in truth if PHRASE in record.metadata]
    if not referring:
        return "detection", "detection: no record has metadata.phrase"
    for record in truth:
        if not isinstance(record.metadata.get(PHRASE), str):
            raise ComparisonError(
                f"{record.source}: metadata.{PHRASE}: expected a text, as {len(referring)} of {len(truth)} records have: "
                "evaluate grounding and detection apart"
            )
        if len(record.objects) != 1 or record.objects[0].crowd:
            raise ComparisonError(f"{record.source}: objects: expected the one object of metadata.{PHRASE}, got {len(record.objects)}")
    points = [item.geometry == "point_2d" for row in rows for item in row.objects]
    if any(points) and not all(points):
        row = next(row for row in rows if any(item.geometry == "point_2d" for item in row.objects))
        raise ComparisonError(f"{row.source}: objects: expected points only or boxes only in the file, got both: evaluate them apart")
    if points and all(points):
        return "pointing", "pointing: every record has one object and metadata.phrase, and every answer is a point"
    return "grounding", "grounding: every record has one object and metadata.phrase"


@dataclass(frozen=True)
class Scores:
    """Metrics by key, the statistics that get an interval, and one entry an image."""

    metrics: dict[str, float | int | None]
    statistics: dict[str, Ratio]
    images: list[dict[str, Any]]


def answer(row: Prediction) -> PredictedObject | None:
    """The object an answer stands for: the one with the best score (the first of equal ones), without scores the first."""
    return max(row.objects, key=lambda item: 0.0 if item.score is None else item.score, default=None)


def grounding_scores(rows: Sequence[Prediction], truth: Sequence[Record], readouts: Sequence[str]) -> Scores:
    """``<readout>.acc.{50,80,90}`` (IoU at least .5, .8, .9), ``<readout>.mean_iou``, ``answered`` and ``n``.

    Over all records: no answer has an IoU of 0. Of several boxes :func:`answer` chooses. A polygon stands for its box.

    Raises:
        ComparisonError: a referred object that is a point.
    """
    chosen = [answer(row) for row in rows]
    true = [_region_box(record) for record in truth]
    metrics: dict[str, float | int | None] = {}
    statistics: dict[str, Ratio] = {}
    one = np.ones((len(rows), 1))
    images: list[dict[str, Any]] = [{} for _ in rows]
    for readout in readouts:
        ious = np.array([_iou(item, readout, box) for item, box in zip(chosen, true, strict=True)])
        values: dict[str, FloatArray] = {f"acc.{key}": (ious >= least).astype(np.float64) for key, least in ACCURACY.items()}
        for key, value in (values | {"mean_iou": ious}).items():
            metrics[f"{readout}.{key}"] = float(value.mean())
            statistics[f"{readout}.{key}"] = Ratio(value[:, None], one)
        for entry, iou in zip(images, ious.tolist(), strict=True):
            entry[f"iou_{readout}"] = iou
    metrics |= {"answered": sum(item is not None for item in chosen) / len(rows), "n": len(rows)}
    return Scores(metrics, statistics, images)


def _region_box(record: Record) -> tuple[float, float, float, float]:
    item = record.objects[0]
    if item.geometry == "point_2d":
        raise ComparisonError(f"{record.source}: objects[0] is a point_2d: a referred object needs a region, give bbox_2d or poly")
    return bounding_box(item.values)


def _iou(item: PredictedObject | None, readout: str, box: tuple[float, float, float, float]) -> float:
    if item is None:
        return 0.0
    found = item.box if readout == FILE_READOUT else item.readouts[readout]
    return float(iou_matrix(as_boxes([found]), as_boxes([box]))[0, 0])


def pointing_scores(rows: Sequence[Prediction], truth: Sequence[Record], readouts: Sequence[str]) -> Scores:
    """``acc``: the share of records whose answer is a point inside the box or the polygon, edges included; ``answered`` and ``n``.

    ``<readout>.acc`` is the same for the points of other readouts than the file's own.

    Raises:
        ComparisonError: a referred object that is a point.
    """
    for record in truth:
        _region_box(record)
    chosen = [answer(row) for row in rows]
    metrics: dict[str, float | int | None] = {"answered": sum(item is not None for item in chosen) / len(rows), "n": len(rows)}
    statistics: dict[str, Ratio] = {}
    images: list[dict[str, Any]] = [{} for _ in rows]
    for readout in readouts:
        pairs = zip(chosen, truth, strict=True)
        hits = [item is not None and inside(_point(item, readout), record.objects[0]) for item, record in pairs]
        own = readout == FILE_READOUT
        key = "acc" if own else f"{readout}.acc"
        metrics[key] = sum(hits) / len(hits)
        statistics[key] = Ratio(np.array(hits, dtype=np.float64)[:, None], np.ones((len(rows), 1)))
        for entry, hit in zip(images, hits, strict=True):
            entry["hit" if own else f"hit_{readout}"] = hit
    return Scores(metrics, statistics, images)


def _point(item: PredictedObject, readout: str) -> tuple[float, float]:
    x, y, _, _ = item.box if readout == FILE_READOUT else item.readouts[readout]
    return x, y


def inside(point: tuple[float, float], region: RecordObject) -> bool:
    """Whether a point lies in a box or a polygon (even-odd rule), edges included."""
    x, y = point
    x1, y1, x2, y2 = bounding_box(region.values)
    if not (x1 <= x <= x2 and y1 <= y <= y2):
        return False
    if region.geometry == "bbox_2d":
        return True
    corners = list(zip(region.values[0::2], region.values[1::2], strict=True))
    odd = False
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        turn = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        if turn == 0 and min(ax, bx) <= x <= max(ax, bx) and min(ay, by) <= y <= max(ay, by):
            return True
        if (ay > y) != (by > y) and (turn > 0) == (by > ay):
            odd = not odd
    return odd
