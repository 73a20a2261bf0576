"""CreateML JSON: ``[{"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": {"x": 60, "y": 40, "width": 80, "height": 40}}]}]``.

Source: the file, or a folder with one a split (Roboflow's ``train/_annotations.createml.json``). Convention: x and y are the box's
centre, in pixels from 0. The older keys ``imagefilename`` and ``annotation`` are read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import Again, Job, RawImage, RawObject, RawSplit, Unusable, brief
from coordexp.data.importers.chat import json_splits, roots_beside
from coordexp.data.importers.files import Head, head_of, json_list

_IMAGES: Final = ("image", "imagefilename", "imageURL", "filename")
_LISTS: Final = ("annotations", "annotation")
_KEYS: Final = ("x", "y", "width", "height")


def looks(head: Head) -> bool:
    """A list of images whose annotations have ``coordinates``, or a folder with such a file."""
    if head.path.is_dir():
        return any(head.path.glob("*.createml.json")) or any(head.path.glob("*/*.createml.json"))
    items = next((head.row[key] for key in _LISTS if key in head.row), None)
    return isinstance(items, list) and any(isinstance(item, dict) and "coordinates" in item for item in items)


def read(job: Job) -> list[RawSplit]:
    """One split a file.

    Raises:
        DataError: no such file.
    """
    files = json_splits(job, "a CreateML JSON file", lambda path: looks(head_of(path)))
    return [_split(job, name, path) for name, path in files.items()]


def _split(job: Job, name: str, path: Path) -> RawSplit:
    rows = json_list(path)
    return RawSplit(name, len(rows), Again(partial(_images, rows, path.name)), roots_beside(job, path, name))


def _images(rows: list[Any], file: str) -> Iterator[RawImage | Unusable]:
    for i, row in enumerate(rows):
        where = f"{file}[{i}]"
        image = next((row[key] for key in _IMAGES if key in row), None) if isinstance(row, dict) else None
        items = next((row[key] for key in _LISTS if key in row), None) if isinstance(row, dict) else None
        if not isinstance(image, str) or not isinstance(items, list):
            yield Unusable("unreadable", f"{where}: expected image and annotations, got {brief(row)}")
            continue
        yield RawImage(where, (image,), [_object(item, f"{where}: annotations[{j}] ({image})") for j, item in enumerate(items)])


def _object(item: Any, where: str) -> RawObject | Unusable:
    box = item.get("coordinates") if isinstance(item, dict) else None
    if not isinstance(box, dict):
        return Unusable("no box", f"{where}: expected label and coordinates, got {brief(item)}")
    return RawObject(where, [box.get(key) for key in _KEYS], "cxcywh", name=item.get("label"))
