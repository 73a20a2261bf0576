"""COCO JSON to record files.

Source: one JSON file; or a folder with ``annotations/instances_<split>.json``, images in ``<split>``, ``images/<split>`` or
``images``; or a folder of ``<split>/_annotations.coco.json`` files with the images beside. ``val2017`` and ``valid`` become ``val``.

Convention: ``bbox`` is ``[x, y, width, height]`` in pixels from 0, so the record's box is ``[x, y, x + width, y + height]``.
``iscrowd: 1`` becomes ``iscrowd: true``. ``image_id`` is COCO's id as text. With ``polygons`` an outline of one part
becomes ``poly``; other segmentations (several parts, masks) stay boxes and are named in the warnings.

The file is mapped, not read, and msgspec builds only the fields that are used: outlines cost nothing unless asked for.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from coordexp.data.importers.base import Draft, Job, Split
from coordexp.errors import ConfigError, DataError

_ROBOFLOW: Final = "_annotations.coco.json"


class _Image(msgspec.Struct):
    id: int | str
    file_name: str
    width: int | None = None
    height: int | None = None


class _Category(msgspec.Struct):
    id: int
    name: str


class _Annotation(msgspec.Struct, gc=False):
    image_id: int | str
    category_id: int
    bbox: tuple[float, ...] | None = None
    iscrowd: int | bool | None = 0
    id: int | str | None = None


class _Outlined(_Annotation, gc=False):
    segmentation: msgspec.Raw = msgspec.Raw()


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _OutlinedFile(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Outlined]
    categories: list[_Category]


def read_coco(job: Job) -> list[Split]:
    """Splits of the folder, or the one of the file (named by ``--split``, else after the file).

    Raises:
        DataError: nothing that is COCO, a file that is broken, or images that are not found.
        ConfigError: several names for one file.
    """
    source = job.source
    if source.is_file():
        if len(job.options.splits) > 1:
            raise ConfigError(f"--split: expected one name for the one file {source}, got {len(job.options.splits)}")
        name = job.options.splits[0] if job.options.splits else _split_name(source)
        return [_split(job, source, name)]
    if not source.is_dir():
        raise DataError(f"{source}: expected a COCO JSON file or a folder of them, got nothing there")
    files = sorted([*(source / "annotations").glob("instances_*.json"), *source.glob(f"*/{_ROBOFLOW}")])
    named = {path: _split_name(path) for path in files}
    if not files:
        raise DataError(f"{source}: expected annotations/instances_*.json or */{_ROBOFLOW}, got neither: give the JSON file itself")
    if len(set(named.values())) < len(files):
        raise DataError(f"{source}: expected one file a split, got {', '.join(p.name for p in files)}: import the files one by one")
    if missing := set(job.options.splits) - set(named.values()):
        raise ConfigError(f"--split: expected one of {', '.join(named.values())}, got {min(missing)!r}")
    return [_split(job, path, name) for path, name in named.items() if not job.options.splits or name in job.options.splits]


def _split_name(path: Path) -> str:
    stem = path.parent.name if path.name == _ROBOFLOW else path.stem.removeprefix("instances_")
    name = re.sub(r"\d{4}$", "", stem) or stem
    return "val" if name == "valid" else name


def _load(job: Job, path: Path) -> _File | _OutlinedFile:
    kind: type[_File | _OutlinedFile] = _OutlinedFile if job.options.polygons else _File
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # A copy of the map would double the memory; msgspec reads it in place, and Raw values are copied out.
            view = memoryview(data)
            try:
                loaded: _File | _OutlinedFile = msgspec.json.decode(view, type=kind)
                for item in loaded.annotations:
                    if isinstance(item, _Outlined):
                        item.segmentation = item.segmentation.copy()
                return loaded
            finally:
                view.release()
    except (msgspec.DecodeError, UnicodeDecodeError, OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected COCO JSON with images, annotations and categories, got: {' '.join(str(error).split())}"
        ) from error


def _split(job: Job, path: Path, name: str) -> Split:
    loaded = _load(job, path)
    if not loaded.images:
        raise DataError(f"{path}: images: expected at least one, got none")
    reader = _Reader(job, path.name, _image_root(job, path, loaded.images[0].file_name), {c.id: c.name for c in loaded.categories}, {})
    known = {image.id for image in loaded.images}
    for number, item in enumerate(loaded.annotations):
        if item.image_id not in known:
            job.drop(f"{path.name}: annotation {_show(item, number)}: image_id: expected an id of the file's images, got {item.image_id}")
        else:
            reader.annotations.setdefault(item.image_id, []).append((number, item))
    return Split(name, len(loaded.images), loaded.images, reader.draft)


def _show(item: _Annotation, number: int) -> str:
    return f"#{number + 1}" if item.id is None else f"id {item.id}"


def _image_root(job: Job, path: Path, first: str) -> Path:
    if job.options.images is not None:
        return job.options.images
    folder, stem = path.parent, path.stem.removeprefix("instances_")
    base = folder.parent if folder.name == "annotations" else folder
    candidates = [folder, base / stem, base / "images" / stem, base / "images", base]
    for candidate in candidates:
        if (candidate / first).is_file():
            return candidate
    looked = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise DataError(f"{path}: expected its first image {first!r} in one of {looked}, got none: name the folder with --images")


@dataclass(frozen=True)
class _Reader:
    job: Job
    file: str
    root: Path
    categories: dict[int, str]
    annotations: dict[int | str, list[tuple[int, _Annotation]]]

    def draft(self, image: _Image) -> Draft:
        where = f"{self.file}: image {image.id} ({image.file_name})"
        path = self.job.image(self.root, image.file_name, where)
        size = self.job.size(path, where, (image.width, image.height))
        found = self.annotations.get(image.id, [])
        objects = self.job.collect(partial(self._object, n, a, size, image.file_name) for n, a in found)
        return Draft(where, path, path.relative_to(self.job.base(self.root)).as_posix(), *size, objects, str(image.id))

    def _object(self, number: int, item: _Annotation, size: tuple[int, int], image: str) -> dict[str, Any]:
        where = f"{self.file}: annotation {_show(item, number)} ({image})"
        if item.category_id not in self.categories:
            raise DataError(f"{where}: category_id: expected an id of the file's categories, got {item.category_id}")
        desc = self.job.label(self.categories[item.category_id], where)
        if item.iscrowd not in (0, 1, None):
            raise DataError(f"{where}: iscrowd: expected 0 or 1, got {item.iscrowd}")
        crowd = {"iscrowd": True} if item.iscrowd else {}
        outline = self._outline(item, where) if isinstance(item, _Outlined) and not item.iscrowd else None
        if outline is not None:
            return {"desc": desc, "poly": self.job.geometry("poly", outline, size, where)}
        if item.bbox is None or len(item.bbox) != 4:
            raise DataError(f"{where}: bbox: expected [x, y, width, height], got {'none' if item.bbox is None else list(item.bbox)}")
        x, y, width, height = item.bbox
        return {"desc": desc, "bbox_2d": self.job.geometry("bbox_2d", [x, y, x + width, y + height], size, where), **crowd}

    def _outline(self, item: _Outlined, where: str) -> list[float] | None:
        try:
            parts = msgspec.json.decode(item.segmentation, type=list[list[float]]) if bytes(item.segmentation) else []
        except msgspec.DecodeError:
            parts = []
        if len(parts) == 1 and len(parts[0]) >= 6 and len(parts[0]) % 2 == 0:
            return parts[0]
        self.job.warnings.append(f"{where}: segmentation: no single outline, imported as its box")
        return None
