"""CSV with a box a row: ``image,xmin,ymin,xmax,ymax,label``, Roboflow's and TensorFlow's ``filename,width,height,class,xmin,...``,
``x,y,w,h``, a ``bbox`` column (``--layout``), keras-retinanet without a header, and OpenImages.

Columns go by their names, in any case and order; separators are comma, semicolon or tab. A row with an image and no numbers is an image
without objects. A column ``split`` (``set``) makes splits, else the file's or folder's name.

Convention: pixels from 0 unless ``--coords`` says otherwise. OpenImages (``ImageID``, ``XMin``, ``XMax``, ``YMin``, ``YMax``) is 0..1;
its ``LabelName`` is looked up in the class descriptions beside (``*class-descriptions*.csv``), and ``IsGroupOf`` becomes ``iscrowd``.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from coordexp.data.importers.base import COORDS, Again, Job, RawImage, RawObject, RawSplit, Unusable, brief, split_name
from coordexp.data.importers.chat import json_splits, roots_beside
from coordexp.data.importers.files import Head, text_of
from coordexp.data.importers.judging import number
from coordexp.data.importers.table import box_of, columns_of, has_box
from coordexp.errors import DataError

_WHAT: Final = "a CSV file with an image and a box a row"
_HEAD: Final = 65_536
# Cells of a row, those of the columns that are read.
Cells = tuple[str, ...]
# keras-retinanet: path,x1,y1,x2,y2,class_name
_HEADLESS: Final = ("image", "xmin", "ymin", "xmax", "ymax", "label")


def looks(head: Head) -> bool:
    """A CSV file with columns of a box, or a folder with one."""
    if head.path.is_dir():
        return any(_is_table(path) for path in sorted([*head.path.glob("*.csv"), *head.path.glob("*/*.csv")])[:8])
    return head.suffix in (".csv", ".tsv") and _is_table(head.path)


def read(job: Job) -> list[RawSplit]:
    """One split a file, or by the column ``split``.

    Raises:
        DataError: no such file, or one without the columns.
    """
    files = json_splits(job, _WHAT, _is_table, (".csv", ".tsv"))
    return [split for name, path in files.items() for split in _splits(job, name, path)]


def _is_table(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD).decode("utf-8-sig", "ignore")
        columns, _, _ = _columns(head.rpartition("\n")[0] or head)
    except (OSError, csv.Error):
        return False
    return has_box(columns) and "image" in columns


def _columns(text: str) -> tuple[dict[str, str], list[str], str]:
    """Columns by meaning, the header (that of a file without one is ours), and the separator."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(",;\t", key=first.count)
    header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
    columns = columns_of(header)
    if not has_box(columns) and len(header) == len(_HEADLESS) and all(number(v) is not None or v == "" for v in header[1:5]):
        return {name: name for name in _HEADLESS}, [], separator
    return columns, header, separator


def _table(path: Path) -> tuple[dict[str, str], list[tuple[int, Cells]]]:
    """Columns by meaning, and of every numbered row the cells of these columns, in their order."""
    text = text_of(path, _WHAT)
    try:
        columns, header, separator = _columns(text)
        at = [(header or [*_HEADLESS]).index(name) for name in columns.values()]
        rows: list[tuple[int, Cells]] = []
        for i, row in enumerate(csv.reader(io.StringIO(text), delimiter=separator), start=1):
            if any(map(str.strip, row)):
                # Most cells repeat: names, flags, numbers of an image.
                rows.append((i, tuple(sys.intern(row[j].strip()) if j < len(row) else "" for j in at)))
    except csv.Error as error:
        raise DataError(f"{path}: expected {_WHAT}, got a file that fails with: {brief(error)}") from error
    if not rows:
        raise DataError(f"{path}: expected {_WHAT}, got an empty file")
    return columns, rows[1:] if header else rows


def _splits(job: Job, name: str, path: Path) -> list[RawSplit]:
    columns, rows = _table(path)
    if not has_box(columns) or "image" not in columns:
        got = ", ".join(columns.values()) or "none"
        raise DataError(f"{path}: expected columns of an image and a box (image,xmin,ymin,xmax,ymax,label), got {brief(got, 200)}")
    open_images = {"ImageID", "LabelName"} <= set(columns.values())
    units = "norm1" if open_images else COORDS[job.options.coords or "absolute"]
    names = _descriptions(path.parent) if open_images else {}
    fields = list(columns)
    image, stated = fields.index("image"), fields.index("split") if "split" in fields else None
    by_split: dict[str, dict[str, list[tuple[int, Cells]]]] = {}
    for i, row in rows:
        # The one name that is asked for a file goes before what its rows say.
        own = row[stated] if stated is not None and not (job.source.is_file() and job.options.splits) else ""
        by_split.setdefault(split_name(own) if own else name, {}).setdefault(row[image], []).append((i, row))
    reading = (path.name, fields, units, job.options.layout, names)
    return [
        RawSplit(split, len(images), Again(partial(_images, images, *reading)), roots_beside(job, path, split))
        for split, images in by_split.items()
    ]


def _descriptions(folder: Path) -> dict[str, str]:
    """OpenImages' names by machine name."""
    for base in (folder, folder.parent):
        for path in sorted(base.glob("*class*descriptions*.csv")):
            rows = csv.reader(io.StringIO(text_of(path)))
            return {row[0]: row[1] for row in rows if len(row) >= 2}
    return {}


def _images(
    images: dict[str, list[tuple[int, Cells]]], file: str, fields: list[str], units: str, layout: str | None, names: dict[str, str]
) -> Iterator[RawImage | Unusable]:
    columns = {name: name for name in fields}
    for image, rows in images.items():
        if not image:
            for i, _ in rows:
                yield Unusable("no image named", f"{file}:{i}: expected the name of an image, got none")
            continue
        objects: list[RawObject | Unusable] = []
        for i, cells in rows:
            line = dict(zip(fields, cells, strict=True))
            name = line.get("label", "")
            made = box_of(line, columns, units, layout, f"{file}:{i} ({brief(image, 60)})", names.get(name, name) or None)
            objects += [] if made is None else [made]
        first = dict(zip(fields, rows[0][1], strict=True))
        yield RawImage(f"{file}:{rows[0][0]}", (image,), objects, size=(first.get("width"), first.get("height")))
