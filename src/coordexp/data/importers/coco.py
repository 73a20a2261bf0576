"""COCO JSON, with LVIS's fields.

Source: JSON files; or a folder with ``annotations/instances_<split>.json`` and images in ``<split>``, ``images/<split>`` or ``images``;
``<split>/_annotations.coco.json`` with the images beside; ``labels.json`` with ``data``; else the COCO files in it or its ``annotations``.

Convention: ``bbox`` is ``[x, y, width, height]`` in pixels from 0. Without a box it is that of ``segmentation`` (outlines, or a mask
as RLE). ``iscrowd`` and ``area`` are carried on, ``ignore`` becomes ``difficult``. With ``polygons`` an outline of one part
becomes ``poly``; other segmentations stay boxes and are named in the warnings. Ids are compared as text.

The file is mapped, not read, and msgspec builds only the fields that are used: outlines stay bytes until they are asked for. What msgspec
refuses (NaN, one item of another type) is read again by Python's reader, so that one bad item costs no other.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from coordexp.boxes import bounding_box
from coordexp.data.importers.base import Job, RawImage, RawObject, RawSplit, Unusable, brief, by_key, id_text, split_name
from coordexp.data.importers.files import Head, json_of
from coordexp.data.importers.finding import plain_name
from coordexp.data.importers.judging import number
from coordexp.errors import DataError

_ROBOFLOW: Final = "_annotations.coco.json"
_PREFIX: Final = re.compile(r"^(instances|lvis_v\d(\.\d)?|person_keypoints|annotations?|coco)_")
_SUFFIX: Final = re.compile(r"(_annotations?|_coco|_?\d{4})$")
_ANNOTATIONS: Final = ("annotations", "annotation", "labels", "json")
_NONE: Final = msgspec.Raw()
_WHAT: Final = "COCO JSON with images, annotations and categories"


class _Image(msgspec.Struct):
    id: Any = None
    file_name: Any = None
    width: Any = None
    height: Any = None
    coco_url: Any = None
    neg_category_ids: Any = None
    not_exhaustive_category_ids: Any = None


class _Category(msgspec.Struct):
    id: Any = None
    name: Any = None
    frequency: Any = None


class _Annotation(msgspec.Struct, gc=False):
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    segmentation: msgspec.Raw = _NONE
    area: Any = None
    iscrowd: Any = None
    ignore: Any = None
    id: Any = None


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def looks(head: Head) -> bool:
    """A COCO file, or a folder with one."""
    return {"images", "annotations"} <= head.top or (head.path.is_dir() and bool(_files(head.path)))


def read(job: Job) -> list[RawSplit]:
    """Splits of the folder, or the one of the file (named by ``--split``, else after the file).

    Raises:
        DataError: nothing that is COCO, or a file that is broken or whose ids are ambiguous.
        ConfigError: several names for one file.
    """
    source = job.source
    if source.is_file():
        return [_split(job, source, job.file_split(_split_name(source)))]
    if not source.is_dir():
        raise DataError(f"{source}: expected a COCO JSON file or a folder of them, got nothing there")
    files = _files(source)
    if not files:
        raise DataError(
            f"{source}: expected annotations/instances_*.json, */{_ROBOFLOW} or labels.json beside data, got none: give the JSON "
            "file itself"
        )
    named = {path: _split_name(path) for path in files}
    if len(set(named.values())) < len(files):
        raise DataError(f"{source}: expected one file a split, got {', '.join(p.name for p in files)}: import the files one by one")
    kept = job.choose(named.values())
    return [_split(job, path, name) for path, name in named.items() if name in kept]


def categories_of(source: Path) -> dict[str, str]:
    """Names of categories by id (as text) of a COCO file, or of the first one of a folder; nothing where there is none.

    Raises:
        DataError: a file that is no JSON, or one id with two names.
    """
    files = [source] if source.is_file() else _files(source) if source.is_dir() else []
    content = json_of(files[0], "COCO JSON with categories") if files else None
    items = content.get("categories") if isinstance(content, dict) else None
    pairs = [(item["id"], str(item["name"])) for item in items or [] if isinstance(item, dict) and {"id", "name"} <= item.keys()]
    return by_key(pairs, "categories", str(source))


def _files(folder: Path) -> list[Path]:
    found = [*(folder / "annotations").glob("instances_*.json"), *folder.glob(f"*/{_ROBOFLOW}"), *folder.glob(_ROBOFLOW)]
    if not found:
        found = [path for path in (folder / "labels.json", *folder.glob("*/labels.json")) if path.is_file() and _is_coco(path)]
    for pattern in ("annotations/*.json", "*.json", "*/*.json", "*/annotations/*.json"):
        found = found or [path for path in folder.glob(pattern) if _is_coco(path)]
    return sorted(found)


def _is_coco(path: Path) -> bool:
    try:
        keys = msgspec.json.decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return {"images", "annotations", "categories"} <= keys.keys()


def _split_name(path: Path) -> str:
    stem = path.parent.name if path.name in (_ROBOFLOW, "labels.json") else path.stem
    name = _SUFFIX.sub("", _PREFIX.sub("", stem)) or stem
    return split_name(name)


def _load(path: Path, *, polygons: bool) -> tuple[_File, list[str]]:
    """The file, and a line for each of its entries that is no object."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # A copy of the map would double the memory; msgspec reads it in place, and what is needed of the outlines is copied out.
            view = memoryview(data)
            try:
                loaded = msgspec.json.decode(view, type=_File)
                for item in loaded.annotations:
                    needed = polygons or not item.bbox or (isinstance(item.bbox, list) and item.bbox[2:] == [0, 0])
                    item.segmentation = item.segmentation.copy() if needed else _NONE
                return loaded, []
            finally:
                view.release()
    except (msgspec.DecodeError, UnicodeDecodeError, OSError, ValueError, RecursionError):
        content = json_of(path, _WHAT)
    if isinstance(content, list):
        raise DataError(f"{path}: expected {_WHAT}, got a list: results of a detector are evaluated, not imported")
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected {_WHAT}, got {brief(content)}")
    broken: list[str] = []
    parts: dict[str, Any] = {}
    for key, kind in (("images", _Image), ("annotations", _Annotation), ("categories", _Category)):
        items = content.get(key)
        if not isinstance(items, list):
            raise DataError(f"{path}: expected {_WHAT}, got {'none' if items is None else brief(items)} as {key}")
        broken += [f"{path.name}: {key}[{i}]: expected an object, got {brief(v)}" for i, v in enumerate(items) if not isinstance(v, dict)]
        names = kind.__struct_fields__
        parts[key] = [kind(**{name: item[name] for name in names if name in item}) for item in items if isinstance(item, dict)]
    return _File(**parts), broken


