"""Pascal VOC folders to record files.

Layout: ``Annotations/<id>.xml``, ``JPEGImages/<id>.<suffix>``, ``ImageSets/Main/{train,val,test,trainval}.txt``
with one id a line.

Convention: VOC pixels are 1-based and inclusive, so ``xmin=1 xmax=width`` is the whole width. Records have
pixel edges: ``[xmin - 1, ymin - 1, xmax, ymax]``. An object is usable when ``1 <= xmin < xmax <= width``, and
the same for y. A box of one pixel (``xmin == xmax``) would be legal by the letter; in practice it is a stray click,
so it counts as degenerate. ``xmin = 0`` is outside, and the sign of a file with 0-based pixels. Objects marked
``difficult`` are kept; their positions in ``objects`` are listed under ``metadata.difficult``.
"""

from __future__ import annotations

import math
import os
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image

from coordexp.data.records import IMAGE_ERRORS, write_records
from coordexp.data.staging import staged_folder
from coordexp.errors import ConfigError, DataError

_EDGES: Final = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class ImportReport:
    """What was written: images per split, boxes in all, boxes per class; ``problems`` has a line for all that was not."""

    splits: dict[str, int]
    boxes: int
    classes: dict[str, int]
    problems: tuple[str, ...]


@dataclass
class _Import:
    """State of one import: ``problem`` either stops it or takes a note, as asked."""

    source: Path
    on_invalid: str
    images: dict[str, list[Path]]
    problems: list[str] = field(default_factory=list)

    def problem(self, line: str) -> None:
        if self.on_invalid == "error":
            raise DataError(f'{line}: fix it, or import with on_invalid="skip" to leave it out')
        self.problems.append(line)


