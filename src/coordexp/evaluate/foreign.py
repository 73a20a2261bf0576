"""Results of other programs as rows of predictions, COCO and LVIS results JSON, YOLO text files and the text answers of chat models, and
the way back.

COCO: ``[{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]``; names come from a file of categories.
Answers: rows with ``response`` (ms-swift infer), ``predict`` (LLaMA-Factory) or a last turn of the model, in any spelling that an import
reads.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.exporting import region
from coordexp.data.importers.answers import objects_of_text
from coordexp.data.importers.base import COORDS, RawObject, Unusable, brief, id_text
from coordexp.data.importers.chat import image_name, turns_of
from coordexp.data.importers.coco import categories_of
from coordexp.data.importers.encoding import LAYOUTS, UNITS, BoxFile, find_reading
from coordexp.data.importers.files import Head, head_of, json_list, rows_of
from coordexp.data.importers.finding import plain_name
from coordexp.data.importers.judging import number, pixels_of
from coordexp.data.importers.yolo import class_names
from coordexp.data.records import Record, read_records
from coordexp.data.rows import IMPORT_FILE, RecordObject
from coordexp.errors import ConfigError, DataError
from coordexp.evaluate.predictions import read_predictions
from coordexp.evaluate.samples import normalise
from coordexp.evaluate.yolo_results import read_yolo
from coordexp.grammar import COORD_TOKEN, HALF_PAIR, Instance, parse

_ANSWERS: Final = ("response", "predict", "prediction", "generated_text", "answer", "output")


@dataclass(frozen=True)
class Foreign:
    """Rows of predictions in the order of the records, and what is to be said about how they were read."""

    rows: list[dict[str, Any]]
    notes: list[str]


def read_foreign(
    path: Path, data: Path, *, categories: Path | None, coords: str | None, convention: str = "norm999"
) -> Foreign | None:
    """Another program's results as predictions for the records ``data``, or None for a file of this package's own form.

    ``coords`` is the unit of numbers in answers of chat models, ``convention`` that of coordinate tokens in them.

    Raises:
        DataError: results of other images, without names, or whose boxes are not what the format says.
        ConfigError: answers whose unit nobody has named.
    """
    if path.is_dir():
        return _yolo(path, read_records(data, check_images=False).records, data, categories)
    head = head_of(path) if path.is_file() else Head(path)
    own = isinstance(head.row.get("objects"), list)  # ms-swift repeats the objects of its rows, a dictionary
    if {"image_id", "bbox"} <= head.row.keys() and not own:
        return _coco(path, read_records(data, check_images=False).records, data, categories)
    if not own and head.row.keys() & {*_ANSWERS, "messages", "conversations"}:
        codec = CoordCodec(CONVENTIONS[convention].bins, convention)
        return _answers(path, read_records(data, check_images=False).records, coords, codec)
    if head.top >= {"images", "annotations", "categories"}:
        raise DataError(f"{path}: expected predictions, got a COCO file of annotations: import it, and evaluate the predictions against it")
    return None


def _coco(path: Path, records: Sequence[Record], data: Path, categories: Path | None) -> Foreign:
    results: list[Any] = json_list(path) if path.suffix.lower() == ".json" else [row for _, row in rows_of(path)]
    names, told = _names(data, categories)
    known = _by_id(records)
    found: dict[str, list[dict[str, Any]]] = {record.image_id: [] for record in records}
    boxes: list[list[float]] = []
    sides: list[tuple[int, int]] = []
    foreign = 0
    for i, item in enumerate(results):
        where = f"{path.name}[{i}]"
        if not isinstance(item, dict):
            raise DataError(f"{where}: expected image_id, category_id, bbox and score, got {brief(item)}")
        record = known.get(id_text(item.get("image_id"))) or known.get(id_text(item.get("image_id")).lstrip("0"))
        if record is None:
            foreign += 1
            continue
        values = [number(v) for v in item["bbox"]] if isinstance(item.get("bbox"), list) else []
        box = [value for value in values if value is not None]
        if len(box) != 4 or len(values) != 4:
            raise DataError(f"{where}: bbox: expected four finite numbers [x, y, width, height], got {brief(item.get('bbox'))}")
        boxes.append(box)
        sides.append((record.width, record.height))
        made = {"desc": _name(item, names, where, told), "bbox_2d": [box[0], box[1], box[0] + box[2], box[1] + box[3]]}
        found[record.image_id].append(made | ({"score": item["score"]} if "score" in item else {}))
    if results and not boxes:
        raise DataError(
            f"{path}: expected results of the images of {data}, got none: its first image_id is {brief(results[0].get('image_id'))}"
        )
    _refuse_other_readings(path, boxes, sides)
    notes = [f"{path.name}: COCO results, {len(boxes)} boxes read as [x, y, width, height] in pixels; names from {told}"]
    if foreign:
        notes.append(f"{path.name}: {foreign} results are of images that {data.name} does not hold: left out")
    return Foreign(_rows(records, found, "results" if any("score" in o for items in found.values() for o in items) else None), notes)


def _name(item: dict[str, Any], names: dict[str, str], where: str, told: str) -> str:
    key = id_text(item.get("category_id"))
    stated = next((item[k] for k in ("category", "category_name", "label", "name") if isinstance(item.get(k), str)), None)
    if stated is None and key not in names:
        raise DataError(f"{where}: category_id {brief(item.get('category_id'))}: expected one of {told}, got none: pass --categories FILE")
    return stated or names[key]


def _names(data: Path, categories: Path | None) -> tuple[dict[str, str], str]:
    """Names by id: of the file that is given, else of the source that the records were imported from."""
    if categories is not None:
        return categories_of(categories), str(categories)
    for source in _sources(data):
        names = categories_of(source) if source.suffix == ".json" or source.is_dir() else {}
        if names:
            return names, str(source)
    return {}, "no file of categories"


def _sources(data: Path, *formats: str) -> list[Path]:
    """What the records were imported from, of these formats where some are named."""
    beside = data.parent / IMPORT_FILE
    try:
        imports = json.loads(beside.read_text(encoding="utf-8"))["imports"] if beside.is_file() else []
        wanted = [entry for entry in imports if data.stem in entry["splits"] and (not formats or entry["format"] in formats)]
        return [Path(source) for entry in wanted for source in entry["sources"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{beside}: expected what an import writes, got one that fails with: {brief(error)}") from error


def _yolo(path: Path, records: Sequence[Record], data: Path, categories: Path | None) -> Foreign:
    source = categories or next((source for source in _sources(data, "yolo") if source.exists()), None)
    if source is None:
        raise DataError(f"{path}: expected names for the class numbers, got none: pass --categories with data.yaml or classes.txt")
    names, points = class_names(source)
    results = read_yolo(path, records, names, str(source), points)
    return Foreign(_rows(records, results.found, "results" if results.scored else None), results.notes)


def _by_id(records: Iterable[Record]) -> dict[str, Record]:
    """Records by id, and by the name of their image without its suffix and zeros; a name that two share is none."""
    found: dict[str, Record] = {}
    several: set[str] = set()
    for record in records:
        for key in {record.image.stem, record.image.stem.lstrip("0")}:
            several |= {key} if key in found else set()
            found[key] = record
    for key in several:
        del found[key]
    return {**found, **{record.image_id: record for record in records}}


def _refuse_other_readings(path: Path, boxes: list[list[float]], sides: list[tuple[int, int]]) -> None:
    """Boxes that are clearly something else would all count as false."""
    if not boxes:
        return
    count = len(boxes)
    values, limits = np.array(boxes, dtype=np.float64), np.array(sides, dtype=np.float64)
    places = tuple(map(str, range(count)))
    file = BoxFile("coco", "pixel", "xywh", values, limits, np.zeros(count, dtype=np.int64), places, places, count, (), True)
    reading = find_reading(file, few=2)
    looks = []
    if reading.units not in (None, "pixel"):
        looks.append(UNITS[str(reading.units)])
    if reading.layout != "xywh":
        looks.append(LAYOUTS[reading.layout])
    if looks:
        raise DataError(f"{path}: expected boxes as [x, y, width, height] in pixels, got {' and '.join(looks)}: convert them first")


def _answers(path: Path, records: Sequence[Record], coords: str | None, codec: CoordCodec) -> Foreign:
    rows: list[tuple[str, dict[str, Any]]] = []
    for where, row in rows_of(path):
        if isinstance(row, Unusable):
            raise row
        rows.append((where, row))
    matched, how = _records_of(rows, records)
    found: dict[str, list[dict[str, Any]]] = {record.image_id: [] for record in records}
    boxless = unusable = tokens = 0
    for (where, row), record in zip(rows, matched, strict=True):
        text = next((row[key] for key in _ANSWERS if isinstance(row.get(key), str)), None)
        turns = turns_of(row)
        if text is None:
            text = next((said for role, said in reversed(turns) if role == "assistant"), "")
        parsed = parse(text, num_bins=codec.num_bins)
        if parsed.instances or not parsed.problems or COORD_TOKEN.search(text):
            tokens += 1
            boxless += "no_answer" in parsed.problems
            unusable += sum(count for problem, count in parsed.problems.items() if problem not in ("no_answer", "trailing_text"))
            found[record.image_id] += [_of_bins(item, record, codec) for item in parsed.instances]
            continue
        question = next((said for role, said in reversed(turns) if role == "user"), "")
        objects = objects_of_text(text, where, question)
        boxless += objects is None
        for raw in objects or []:
            made = _object(raw, (record.width, record.height), None if coords is None else COORDS[coords], path)
            unusable += made is None
            found[record.image_id] += [] if made is None else [made]
    read = [f"{tokens} in coordinate tokens as {codec.convention}"] if tokens else []
    read += [f"{len(rows) - tokens} {'without tokens' if coords is None else f'in numbers as {coords}'}"] if tokens < len(rows) else []
    notes = [
        f"{path.name}: {len(rows)} answers, matched {how}, {' and '.join(read)}; {boxless} without a box, {unusable} boxes unusable"
    ]
    return Foreign(_rows(records, found, None), notes)


def _records_of(rows: Sequence[tuple[str, dict[str, Any]]], records: Sequence[Record]) -> tuple[Sequence[Record], str]:
    """The record of each row, by the name of its image, else by the order of the rows where the names do not speak against it."""
    known: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        for name in {record.image.name, record.image_name}:
            known[name].append(record)
    fits = [_fitting(row, known) for _, row in rows]
    if all(len(fit) == 1 for fit in fits):
        return [fit[0] for fit in fits], "by the names of their images"
    if len(rows) == len(records) and (not any(fits) or all(record in fit for record, fit in zip(records, fits, strict=True))):
        return records, "in the order of the records"
    place, fit = next((where, fit) for (where, _), fit in zip(rows, fits, strict=True) if len(fit) != 1)
    got = f"{len(fit)} records with that image" if fit else "none"
    raise DataError(
        f"{place}: expected the image of one record, or the {len(records)} records row by row, got {got} and {len(rows)} rows in all"
    )


def _fitting(row: dict[str, Any], known: dict[str, list[Record]]) -> list[Record]:
    try:
        name = plain_name(image_name(row, ""))
    except Unusable:
        return []
    return known.get(name) or known.get(name.rpartition("/")[2]) or []


def _of_bins(item: Instance, record: Record, codec: CoordCodec) -> dict[str, Any]:
    sides = (record.width, record.height)
    return {"desc": item.desc, item.geometry: [float(codec.to_pixel(b, sides[i % 2])) for i, b in enumerate(item.bins)]}


def _object(raw: RawObject | Unusable, size: tuple[int, int], units: str | None, path: Path) -> dict[str, Any] | None:
    if isinstance(raw, Unusable) or not isinstance(raw.name, str) or not raw.name.strip() or HALF_PAIR.search(raw.name):
        return None
    units = raw.units or units
    if units is None:
        raise ConfigError(
            f"--coords: expected one of {', '.join(COORDS)}, got none: {path} does not say what the numbers of its answers are"
        )
    try:
        geometry, values = pixels_of(raw, size, units, lambda line: None)
    except Unusable:
        return None
    return {"desc": raw.name.strip(), geometry: values}


def _rows(records: Sequence[Record], found: dict[str, list[dict[str, Any]]], source: str | None) -> list[dict[str, Any]]:
    return [
        {"image_id": r.image_id, "width": r.width, "height": r.height, "objects": found[r.image_id], "score_source": source}
        for r in records
    ]


def coco_results(path: Path, data: Path, categories: Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Predictions as COCO results, boxes ``[x, y, width, height]``; ids of images as numbers where they are.

    Descriptions without a category in the file are left out and counted.

    Raises:
        DataError: predictions that cannot be read, or no file of categories.
    """
    names, told = _names(data, categories)
    if not names:
        raise DataError(f"{data}: expected a file that numbers the categories, got none: pass --categories FILE")
    number_of = {normalise(name): int(key) if key.isdecimal() else key for key, name in names.items()}
    rows: list[dict[str, Any]] = []
    unknown: Counter[str] = Counter()
    for row in read_predictions(path):
        image = int(row.image_id) if row.image_id.isdecimal() else row.image_id
        for item in row.objects:
            category = number_of.get(normalise(item.desc))
            if category is None:
                unknown[item.desc] += 1
                continue
            x1, y1, x2, y2 = item.box
            made = {"image_id": image, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            rows.append(made | {"score": 1.0 if item.score is None else item.score})
    notes = [f"categories from {told}"]
    if unknown:
        shown = ", ".join(f"{name} {count}" for name, count in unknown.most_common(5))
        notes.append(f"{unknown.total()} boxes of descriptions that are no category left out ({shown})")
    return rows, notes


def labelstudio_tasks(path: Path, data: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Predictions as tasks with one pre-annotation each, in percent of the sides, with scores where there are some.

    Raises:
        DataError: predictions that cannot be read, or of an image that the records do not hold.
    """
    records = {record.image_id: record for record in read_records(data, check_images=False).records}
    tasks = []
    for row in read_predictions(path):
        if row.image_id not in records:
            raise DataError(f"{row.source}: image_id: expected one of {data.name}, got {row.image_id!r}")
        result = []
        for item in row.objects:
            values = item.values or item.box
            made = region(RecordObject(item.desc, item.geometry, tuple(values)), row.width, row.height)
            result.append(made | ({} if item.score is None else {"score": item.score}))
        tasks.append({"data": {"image": records[row.image_id].image_name}, "predictions": [{"model_version": path.stem, "result": result}]})
    return tasks, []
