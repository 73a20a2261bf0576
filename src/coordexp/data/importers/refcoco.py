"""RefCOCO, RefCOCO+ and RefCOCOg as JSON or JSONL: one record a phrase, with ``metadata.phrase``.

Rows of: the list that REFER's pickles hold, written as JSON (``ref_id``, ``ann_id``, ``sentences``, ``split``) with ``instances.json``
beside; the rows of Hugging Face data sets (``sentences`` or ``answer``, ``bbox``, ``raw_anns``); evaluation files with ``sent`` and
``bbox``. A pickle can run programs and is refused.

Convention: the box of ``raw_anns`` or ``instances.json`` is COCO's ``[x, y, width, height]``. Rows with nothing but ``bbox`` need
``--layout`` (xyxy or xywh), unless a ``segmentation`` beside it tells which one it is. The description is the phrase.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from coordexp.boxes import bounding_box
from coordexp.data.importers.base import (
    Again,
    Job,
    Layout,
    RawImage,
    RawObject,
    RawSplit,
    Unusable,
    brief,
    folder_split,
    id_text,
    split_name,
)
from coordexp.data.importers.chat import roots_beside, split_files
from coordexp.data.importers.files import Head, json_of, rows_of
from coordexp.data.importers.judging import number
from coordexp.data.importers.table import known_layout, parsed
from coordexp.errors import DataError

_PHRASES: Final = ("sentences", "captions", "answer", "sent", "phrase", "sentence", "caption", "expression", "text", "ref_exp")
_IMAGES: Final = ("file_name", "image_path", "image", "img", "filename", "img_path")


def looks(head: Head) -> bool:
    """Rows with a phrase and either a box or the id of an annotation, or a folder with REFER's files."""
    row = head.row
    if head.path.is_dir():
        return any(head.path.glob("refs*"))
    return not head.top and (("ref_id" in row and "sentences" in row) or ("bbox" in row and any(key in row for key in _PHRASES[:5])))


def read(job: Job) -> list[RawSplit]:
    """Splits by the rows' ``split``, else by the file's name.

    Raises:
        DataError: nothing there, or a pickle.
    """
    source = job.source
    if not source.exists():
        raise DataError(f"{source}: expected rows of RefCOCO, got nothing there")
    pickles = [source] if source.suffix in (".p", ".pkl", ".pickle") else sorted(source.glob("refs*.p")) if source.is_dir() else []
    files = {source.stem: source} if source.is_file() else {p.stem: p for p in sorted(source.glob("refs*.json*"))}
    files = files or split_files(source, (".jsonl", ".json"))
    if pickles and (source.is_file() or not files):
        raise DataError(
            f"{pickles[0]}: expected JSON, got a pickle, which can run programs: write it as JSON first "
            "(json.dump(pickle.load(open(FILE, 'rb')), open('refs.json', 'w')) in an environment you trust it in)"
        )
    if not files:
        raise DataError(f"{source}: expected refs.json, or JSON or JSONL rows with bbox and sentences, got none: give the file itself")
    return [split for stem, path in files.items() for split in _splits(job, stem, path, single=len(files) == 1)]


def _splits(job: Job, stem: str, path: Path, *, single: bool) -> list[RawSplit]:
    boxes = _annotations(path.parent / "instances.json")
    rows = list(rows_of(path))
    default = folder_split((stem,)) or (job.file_split(split_name(stem)) if single and job.source.is_file() else split_name(stem))
    by_split: dict[str, list[tuple[str, dict[str, Any] | Unusable]]] = {}
    for where, row in rows:
        stated = row.get("split") if isinstance(row, dict) else None
        name = split_name(stated) if isinstance(stated, str) and stated else default
        by_split.setdefault(name, []).append((where, row))
    kept = by_split if len(by_split) == 1 and job.source.is_file() else {name: by_split[name] for name in job.choose(by_split)}
    return [
        RawSplit(name, len(kept[name]), Again(partial(_images, kept[name], boxes, job.options.layout)), roots_beside(job, path, name))
        for name in kept
    ]


