"""Records: one image and its objects a line of JSON, in pixels. numpy, PIL and the standard library only.

``{"images": ["img/0001.png"], "width": 96, "height": 96, "objects": [{"desc": "small red circle",
"bbox_2d": [12, 30, 28, 46]}], "image_id": "train-000001", "metadata": {}}``

An object has ``desc`` and exactly one of ``bbox_2d`` ``[x1, y1, x2, y2]``, ``poly`` ``[x1, y1, ...]`` (at
least 3 points) and ``point_2d`` ``[x, y]``. Coordinates are pixel edges: a box around the whole image is
``[0, 0, width, height]``. ``image_id`` and ``metadata`` are optional. Image paths are relative to the
folder of the file and may not leave it, not through a symbolic link either.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image, UnidentifiedImageError

from coordexp.boxes import bounding_box, box_problem
from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError, DataError
from coordexp.grammar import GEOMETRIES, Geometry

RECORD_KEYS: Final = ("images", "width", "height", "objects", "image_id", "metadata")
REQUIRED_KEYS: Final = ("images", "width", "height", "objects")
# Bounds that no image or annotation reaches; beyond them arithmetic and recursion would fail without naming the line.
MAX_SIDE: Final = 1_000_000
MAX_DEPTH: Final = 50
OBJECT_KEYS: Final = ("desc", *GEOMETRIES)
# What PIL raises for files it cannot read, by format and by where the damage is.
IMAGE_ERRORS: Final = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class RecordObject:
    """One annotated object; ``values`` are pixels, x and y in turn."""

    desc: str
    geometry: Geometry
    values: tuple[float, ...]


@dataclass(frozen=True)
class Record:
    """One image with its objects. ``image`` is absolute; ``source`` is ``file:line``, for messages."""

    image: Path
    width: int
    height: int
    objects: tuple[RecordObject, ...]
    image_id: str
    metadata: dict[str, Any]
    source: str


@dataclass(frozen=True)
class RecordFile:
    """Usable records of a file in file order, and one line for each that was skipped."""

    records: tuple[Record, ...]
    skipped: tuple[str, ...]


def read_records(
    path: Path, *, on_invalid: Literal["error", "skip"] = "error", limit: int | None = None, check_images: bool = True
) -> RecordFile:
    """Read and check a record file. Blank lines are ignored.

    A record without ``image_id`` takes the stem of its image path, followed by ``-2``, ``-3``, ... where that is
    taken by an earlier record. ``limit`` stops after that many usable records. ``check_images`` reads
    each image's header: it must exist and have the record's size (see :func:`verify_images` for the rest).

    Raises:
        ConfigError: an unknown ``on_invalid`` or a ``limit`` below 1.
        DataError: a file that is missing or has no record; with ``on_invalid="error"`` the first record that
            cannot be used, as ``file:line: field: expected ..., got ...``.
    """
    if on_invalid not in ("error", "skip"):
        raise ConfigError(f"on_invalid: expected 'error' or 'skip', got {on_invalid!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected at least 1 record, got {limit}")
    path = Path(path)
    folder = path.parent.resolve()
    records: list[Record] = []
    skipped: list[str] = []
    seen: dict[str, str] = {}
    lines = 0
    for number, line in _lines(path):
        if limit is not None and len(records) == limit:
            break
        lines += 1
        source = f"{path}:{number}"
        try:
            records.append(_record(_row(line, source), source, folder, seen, check_images))
        except DataError as error:
            if on_invalid == "error":
                raise
            skipped.append(str(error))
    if not lines:
        raise DataError(f"{path}: expected one JSON record a line, got an empty file")
    return RecordFile(tuple(records), tuple(skipped))


def write_records(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically: the old file, if any, stays until the new one is complete.

    Raises:
        DataError: a row that is no JSON (NaN and Infinity included); nothing is written then.
    """
    path = Path(path)
    with atomic_text(path) as file:
        for number, row in enumerate(rows, start=1):
            try:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}:{number}: expected values that JSON can hold, got a row that fails with: {error}") from error


