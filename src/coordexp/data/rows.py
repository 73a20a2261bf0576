"""One line of a record file: what it must hold, and every fault of one that does not. Standard library only."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from coordexp.boxes import bounding_box, box_problem
from coordexp.data.images import image_size
from coordexp.errors import DataError
from coordexp.grammar import GEOMETRIES, HALF_PAIR, Geometry

RECORD_KEYS: Final = ("images", "width", "height", "objects", "image_id", "metadata")
REQUIRED_KEYS: Final = ("images", "width", "height", "objects")
OBJECT_KEYS: Final = ("desc", *GEOMETRIES, "area", "iscrowd", "difficult")
# Bounds that no image or annotation reaches; beyond them arithmetic and recursion would fail without naming the line.
MAX_SIDE: Final = 1_000_000
MAX_DEPTH: Final = 50
# Written by an import beside the records: says, among other things, where linked images may lie.
IMPORT_FILE: Final = "import.json"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RecordObject:
    """One annotated object; ``values`` are pixels, x and y in turn. A ``crowd`` region and a ``difficult`` object are never a training
    target. ``area`` is the object's own area in pixels squared, where the source has it."""

    desc: str
    geometry: Geometry
    values: tuple[float, ...]
    crowd: bool = False
    difficult: bool = False
    area: float | None = None

    @property
    def taught(self) -> bool:
        """Whether answers name the object."""
        return not (self.crowd or self.difficult)


@dataclass(frozen=True)
class Record:
    """One image with its objects. ``image`` is absolute, ``image_name`` as the file has it; ``source`` is ``file:line``, for messages."""

    image: Path
    width: int
    height: int
    objects: tuple[RecordObject, ...]
    image_id: str
    metadata: dict[str, Any]
    source: str
    image_name: str = ""


