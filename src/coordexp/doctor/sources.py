"""Boxes of a data file as numbers, nothing converted and nothing refused: records, and JSON of other tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordexp.boxes import bounding_box
from coordexp.data.images import image_size
from coordexp.errors import DataError

_FENCE: Final = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_BOX_KEYS: Final = ("bbox_2d", "bbox", "box")
_LABEL_KEYS: Final = ("desc", "label", "ref", "category_id", "category")
# Enough for every test of the probe; keeps a file of millions of boxes to seconds.
MAX_BOXES: Final = 200_000


@dataclass(frozen=True)
class BoxFile:
    """``values [N, 4]`` as written, ``sides [N, 2]`` (width, height in pixels; NaN where unknown), ``image [N]``.

    ``format`` is ``records``, ``coco`` or ``other``; ``units`` and ``layout`` are what it promises (None: nothing). ``place``
    and ``label`` by box. ``unreadable``: places of what looks like a box and is none.
    """

    format: str
    units: str | None
    layout: str | None
    values: NDArray[np.float64]
    sides: NDArray[np.float64]
    image: NDArray[np.int64]
    place: tuple[str, ...]
    label: tuple[str, ...]
    images: int
    unreadable: tuple[str, ...]
    complete: bool


@dataclass
class _Found:
    values: list[list[float]] = field(default_factory=list)
    sides: list[tuple[float, float]] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    place: list[str] = field(default_factory=list)
    label: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    promises: set[str | None] = field(default_factory=set)
    images: int = 0

    def add(self, value: Any, label: Any, side: tuple[float, float], place: str) -> None:
        numbers = value if isinstance(value, list) else []
        if len(numbers) == 2 and all(map(_is_number, numbers)):
            return  # a point
        if len(numbers) != 4 or not all(map(_is_number, numbers)):
            self.unreadable.append(place)
            return
        self.values.append([float(v) for v in numbers])
        self.sides.append(side)
        self.image.append(self.images)
        self.place.append(place)
        self.label.append(str(label))

    def file(self, format: str, units: str | None, layout: str | None, *, complete: bool) -> BoxFile:
        return BoxFile(
            format, units, layout,
            np.array(self.values, dtype=np.float64).reshape(-1, 4), np.array(self.sides, dtype=np.float64).reshape(-1, 2),
            np.array(self.image, dtype=np.int64), tuple(self.place), tuple(self.label), self.images, tuple(self.unreadable), complete,
        )  # fmt: skip


def _is_number(value: Any) -> bool:
    # The comparison is false for NaN and exact for integers beyond the range of a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def read_boxes(path: Path) -> BoxFile:
    """Boxes of a records JSONL, a COCO file, or JSONL or a JSON list whose rows hold ``objects``, ``annotations`` or an answer in JSON.

    Raises:
        DataError: a file that is missing, no JSON, or holds no row of that kind.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: expected a data file, got {'a folder' if path.is_dir() else 'nothing there'}: name the JSONL or JSON file"
        )
    content = _whole(path)
    found = _Found()
    if isinstance(content, dict) and isinstance(content.get("annotations"), list) and isinstance(content.get("images"), list):
        return _read_coco(content, found)
    ours = True
    complete = True
    for place, row in _rows(path, content):
        if len(found.values) >= MAX_BOXES:
            complete = False
            break
        ours = _read_row(row, place, path.parent, found) and ours
        found.images += 1
    if not found.images:
        raise DataError(f"{path}: expected one JSON object a line or a JSON list of them, got none")
    if ours:
        return found.file("records", "pixel", "xyxy", complete=complete)
    units = next(iter(found.promises)) if len(found.promises) == 1 else None
    return found.file("other", units, None, complete=complete)


def _whole(path: Path) -> Any:
    """The file as one JSON value, or None where it is lines."""
    if path.suffix != ".json":
        return None
    try:
        return json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return None


