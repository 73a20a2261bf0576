"""Rows of a table with one box each: which column is what, and which numbers are a box. Shared by csv and hf."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from coordexp.data.importers.base import Layout, RawObject, Unusable, brief
from coordexp.data.importers.judging import number
from coordexp.errors import ConfigError

# Names of columns, in small letters without signs.
_COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "image": ("image", "filename", "file", "imagename", "imagepath", "path", "filepath", "img", "imgpath", "imageid", "imgid", "id"),
    "label": ("label", "class", "classname", "labelname", "name", "category", "categoryname", "target", "object", "classid", "categoryid"),
    "xmin": ("xmin", "x1", "left", "minx", "bboxxmin", "bboxx1"),
    "ymin": ("ymin", "y1", "top", "miny", "bboxymin", "bboxy1"),
    "xmax": ("xmax", "x2", "right", "maxx", "bboxxmax", "bboxx2"),
    "ymax": ("ymax", "y2", "bottom", "maxy", "bboxymax", "bboxy2"),
    "x": ("x", "bboxx"),
    "y": ("y", "bboxy"),
    "w": ("w", "bboxw", "bboxwidth", "boxwidth", "width"),
    "h": ("h", "bboxh", "bboxheight", "boxheight", "height"),
    "width": ("imagewidth", "imgwidth", "width"),
    "height": ("imageheight", "imgheight", "height"),
    "bbox": ("bbox", "box", "boundingbox"),
    "crowd": ("isgroupof", "iscrowd"),
    "difficult": ("difficult", "isdifficult", "ignore"),
    "area": ("area",),
    "split": ("split", "set", "subset"),
}
_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def columns_of(names: Iterable[str]) -> dict[str, str]:
    """The columns that a table has, by what they mean."""
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(re.sub(r"[^a-z0-9]", "", str(name).lower()), name)
    found = {what: next((plain[key] for key in keys if key in plain), "") for what, keys in _COLUMNS.items()}
    kept = {what: name for what, name in found.items() if name}
    # With corners (or a box in one column) width and height are the image's, else the box's.
    if "xmax" in kept or "bbox" in kept:
        kept.pop("w", None)
        kept.pop("h", None)
    else:
        for side, box in (("width", "w"), ("height", "h")):
            if side in kept and kept[side] == kept.get(box):
                del kept[side]
        if {"xmin", "ymin"} <= kept.keys() and "x" not in kept:
            kept.update(x=kept.pop("xmin"), y=kept.pop("ymin"))
    return kept


def has_box(columns: Mapping[str, str]) -> bool:
    """Whether these columns hold a box."""
    return any(all(name in columns for name in names) for names in (("xmin", "ymin", "xmax", "ymax"), ("x", "y", "w", "h"), ("bbox",)))


def box_of(
    row: Mapping[str, Any], columns: Mapping[str, str], units: str | None, layout: str | None, where: str, name: Any
) -> RawObject | Unusable | None:
    """The box of a row, or None for a row that has none: an image without objects.

    Raises:
        ConfigError: a box in one column whose layout neither the file nor the user says.
    """
    kind: Layout
    if "bbox" in columns:
        value = row[columns["bbox"]]
        values = _NUMBER.findall(value) if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else value
        if values in (None, "", []):
            return None
        kind = known_layout(layout, where)
    else:
        corners = "xmax" in columns
        values = [row.get(columns[key]) for key in (("xmin", "ymin", "xmax", "ymax") if corners else ("x", "y", "w", "h"))]
        if all(value in (None, "") for value in values):
            return None
        kind = "xyxy" if corners else known_layout(layout, where) if layout is not None else "xywh"
    flags = {key: row.get(columns[key]) for key in ("crowd", "difficult", "area") if key in columns}
    if isinstance(values, list) and any(value in (None, "") or number(value) is None for value in values):
        return Unusable("not numbers", f"{where}: expected finite numbers, got {brief(values)}")
    return RawObject(where, [number(v) for v in values] if isinstance(values, list) else values, kind, units, name, **flags)


def known_layout(layout: str | None, where: str) -> Layout:
    """What the user says that boxes are.

    Raises:
        ConfigError: nothing.
    """
    for name in ("xyxy", "xywh", "cxcywh", "yxyx"):
        if name == layout:
            return name  # type: ignore[return-value]
    raise ConfigError(f"--layout: expected xyxy, xywh, cxcywh or yxyx, got none: {where} does not say how its boxes stand")


def layout_by_area(boxes: Any, areas: Any) -> str | None:
    """``xywh`` or ``xyxy``, told by areas that are a box's under one of them only; None where they tell nothing."""
    votes = {"xywh": 0, "xyxy": 0}
    for box, area in zip(boxes, areas, strict=False):
        numbers = [number(v) for v in box] if isinstance(box, list | tuple) else []
        size = number(area)
        if len(numbers) != 4 or None in numbers or not size:
            continue
        x, y, a, b = (v or 0.0 for v in numbers)
        for layout, own in (("xywh", a * b), ("xyxy", (a - x) * (b - y))):
            votes[layout] += abs(own - size) <= 0.01 * size
    best = max(votes, key=lambda key: votes[key])
    return best if votes[best] > 0 and min(votes.values()) < 0.1 * votes[best] else None


def parsed(value: Any) -> Any:
    """A value that is JSON in a text, as such."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
