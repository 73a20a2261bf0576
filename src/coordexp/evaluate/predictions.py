"""Reader of ``predictions.jsonl``: one line a record, no header, boxes in pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from coordexp.boxes import bounding_box
from coordexp.errors import DataError
from coordexp.evaluate.registry import READOUT_NAMES
from coordexp.grammar import GEOMETRIES, HALF_PAIR, Geometry

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class PredictedObject:
    """One predicted object. ``box`` is ``bbox_2d`` as it stands; ``readouts`` are other readings of the same four slots.

    Of a polygon or a point (``geometry``, ``values`` as written) ``box`` and ``readouts`` are bounding boxes; a point's overlaps with
    nothing.
    All boxes are ``(x1, y1, x2, y2)`` in pixels and finite. They may be reversed or lie outside the image
    (a refined edge can cross its partner); such a box overlaps with nothing, and counts as a false positive.
    """

    desc: str
    box: Box
    score: float | None
    readouts: dict[str, Box]
    geometry: Geometry = "bbox_2d"
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row. ``None`` in ``problems``, ``num_tokens`` and ``truncated`` means that the row does not say.

    ``states_error`` tells a row that says ``"error": null`` from one without the field.
    """

    image_id: str
    width: int
    height: int
    objects: tuple[PredictedObject, ...]
    score_source: str | None
    problems: dict[str, int] | None
    error: str | None
    states_error: bool
    num_tokens: int | None
    truncated: bool | None
    source: str


def read_predictions(path: Path) -> list[Prediction]:
    """All rows of a predictions file, in file order: see :func:`iter_predictions`."""
    return list(iter_predictions(path))


def iter_predictions(path: Path) -> Iterator[Prediction]:
    """The rows of a predictions file one by one, in file order, none kept. Fields that the format does not name are left alone.

    Either every object of the file has a ``score`` or none has, from one ``score_source``; and every
    object has the same ``readouts``.

    Raises:
        DataError: a missing, unreadable or empty file; otherwise one line
            ``file:line: field: expected ..., got ...`` for the first fault.
    """
    checks = _Checks()
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path.name}:{number}"
                row = _plain_row(line, where) or _Row(where).read(line.rstrip(b"\r\n"))
                checks.add(row)
                yield row
    except OSError as error:
        raise DataError(f"{path}: cannot read the predictions file ({error.strerror}): give the predictions.jsonl of a run") from error
    if not number:
        raise DataError(f"{path}: expected at least one prediction, got an empty file")


