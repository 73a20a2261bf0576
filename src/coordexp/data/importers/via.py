"""VIA (VGG Image Annotator) JSON: a project, or the annotations it exports.

``{"a.jpg1234": {"filename": "a.jpg", "regions": [{"shape_attributes": {"name": "rect", "x", "y", "width", "height"}, "region_attributes":
{"class": "cat"}}]}}``. Convention: pixels from 0; ``rect``, ``polygon``, ``circle``, ``ellipse`` and ``point`` are read. The name is the
region's only attribute, else the one called label, class, name, type, category or object.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import Again, Job, RawImage, RawObject, RawSplit, Unusable, brief
from coordexp.data.importers.chat import json_splits, roots_beside
from coordexp.data.importers.files import Head, head_of, json_of
from coordexp.data.importers.judging import number
from coordexp.errors import DataError

_META: Final = "_via_img_metadata"
_NAMES: Final = ("label", "class", "class_name", "name", "type", "category", "object", "species")


def looks(head: Head) -> bool:
    """A VIA file, or a folder with one."""
    if head.path.is_dir():
        return any(looks(head_of(path)) for path in sorted([*head.path.glob("*.json"), *head.path.glob("*/*.json")])[:2])
    first = next(iter(head.row.values()), None) if head.top else None
    return _META in head.top or (isinstance(first, dict) and {"filename", "regions"} <= first.keys())


def read(job: Job) -> list[RawSplit]:
    """One split a file.

    Raises:
        DataError: no such file, or one that is broken.
    """
    files = json_splits(job, "a VIA JSON file", lambda path: looks(head_of(path)))
    return [_split(job, name, path) for name, path in files.items()]


def _split(job: Job, name: str, path: Path) -> RawSplit:
    content = json_of(path, "a VIA JSON file")
    images = content.get(_META, content) if isinstance(content, dict) else None
    if not isinstance(images, dict) or not images:
        raise DataError(f"{path}: expected a VIA project or its annotations, got {brief(content)}")
    return RawSplit(name, len(images), Again(partial(_images, images, path.name)), roots_beside(job, path, name))


def _images(images: dict[str, Any], file: str) -> Iterator[RawImage | Unusable]:
    for key, entry in images.items():
        where = f"{file}: {brief(key)}"
        regions = entry.get("regions") if isinstance(entry, dict) else None
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(regions, list) or not isinstance(name, str):
            yield Unusable("unreadable", f"{where}: expected filename and regions, got {brief(entry)}")
            continue
        yield RawImage(where, (name,), [_object(region, f"{where}: regions[{i}]") for i, region in enumerate(regions)])


def _object(region: Any, where: str) -> RawObject | Unusable:
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    if not isinstance(region, dict) or not isinstance(shape, dict):
        return Unusable("no box", f"{where}: expected shape_attributes, got {brief(region)}")
    name, kind = _name(region.get("region_attributes")), shape.get("name")
    if kind == "rect":
        return RawObject(where, [shape.get(key) for key in ("x", "y", "width", "height")], "xywh", name=name)
    if kind in ("circle", "ellipse"):
        rx, ry = number(shape.get("r", shape.get("rx"))), number(shape.get("r", shape.get("ry")))
        if rx is None or ry is None:
            return Unusable("not numbers", f"{where}: expected a radius, got {brief(shape)}")
        return RawObject(where, [shape.get("cx"), shape.get("cy"), 2 * rx, 2 * ry], "cxcywh", name=name)
    if kind == "point":
        return RawObject(where, [shape.get("cx"), shape.get("cy")], "point", name=name)
    xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
    if kind == "polygon" and isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys):
        return RawObject(where, [value for pair in zip(xs, ys, strict=True) for value in pair], "outline", name=name)
    return Unusable("no box", f"{where}: expected a rect, polygon, circle, ellipse or point, got {brief(kind)}")


def _name(attributes: Any) -> Any:
    """The one name among a region's attributes, or None."""
    found = {str(key).lower(): value for key, value in attributes.items()} if isinstance(attributes, dict) else {}
    value = next(iter(found.values())) if len(found) == 1 else next((found[key] for key in _NAMES if found.get(key)), None)
    if isinstance(value, dict):
        ticked = [key for key, on in value.items() if on]
        return ticked[0] if len(ticked) == 1 else None
    return value