def _rows(path: Path, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if content is not None:
        items = content if isinstance(content, list) else [content]
        for number, row in enumerate(items, start=1):
            if not isinstance(row, dict):
                raise DataError(f"{path}: row {number}: expected a JSON object, got {str(row)[:60]}")
            yield f"{path.name}:{number}", row
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: expected one JSON object, got a line that fails with: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected one JSON object, got {str(row)[:60]}")
            yield f"{path.name}:{number}", row


def _read_row(row: dict[str, Any], place: str, folder: Path, found: _Found) -> bool:
    """Add the row's boxes; whether it is a record of ours."""
    items, side = _items(row), _side(row, folder)
    if isinstance(items, dict):
        # ms-swift: parallel lists.
        boxes, refs = items.get("bbox"), items.get("ref")
        found.promises.add({"real": "pixel", "norm1": "norm1"}.get(str(items.get("bbox_type"))))
        for i, box in enumerate(boxes if isinstance(boxes, list) else []):
            label = refs[min(i, len(refs) - 1)] if isinstance(refs, list) and refs else ""
            found.add(box, label, side, f"{place}: objects.bbox[{i}]")
        return False
    ours = "objects" in row and "width" in row and "height" in row and "images" in row
    for i, item in enumerate(items):
        where = f"{place}: objects[{i}]"
        if not isinstance(item, dict):
            found.unreadable.append(where)
            continue
        label = next((item[key] for key in _LABEL_KEYS if key in item), "")
        ours = ours and "desc" in item
        key = next((key for key in _BOX_KEYS if key in item), None)
        if key is not None:
            found.add(item[key], label, side, f"{where}.{key}")
        elif isinstance(item.get("poly"), list) and len(item["poly"]) >= 6 and all(map(_is_number, item["poly"])):
            found.add([*bounding_box(item["poly"])], label, side, f"{where}.poly")
        elif "point_2d" not in item:
            found.unreadable.append(where)
    if not ours:
        found.promises.add(None)
    return ours


def _items(row: dict[str, Any]) -> Any:
    for key in ("objects", "annotations"):
        if isinstance(row.get(key), list | dict):
            return row[key]
    turns = row.get("conversations", row.get("messages"))
    last = turns[-1] if isinstance(turns, list) and turns else None
    text = last.get("value", last.get("content")) if isinstance(last, dict) else None
    if not isinstance(text, str):
        return []
    fenced = _FENCE.fullmatch(text)
    try:
        answer = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return []  # an answer in words has no boxes
    return answer if isinstance(answer, list) else [answer]


def _side(row: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Width and height as the row says, else from the image's header, else NaN."""
    width: Any = row.get("width")
    height: Any = row.get("height")
    if _is_number(width) and _is_number(height) and width > 0 and height > 0:
        return float(width), float(height)
    name = row.get("images", row.get("image"))
    name = name[0] if isinstance(name, list) and name else name
    name = name.get("path") if isinstance(name, dict) else name
    if isinstance(name, str) and "\0" not in name and (folder / name).is_file():
        try:
            size = image_size(folder / name)
        except DataError:
            return float("nan"), float("nan")  # `data validate` names broken images; here their size is unknown
        return float(size[0]), float(size[1])
    return float("nan"), float("nan")


def _read_coco(content: dict[str, Any], found: _Found) -> BoxFile:
    sides: dict[Any, tuple[float, float]] = {}
    for image in content["images"]:
        if isinstance(image, dict) and isinstance(image.get("id"), int | str):
            sides[image["id"]] = _side({key: image.get(key) for key in ("width", "height")}, Path())
    number = {key: i for i, key in enumerate(sides)}
    complete = len(content["annotations"]) <= MAX_BOXES
    for i, item in enumerate(content["annotations"][:MAX_BOXES]):
        where = f"annotations[{i}]"
        key = item.get("image_id") if isinstance(item, dict) else None
        if not isinstance(key, int | str) or key not in sides or "bbox" not in item:
            found.unreadable.append(where)
            continue
        found.images = number[key]
        found.add(item["bbox"], item.get("category_id", ""), sides[key], f"{where}.bbox")
    found.images = len(sides)
    return found.file("coco", "pixel", "xywh", complete=complete)
