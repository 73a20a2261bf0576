"""Records of this package as raw objects, for `doctor`; an import of them would change nothing."""

from __future__ import annotations

from typing import Any

from coordexp.data.importers.base import Job, RawObject, RawSplit, Unusable, brief
from coordexp.data.importers.chat import chat_splits
from coordexp.data.importers.files import Head

_KEYS = {"images", "width", "height", "objects"}


def looks(head: Head) -> bool:
    """Rows with a record's keys, whose objects have ``desc``."""
    objects = head.row.get("objects")
    return head.row.keys() >= _KEYS and isinstance(objects, list) and all(isinstance(o, dict) and "desc" in o for o in objects)


def read(job: Job) -> list[RawSplit]:
    """The one split of the file."""
    return chat_splits(job, _objects)


def _objects(row: dict[str, Any], where: str) -> tuple[list[RawObject | Unusable], dict[str, Any]]:
    objects = row.get("objects")
    if not isinstance(objects, list):
        raise Unusable("no objects", f"{where}: objects: expected a list, got {brief(objects)}")
    return [_object(item, f"{where}: objects[{i}]") for i, item in enumerate(objects)], {}


def _object(item: Any, where: str) -> RawObject | Unusable:
    if not isinstance(item, dict):
        return Unusable("no box", f"{where}: expected an object, got {brief(item)}")
    for key, layout in (("bbox_2d", "xyxy"), ("poly", "outline"), ("point_2d", "point")):
        if key in item:
            return RawObject(f"{where}.{key}", item[key], layout, name=item.get("desc"))  # type: ignore[arg-type]
    return Unusable("no box", f"{where}: expected bbox_2d, poly or point_2d, got {brief(', '.join(map(str, item)))}")
