"""Records that refer to objects by a phrase: the share of answers that meet them (grounding), and points that fall on them (pointing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from coordexp.boxes import area
from coordexp.data.answers import PHRASE
from coordexp.data.records import Record
from coordexp.errors import ComparisonError
from coordexp.evaluate.bootstrap import Ratio, points
from coordexp.evaluate.detection import count_matches
from coordexp.evaluate.matching import overlap
from coordexp.evaluate.predictions import Prediction
from coordexp.evaluate.registry import ACCURACY, FILE_READOUT
from coordexp.evaluate.samples import BoolArray, Flat, FloatArray, IntArray

Task = Literal["detection", "grounding", "pointing"]


class TaskFinder:
    """What the records ask for, found while both files are read.

    ``metadata.phrase`` on every record: ``grounding``, or ``pointing`` where every predicted object is a point. Anything else is
    ``detection``. Boxes may be asked for by a phrase that means one object, several or none; a point by one that means one.
    """

    def __init__(self) -> None:
        self.phrases = 0
        self._records = 0
        self._plain: str | None = None
        self._crowd: str | None = None
        self._odd: tuple[str, int] | None = None
        self._boxes = 0
        self._points: list[str] = []

    def record(self, record: Record) -> bool:
        """Note a record; whether it has a phrase."""
        self._records += 1
        if not isinstance(record.metadata.get(PHRASE), str):
            self._plain = self._plain or record.source
            # A phrase that is no text asks for nothing, and is not to be taken for a record of detection either.
            self.phrases += PHRASE in record.metadata
            return False
        self.phrases += 1
        if len(record.objects) != 1 and self._odd is None:
            self._odd = record.source, len(record.objects)
        if any(item.crowd for item in record.objects):
            self._crowd = self._crowd or record.source
        return True

    def prediction(self, row: Prediction) -> None:
        """Note a row of predictions."""
        points = sum(item.geometry == "point_2d" for item in row.objects)
        self._boxes += len(row.objects) - points
        if points:
            self._points.append(row.source)

    def task(self) -> tuple[Task, str]:
        """The task, and a sentence that says why.

        Raises:
            ComparisonError: a phrase on some records only, a crowd as what is meant, boxes and points in one file, or points for
                phrases that do not mean one object.
        """
        if not self.phrases:
            return "detection", "detection: no record has metadata.phrase"
        if self._plain is not None:
            raise ComparisonError(
                f"{self._plain}: metadata.{PHRASE}: expected a text, as {self.phrases} of {self._records} records have one: "
                "evaluate grounding and detection apart"
            )
        if self._crowd is not None:
            raise ComparisonError(f"{self._crowd}: objects: expected single objects of metadata.{PHRASE}, got a crowd")
        if self._points and self._boxes:
            where = f"{self._points[0]}: objects"
            raise ComparisonError(f"{where}: expected points only or boxes only in the file, got both: evaluate them apart")
        if self._points:
            if self._odd is not None:
                source, count = self._odd
                raise ComparisonError(f"{source}: objects: expected the one object of metadata.{PHRASE} for a point, got {count}")
            return "pointing", "pointing: every record has one object and metadata.phrase, and every answer is a point"
        meant = "one object" if self._odd is None else "any number of objects"
        return "grounding", f"grounding: every record has {meant} and metadata.phrase"


@dataclass(frozen=True)
class Scores:
    """Metrics by key, the statistics that get an interval, and one entry an image."""

    metrics: dict[str, float | int | None]
    statistics: dict[str, Ratio]
    images: list[dict[str, Any]]


def answers(flat: Flat) -> IntArray:
    """``[I]``: the predicted box an answer stands for, the one with the best score (the first of equal ones), without scores the first.

    -1 without one.
    """
    order = np.arange(len(flat.pred_image))
    if flat.scores is not None:
        order = np.lexsort((order, -flat.scores, flat.pred_image))
    chosen = np.full(flat.images, -1, dtype=np.int64)
    chosen[flat.pred_image[order[::-1]]] = order[::-1]
    return chosen


def grounding_scores(flat: Flat, readouts: Sequence[str]) -> Scores:
    """``<readout>.acc.{50,80,90}`` (IoU at least .5, .8, .9), ``<readout>.mean_iou``, ``answered`` and ``n``.

    Over the records whose phrase means one object, which is RefCOCO's accuracy: no answer has an IoU of 0. Of several boxes
    :func:`answers` chooses. A polygon stands for its box. Where phrases mean several objects or none, as in gRefCOCO:
    ``<readout>.exact.50``, the share of all records whose boxes and objects match one to one at IoU .5 ("F1 = 1"; no box where nothing is
    meant is right), ``no_target_acc``, the share of phrases without an object that get no box, and ``target_acc``, that of the others
    that get one.
    """
    meant = np.bincount(flat.true_image, minlength=flat.images)
    given = np.bincount(flat.pred_image, minlength=flat.images)
    single = meant == 1
    statistics = {"answered": _share(given > 0, np.ones(flat.images, dtype=bool))}
    general = not single.all()
    if general:
        statistics |= {"no_target_acc": _share(given == 0, meant == 0), "target_acc": _share(given > 0, meant > 0)}
    images: list[dict[str, Any]] = [{} for _ in range(flat.images)]
    chosen = answers(flat)
    for readout in readouts:
        ious = _chosen_iou(flat, readout, chosen, single)
        statistics |= {f"{readout}.acc.{key}": _share(ious >= least, single) for key, least in ACCURACY.items()}
        statistics[f"{readout}.mean_iou"] = Ratio(ious[:, None], single.astype(np.float64)[:, None])
        for entry, iou, one in zip(images, ious.tolist(), single.tolist(), strict=True):
            entry[f"iou_{readout}"] = iou if one else None
        if general:
            right = (count_matches(flat.at(readout), class_aware=False).tp[:, 0] == meant) & (given == meant)
            statistics[f"{readout}.exact.50"] = _share(right, np.ones(flat.images, dtype=bool))
            for entry, exact in zip(images, right.tolist(), strict=True):
                entry[f"exact_{readout}"] = exact
    return Scores({**points(statistics), "n": flat.images}, statistics, images)


def _share(hit: BoolArray, of: BoolArray) -> Ratio:
    return Ratio((hit & of).astype(np.float64)[:, None], of.astype(np.float64)[:, None])


def _chosen_iou(flat: Flat, readout: str, chosen: IntArray, single: BoolArray) -> FloatArray:
    """``[I]``: IoU of the answer with the one object; 0 without an answer, and where not one object is meant."""
    ious = np.zeros(flat.images)
    image = np.flatnonzero((chosen >= 0) & single)
    a = flat.boxes[readout][chosen[image]]
    b = flat.true_boxes[np.searchsorted(flat.true_image, image)]
    shared = overlap(a, b)
    union = area(a) + area(b) - shared
    values = np.zeros(len(image))
    np.divide(shared, union, out=values, where=union > 0)
    ious[image] = values
    return ious


def pointing_scores(flat: Flat, polygons: Mapping[int, Sequence[float]], readouts: Sequence[str]) -> Scores:
    """``acc``: the share of records whose answer is a point inside the box or the polygon, edges included; ``answered`` and ``n``.

    ``<readout>.acc`` is the same for the points of other readouts than the file's own. ``polygons`` by index of the true object.
    """
    chosen = answers(flat)
    everything = np.ones(flat.images, dtype=bool)
    statistics = {"answered": _share(chosen >= 0, everything)}
    images: list[dict[str, Any]] = [{} for _ in range(flat.images)]
    for readout in readouts:
        hit = np.zeros(flat.images, dtype=bool)
        image = np.flatnonzero(chosen >= 0)
        place, region = flat.boxes[readout][chosen[image], :2], flat.true_boxes[image]
        hit[image] = (place >= region[:, :2]).all(axis=1) & (place <= region[:, 2:]).all(axis=1)
        for i, (x, y) in zip(image.tolist(), place.tolist(), strict=True):
            if hit[i] and i in polygons:
                hit[i] = inside((x, y), polygons[i])
        own = readout == FILE_READOUT
        statistics["acc" if own else f"{readout}.acc"] = _share(hit, everything)
        for entry, value in zip(images, hit.tolist(), strict=True):
            entry["hit" if own else f"hit_{readout}"] = value
    return Scores({**points(statistics), "n": flat.images}, statistics, images)


def inside(point: tuple[float, float], region: Sequence[float]) -> bool:
    """Whether a point lies in the polygon ``[x1, y1, x2, y2, x3, ...]`` (even-odd rule), edges included."""
    x, y = point
    corners = list(zip(region[0::2], region[1::2], strict=True))
    odd = False
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        turn = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        if turn == 0 and min(ax, bx) <= x <= max(ax, bx) and min(ay, by) <= y <= max(ay, by):
            return True
        if (ay > y) != (by > y) and (turn > 0) == (by > ay):
            odd = not odd
    return odd
