"""Datumaro JSON: ``annotations/<split>.json`` with ``categories`` and ``items``, images in ``images/<split>`` or ``images``.

Convention: ``bbox`` is ``[x, y, width, height]`` and polygons are flat ``points``, in pixels from 0; ``label_id`` counts the labels.
Labels of whole images are not read; key points and masks are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import Again, Job, RawImage, RawObject, RawSplit, Unusable, brief, id_text
from coordexp.data.importers.chat import json_splits, roots_beside
from coordexp.data.importers.files import Head, head_of, json_of
from coordexp.errors import DataError

_WHAT: Final = "a Datumaro JSON file"


def looks(head: Head) -> bool:
    """A Datumaro file, or a folder with one in ``annotations``."""
    if head.path.is_dir():
        return any(looks(head_of(path)) for path in sorted(head.path.glob("annotations/*.json"))[:1])
    return {"categories", "items"} <= head.top


def read(job: Job) -> list[RawSplit]:
    """One split a file.

    Raises:
        DataError: no such file, or one that is broken.
    """
    files = json_splits(job, _WHAT, lambda path: looks(head_of(path)))
    return [_split(job, name, path) for name, path in files.items()]


def _split(job: Job, name: str, path: Path) -> RawSplit:
    content = json_of(path, _WHAT)
    items = content.get("items") if isinstance(content, dict) else None
    categories = content.get("categories") if isinstance(content, dict) else None
    labels = categories.get("label") if isinstance(categories, dict) else None
    names = labels.get("labels") if isinstance(labels, dict) else None
    if not isinstance(items, list) or not isinstance(names, list):
        raise DataError(f"{path}: expected {_WHAT} with items and categories.label.labels, got {brief(content)}")
    known = {str(i): item.get("name") if isinstance(item, dict) else item for i, item in enumerate(names)}
    return RawSplit(name, len(items), Again(partial(_images, items, known, path.name)), roots_beside(job, path, name))


def _images(items: list[Any], names: dict[str, Any], file: str) -> Iterator[RawImage | Unusable]:
    for i, item in enumerate(items):
        where = f"{file}: items[{i}]"
        if not isinstance(item, dict) or not isinstance(item.get("annotations"), list):
            yield Unusable("unreadable", f"{where}: expected an item with annotations, got {brief(item)}")
            continue
        image: dict[str, Any] = next((item[key] for key in ("image", "media") if isinstance(item.get(key), dict)), {})
        stated = image.get("size")
        height, width = stated if isinstance(stated, list) and len(stated) == 2 else (None, None)
        named = tuple(text for text in (image.get("path"), item.get("id")) if isinstance(text, str) and text)
        found = [_object(raw, names, f"{where}: annotations[{j}]") for j, raw in enumerate(item["annotations"])]
        objects = [raw for raw in found if raw is not None]
        key = id_text(item["id"]) if item.get("id") not in (None, "") else None
        yield RawImage(where, named, objects, key, size=(width, height))


def _object(item: Any, names: dict[str, Any], where: str) -> RawObject | Unusable | None:
    if not isinstance(item, dict):
        return Unusable("unreadable", f"{where}: expected an annotation, got {brief(item)}")
    kind, key = item.get("type"), id_text(item.get("label_id"))
    if kind in ("label", "caption"):
        return None
    if kind not in ("bbox", "polygon"):
        return Unusable("no box", f"{where}: expected a bbox or polygon, got {brief(kind)}")
    if key not in names:
        return Unusable("unknown category", f"{where}: label_id: expected one of 0..{len(names) - 1}, got {brief(item.get('label_id'))}")
    extra = item.get("attributes")
    attributes = extra if isinstance(extra, dict) else {}
    flags = {"crowd": attributes.get("is_crowd"), "difficult": attributes.get("difficult"), "area": item.get("area")}
    if kind == "bbox":
        return RawObject(where, item.get("bbox"), "xywh", name=names[key], **flags)
    return RawObject(where, item.get("points"), "outline", name=names[key], **flags)
