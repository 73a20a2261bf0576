"""Boxes of a file, whoever wrote it: four numbers and, where it can be known, the size of the image. numpy and PIL only.

Read are: records; COCO JSON; JSON or JSON lines in which boxes stand under a key such as ``bbox_2d`` or ``bbox``; and chat data
whose answers hold lists of four numbers. Nothing is converted: what the numbers mean is what ``conventions.py`` asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordexp.data.images import image_size
from coordexp.errors import DataError

BOX_KEYS: Final = ("bbox_2d", "bbox", "box", "boxes", "bboxes")
_NUMBER: Final = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX: Final = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")
_COORD_BOX: Final = re.compile(r"<\|coord_(\d+)\|>[\s,\"]*" * 3 + r"<\|coord_(\d+)\|>")

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """``values [N, 4]`` as written; ``sizes [N, 2]``, width and height in pixels, NaN where unknown; ``places``: where each stands."""

    values: FloatArray
    sizes: FloatArray
    places: tuple[str, ...]
    rows: int

    @property
    def known(self) -> bool:
        """Whether the image size of every box is known."""
        return bool(np.isfinite(self.sizes).all())


def read_boxes(path: Path) -> Boxes:
    """All boxes of the file, in file order.

    Raises:
        DataError: a file that cannot be read, is not JSON, or holds no box.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable JSON or JSONL file: {' '.join(str(error).split())}") from None
    rows = _rows(path, text)
    found = [item for place, row in rows for item in _boxes_of(row, place, path.parent)]
    if not found:
        raise DataError(f"{path}: expected boxes, lists of four numbers under {', '.join(BOX_KEYS)} or in answers, found none")
    values = np.array([box for box, _, _ in found], dtype=np.float64)
    sizes = np.array([size for _, size, _ in found], dtype=np.float64)
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise DataError(f"{found[bad][2]}: expected finite coordinates, got {list(found[bad][0])}")
    return Boxes(values, sizes, tuple(place for _, _, place in found), len(rows))


def _rows(path: Path, text: str) -> list[tuple[str, Any]]:
    """``(place, value)``: the lines of a JSONL file, the entries of a JSON list, or the joined images of a COCO file."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return list(_lines(path, text))
    if isinstance(whole, dict) and isinstance(whole.get("annotations"), list) and isinstance(whole.get("images"), list):
        images = {image.get("id"): image for image in whole["images"] if isinstance(image, dict)}
        rows = []
        for i, item in enumerate(whole["annotations"]):
            image = images.get(item.get("image_id"), {}) if isinstance(item, dict) else {}
            box = item.get("bbox") if isinstance(item, dict) else None
            rows.append((f"{path.name}: annotations[{i}]", {"bbox": box, "width": image.get("width"), "height": image.get("height")}))
        return rows
    return [(f"{path.name}: [{i}]", row) for i, row in enumerate(whole)] if isinstance(whole, list) else [(path.name, whole)]


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: expected one JSON value a line: {' '.join(str(error).split())}") from None


_Found = tuple[tuple[float, ...], tuple[float, float], str]


def _boxes_of(row: Any, place: str, folder: Path) -> Iterator[_Found]:
    found = list(_walk(row, ""))
    if found:
        size = _size(row, folder)
        yield from ((box, size, f"{place}{where}") for box, where in found)


def _walk(value: Any, where: str) -> Iterator[tuple[tuple[float, ...], str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            at = f": {key}" if not where else f"{where}.{key}"
            if key in BOX_KEYS and isinstance(inner, list):
                boxes = [inner] if _is_box(inner) else inner
                yield from ((tuple(map(float, box)), at) for box in boxes if _is_box(box))
            elif key != "readouts":  # the same boxes again, read otherwise
                yield from _walk(inner, at)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _walk(inner, f"{where}[{i}]")
    elif isinstance(value, str):
        for pattern in (_BOX, _COORD_BOX):
            yield from ((tuple(map(float, match.groups())), where) for match in pattern.finditer(value))


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)


def _size(row: Any, folder: Path) -> tuple[float, float]:
    """Width and height that the row states, else those of its one image file, else NaN."""
    unknown = (float("nan"), float("nan"))
    if not isinstance(row, dict):
        return unknown
    sides = [row.get(key) for key in ("width", "height")]
    stated = [float(side) for side in sides if isinstance(side, int | float) and side > 0]
    if len(stated) == 2:
        return stated[0], stated[1]
    images = row.get("images", row.get("image"))
    name = images[0] if isinstance(images, list) and len(images) == 1 else images
    if not isinstance(name, str):
        return unknown
    try:
        width, height = image_size(folder / name)
    except DataError:
        # No picture to ask: the check says that sizes are unknown.
        return unknown
    return float(width), float(height)