def _split(job: Job, path: Path, name: str) -> RawSplit:
    loaded, broken = _load(path, polygons=job.options.polygons)
    if not loaded.images and job.source.is_file():
        raise DataError(f"{path}: images: expected at least one, got none")
    categories = by_key(((c.id, c.name) for c in loaded.categories), "categories", str(path))
    for name_ in [value for value in categories.values() if isinstance(value, str) and not value.strip().isdecimal()]:
        categories.setdefault(name_.strip(), name_)  # some tools write the name where the id belongs
    by_key(((image.id, _name(image)) for image in loaded.images), "images", str(path))
    frequency = {str(c.name).strip(): c.frequency for c in loaded.categories if c.frequency in ("r", "c", "f")}
    ids = _Ids(image.id for image in loaded.images)
    found: dict[str, list[int]] = {}
    stray = [Unusable("unreadable", line) for line in broken]
    for number_, item in enumerate(loaded.annotations):
        key = ids.find(item.image_id)
        if key is None:
            where = f"{path.name}: annotation {_show(item, number_)}: image_id"
            stray.append(Unusable("unknown image id", f"{where}: expected an id of the file's images, got {brief(item.image_id)}"))
        else:
            found.setdefault(key, []).append(number_)
    reader = _Images(job, path.name, loaded, categories, found, frequency)
    return RawSplit(name, len(loaded.images), reader, _roots(path, [_name(image) for image in loaded.images[:20]]), stray)


class _Ids:
    """Ids of images as text; one with leading zeros is found by its number where that is the only one."""

    def __init__(self, ids: Iterable[Any]) -> None:
        self.texts = {id_text(value) for value in ids}
        self._numbers: dict[str, set[str]] | None = None

    def find(self, value: Any) -> str | None:
        text = id_text(value)
        if text in self.texts or value is None or not text.isdecimal():
            return text if text in self.texts else None
        if self._numbers is None:
            self._numbers = {}
            for known in self.texts:
                self._numbers.setdefault(known.lstrip("0"), set()).add(known)
        near = self._numbers.get(text.lstrip("0"), set())
        return next(iter(near)) if len(near) == 1 else None


def _show(item: _Annotation, number_: int) -> str:
    return f"#{number_ + 1}" if item.id is None else f"id {brief(item.id)}"


def _name(image: _Image) -> str:
    name = image.file_name if isinstance(image.file_name, str) and image.file_name.strip() else image.coco_url
    return name if isinstance(name, str) else ""