class _Checks:
    """What must hold over a whole file: every image once; scores, their source and readouts comparable."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._lead: tuple[Prediction, PredictedObject] | None = None

    def add(self, row: Prediction) -> None:
        if row.image_id in self._first:
            first = self._first[row.image_id]
            raise DataError(f"{row.source}: image_id: expected one row per image, got {row.image_id!r} again (first at {first})")
        self._first[row.image_id] = row.source
        for i, item in enumerate(row.objects):
            if self._lead is None:
                self._lead = (row, item)
            self._uniform(f"{row.source}: objects[{i}]", row, item, *self._lead)

    def _uniform(self, where: str, row: Prediction, item: PredictedObject, first_row: Prediction, first: PredictedObject) -> None:
        if (item.score is None) != (first.score is None):
            expected, got = ("no score", "one") if first.score is None else ("a score", "none")
            raise DataError(
                f"{where}.score: expected {expected}, as at {first_row.source}, got {got}: score all objects of a file or none"
            )
        if item.score is not None and row.score_source != first_row.score_source:
            raise DataError(
                f"{row.source}: score_source: expected {first_row.score_source!r}, as at {first_row.source}, got {row.score_source!r}: "
                "scores of different sources cannot be ranked together"
            )
        if item.readouts.keys() != first.readouts.keys():
            raise DataError(
                f"{where}.readouts: expected {sorted(first.readouts)}, as at {first_row.source}, got {sorted(item.readouts)}: "
                "write the same readouts for every object"
            )


class _PlainObject(msgspec.Struct):
    desc: str
    bbox_2d: tuple[float, float, float, float]
    score: float | None = None
    readouts: dict[str, tuple[float, float, float, float]] | None = None
    poly: Any = msgspec.UNSET
    point_2d: Any = msgspec.UNSET


class _PlainRow(msgspec.Struct):
    image_id: str
    width: int
    height: int
    objects: list[_PlainObject]
    score_source: str | None
    problems: dict[str, int] | None = None
    error: str | msgspec.UnsetType | None = msgspec.UNSET
    num_tokens: int | None = None
    truncated: bool | None = None


_DECODER: Final = msgspec.json.Decoder(_PlainRow)
_LEGAL: Final = frozenset(READOUT_NAMES)


def _plain_row(line: bytes, where: str) -> Prediction | None:
    """A row of boxes without any fault, by far the most frequent, decoded at once; None sends it through all checks of :class:`_Row`."""
    try:
        row = _DECODER.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    error = None if row.error is msgspec.UNSET else row.error
    texts = (row.image_id, row.score_source, error)
    counts = (*(row.problems or {}).values(), row.num_tokens or 0, row.width - 1, row.height - 1)
    if "" in texts or min(counts) < 0 or "" in (row.problems or ()):
        return None
    objects = []
    for item in row.objects:
        readouts = item.readouts or {}
        numbers = (*item.bbox_2d, item.score or 0.0, *(value for box in readouts.values() for value in box))
        if item.poly is not msgspec.UNSET or item.point_2d is not msgspec.UNSET or not readouts.keys() <= _LEGAL:
            return None
        # Infinity has no spelling in JSON; the bound is that of _Row.number.
        if max(numbers) >= 1e300 or min(numbers) <= -1e300:
            return None
        objects.append(PredictedObject(item.desc, item.bbox_2d, item.score, readouts, "bbox_2d", item.bbox_2d))
    return Prediction(
        row.image_id, row.width, row.height, tuple(objects), row.score_source, row.problems, error, row.error is not msgspec.UNSET,
        row.num_tokens, row.truncated, where,
    )  # fmt: skip


class _Row:
    """Checks of one line; ``where`` is ``file:line``."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, field: str, expected: str, got: object) -> NoReturn:
        raise DataError(f"{self.where}: {field}: expected {expected}, got {_short(got)}")

    def read(self, line: bytes) -> Prediction:
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.where}: line: expected one JSON object, got {line[:60]!r} ({reason})") from error
        if not isinstance(row, dict):
            self.fail("line", "one JSON object", row)
        for name in ("image_id", "width", "height", "objects", "score_source"):
            if name not in row:
                self.fail(name, "the field to be present", sorted(row))
        objects = row["objects"]
        if not isinstance(objects, list):
            self.fail("objects", "a list", objects)
        return Prediction(
            image_id=self.text("image_id", row["image_id"]),
            width=self.integer("width", row["width"], 1),
            height=self.integer("height", row["height"], 1),
            objects=tuple(self.object(f"objects[{i}]", item) for i, item in enumerate(objects)),
            score_source=self.optional_text("score_source", row["score_source"]),
            problems=self.problems(row["problems"]) if row.get("problems") is not None else None,
            error=self.optional_text("error", row.get("error")),
            states_error="error" in row,
            num_tokens=self.integer("num_tokens", row["num_tokens"], 0) if row.get("num_tokens") is not None else None,
            truncated=self.boolean("truncated", row["truncated"]) if row.get("truncated") is not None else None,
            source=self.where,
        )

    def object(self, field: str, item: Any) -> PredictedObject:
        if not isinstance(item, dict):
            self.fail(field, "a JSON object", item)
        present = [name for name in GEOMETRIES if name in item]
        for name in ("desc",) if present else ("desc", "bbox_2d"):
            if name not in item:
                self.fail(f"{field}.{name}", "the field to be present", sorted(item))
        if len(present) > 1:
            self.fail(field, f"one of {', '.join(GEOMETRIES)}", present)
        desc = item["desc"]
        if not isinstance(desc, str):
            self.fail(f"{field}.desc", "a string", desc)
        self.unicode(f"{field}.desc", desc)
        readouts = {} if item.get("readouts") is None else item["readouts"]
        if not isinstance(readouts, dict):
            self.fail(f"{field}.readouts", "a JSON object", readouts)
        for name in readouts:
            if name not in READOUT_NAMES:
                self.fail(f"{field}.readouts", f"names among {', '.join(READOUT_NAMES)}", name)
        score = item.get("score")
        geometry = present[0]
        values = self.values(geometry, f"{field}.{geometry}", item[geometry])
        return PredictedObject(
            desc=desc,
            box=_bounds(geometry, values),
            score=None if score is None else self.number(f"{field}.score", score),
            readouts={
                name: _bounds(geometry, self.values(geometry, f"{field}.readouts.{name}", found)) for name, found in readouts.items()
            },
            geometry=geometry,
            values=values,
        )

    def values(self, geometry: Geometry, field: str, value: Any) -> tuple[float, ...]:
        if geometry == "bbox_2d":
            return self.box(field, value)
        if geometry == "point_2d" and (not isinstance(value, list) or len(value) != 2):
            self.fail(field, "2 numbers [x, y]", value)
        if not isinstance(value, list) or (geometry == "poly" and (len(value) < 6 or len(value) % 2)):
            self.fail(field, "at least 3 points [x1, y1, ...]", value)
        return tuple(self.number(field, v) for v in value)

    def box(self, field: str, value: Any) -> Box:
        if not isinstance(value, list) or len(value) != 4:
            self.fail(field, "4 numbers [x1, y1, x2, y2]", value)
        x1, y1, x2, y2 = (self.number(field, v) for v in value)
        return x1, y1, x2, y2

    def number(self, field: str, value: Any) -> float:
        # The comparison is false for NaN and exact for integers beyond the range of a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            self.fail(field, "a finite number", value)
        return float(value)

    def integer(self, field: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.fail(field, f"an integer of at least {least}", value)
        return value

    def boolean(self, field: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self.fail(field, "true or false", value)
        return value

    def text(self, field: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            self.fail(field, "a string that is not empty", value)
        return self.unicode(field, value)

    def unicode(self, field: str, value: str) -> str:
        if HALF_PAIR.search(value):
            self.fail(field, "valid Unicode, without halves of surrogate pairs", value)
        return value

    def optional_text(self, field: str, value: Any) -> str | None:
        return None if value is None else self.text(field, value)

    def problems(self, value: Any) -> dict[str, int]:
        if not isinstance(value, dict):
            self.fail("problems", "a JSON object of counts", value)
        return {self.text("problems", reason): self.integer(f"problems.{reason}", count, 0) for reason, count in value.items()}


def _bounds(geometry: Geometry, values: tuple[float, ...]) -> Box:
    """A box as it stands, reversed or not; of other geometries the bounding box."""
    return (values[0], values[1], values[2], values[3]) if geometry == "bbox_2d" else bounding_box(values)


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else text[:117] + "..."
