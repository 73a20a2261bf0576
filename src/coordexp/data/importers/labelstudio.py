"""Label Studio JSON: its full export (tasks with ``annotations``) and ``JSON-MIN`` (``label`` beside the image).

Convention: x, y, width and height are percent of the sides; a rotated rectangle turns around its upper left corner and becomes an outline.
Polygons and key points are read, ellipses as their box; brushes are left out. Of several annotations of a task the one marked as
ground truth counts; without a mark the task is left out, because which one is right is not said. Predictions and cancelled ones are not
read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import Again, Job, RawImage, RawObject, RawSplit, Unusable, brief, id_text
from coordexp.data.importers.chat import json_splits, roots_beside
from coordexp.data.importers.files import Head, head_of, json_list
from coordexp.data.importers.judging import number

_LABELS: Final = ("rectanglelabels", "polygonlabels", "ellipselabels", "keypointlabels", "brushlabels", "labels")
_IMAGES: Final = ("image", "img", "photo", "picture", "url", "image_url")


def looks(head: Head) -> bool:
    """A list of tasks, or of the images of JSON-MIN."""
    row = head.row
    if isinstance(row.get("data"), dict) and isinstance(row.get("annotations", row.get("completions")), list):
        return True
    return any(
        isinstance(value, list) and value and isinstance(value[0], dict) and "original_width" in value[0] for value in row.values()
    )


def read(job: Job) -> list[RawSplit]:
    """One split a file.

    Raises:
        DataError: no such file.
    """
    files = json_splits(job, "a Label Studio JSON export", lambda path: looks(head_of(path)))
    return [_split(job, name, path) for name, path in files.items()]


def _split(job: Job, name: str, path: Path) -> RawSplit:
    rows = json_list(path)
    return RawSplit(name, len(rows), Again(partial(_images, rows, path.name)), roots_beside(job, path, name))


def _images(rows: list[Any], file: str) -> Iterator[RawImage | Unusable]:
    for i, row in enumerate(rows):
        where = f"{file}[{i}]"
        try:
            if not isinstance(row, dict):
                raise Unusable("unreadable", f"{where}: expected a task, got {brief(row)}")
            regions = _regions(row, where)
            data = row["data"] if isinstance(row.get("data"), dict) else row
            name = next((data[key] for key in _IMAGES if isinstance(data.get(key), str)), None)
            if name is None:
                raise Unusable(
                    "no image named", f"{where}: expected an image among the task's data, got {brief(', '.join(map(str, data)))}"
                )
        except Unusable as fault:
            yield fault
            continue
        first = next((region for region in regions if isinstance(region, dict)), {})
        objects = [found for j, region in enumerate(regions) for found in _objects(region, f"{where}: result[{j}]")]
        key = id_text(row["id"]) if row.get("id") is not None else None
        yield RawImage(where, (name,), objects, key, size=(first.get("original_width"), first.get("original_height")))


def _regions(row: dict[str, Any], where: str) -> list[Any]:
    """The regions of a task's one annotation."""
    done = row.get("annotations", row.get("completions"))
    if not isinstance(done, list):
        found = next((v for v in row.values() if isinstance(v, list) and v and isinstance(v[0], dict) and "original_width" in v[0]), [])
        return list(found)
    live = [one for one in done if isinstance(one, dict) and not one.get("was_cancelled") and isinstance(one.get("result"), list)]
    marked = [one for one in live if one.get("ground_truth")]
    chosen = marked if len(live) > 1 else live
    if not live:
        raise Unusable("not annotated", f"{where}: expected a finished annotation, got none", empty=True)
    if len(chosen) != 1:
        got = f"{len(live)}, {len(marked)} of them marked as ground truth"
        raise Unusable("several annotations", f"{where}: expected one annotation of the task, or one marked as ground truth, got {got}")
    return list(chosen[0]["result"])


def _objects(region: Any, where: str) -> list[RawObject | Unusable]:
    """One object for each label of a region; none of what is no region."""
    value = region.get("value", region) if isinstance(region, dict) else None
    if not isinstance(value, dict):
        return [Unusable("unreadable", f"{where}: expected a region, got {brief(region)}")]
    if (
        "value" in region
        and not isinstance(region.get("original_width"), int | float)
        and region.get("type") in ("choices", "textarea", "rating")
    ):
        return []
    labels = next((value[key] for key in _LABELS if isinstance(value.get(key), list)), [None])
    shape = _shape(value, region, where)
    if isinstance(shape, Unusable):
        return [shape]
    return [RawObject(where, shape[1], shape[0], shape[2], name) for name in labels or [None]]


def _shape(value: dict[str, Any], region: dict[str, Any], where: str) -> tuple[Any, list[Any], str] | Unusable:
    points = value.get("points")
    if isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points):
        return "outline", [v for point in points for v in point], "norm100"
    if "radiusX" in value:
        rx, ry = number(value.get("radiusX")), number(value.get("radiusY"))
        if rx is None or ry is None:
            return Unusable("not numbers", f"{where}: expected two radii, got {brief(value)}")
        return "cxcywh", [value.get("x"), value.get("y"), 2 * rx, 2 * ry], "norm100"
    if "height" not in value and "x" in value:
        return "point", [value.get("x"), value.get("y")], "norm100"
    box = [value.get(key) for key in ("x", "y", "width", "height")]
    if "x" not in value:
        return Unusable("no box", f"{where}: expected a rectangle, polygon, ellipse or key point, got {brief(region.get('type', value))}")
    if not number(value.get("rotation", 0)):
        return "xywh", box, "norm100"
    numbers = [number(v) for v in (*box, value.get("rotation"), region.get("original_width"), region.get("original_height"))]
    if any(v is None for v in numbers):
        return Unusable("not numbers", f"{where}: expected a rotated rectangle and its image's size, got {brief(value)}")
    x, y, w, h, angle, width, height = (v or 0.0 for v in numbers)
    # Turned in pixels: in percent an oblong image would shear it.
    x, y, w, h = x * width / 100, y * height / 100, w * width / 100, h * height / 100
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = [(0.0, 0.0), (w, 0.0), (w, h), (0.0, h)]
    return "outline", [v for a, b in corners for v in (x + a * cos - b * sin, y + a * sin + b * cos)], "pixel"
