"""Records: one image and its objects a line of JSON, in pixels. numpy, PIL and the standard library only.

``{"images": ["img/0001.png"], "width": 96, "height": 96, "objects": [{"desc": "small red circle",
"bbox_2d": [12, 30, 28, 46]}], "image_id": "train-000001", "metadata": {}}``

An object has ``desc`` and exactly one of ``bbox_2d`` ``[x1, y1, x2, y2]``, ``poly`` ``[x1, y1, ...]`` (at
least 3 points) and ``point_2d`` ``[x, y]``. Coordinates are pixel edges: a box around the whole image is
``[0, 0, width, height]``. ``iscrowd: true`` marks a region of many objects: no training target, and in evaluation
what COCO calls a crowd. ``difficult: true`` marks an object that is no training target either and that evaluation ignores; ``area`` is
the object's area in pixels squared, where it is not that of its box. ``image_id`` and ``metadata`` are optional. Image paths are relative
to the folder of the file and may not leave it. A symbolic link out of it is refused, but for one: the image file itself may be a link
into a folder that the ``import.json`` beside the record file names under ``image_roots`` (an import links instead of copying).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from coordexp.data.images import load_image, orientation
from coordexp.data.rows import Record, RecordObject, RowReader, read_row, size_problem
from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError, DataError

__all__ = [
    "Record", "RecordFile", "RecordObject", "check_records", "iter_records", "open_image", "read_records", "verify_images", "write_records",
]  # fmt: skip


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
    reader = RowReader(path.parent.resolve(), check_images=check_images)
    records: list[Record] = []
    skipped: list[str] = []
    lines = 0
    for source, line, _ in _lines(path):
        if limit is not None and len(records) == limit:
            break
        lines += 1
        record, faults = _read(reader, line, source)
        if record is not None:
            records.append(record)
        elif on_invalid == "error":
            raise DataError(faults[0])
        else:
            skipped.append(faults[0])
    if not lines:
        raise DataError(f"{path}: expected one JSON record a line, got an empty file")
    return RecordFile(tuple(records), tuple(skipped))


def iter_records(path: Path) -> Iterator[Record]:
    """The records of a file one by one, as :func:`read_records` with ``check_images=False`` gives them, none kept, links not followed.

    Raises:
        DataError: as there.
    """
    path = Path(path)
    reader = RowReader(path.parent.resolve(), check_images=False, follow=False)
    empty = True
    for source, line, _ in _lines(path):
        record, faults = _read(reader, line, source)
        if record is None:
            raise DataError(faults[0])
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: expected one JSON record a line, got an empty file")


@dataclass(frozen=True)
class RecordCheck:
    """What a check of a whole file found: counts, ``faults`` (one line each, in file order) and ``turned``, the
    number of images whose EXIF orientation is applied: their boxes must be counted in the upright picture."""

    records: int
    objects: int
    turned: int
    faults: tuple[str, ...]


def check_records(path: Path, progress: Callable[[int, int], None] | None = None) -> RecordCheck:
    """Check every field of every record and decode every image; nothing is kept in memory but the faults.

    ``progress(done, total)`` counts bytes of the file.

    Raises:
        DataError: a file that is missing or has no line. Faults of lines are returned, not raised.
    """
    path = Path(path)
    reader = RowReader(path.parent.resolve(), check_images=False)
    records = objects = turned = lines = 0
    faults: list[str] = []
    for source, line, done in _lines(path):
        lines += 1
        record, found = _read(reader, line, source)
        if record is not None:
            try:
                open_image(record).close()
                records, objects = records + 1, objects + len(record.objects)
                turned += orientation(record.image) != 1
            except DataError as error:
                found.append(str(error))
        faults += found
        if progress is not None:
            progress(done, path.stat().st_size)
    if not lines:
        raise DataError(f"{path}: expected one JSON record a line, got an empty file")
    return RecordCheck(records, objects, turned, tuple(faults))


def _read(reader: RowReader, line: bytes, source: str) -> tuple[Record | None, list[str]]:
    try:
        row = read_row(line, source)
    except DataError as error:
        return None, [str(error)]
    return reader.read(row, source)


def write_records(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically: the old file, if any, stays until the new one is complete.

    Raises:
        DataError: a row that is no JSON (NaN and Infinity included); nothing is written then.
    """
    path = Path(path)
    with atomic_text(path) as file:
        for number, row in enumerate(rows, start=1):
            try:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False)
                line.encode()  # half a surrogate pair has no bytes
                file.write(line + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}:{number}: expected values that JSON can hold, got a row that fails with: {error}") from error


def open_image(record: Record) -> Image.Image:
    """The record's image, decoded whole, upright, 8-bit RGB: see :func:`coordexp.data.images.load_image`.

    Raises:
        DataError: an image that cannot be used, or one that is not of the record's size.
    """
    try:
        image = load_image(record.image)
    except DataError as error:
        raise DataError(f"{record.source}: images[0]: {error}") from error
    problem = size_problem(image.size, record.width, record.height)
    if problem is not None:
        raise DataError(f"{record.source}: images[0]: {problem} ({record.image})")
    return image


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


def _lines(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """``(file:line, line, bytes read)`` of lines that are not blank; bytes, so that a bad encoding is blamed on its line."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file of records, got {'a folder' if path.is_dir() else 'nothing there'}: check the path")
    with path.open("rb") as file:
        done = 0
        for number, line in enumerate(file, start=1):
            done += len(line)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{path}:{number}", line, done