def read_row(line: bytes, source: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        DataError: no UTF-8, no JSON object, or a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{source}: {_name(twice)}: expected the key once in its object, got it {keys.count(twice)} times")
        return found

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8 text, got byte {line[error.start]:#04x} at column {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: expected one JSON object, got a line that fails with: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected one JSON object, got {show(row)}")
    return row


class RowReader:
    """Reads the rows of one file: knows its folder, which ids it has seen and where linked images may lie."""

    def __init__(self, folder: Path, *, check_images: bool, follow: bool = True) -> None:
        """``follow=False``: nobody will open the images, so links are not followed; paths are checked as they are written."""
        self.folder = folder
        self.check_images = check_images
        self.follow = follow
        self._seen: dict[str, str] = {}
        self._roots: tuple[Path, ...] | None = None

    def read(self, row: dict[str, Any], source: str) -> tuple[Record | None, list[str]]:
        """The record of a row, or None and every fault of it, one line each, as ``file:line: field: expected ..., got ...``."""
        faults = _key_faults(row, RECORD_KEYS, source, "")
        faults += [
            f"{source}: {key}: expected this key, got none: a record needs {', '.join(REQUIRED_KEYS)}"
            for key in REQUIRED_KEYS
            if key not in row
        ]
        sides = [_try(faults, _side, row[key], f"{source}: {key}") if key in row else None for key in ("width", "height")]
        objects = _objects(row.get("objects", []), source, sides, faults)
        metadata = row.get("metadata", {})
        if isinstance(metadata, dict):
            _try(faults, _check_finite, metadata, f"{source}: metadata")
        else:
            faults.append(f"{source}: metadata: expected an object, got {show(metadata)}")
        found = _try(faults, self._image, row["images"], source) if "images" in row else None
        # Before the image is looked at: ids must not depend on check_images.
        image_id = _try(faults, self._image_id, row, found[0] if found else "", source)
        if image_id is not None and not faults:
            self._seen[image_id] = source
        width, height = sides
        if found is None or width is None or height is None:
            return None, faults
        if self.check_images:
            _try(faults, _check_header, found[1], width, height, source)
        if faults or image_id is None:
            return None, faults
        return Record(found[1], width, height, tuple(objects), image_id, metadata, source, found[0]), []

    def _image(self, images: Any, source: str) -> tuple[str, Path]:
        if not isinstance(images, list) or len(images) != 1:
            raise DataError(f"{source}: images: expected a list of one path, got {show(images)}")
        name = _text(images[0], f"{source}: images[0]")
        inside = not os.path.isabs(name) and "\0" not in name
        image = self.folder
        if inside and not self.follow:
            image = Path(os.path.normpath(os.path.join(self.folder, name)))
            inside = image != self.folder and image.is_relative_to(self.folder)
        elif inside:
            try:
                path = self.folder / name
                image = path.resolve()
                # The folder that holds the file or its link must be ours; only the file itself may be a link, to a named place.
                holder = path.parent.resolve()
            except (OSError, RuntimeError) as error:  # names too long for the file system; loops of links
                raise DataError(f"{source}: images[0]: expected a usable path, got {show(name)}: {error}") from error
            inside = image != self.folder and image.is_relative_to(self.folder)
            if not inside and path.name != ".." and holder.is_relative_to(self.folder):
                inside = any(image.is_relative_to(root) for root in self._linked_roots())
        if not inside:
            raise DataError(f"{source}: images[0]: expected a path inside the folder of the record file, got {show(name)}")
        return name, image

    def _linked_roots(self) -> tuple[Path, ...]:
        """Folders that an import has linked its images from; none without its ``import.json``."""
        if self._roots is None:
            path = self.folder / IMPORT_FILE
            roots: Any = []
            if path.is_file():
                try:
                    roots = json.loads(path.read_text(encoding="utf-8"))["image_roots"]
                except (ValueError, RecursionError, KeyError, TypeError) as error:
                    raise DataError(f"{path}: image_roots: expected the list that an import writes, got none: import again") from error
            if not isinstance(roots, list) or not all(isinstance(root, str) and os.path.isabs(root) for root in roots):
                raise DataError(f"{path}: image_roots: expected a list of absolute folders, got {show(roots)}: import again")
            self._roots = tuple(Path(root).resolve() for root in roots)
        return self._roots

    def _image_id(self, row: dict[str, Any], name: str, source: str) -> str:
        if "image_id" in row:
            image_id = _text(row["image_id"], f"{source}: image_id")
            if image_id in self._seen:
                first = self._seen[image_id]
                raise DataError(f"{source}: image_id: expected one record per id, got {image_id!r} again (first at {first})")
        else:
            stem = Path(name).stem
            image_id, copies = stem, 1
            while image_id in self._seen:
                copies += 1
                image_id = f"{stem}-{copies}"
        return image_id


def _try(faults: list[str], check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What ``check`` gives, or None with its complaint noted."""
    try:
        return check(*args, **kwargs)
    except DataError as error:
        faults.append(str(error))
        return None


def _objects(items: Any, source: str, sides: Sequence[int | None], faults: list[str]) -> list[RecordObject]:
    if not isinstance(items, list):
        faults.append(f"{source}: objects: expected a list, got {show(items)}")
        return []
    found = [_object(item, f"{source}: objects[{i}]", sides, faults) for i, item in enumerate(items)]
    return [item for item in found if item is not None]


def _object(item: Any, where: str, sides: Sequence[int | None], faults: list[str]) -> RecordObject | None:
    box = _plain_box(item, sides)
    if box is not None:
        return RecordObject(item["desc"], "bbox_2d", box)
    if not isinstance(item, dict):
        faults.append(f"{where}: expected an object with desc and one of {', '.join(GEOMETRIES)}, got {show(item)}")
        return None
    before = len(faults)
    faults += _key_faults(item, OBJECT_KEYS, where, ".")
    desc = _try(faults, _text, item.get("desc"), f"{where}.desc")
    crowd, difficult, area = item.get("iscrowd", False), item.get("difficult", False), item.get("area")
    for key, value in (("iscrowd", crowd), ("difficult", difficult)):
        if not isinstance(value, bool):
            faults.append(f"{where}.{key}: expected true or false, got {show(value)}")
    if "area" in item and (area is None or not _is_number(area) or area <= 0):
        faults.append(f"{where}.area: expected a positive number of square pixels, got {show(area)}")
    present = [geometry for geometry in GEOMETRIES if geometry in item]
    if len(present) != 1:
        faults.append(f"{where}: expected exactly one of {', '.join(GEOMETRIES)}, got {' and '.join(present) or 'none'}")
        return None
    geometry = present[0]
    if crowd is True and geometry == "point_2d":
        faults.append(f"{where}.iscrowd: expected a crowd to cover a region, got a point")
    values = item[geometry]
    faults += _value_faults(geometry, values, f"{where}.{geometry}", sides)
    if len(faults) > before or desc is None:
        return None
    return RecordObject(desc, geometry, tuple(float(value) for value in values), crowd, difficult, None if area is None else float(area))


def _plain_box(item: Any, sides: Sequence[int | None]) -> tuple[float, ...] | None:
    """The values of an object that is just a description and a sound box, by far the most frequent; None sends it through all checks."""
    width, height = sides
    if not isinstance(item, dict) or len(item) != 2 or width is None or height is None:
        return None
    desc, box = item.get("desc"), item.get("bbox_2d")
    if not isinstance(desc, str) or not desc.isascii() or not desc.strip() or not isinstance(box, list) or len(box) != 4:
        return None
    x1, y1, x2, y2 = box
    if type(x1) is type(y1) is type(x2) is type(y2) is float and 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:
        return x1, y1, x2, y2
    return None


def _value_faults(geometry: Geometry, values: Any, where: str, sides: Sequence[int | None]) -> list[str]:
    if not isinstance(values, list):
        return [f"{where}: expected a list of numbers, got {show(values)}"]
    faults = [f"{where}[{i}]: expected a finite number, got {show(v)}" for i, v in enumerate(values) if not _is_number(v)]
    if faults:
        return faults
    # Without a usable size the rest is still checked.
    width, height = (math.inf if side is None else side for side in sides)
    problem = geometry_problem(geometry, values, width, height)
    return [f"{where}: {problem}"] if problem else []


def geometry_problem(geometry: Geometry, values: Sequence[float], width: float, height: float) -> str | None:
    """Why finite pixel values cannot be used as this geometry of an image, or None."""
    if geometry == "bbox_2d":
        return box_problem(values, width, height)
    if geometry == "point_2d" and len(values) != 2:
        return f"expected 2 numbers [x, y], got {len(values)}"
    if geometry == "poly":
        if len(values) < 6 or len(values) % 2:
            return f"expected at least 3 points [x1, y1, ...], an even number of values, got {len(values)}"
        x1, y1, x2, y2 = bounding_box(values)
        if x2 <= x1 or y2 <= y1:
            return f"expected a polygon that extends in x and in y, got {show(values)}"
    if any(x < 0 or x > width for x in values[0::2]) or any(y < 0 or y > height for y in values[1::2]):
        return f"expected points inside the {width:g}x{height:g} image, got {show(values)}"
    return None


def _check_header(path: Path, width: int, height: int, source: str) -> None:
    try:
        problem = size_problem(image_size(path), width, height)
    except DataError as error:
        raise DataError(f"{source}: images[0]: {error}") from error
    if problem:
        raise DataError(f"{source}: images[0]: {problem} ({path})")


def size_problem(size: tuple[int, int], width: int, height: int) -> str | None:
    """Why an upright picture of ``size`` does not fit a stated size, or None."""
    if size == (width, height):
        return None
    hint = ""
    if size == (height, width):
        hint = ": width and height are swapped, count size and boxes in the upright picture if the file has an EXIF rotation"
    return f"expected an image of the record's {width}x{height} pixels, got {size[0]}x{size[1]}{hint}"


def _key_faults(row: dict[str, Any], legal: Sequence[str], where: str, separator: str) -> list[str]:
    prefix = f"{where}{separator}" if separator else f"{where}: "
    faults = []
    for key in row:
        if key not in legal:
            nearest = difflib.get_close_matches(key, legal, n=1, cutoff=0.0)[0]
            faults.append(
                f"{prefix}{_name(key)}: expected one of the keys {', '.join(legal)}, got an unknown one: did you mean {nearest!r}?"
            )
    return faults


def _name(key: str) -> str:
    """A key for a message: it can hold anything, line breaks too."""
    return key if key.isprintable() and len(key) <= 80 else show(key)


def _check_finite(value: Any, where: str, depth: int = 0) -> None:
    """Metadata is free, but it is written out again, and NaN is no JSON."""
    if depth > MAX_DEPTH:
        source, _, field = where.rpartition(": ")
        raise DataError(f"{source}: {field[:60]}...: expected at most {MAX_DEPTH} levels of nesting, got more")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: expected a finite number, got {show(value)}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_finite(item, f"{where}.{_name(key)}", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_finite(item, f"{where}[{i}]", depth + 1)


def _side(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIDE:
        raise DataError(f"{where}: expected a positive whole number of pixels, at most {MAX_SIDE}, got {show(value)}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected a non-empty string, got {show(value)}")
    # JSON can spell half a surrogate pair; no file or tokenizer can take it.
    if HALF_PAIR.search(value):
        raise DataError(f"{where}: expected valid Unicode, got half a surrogate pair in {show(value)}")
    return value


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


def show(value: Any) -> str:
    """The value as JSON, short enough for one line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def losses_of(path: Path) -> list[str]:
    """What the import that wrote a record file left out of it, one line each; nothing for files that no import wrote.

    Raises:
        DataError: an ``import.json`` beside it that no import wrote.
    """
    beside = path.parent / IMPORT_FILE
    if not beside.is_file():
        return []
    try:
        imports = json.loads(beside.read_text(encoding="utf-8"))["imports"]
        found = [entry["left_out"][path.stem] for entry in imports if path.stem in entry["left_out"]]
        return [
            f"the import left out {lost['objects_lost']} of {lost['objects']} objects and {lost['images_lost']} of "
            f"{lost['images']} images: "
            + ", ".join(f"{count} {reason}" for reason, count in lost["reasons"].items())
            for lost in found
            if lost["reasons"]
        ]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{beside}: expected what an import writes, got {show(str(error))}: import again") from error