def _roots(path: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Folders in which images may lie, the one that holds most of these names first."""
    folder, stem = path.parent, _PREFIX.sub("", path.stem)
    base = folder.parent if folder.name.lower() in _ANNOTATIONS else folder
    split = _split_name(path)
    inner = [part for name in dict.fromkeys((stem, split)) for part in (base / name, base / "images" / name, base / name / "images")]
    candidates = list(dict.fromkeys([folder, *inner, folder / "data", base / "images", base / "data", base]))
    there = {root: sum(os.path.isfile(root / plain_name(name)) for name in names) for root in candidates if root.is_dir()}
    return tuple(sorted(there, key=lambda root: -there[root]))


@dataclass(frozen=True)
class _Images:
    """The images of a file, with their annotations."""

    job: Job
    file: str
    loaded: _File
    categories: dict[str, Any]
    found: dict[str, list[int]]
    frequency: dict[str, str]

    def __iter__(self) -> Iterator[RawImage]:
        federated = any(image.neg_category_ids is not None for image in self.loaded.images)
        seen: set[str] = set()
        for image in self.loaded.images:
            key = id_text(image.id)
            name = _name(image)
            where = f"{self.file}: image {key} ({name})"
            metadata: dict[str, Any] = {}
            if federated:
                for field, ids in (
                    ("neg_categories", image.neg_category_ids), ("not_exhaustive_categories", image.not_exhaustive_category_ids)
                ):  # fmt: skip
                    metadata[field] = self._names(ids, where, field)
            if self.frequency and not seen:
                # Any one record may name the frequency of every category.
                metadata["category_frequency"] = self.frequency
            objects = () if key in seen else self._objects(self.found.get(key, ()), name)
            seen.add(key)
            yield RawImage(where, (name,), objects, key, size=(image.width, image.height), metadata=metadata)

    def _names(self, ids: Any, where: str, field: str) -> list[str]:
        known = [id_text(value) for value in ids] if isinstance(ids, list) else []
        missing = next((key for key in known if key not in self.categories), None)
        if missing is not None:
            raise DataError(f"{where}: {field}: expected ids of the file's categories, got {missing}")
        return [str(self.categories[key]).strip() for key in known]

    def _objects(self, numbers: Sequence[int], image: str) -> list[RawObject | Unusable]:
        return [self._object(number_, self.loaded.annotations[number_], image) for number_ in numbers]

    def _object(self, number_: int, item: _Annotation, image: str) -> RawObject | Unusable:
        where = f"{self.file}: annotation {_show(item, number_)} ({image})"
        key = id_text(item.category_id)
        if key not in self.categories:
            return Unusable(
                "unknown category", f"{where}: category_id: expected an id of the file's categories, got {brief(item.category_id)}"
            )
        made = RawObject(where, item.bbox, "xywh", name=self.categories[key], crowd=item.iscrowd, difficult=item.ignore, area=item.area)
        polygons = self.job.options.polygons and not item.iscrowd
        if item.segmentation == _NONE:
            if polygons:
                self.job.note(f"{where}: segmentation: no single outline, imported as its box")
            if item.bbox is None:
                return Unusable("no box", f"{where}: bbox: expected [x, y, width, height], got none")
            return made
        parts = _segments(item.segmentation)
        if polygons and isinstance(parts, list) and len(parts) == 1:
            made.values, made.layout = parts[0], "outline"
            return made
        if polygons:
            self.job.note(f"{where}: segmentation: no single outline, imported as its box")
        if not item.bbox or (isinstance(item.bbox, list) and item.bbox[2:] == [0, 0]):
            box = _box_of(parts)
            if box is None:
                return Unusable("no box", f"{where}: bbox: expected [x, y, width, height], or a segmentation, got {brief(item.bbox)}")
            made.values = box
        return made


def _segments(value: Any) -> list[list[float]] | dict[str, Any] | None:
    """Outlines as flat lists, an RLE as its object, else None."""
    try:
        found = msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
    except msgspec.DecodeError:
        return None
    if isinstance(found, dict):
        return found
    if isinstance(found, list) and found and not isinstance(found[0], list):
        found = [found]  # one flat outline
    if not isinstance(found, list) or not found:
        return None
    good = [part for part in found if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
    return found if len(good) == len(found) and all(number(v) is not None for part in found for v in part) else None


def _box_of(parts: list[list[float]] | dict[str, Any] | None) -> list[float] | None:
    """``[x, y, width, height]`` around outlines or a mask."""
    if parts is None:
        return None
    if isinstance(parts, list):
        x1, y1, x2, y2 = bounding_box([float(v) for part in parts for v in part])
        return [x1, y1, x2 - x1, y2 - y1]
    return _mask_box(parts.get("counts"), parts.get("size"))


def _mask_box(counts: Any, size: Any) -> list[float] | None:
    """The box of a run-length mask, columns first; counts as numbers, or as the text in which COCO compresses them."""
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) and 0 < v < 1_000_000 for v in size)):
        return None
    height, width = size
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(v, int) and v >= 0 for v in runs) or sum(runs) > height * width:
        return None
    x1, y1, x2, y2, at = width, height, 0, 0, 0
    for i, run in enumerate(runs):
        if i % 2 and run:
            first, last = divmod(at, height), divmod(at + run - 1, height)
            top, bottom = (first[1], last[1]) if first[0] == last[0] else (0, height - 1)
            x1, x2, y1, y2 = min(x1, first[0]), max(x2, last[0] + 1), min(y1, top), max(y2, bottom + 1)
        at += run
    return [float(x1), float(y1), float(x2 - x1), float(y2 - y1)] if x2 > x1 else None


def _runs(text: str) -> list[int]:
    """Runs of COCO's compressed text: groups of 5 bits, from the third run on differences to the run before the last."""
    runs: list[int] = []
    value = shift = 0
    for character in text.encode("ascii", "replace"):
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
