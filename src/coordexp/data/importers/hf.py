"""Hugging Face `datasets` folders: parquet files, or an image folder with ``metadata.jsonl``; rows with an image and ``objects``.

``objects`` is ``{"bbox": [[...]], "category": [0, ...]}`` (also ``categories``, ``label``, ``labels``), or a list of such objects. Names
of numbered categories are those that the parquet file's own description lists. Images that are bytes in the file are written out. Splits
are the files' names (``train-00000-of-00002.parquet``) or folders.

Convention: pixels; how a box stands is told by ``area`` where it fits one layout only, else by ``--layout`` (xywh is COCO's). Parquet needs
``pip install 'coordexp[parquet]'``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import (
    COORDS,
    Again,
    Job,
    RawImage,
    RawObject,
    RawSplit,
    Unusable,
    brief,
    folder_split,
    id_text,
    split_name,
)
from coordexp.data.importers.chat import image_name
from coordexp.data.importers.files import Head, rows_of
from coordexp.data.importers.table import known_layout, layout_by_area
from coordexp.errors import ConfigError, DataError

_LABELS: Final = ("category", "categories", "label", "labels", "class", "name", "category_id", "id2label")
_BOXES: Final = ("bbox", "bboxes", "boxes", "box")
_SHARD: Final = re.compile(r"[-_.]?\d{5}-of-\d{5}.*$|[-_]\d+$")


def looks(head: Head) -> bool:
    """A parquet file, ``metadata.jsonl``, or a folder with them."""
    if head.path.is_dir():
        return bool(_files(head.path))
    return head.suffix == ".parquet" or (head.path.name == "metadata.jsonl" and "file_name" in head.row and "objects" in head.row)


def read(job: Job) -> list[RawSplit]:
    """Splits by the files' names or folders.

    Raises:
        DataError: nothing there, or a file that cannot be read.
        ConfigError: parquet without its package.
    """
    source = job.source
    if not source.exists():
        raise DataError(f"{source}: expected a folder of parquet files or metadata.jsonl, got nothing there")
    files = [source] if source.is_file() else _files(source)
    if not files:
        raise DataError(f"{source}: expected parquet files or metadata.jsonl, got none")
    splits: dict[str, list[Path]] = {}
    for path in files:
        parts = () if source.is_file() else path.relative_to(source).parts[:-1]
        stem = _SHARD.sub("", path.stem)
        name = folder_split((stem,)) or folder_split(parts) or ("train" if stem in ("metadata", "") else split_name(stem))
        splits.setdefault(job.file_split(name) if source.is_file() else name, []).append(path)
    kept = list(splits) if source.is_file() else job.choose(splits)
    return [_split(job, name, splits[name]) for name in kept]


def _files(folder: Path) -> list[Path]:
    found = sorted(path for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet") for path in folder.glob(pattern))
    return found or sorted([*folder.glob("metadata.jsonl"), *folder.glob("*/metadata.jsonl")])


def _split(job: Job, name: str, files: list[Path]) -> RawSplit:
    count = sum(_count(path) for path in files)
    roots = tuple(dict.fromkeys(path.parent for path in files))
    return RawSplit(name, count, Again(partial(_images, files, job)), roots)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install 'coordexp[parquet]'") from error
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: expected a parquet file, got one that fails with: {brief(error)}") from error


def _count(path: Path) -> int:
    return int(_parquet(path).metadata.num_rows) if path.suffix == ".parquet" else sum(1 for _ in rows_of(path))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    if path.suffix != ".parquet":
        yield from rows_of(path)
        return
    number_ = 0
    for batch in _parquet(path).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            number_ += 1
            yield f"{path.name}:{number_}", row


def _names(path: Path) -> dict[str, str]:
    """Names of numbered categories, from the description that `datasets` puts into a parquet file."""
    if path.suffix != ".parquet":
        return {}
    stated = (_parquet(path).schema_arrow.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(stated)["info"]["features"]["objects"] if stated else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    names: list[Any] = []
    stack = [features]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if value.get("_type") == "ClassLabel" and isinstance(value.get("names"), list):
                names = value["names"]
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    return {str(i): str(name) for i, name in enumerate(names)}


def _images(files: list[Path], job: Job) -> Iterator[RawImage | Unusable]:
    names = next(filter(None, (_names(path) for path in files)), {})
    layout = job.options.layout or _told(files)
    for path in files:
        for where, row in _rows(path):
            yield row if isinstance(row, Unusable) else _image(row, where, names, layout, job)


def _told(files: list[Path]) -> str | None:
    """The layout that areas tell, from the first rows."""
    boxes: list[Any] = []
    areas: list[Any] = []
    for i, (_, row) in enumerate(_rows(files[0])):
        found = row.get("objects") if isinstance(row, dict) else None
        if isinstance(found, dict) and isinstance(found.get("area"), list):
            boxes += next((found[key] for key in _BOXES if isinstance(found.get(key), list)), [])
            areas += found["area"]
        if i >= 200:
            break
    return layout_by_area(boxes, areas)


def _image(row: dict[str, Any], where: str, names: dict[str, str], layout: str | None, job: Job) -> RawImage | Unusable:
    try:
        image = row.get("image")
        data = image.get("bytes") if isinstance(image, dict) else None
        stem = id_text(row.get("image_id", where.rpartition(":")[2]))
        name = image_name(row, where) if data is None else (image or {}).get("path") or f"{stem}.png"
        objects = _objects(row.get("objects"), where, names, layout, job)
    except Unusable as fault:
        return fault
    key = id_text(row["image_id"]) if row.get("image_id") is not None else None
    size = (row.get("width"), row.get("height"))
    if data is not None:
        name = f"{where.partition('.parquet')[0]}-{Path(name).stem}{Path(name).suffix or '.png'}"
    return RawImage(where, (name,), objects, key, size=size, content=data)


def _objects(found: Any, where: str, names: dict[str, str], layout: str | None, job: Job) -> list[RawObject | Unusable]:
    if isinstance(found, list):
        items = [item if isinstance(item, dict) else {} for item in found]
    elif isinstance(found, dict):
        boxes = next((found[key] for key in _BOXES if isinstance(found.get(key), list)), None)
        if boxes is None:
            raise Unusable("no objects", f"{where}: objects: expected bbox, got {brief(', '.join(found))}")
        columns = {key: value for key, value in found.items() if isinstance(value, list)}
        short = next((key for key, value in columns.items() if len(value) != len(boxes)), None)
        if short is not None:
            raise Unusable(
                "names and boxes do not pair", f"{where}: objects.{short}: expected {len(boxes)} values, got {len(columns[short])}"
            )
        items = [{key: value[i] for key, value in columns.items()} for i in range(len(boxes))]
    else:
        raise Unusable("no objects", f"{where}: objects: expected lists of bbox and category, got {brief(found)}")
    return [_object(item, f"{where}: objects[{i}]", names, layout, job) for i, item in enumerate(items)]


def _object(item: dict[str, Any], where: str, names: dict[str, str], layout: str | None, job: Job) -> RawObject | Unusable:
    box = next((item[key] for key in _BOXES if key in item), None)
    if box is None:
        return Unusable("no box", f"{where}: expected bbox, got {brief(', '.join(item)) or 'none'}")
    name = next((item[key] for key in _LABELS if item.get(key) is not None), None)
    if isinstance(name, int) and not isinstance(name, bool) and names:
        if str(name) not in names:
            return Unusable("unknown category", f"{where}: expected a category of 0..{len(names) - 1}, got {name}")
        name = names[str(name)]
    flags = {"crowd": item.get("iscrowd", item.get("is_crowd")), "difficult": item.get("difficult"), "area": item.get("area")}
    return RawObject(where, box, known_layout(layout, where), COORDS[job.options.coords or "absolute"], name, **flags)
