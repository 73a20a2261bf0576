"""Records to other tools' formats: COCO, FiftyOne's COCO folder, YOLO, Pascal VOC, Label Studio. PIL-free, standard library only.

What a format has no place for is left out and counted, never bent: points in COCO, YOLO and VOC; crowds and difficult objects in YOLO;
crowds and outlines in VOC; crowds in Label Studio. Numbers are written with all their digits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

from coordexp.boxes import bounding_box
from coordexp.data.records import Record, RecordObject, read_records
from coordexp.data.staging import atomic_text, link_or_copy, staged_folder
from coordexp.errors import ConfigError, DataError

Progress = Callable[[int, int], None]


@dataclass
class DataExport:
    """``splits``: images by split; ``left_out``: objects that the format has no place for, by what they are."""

    splits: dict[str, int] = field(default_factory=dict)
    objects: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def keep(self, item: RecordObject, **without: bool) -> bool:
        """Count the object; whether none of the reasons that are true forbids it."""
        reason = next((name for name, yes in without.items() if yes), None)
        if reason is None:
            self.objects += 1
        else:
            self.left_out[reason] += 1
        return reason is None


def export_data(
    format_name: str, files: Sequence[Path], out: Path, *, copy: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> DataExport:
    """Write record files, one a split, as another format; ``out`` appears only when all is written. Images are links, or copies.

    Raises:
        ConfigError: an unknown format, two files of one name, or an ``out`` in use.
        DataError: a record that cannot be read, or a link that cannot be made.
    """
    if format_name not in EXPORTS:
        raise ConfigError(f"unknown data format {format_name!r}: expected one of {', '.join(EXPORTS)}")
    names = [path.stem for path in files]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"expected record files of different names, got {twice[0]}.jsonl twice: export them into two folders")
    read = {path.stem: read_records(path).records for path in files}
    report = DataExport({name: len(records) for name, records in read.items()})
    # One list for all splits: a class has the same number everywhere.
    descs = sorted({item.desc for records in read.values() for record in records for item in record.objects})
    place, write = EXPORTS[format_name]
    total = sum(report.splits.values())
    done = 0
    with staged_folder(out, kind=f"{format_name} export", overwrite=overwrite) as folder:
        for split, records in read.items():
            known: dict[str, Path] = {}
            images = []
            for record in records:
                name = place(_name(record), split)
                if known.setdefault(name, record.image) != record.image:
                    raise DataError(f"{record.source}: expected images of different names, got {name} twice: rename one")
                images.append(name)
                _place(record.image, folder / name, copy=copy)
                done += 1
                if progress is not None:
                    progress(done, total)
            write(folder, split, list(zip(records, images, strict=True)), report, descs)
        if format_name == "yolo":
            with atomic_text(folder / "data.yaml") as file:
                # JSON is YAML, and quotes every name as it must be.
                file.write("".join(f"{split}: images/{split}\n" for split in read) + f"names: {json.dumps(descs, ensure_ascii=False)}\n")
    return report


def _name(record: Record) -> str:
    return record.image_name.removeprefix("images/")


def _place(image: Path, target: Path, *, copy: bool) -> None:
    if target.exists():
        return  # several records of one image
    target.parent.mkdir(parents=True, exist_ok=True)
    link_or_copy(image, target, copy=copy, command="export")


def _dump(path: Path, content: Any) -> None:
    with atomic_text(path) as file:
        json.dump(content, file, ensure_ascii=False, allow_nan=False)


Items = list[tuple[Record, str]]


def coco_content(items: Items, report: DataExport, folder: str, descs: Sequence[str]) -> dict[str, Any]:
    """COCO's three lists. Ids of images are the records' where all are numbers, else 1, 2, ...; ``ignore`` marks difficult objects."""
    numbered = all(record.image_id.isdecimal() for record, _ in items) and len({int(r.image_id) for r, _ in items}) == len(items)
    category = {desc: i for i, desc in enumerate(descs, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (record, name) in enumerate(items, start=1):
        key = int(record.image_id) if numbered else number
        images.append({"id": key, "file_name": name.removeprefix(folder), "width": record.width, "height": record.height})
        for item in record.objects:
            if not report.keep(item, points=item.geometry == "point_2d"):
                continue
            x1, y1, x2, y2 = bounding_box(item.values)
            outline = [list(item.values)] if item.geometry == "poly" else []
            made = {
                "id": len(annotations) + 1, "image_id": key, "category_id": category[item.desc], "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": item.area if item.area is not None else (x2 - x1) * (y2 - y1), "iscrowd": int(item.crowd), "segmentation": outline,
            }  # fmt: skip
            annotations.append(made | ({"ignore": 1} if item.difficult else {}))
    categories = [{"id": i, "name": desc, "supercategory": ""} for desc, i in category.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _coco(folder: Path, split: str, items: Items, report: DataExport, descs: Sequence[str]) -> None:
    _dump(folder / "annotations" / f"instances_{split}.json", coco_content(items, report, f"images/{split}/", descs))


def _fiftyone(folder: Path, split: str, items: Items, report: DataExport, descs: Sequence[str]) -> None:
    _dump(folder / split / "labels.json", coco_content(items, report, f"{split}/data/", descs))


def _yolo(folder: Path, split: str, items: Items, report: DataExport, descs: Sequence[str]) -> None:
    number = {desc: i for i, desc in enumerate(descs)}
    for record, name in items:
        rows = []
        for item in record.objects:
            if not report.keep(item, points=item.geometry == "point_2d", crowds=item.crowd, difficult=item.difficult):
                continue
            sides = (record.width, record.height)
            values = [v / sides[i % 2] for i, v in enumerate(item.values)]
            if item.geometry == "bbox_2d":
                x1, y1, x2, y2 = values
                values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            rows.append(" ".join([str(number[item.desc]), *(repr(v) for v in values)]))
        with atomic_text((folder / name.replace("images/", "labels/", 1)).with_suffix(".txt")) as file:
            file.write("".join(row + "\n" for row in rows))


def _voc(folder: Path, split: str, items: Items, report: DataExport, descs: Sequence[str]) -> None:
    stems = []
    for record, name in items:
        stem = Path(name).stem
        objects = ""
        for item in record.objects:
            if not report.keep(item, points=item.geometry == "point_2d", crowds=item.crowd, outlines=item.geometry == "poly"):
                continue
            x1, y1, x2, y2 = item.values
            edges = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True)
            box = "".join(f"<{edge}>{int(v) if float(v).is_integer() else v!r}</{edge}>" for edge, v in edges)
            objects += (
                f"<object><name>{escape(item.desc)}</name><difficult>{int(item.difficult)}</difficult><bndbox>{box}</bndbox></object>\n"
            )
        size = f"<size><width>{record.width}</width><height>{record.height}</height><depth>3</depth></size>"
        with atomic_text(folder / "Annotations" / f"{stem}.xml") as file:
            file.write(f"<annotation><filename>{escape(Path(name).name)}</filename>{size}\n{objects}</annotation>\n")
        stems.append(stem)
    with atomic_text(folder / "ImageSets" / "Main" / f"{split}.txt") as file:
        file.write("".join(f"{stem}\n" for stem in stems))


def _labelstudio(folder: Path, split: str, items: Items, report: DataExport, descs: Sequence[str]) -> None:
    _dump(folder / f"{split}.json", [_task(record, name, report) for record, name in items])


def _task(record: Record, name: str, report: DataExport) -> dict[str, Any]:
    """A task with one annotation, in percent of the sides."""
    result = [region(item, record.width, record.height) for item in record.objects if report.keep(item, crowds=item.crowd)]
    return {"data": {"image": name}, "annotations": [{"result": result}]}


def region(item: RecordObject, width: int, height: int) -> dict[str, Any]:
    """A region of Label Studio."""
    sides = (width, height)
    share = [v / sides[i % 2] * 100 for i, v in enumerate(item.values)]
    value: dict[str, Any]
    if item.geometry == "poly":
        kind, value = "polygon", {"points": [share[i : i + 2] for i in range(0, len(share), 2)]}
    elif item.geometry == "point_2d":
        kind, value = "keypoint", {"x": share[0], "y": share[1], "width": 0.5}
    else:
        x1, y1, x2, y2 = share
        kind, value = "rectangle", {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}
    made = {"type": f"{kind}labels", "from_name": "label", "to_name": "image", "original_width": width, "original_height": height}
    return {**made, "image_rotation": 0, "value": {**value, f"{kind}labels": [item.desc]}}


Place = Callable[[str, str], str]
Write = Callable[[Path, str, Items, DataExport, Sequence[str]], None]
EXPORTS: Final[dict[str, tuple[Place, Write]]] = {
    "coco": (lambda name, split: f"images/{split}/{name}", _coco),
    "fiftyone": (lambda name, split: f"{split}/data/{name}", _fiftyone),
    "yolo": (lambda name, split: f"images/{split}/{name}", _yolo),
    "voc": (lambda name, split: f"JPEGImages/{name.replace('/', '_')}", _voc),
    "labelstudio": (lambda name, split: f"images/{name}", _labelstudio),
}