def import_voc(
    source: Path,
    out: Path,
    *,
    on_invalid: Literal["error", "skip"] = "skip",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Write ``out/<split>.jsonl`` for every split list and ``out/images/``; ``out`` appears only when all is written.

    Splits are ``train``, ``val`` and ``test``, those that have a list; ``trainval`` only where neither of its
    halves has one; without any list there is one split, ``all``. Images are hard links to the source's files, or
    copies where the file system does not allow links. With ``on_invalid="skip"`` an unusable object is left out of its image,
    an image without a readable annotation or of another size than annotated is left out of its split, and both are in the report.

    Raises:
        ConfigError: ``out`` is not empty (see ``overwrite``), or an unknown ``on_invalid``.
        DataError: ``source`` is no VOC folder or nothing in it is usable; with ``on_invalid="error"`` the first unusable
            object or image, as ``file.xml: object N (name): why`` with N counted from 1.
    """
    source = Path(source)
    if on_invalid not in ("error", "skip"):
        raise ConfigError(f"on_invalid: expected 'error' or 'skip', got {on_invalid!r}")
    for name in ("Annotations", "JPEGImages"):
        if not (source / name).is_dir():
            raise DataError(f"{source}: expected a Pascal VOC folder with Annotations and JPEGImages, got one without {name}")
    images: dict[str, list[Path]] = {}
    for path in sorted((source / "JPEGImages").iterdir()):
        images.setdefault(path.stem, []).append(path)
    state = _Import(source, on_invalid, images)
    splits = _split_ids(state)
    classes: Counter[str] = Counter()
    counts: dict[str, int] = {}
    total, done = sum(len(ids) for ids in splits.values()), 0
    with staged_folder(Path(out), overwrite=overwrite) as folder:
        (folder / "images").mkdir()
        for split, ids in splits.items():
            rows = []
            for image_id in ids:
                row = _import_image(state, image_id, folder / "images")
                if row is not None:
                    rows.append(row)
                    classes.update(item["desc"] for item in row["objects"])
                done += 1
                if progress is not None:
                    progress(done, total)
            if not rows:
                raise DataError(f"{source}: expected at least one usable image in split {split!r}, got none{_first(state.problems)}")
            write_records(folder / f"{split}.jsonl", rows)
            counts[split] = len(rows)
    return ImportReport(counts, classes.total(), dict(sorted(classes.items())), tuple(state.problems))


def _first(problems: list[str]) -> str:
    return f": {problems[0]}" if problems else ""


def _split_ids(state: _Import) -> dict[str, list[str]]:
    lists = state.source / "ImageSets" / "Main"
    names = [name for name in ("train", "val", "test") if (lists / f"{name}.txt").is_file()]
    if not {"train", "val"} & set(names) and (lists / "trainval.txt").is_file():
        names.insert(0, "trainval")
    if not names:
        return {"all": sorted(path.stem for path in (state.source / "Annotations").glob("*.xml"))}
    splits: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for name in names:
        path = lists / f"{name}.txt"
        ids: dict[str, None] = {}
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: expected UTF-8 text with one image id a line, got {error.reason}") from error
        for number, line in enumerate(lines, start=1):
            image_id, where = line.strip(), f"{path.name}:{number}"
            if not image_id:
                continue
            if Path(image_id).name != image_id:
                state.problem(f"{where}: expected the name of an image without folders, got {image_id!r}")
            elif image_id in ids:
                state.problem(f"{where}: expected an image once, got {image_id!r} again (first at {first[image_id]})")
            else:
                # Evaluating on training images makes every number worthless; it must not pass unnoticed.
                if image_id in first:
                    state.problem(f"{where}: expected an image in one split, {image_id!r} is also at {first[image_id]}")
                ids[image_id] = None
                first.setdefault(image_id, where)
        splits[name] = list(ids)
    return splits


def _import_image(state: _Import, image_id: str, target: Path) -> dict[str, Any] | None:
    """The record of one image, with the image linked into ``target``; None if the image cannot be used."""
    annotation = f"{image_id}.xml"
    found = state.images.get(image_id, [])
    try:
        root = _read_xml(state.source / "Annotations" / annotation)
        if len(found) != 1:
            got = " and ".join(path.name for path in found) or "none"
            raise DataError(f"{annotation}: expected one image {image_id}.* in JPEGImages, got {got}")
        width, height = _image_size(root, found[0], annotation)
    except DataError as error:
        state.problem(str(error))
        return None
    objects: list[dict[str, Any]] = []
    difficult: list[int] = []
    for number, element in enumerate(root.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        problem, box = _read_box(element, width, height) if name else ("expected a name, got none", [])
        if problem:
            state.problem(f"{annotation}: object {number} ({name or 'no name'}): {problem}")
            continue
        if (element.findtext("difficult") or "").strip() == "1":
            difficult.append(len(objects))
        objects.append({"desc": name, "bbox_2d": box})
    _link(found[0], target / found[0].name)
    metadata: dict[str, Any] = {"annotation": annotation, **({"difficult": difficult} if difficult else {})}
    size = {"width": width, "height": height}
    return {"images": [f"images/{found[0].name}"], **size, "objects": objects, "image_id": image_id, "metadata": metadata}


class _PlainTree(ET.TreeBuilder):
    """Refuses a document type before any entity of it can be expanded or fetched."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("expected plain XML, got a document type declaration (<!DOCTYPE>)")


def _read_xml(path: Path) -> ET.Element:
    if not path.is_file():
        raise DataError(f"{path.name}: expected an annotation in Annotations, got none")
    try:
        root = ET.parse(path, parser=ET.XMLParser(target=_PlainTree())).getroot()
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    except (ET.ParseError, LookupError, ValueError) as error:  # broken XML; an encoding that does not exist or does not fit
        raise DataError(f"{path.name}: expected XML, got a file that fails with: {error}") from error
    if root.tag != "annotation":
        raise DataError(f"{path.name}: expected an <annotation>, got <{root.tag}>")
    return root


def _image_size(root: ET.Element, path: Path, annotation: str) -> tuple[int, int]:
    """Size from the image's header. The annotation must agree, or say nothing (absent or 0, as some tools write)."""
    try:
        with Image.open(path) as image:
            size = image.size
    except IMAGE_ERRORS as error:
        raise DataError(f"{annotation}: expected a readable image {path.name}, got: {' '.join(str(error).split())}") from error
    for key, actual in zip(("width", "height"), size, strict=True):
        text = (root.findtext(f"size/{key}") or "0").strip()
        if text not in ("0", str(actual)):
            raise DataError(f"{annotation}: {key}: expected the image's {actual} pixels, got {text}")
    return size


def _read_box(element: ET.Element, width: int, height: int) -> tuple[str | None, list[float]]:
    """``(why it cannot be used or None, [x1, y1, x2, y2])`` of an ``<object>``."""
    texts = {key: (element.findtext(f"bndbox/{key}") or "").strip() for key in _EDGES}
    shown = " ".join(f"{key}={text or 'none'}" for key, text in texts.items())
    try:
        xmin, ymin, xmax, ymax = (float(text) for text in texts.values())
    except ValueError:
        return f"expected four numbers, got {shown}", []
    if not all(math.isfinite(value) for value in (xmin, ymin, xmax, ymax)):
        return f"expected finite numbers, got {shown}", []
    if xmax <= xmin or ymax <= ymin:
        return f"expected xmax > xmin and ymax > ymin, got {shown}", []
    if xmin < 1 or ymin < 1 or xmax > width or ymax > height:
        return f"expected a box within 1..{width} and 1..{height} (pixels count from 1), got {shown}", []
    return None, [int(edge) if edge.is_integer() else edge for edge in (xmin - 1, ymin - 1, xmax, ymax)]


def _link(image: Path, target: Path) -> None:
    if target.exists():  # in an earlier split
        return
    try:
        os.link(image.resolve(), target)
    except OSError:
        # Another file system, one without hard links, or a file of another owner: a copy always works.
        shutil.copyfile(image, target)
