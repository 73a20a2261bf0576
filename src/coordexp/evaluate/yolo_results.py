"""YOLO predictions: a folder with one ``NAME.txt`` an image, as detectors write it with ``save_txt`` and ``save_conf``.

A line is ``class cx cy w h [score]`` in shares of the image's sides (0..1), or ``class x1 y1 x2 y2 x3 y3 ... [score]``, an outline or an
oriented box; of key points (``kpt_shape`` of the data set yaml) the box is read. An image on which nothing was found has no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from coordexp.boxes import bounding_box
from coordexp.data.importers.base import brief, id_text
from coordexp.data.importers.encoding import LAYOUTS, UNITS, BoxFile, broken, corners, find_reading
from coordexp.data.importers.files import text_of
from coordexp.data.importers.judging import number
from coordexp.data.records import Record
from coordexp.errors import DataError

# No share of a box that has anything to do with its image is larger; a width of an unclipped box can be a little above 1.
_LARGEST = 2.0
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _Line:
    """``values``: the shares as written; ``box`` their ``[cx, cy, w, h]``; ``side``: width and height of the image in pixels."""

    where: str
    desc: str
    values: list[float]
    box: list[float]
    score: float | None
    side: tuple[int, int]

    def made(self) -> dict[str, Any]:
        """The object of a row of predictions, in pixels."""
        if len(self.values) == 4:
            geometry, shares = "bbox_2d", corners(np.array([self.values]), "cxcywh")[0].tolist()
        else:
            geometry, shares = "poly", self.values
        made = {"desc": self.desc, geometry: [v * self.side[i % 2] for i, v in enumerate(shares)]}
        return made if self.score is None else made | {"score": self.score}


@dataclass
class YoloResults:
    """Objects by the id of their record, and what is to be said about how they were matched."""

    found: dict[str, list[dict[str, Any]]]
    scored: bool = False
    notes: list[str] = field(default_factory=list)


def read_yolo(folder: Path, records: Sequence[Record], names: dict[str, str], told: str, points: int) -> YoloResults:
    """The predictions of a folder for ``records``. ``names`` by class number, read from ``told``; ``points``: numbers of key points a line.

    Raises:
        DataError: no files, files of other images, a line that is none, scores here and there, or numbers that are no shares.
    """
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise DataError(f"{folder}: expected predictions.jsonl, or a folder of YOLO predictions, NAME.txt an image, got one without .txt")
    matched, strange = _matched(folder, files, records)
    if not matched:
        raise DataError(
            f"{folder}: expected files named as the images, such as {PurePosixPath(records[0].image_name).stem}.txt, got "
            f"{len(files)} others, such as {files[0].name}"
        )
    results = YoloResults({record.image_id: [] for record in records})
    lines: list[_Line] = []
    for record in records:
        if record.image_id in matched:
            own = _lines(folder, matched[record.image_id], record, names, told, points)
            results.found[record.image_id] = [line.made() for line in own]
            lines += own
    other = next((line for line in lines if (line.score is None) != (lines[0].score is None)), None)
    if other is not None:
        expected, got = ("no score", "one") if lines[0].score is None else ("a score", "none")
        raise DataError(f"{other.where}: expected {expected}, as at {lines[0].where}, got {got}: score all lines or none")
    _refuse_other_readings(lines)
    results.scored = bool(lines) and lines[0].score is not None
    results.notes.append(
        f"{folder.name}: YOLO predictions, {len(lines)} boxes in {len(matched)} files, matched by the names of the images, read as shares "
        f"of the sides, {'with' if results.scored else 'without'} scores; names from {told}"
    )
    without = [record.image_name for record in records if record.image_id not in matched]
    if without:
        results.notes.append(f"{folder.name}: {len(without)} images have no file ({_few(without)}): nothing was found on them")
    if strange:
        results.notes.append(f"{folder.name}: {len(strange)} files are of no image of the records ({_few(strange)}): left out")
    return results


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _matched(folder: Path, files: Sequence[Path], records: Sequence[Record]) -> tuple[dict[str, Path], list[str]]:
    """The file of each record, by the ends of both paths, the longest that an image has first; and the files that fit none."""
    known: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        parts = PurePosixPath(record.image_name).with_suffix("").parts
        for start in range(len(parts)):
            known["/".join(parts[start:])].append(record)
    matched: dict[str, Path] = {}
    strange = []
    for path in files:
        shown = path.relative_to(folder).as_posix()
        parts = PurePosixPath(shown).with_suffix("").parts
        fit = next((known[end] for start in range(len(parts)) if (end := "/".join(parts[start:])) in known), [])
        if not fit:
            strange.append(shown)
            continue
        if len(fit) > 1:
            raise DataError(f"{path}: expected the predictions of one record, got {len(fit)} records with images of that name")
        if fit[0].image_id in matched:
            raise DataError(f"{path}: expected one file an image, got {matched[fit[0].image_id]} for {fit[0].image_name}, too")
        matched[fit[0].image_id] = path
    return matched, strange


def _lines(folder: Path, path: Path, record: Record, names: dict[str, str], told: str, points: int) -> list[_Line]:
    shown = path.relative_to(folder).as_posix()
    rows = [(f"{folder.name}/{shown}:{n}", line) for n, line in enumerate(text_of(path).splitlines(), start=1) if line.strip()]
    return [_line(where, text, record, names, told, points) for where, text in rows]


def _line(where: str, text: str, record: Record, names: dict[str, str], told: str, points: int) -> _Line:
    numbers = [number(word) for word in text.split()]
    values = [value for value in numbers[1:] if value is not None]
    if None in numbers:
        raise DataError(f"{where}: expected numbers, class cx cy w h and perhaps a score, got {brief(text)!r}")
    extra = len(values) - points
    if extra not in (4, 5) and (points or extra < 6):
        raise DataError(f"{where}: expected class and 4 numbers or at least 3 points, and perhaps a score, got {brief(text)!r}")
    label = id_text(numbers[0])
    if label not in names:
        raise DataError(f"{where}: class {label}: expected one of the {len(names)} classes of {told}, got none: pass --categories FILE")
    score = values.pop() if extra % 2 else None
    if score is not None and not 0 <= score <= 1:
        raise DataError(f"{where}: expected a score of 0 to 1 as the last number, got {score:g}")
    if points:
        values = values[:4]
    box = values
    if len(values) > 4:
        x1, y1, x2, y2 = bounding_box(values)
        box = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    return _Line(where, names[label], values, box, score, (record.width, record.height))


def _refuse_other_readings(lines: Sequence[_Line]) -> None:
    """Numbers that are clearly something else would all count as false."""
    far = next((line for line in lines if max(map(abs, line.values)) > _LARGEST), None)
    if far is not None:
        units = find_reading(_file(lines)).units
        looks = f" (they look like {UNITS[units]})" if units not in (None, "norm1") else ""
        got = max(map(abs, far.values))
        raise DataError(f"{far.where}: expected shares of the image's sides, 0..1, got {got:g}{looks}: divide them first")
    inside = [line for line in lines if max(line.box) <= 1]
    if not inside:
        return
    file = _file(inside)
    limit = np.ones_like(file.sides)
    own = broken(corners(file.values, "cxcywh"), limit, "norm1")
    scores = [line.score for line in inside]
    if None not in scores and own.sum() >= 2 and own.mean() >= 0.05:
        # The score is the box's height where it was written before the box.
        shifted = np.hstack([file.values[:, 1:], np.array(scores, dtype=np.float64)[:, None]])
        if broken(corners(shifted, "cxcywh"), limit, "norm1").mean() <= own.mean() / 10:
            raise DataError(f"{inside[0].where}: expected class cx cy w h score, got the score before the box: put it last")
    layout = find_reading(file, few=2).layout
    if layout != "cxcywh":
        raise DataError(f"{inside[0].where}: expected {LAYOUTS['cxcywh']} after the class, got {LAYOUTS[layout]}: convert them first")


def _file(lines: Sequence[_Line]) -> BoxFile:
    places = tuple(line.where for line in lines)
    values, sides = np.array([line.box for line in lines]), np.array([line.side for line in lines], dtype=np.float64)
    return BoxFile("yolo", "norm1", "cxcywh", values, sides, np.zeros(len(lines), dtype=np.int64), places, places, len(lines), (), True)