def _annotations(path: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Of REFER's ``instances.json``: by annotation id its box, the name of its image and the image's size."""
    if not path.is_file():
        return {}
    content = json_of(path, "REFER's instances.json")
    try:
        images = {id_text(image["id"]): image for image in content["images"]}
        found = {}
        for item in content["annotations"]:
            image = images[id_text(item["image_id"])]
            found[id_text(item["id"])] = (item["bbox"], image["file_name"], (image.get("width"), image.get("height")))
        return found
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: expected images and annotations with ids, got one without {error}") from error


def _images(
    rows: list[tuple[str, dict[str, Any] | Unusable]], boxes: dict[str, tuple[Any, Any, Any]], layout: str | None
) -> Iterator[RawImage | Unusable]:
    for where, row in rows:
        if isinstance(row, Unusable):
            yield row
            continue
        phrases = _phrases(row)
        if not phrases:
            yield Unusable("no phrase", f"{where}: expected sentences, answer or sent with a text, got {brief(', '.join(map(str, row)))}")
            continue
        known = boxes.get(id_text(row.get("ann_id")))
        image, size = _image(row, known)
        for i, phrase in enumerate(phrases):
            place = where if len(phrases) == 1 else f"{where}: sentences[{i}]"
            try:
                raw = _object(row, known, layout, place, phrase)
            except Unusable as fault:
                yield fault
                continue
            number_of = where.rpartition(":")[2]
            yield RawImage(place, image, [raw], row=f"{number_of}-{i + 1}", size=size, metadata={"phrase": phrase})


def _phrases(row: dict[str, Any]) -> list[str]:
    found = next((parsed(row[key]) for key in _PHRASES if row.get(key)), None)
    items = found if isinstance(found, list) else [found]
    texts = [item.get("sent", item.get("raw")) if isinstance(item, dict) else item for item in items]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _image(row: dict[str, Any], known: tuple[Any, Any, Any] | None) -> tuple[tuple[str, ...], tuple[Any, Any]]:
    info = parsed(row.get("raw_image_info"))
    info = info if isinstance(info, dict) else {}
    names = [known[1] if known else None, info.get("file_name"), *(row.get(key) for key in _IMAGES)]
    size = known[2] if known else (row.get("width", info.get("width")), row.get("height", info.get("height")))
    # REFER calls images COCO_train2014_000000581857_16.jpg, the number of the annotation behind the image's name.
    plain = [name for name in names if isinstance(name, str) and name]
    cut = [f"{name.rpartition('_')[0]}.jpg" for name in plain if name.startswith("COCO_") and name.count("_") == 3]
    return tuple(dict.fromkeys([*plain, *cut])), size


def _object(row: dict[str, Any], known: tuple[Any, Any, Any] | None, layout: str | None, where: str, phrase: str) -> RawObject:
    raw = parsed(row.get("raw_anns"))
    if known is not None or (isinstance(raw, dict) and "bbox" in raw):
        return RawObject(where, known[0] if known is not None else raw["bbox"], "xywh", name=phrase)
    box = parsed(row.get("bbox"))
    if box is None:
        raise Unusable("no box", f"{where}: expected bbox, or ann_id with instances.json beside, got neither")
    return RawObject(where, box, _told(row, box) or known_layout(layout, where), name=phrase)


def _told(row: dict[str, Any], box: Any) -> Layout | None:
    """The layout under which the box is that of the row's segmentation, if there is one."""
    outline = parsed(row.get("segmentation"))
    flat = [v for part in outline for v in (part if isinstance(part, list) else [part])] if isinstance(outline, list) else []
    values, points = [number(v) for v in box] if isinstance(box, list) else [], [number(v) for v in flat]
    if len(values) != 4 or len(points) < 6 or len(points) % 2 or None in values or None in points:
        return None
    x1, y1, x2, y2 = bounding_box([v or 0.0 for v in points])
    a, b, c, d = (v or 0.0 for v in values)
    near = 0.02 * max(x2 - x1, y2 - y1, 1.0) + 1.0
    fits: dict[Layout, bool] = {"xyxy": max(abs(c - x2), abs(d - y2)) <= near, "xywh": max(abs(a + c - x2), abs(b + d - y2)) <= near}
    told = [name for name, fit in fits.items() if fit]
    return told[0] if len(told) == 1 else None