def open_image(record: Record) -> Image.Image:
    """The record's image, fully decoded, as 8-bit RGB (transparency is dropped).

    Pixels are taken as stored: an EXIF rotation is not applied.

    Raises:
        DataError: missing, truncated or unreadable, more than 8 bits a channel, or not of the record's size.
    """
    try:
        with Image.open(record.image) as image:
            problem = _size_problem(image.size, record.width, record.height)
            image.load()
            # Converting these clips silently: a 16-bit image would come out white.
            if problem is None and image.mode.startswith(("I", "F")):
                problem = f"expected 8 bits a channel, got mode {image.mode!r}"
            pixels = image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    except IMAGE_ERRORS as error:
        raise DataError(f"{record.source}: images[0]: {_unreadable(record.image, error)}") from error
    if problem is not None:
        raise DataError(f"{record.source}: images[0]: {problem} ({record.image})")
    return pixels


def verify_images(records: Iterable[Record]) -> None:
    """Decode every image once, so that a damaged file stops a run at its start and not in the middle.

    Raises:
        DataError: one line for every image that :func:`open_image` refuses.
    """
    problems = []
    for record in records:
        try:
            open_image(record).close()
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; bytes, so that a bad encoding is blamed on its line."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file of records, got {'a folder' if path.is_dir() else 'nothing there'}: check the path")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def _row(line: bytes, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{source}: {twice}: expected the key once in its object, got it {keys.count(twice)} times")
        return found

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8 text, got byte {line[error.start]:#04x} at column {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: expected one JSON object, got a line that fails with: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected one JSON object, got {_show(row)}")
    return row


def _record(row: dict[str, Any], source: str, folder: Path, seen: dict[str, str], check_images: bool) -> Record:
    _check_keys(row, RECORD_KEYS, source, "")
    for key in REQUIRED_KEYS:
        if key not in row:
            raise DataError(f"{source}: {key}: expected this key, got none: a record needs {', '.join(REQUIRED_KEYS)}")
    width, height = (_side(row[key], f"{source}: {key}") for key in ("width", "height"))
    if not isinstance(row["objects"], list):
        raise DataError(f"{source}: objects: expected a list, got {_show(row['objects'])}")
    objects = tuple(_object(item, f"{source}: objects[{i}]", width, height) for i, item in enumerate(row["objects"]))
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(f"{source}: metadata: expected an object, got {_show(metadata)}")
    _check_finite(metadata, f"{source}: metadata")
    name, image = _image_path(row["images"], source, folder)
    # Before the image is looked at: ids must not depend on check_images.
    image_id = _image_id(row, name, source, seen)
    if check_images:
        _check_header(image, width, height, source)
    return Record(image, width, height, objects, image_id, metadata, source)


def _object(item: Any, where: str, width: int, height: int) -> RecordObject:
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected an object with desc and one of {', '.join(GEOMETRIES)}, got {_show(item)}")
    _check_keys(item, OBJECT_KEYS, where, ".")
    desc = _text(item.get("desc"), f"{where}.desc")
    present = [geometry for geometry in GEOMETRIES if geometry in item]
    if len(present) != 1:
        raise DataError(f"{where}: expected exactly one of {', '.join(GEOMETRIES)}, got {' and '.join(present) or 'none'}")
    geometry = present[0]
    values = item[geometry]
    if not isinstance(values, list):
        raise DataError(f"{where}.{geometry}: expected a list of numbers, got {_show(values)}")
    for i, value in enumerate(values):
        if not _is_number(value):
            raise DataError(f"{where}.{geometry}[{i}]: expected a finite number, got {_show(value)}")
    problem = _geometry_problem(geometry, values, width, height)
    if problem:
        raise DataError(f"{where}.{geometry}: {problem}")
    return RecordObject(desc, geometry, tuple(float(value) for value in values))


def _geometry_problem(geometry: Geometry, values: Sequence[float], width: int, height: int) -> str | None:
    if geometry == "bbox_2d":
        return box_problem(values, width, height)
    if geometry == "point_2d" and len(values) != 2:
        return f"expected 2 numbers [x, y], got {len(values)}"
    if geometry == "poly":
        if len(values) < 6 or len(values) % 2:
            return f"expected at least 3 points [x1, y1, ...], an even number of values, got {len(values)}"
        x1, y1, x2, y2 = bounding_box(values)
        if x2 <= x1 or y2 <= y1:
            return f"expected a polygon that extends in x and in y, got {_show(values)}"
    if any(x < 0 or x > width for x in values[0::2]) or any(y < 0 or y > height for y in values[1::2]):
        return f"expected points inside the {width}x{height} image, got {_show(values)}"
    return None


def _image_path(images: Any, source: str, folder: Path) -> tuple[str, Path]:
    if not isinstance(images, list) or len(images) != 1:
        raise DataError(f"{source}: images: expected a list of one path, got {_show(images)}")
    name = _text(images[0], f"{source}: images[0]")
    inside = not os.path.isabs(name) and "\0" not in name
    image = folder
    if inside:
        try:
            image = (folder / name).resolve()
        except (OSError, RuntimeError) as error:  # names too long for the file system; loops of links
            raise DataError(f"{source}: images[0]: expected a usable path, got {_show(name)}: {error}") from error
        inside = image != folder and image.is_relative_to(folder)
    if not inside:
        raise DataError(f"{source}: images[0]: expected a path inside the folder of the record file, got {_show(name)}")
    return name, image


def _image_id(row: dict[str, Any], name: str, source: str, seen: dict[str, str]) -> str:
    if "image_id" in row:
        image_id = _text(row["image_id"], f"{source}: image_id")
        if image_id in seen:
            raise DataError(f"{source}: image_id: expected one record per id, got {image_id!r} again (first at {seen[image_id]})")
    else:
        stem = Path(name).stem
        image_id, copies = stem, 1
        while image_id in seen:
            copies += 1
            image_id = f"{stem}-{copies}"
    seen[image_id] = source
    return image_id


def _check_header(path: Path, width: int, height: int, source: str) -> None:
    try:
        with Image.open(path) as image:
            problem = _size_problem(image.size, width, height)
    except IMAGE_ERRORS as error:
        raise DataError(f"{source}: images[0]: {_unreadable(path, error)}") from error
    if problem:
        raise DataError(f"{source}: images[0]: {problem} ({path})")


def _size_problem(size: tuple[int, int], width: int, height: int) -> str | None:
    if size == (width, height):
        return None
    hint = ": width and height are swapped, save the file upright if it has an EXIF rotation" if size == (height, width) else ""
    return f"expected an image of the record's {width}x{height} pixels, got {size[0]}x{size[1]}{hint}"


def _unreadable(path: Path, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f"expected an image file, got nothing at {path}"
    if isinstance(error, UnidentifiedImageError):
        return f"expected an image file, got something else at {path}"
    return f"expected a whole image, got one that fails with: {' '.join(str(error).split())} ({path})"


def _check_keys(row: dict[str, Any], legal: Sequence[str], where: str, separator: str) -> None:
    for key in row:
        if key not in legal:
            nearest = difflib.get_close_matches(key, legal, n=1, cutoff=0.0)[0]
            prefix = f"{where}{separator}" if separator else f"{where}: "
            raise DataError(f"{prefix}{key}: expected one of the keys {', '.join(legal)}, got an unknown one: did you mean {nearest!r}?")


def _check_finite(value: Any, where: str, depth: int = 0) -> None:
    """Metadata is free, but it is written out again, and NaN is no JSON."""
    if depth > MAX_DEPTH:
        source, _, field = where.rpartition(": ")
        raise DataError(f"{source}: {field[:60]}...: expected at most {MAX_DEPTH} levels of nesting, got more")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: expected a finite number, got {_show(value)}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_finite(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_finite(item, f"{where}[{i}]", depth + 1)


def _side(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIDE:
        raise DataError(f"{where}: expected a positive whole number of pixels, at most {MAX_SIDE}, got {_show(value)}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected a non-empty string, got {_show(value)}")
    # JSON can spell half a surrogate pair; no file or tokenizer can take it.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: expected valid Unicode, got half a surrogate pair in {_show(value)}")
    return value


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


def _show(value: Any) -> str:
    """The value as JSON, short enough for one line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
