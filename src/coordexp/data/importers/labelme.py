"""labelme JSON, one file an image: ``{"imagePath": "a.jpg", "imageWidth": .., "imageHeight": .., "shapes": [{"label", "points",
"shape_type"}]}``.

Source: a folder (its folders train, valid and test are the splits), or one file. Convention: pixels from 0. ``rectangle`` is two corners
in any order, ``polygon`` (also X-AnyLabeling's ``rotation``) an outline, ``circle`` its centre and a point of its edge, ``point`` a
point. Lines and masks are left out. ``difficult`` of a shape or among its flags is carried on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from coordexp.boxes import bounding_box
from coordexp.data.importers.base import Again, Job, RawImage, RawObject, RawSplit, Unusable, brief, folder_split
from coordexp.data.importers.files import Head, head_of, json_of
from coordexp.data.importers.judging import number
from coordexp.errors import DataError

_KEYS: Final = {"shapes", "imagePath"}


def looks(head: Head) -> bool:
    """A labelme file, or a folder with one."""
    if head.path.is_dir():
        return any(looks(head_of(path)) for path in sorted(head.path.rglob("*.json"))[:1])
    return head.top >= _KEYS


def read(job: Job) -> list[RawSplit]:
    """One file an image.

    Raises:
        DataError: none there.
    """
    source = job.source
    if not source.exists():
        raise DataError(f"{source}: expected a labelme JSON file or a folder of them, got nothing there")
    root = source.parent if source.is_file() else source
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*.json") if not path.name.startswith("."))
    if not files or (source.is_file() and not looks(head_of(source))):
        raise DataError(f"{source}: expected labelme JSON files with shapes and imagePath, got none")
    splits: dict[str, list[Path]] = {}
    for path in files:
        name = job.file_split("all") if source.is_file() else folder_split(path.relative_to(root).parts[:-1]) or "all"
        splits.setdefault(name, []).append(path)
    kept = job.choose(splits) if source.is_dir() else list(splits)
    return [RawSplit(name, len(splits[name]), Again(partial(_images, splits[name], root)), (root,)) for name in kept]


def _images(files: list[Path], root: Path) -> Iterator[RawImage | Unusable]:
    for path in files:
        inner = path.relative_to(root)
        where = inner.as_posix()
        try:
            content = json_of(path, "labelme JSON")
        except DataError as error:
            yield Unusable("unreadable", f"{where}: {str(error).partition(': ')[2]}")
            continue
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            yield Unusable("unreadable", f"{where}: expected shapes and imagePath, got {brief(content)}")
            continue
        objects = [_object(shape, f"{where}: shapes[{i}]") for i, shape in enumerate(content["shapes"])]
        stated = content.get("imagePath")
        near = (inner.parent / stated.replace("\\", "/")).as_posix() if isinstance(stated, str) and stated else ""
        names = tuple(name for name in (near, inner.with_suffix("").as_posix()) if name)
        size = (content.get("imageWidth"), content.get("imageHeight"))
        yield RawImage(where, names, objects, inner.with_suffix("").as_posix(), size=size)


def _object(shape: Any, where: str) -> RawObject | Unusable:
    points = shape.get("points") if isinstance(shape, dict) else None
    flat = [number(v) for v in _flat(points)]
    values = [value for value in flat if value is not None]
    if not isinstance(shape, dict) or not values or len(values) < len(flat):
        return Unusable("not numbers", f"{where}: expected points of two finite numbers, got {brief(points)}")
    flags = shape.get("flags")
    difficult = shape.get("difficult") or (flags.get("difficult") if isinstance(flags, dict) else None)
    kind = shape.get("shape_type") or "polygon"
    common = {"name": shape.get("label"), "difficult": difficult}
    if kind == "rectangle" and len(values) in (4, 8):
        return RawObject(where, [*bounding_box(values)], "xyxy", **common)
    if kind in ("polygon", "rotation") and len(values) >= 6:
        return RawObject(where, values, "outline", **common)
    if kind == "circle" and len(values) == 4:
        radius = math.dist(values[:2], values[2:])
        return RawObject(where, [*values[:2], 2 * radius, 2 * radius], "cxcywh", **common)
    if kind == "point" and len(values) == 2:
        return RawObject(where, values, "point", **common)
    return Unusable("no box", f"{where}: expected a rectangle, polygon, circle or point, got a {brief(kind)} of {len(values) // 2} points")


def _flat(points: Any) -> list[Any]:
    """The numbers of a list of pairs, nothing of anything else."""
    pairs = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
    return [v for point in points for v in point] if pairs else []
