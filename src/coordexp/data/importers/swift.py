"""ms-swift grounding JSONL.

A row is ``{"messages": [...], "images": ["a.jpg"], "objects": {"ref": ["cat"], "bbox": [[x1, y1, x2, y2]]}}``. Names belong to boxes by
place: where the messages have ``<ref-object>`` and ``<bbox>``, those of one turn go together in their order, and boxes of a turn without
names take those of the turn before. Else there are as many ``ref`` as ``bbox``, or one for all. Boxes without ``ref`` are named by what the
answer says beside ``<bbox>``, or by the question. A ``bbox`` of two numbers is a point.

Convention: ``bbox_type`` of ``objects`` says ``real`` (absolute pixels) or ``norm1`` (0..1). Rows without it are what ``--coords``
says: ``absolute``, ``norm1000`` or ``norm1``; nothing is guessed. ms-swift ignores EXIF rotations: an image with one is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from coordexp.data.importers.answers import objects_of_text, objects_of_value
from coordexp.data.importers.base import Job, RawObject, RawSplit, Unusable, brief
from coordexp.data.importers.chat import chat_splits, turns_of
from coordexp.data.importers.files import Head

_TYPES: Final = {"real": "pixel", "norm1": "norm1", "norm1000": "norm1000"}
_PLACES: Final = re.compile(r"<ref-object>|<bbox>")


def looks(head: Head) -> bool:
    """Rows with ``objects`` of parallel lists."""
    found = head.row.get("objects")
    return isinstance(found, dict) and "bbox" in found and bool(head.row.keys() & {"messages", "images", "query"})


def read(job: Job) -> list[RawSplit]:
    """Splits of the source: see :func:`coordexp.data.importers.chat.chat_splits`."""
    return chat_splits(job, _objects, stored=True)


def _objects(row: dict[str, Any], where: str) -> tuple[list[RawObject | Unusable], dict[str, Any]]:
    found = row.get("objects")
    if isinstance(found, str):
        with suppress(ValueError, RecursionError):  # what it is instead is said below
            found = json.loads(found)
    if isinstance(found, list):
        # The older form: one object a dictionary, with caption, bbox and bbox_type.
        return [_typed(raw, item) for item, raw in zip(found, objects_of_value(found, f"{where}: objects"), strict=False)], {}
    refs = found.get("ref", []) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("bbox"), list) or not isinstance(refs, list):
        empty = found is None and "messages" in row
        raise Unusable("no objects", f"{where}: objects: expected lists ref and bbox, got {brief(found)}", empty=empty)
    units = _units(found.get("bbox_type"), where)
    boxes = found["bbox"]
    if boxes and all(isinstance(v, int | float) for v in boxes):
        boxes = [boxes]
    names = _names(row, refs, boxes, where)
    return [_object(box, name, units, f"{where}: objects.bbox[{i}]") for i, (box, name) in enumerate(zip(boxes, names, strict=True))], {}


def _units(kind: Any, where: str) -> str | None:
    if kind is not None and not (isinstance(kind, str) and kind in _TYPES):
        raise Unusable("unknown bbox_type", f"{where}: objects.bbox_type: expected one of {', '.join(_TYPES)}, got {brief(kind)!r}")
    return None if kind is None else _TYPES[kind]


def _typed(raw: RawObject | Unusable, item: Any) -> RawObject | Unusable:
    if isinstance(raw, RawObject) and isinstance(item, dict):
        raw.units = _units(item.get("bbox_type"), raw.where)
    return raw


def _names(row: dict[str, Any], refs: list[Any], boxes: list[Any], where: str) -> Sequence[Any]:
    """A name for each box."""
    texts = turns_of(row)
    placed = _by_place(refs, boxes, [_PLACES.findall(text) for _, text in texts])
    if placed is not None:
        return placed
    if len(refs) == len(boxes):
        return refs
    if len(refs) == 1:
        return refs * len(boxes)
    if refs:
        problem = f"{where}: objects.ref: expected one, or as many as the {len(boxes)} bbox, got {len(refs)}"
        raise Unusable("names and boxes do not pair", problem)
    return _said(texts, len(boxes), where)


def _by_place(refs: list[Any], boxes: list[Any], turns: list[list[str]]) -> list[Any] | None:
    """Names by the places of the messages, or None where those do not tell."""
    flat = [place for turn in turns for place in turn]
    if not refs or flat.count("<ref-object>") != len(refs) or flat.count("<bbox>") != len(boxes):
        return None
    left = list(refs)
    before: list[Any] = []
    names: list[Any] = []
    for turn in turns:
        here = [left.pop(0) for _ in range(turn.count("<ref-object>"))]
        count = turn.count("<bbox>")
        given = here or before
        if count and len(given) not in (1, count):
            return None
        names += given * count if len(given) == 1 else given[:count] if count else []
        before = here or before
    return names


def _said(texts: list[tuple[str, str]], count: int, where: str) -> list[Any]:
    """Names that the answers give beside the places of the boxes, else what the question asks for."""
    names: list[Any] = [None] * count
    question, at = "", 0
    for role, text in texts:
        number_of = iter(range(at, count))
        at += text.count("<bbox>")
        filled = re.sub("<bbox>", lambda _: f"[{next(number_of, -1)}, -1, -1, -1]", text)  # noqa: B023
        if role != "assistant":
            question = text
            continue
        for raw in objects_of_text(filled, where, question) or ():
            if isinstance(raw, RawObject) and isinstance(raw.values, list) and len(raw.values) == 4 and 0 <= int(raw.values[0]) < count:
                names[int(raw.values[0])] = raw.name
    return names


def _object(box: Any, name: Any, units: str | None, where: str) -> RawObject:
    length = len(box) if isinstance(box, list) else 0
    layout = "point" if length == 2 else "outline" if length >= 6 and length % 2 == 0 else "xyxy"
    return RawObject(where, box, layout, units, name)  # type: ignore[arg-type]
