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
_SUFFIXES: Final = (".csv", ".tsv", ".txt")
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
        columns, _ = _table(path)
    except DataError:
        return False
    return has_box(columns) and "image" in columns


def _table(path: Path) -> tuple[dict[str, str], list[tuple[int, dict[str, str]]]]:
    """Columns by meaning, and the numbered rows."""
    text = text_of(path, _WHAT)
    first = text.splitlines()[0] if text.strip() else ""
    separator = max(",;\t", key=first.count)
    try:
        lines = [(i, row) for i, row in enumerate(csv.reader(io.StringIO(text), delimiter=separator), start=1) if any(map(str.strip, row))]
    except csv.Error as error:
        raise DataError(f"{path}: expected {_WHAT}, got a file that fails with: {brief(error)}") from error
    if not lines:
        raise DataError(f"{path}: expected {_WHAT}, got an empty file")
    header = [name.strip() for name in lines[0][1]]
    columns = columns_of(header)
    if not has_box(columns) and len(header) == len(_HEADLESS) and all(number(v) is not None or v == "" for v in header[1:5]):
        return dict(zip(_HEADLESS, _HEADLESS, strict=True)), [
            (i, dict(zip(_HEADLESS, map(str.strip, row), strict=False))) for i, row in lines
        ]
    return columns, [(i, dict(zip(header, map(str.strip, row), strict=False))) for i, row in lines[1:]]


def _splits(job: Job, name: str, path: Path) -> list[RawSplit]:
    columns, rows = _table(path)
    if not has_box(columns) or "image" not in columns:
        got = ", ".join(rows[0][1]) if rows else "none"
        raise DataError(f"{path}: expected columns of an image and a box (image,xmin,ymin,xmax,ymax,label), got {brief(got, 200)}")
    open_images = {"ImageID", "LabelName"} <= set(columns.values())
    units = "norm1" if open_images else COORDS[job.options.coords or "absolute"]
    names = _descriptions(path.parent) if open_images else {}
    by_split: dict[str, dict[str, list[tuple[int, dict[str, str]]]]] = {}
    for i, row in rows:
        stated = row.get(columns["split"], "") if "split" in columns else ""
        split = split_name(stated) if (stated and not job.source.is_file()) or (stated and not job.options.splits) else name
        by_split.setdefault(split, {}).setdefault(row.get(columns["image"], ""), []).append((i, row))
    reading = (path.name, columns, units, job.options.layout, names)
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
    images: dict[str, list[tuple[int, dict[str, str]]]],
    file: str,
    columns: dict[str, str],
    units: str,
    layout: str | None,
    names: dict[str, str],
) -> Iterator[RawImage | Unusable]:
    for image, rows in images.items():
        first, row = rows[0]
        if not image:
            for i, _ in rows:
                yield Unusable("no image named", f"{file}:{i}: expected the name of an image, got none")
            continue
        objects: list[RawObject | Unusable] = []
        for i, line in rows:
            name = line.get(columns.get("label", ""), "")
            made = box_of(line, columns, units, layout, f"{file}:{i} ({brief(image, 60)})", names.get(name, name) or None)
            objects += [] if made is None else [made]
        size = (row.get(columns.get("width", "")), row.get(columns.get("height", "")))
        yield RawImage(f"{file}:{first}", (image,), objects, size=size)
