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
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import Draft, Job, Split
from coordexp.errors import DataError

_EDGES: Final = ("xmin", "ymin", "xmax", "ymax")


def read_voc(job: Job) -> list[Split]:
    """Splits ``train``, ``val`` and ``test``, those that have a list; ``trainval`` only where neither of its halves has one;
    without any list one split, ``all``.

    Raises:
        DataError: ``source`` is no VOC folder.
    """
    source = job.source
    for name in ("Annotations", "JPEGImages"):
        if not (source / name).is_dir():
            raise DataError(f"{source}: expected a Pascal VOC folder with Annotations and JPEGImages, got one without {name}")
    images: dict[str, list[Path]] = {}
    for path in sorted((source / "JPEGImages").iterdir()):
        images.setdefault(path.stem, []).append(path)
    reader = _Reader(job, images)
    return [Split(name, len(ids), ids, reader.draft) for name, ids in _split_ids(job).items()]


def _split_ids(job: Job) -> dict[str, list[tuple[str, str]]]:
    """By split: where each id stands, and the id."""
    lists = job.source / "ImageSets" / "Main"
    names = [name for name in ("train", "val", "test") if (lists / f"{name}.txt").is_file()]
    if not {"train", "val"} & set(names) and (lists / "trainval.txt").is_file():
        names.insert(0, "trainval")
    if not names:
        return {"all": [(path.name, path.stem) for path in sorted((job.source / "Annotations").glob("*.xml"))]}
    splits: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        path = lists / f"{name}.txt"
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: expected UTF-8 text with one image id a line, got {error.reason}") from error
        splits[name] = [(f"{path.name}:{number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    return splits


@dataclass(frozen=True)
class _Reader:
    job: Job
    images: dict[str, list[Path]]

    def draft(self, item: tuple[str, str]) -> Draft:
        where, image_id = item
        if Path(image_id).name != image_id:
            raise DataError(f"{where}: expected the name of an image without folders, got {image_id!r}")
        annotation = f"{image_id}.xml"
        found = self.images.get(image_id, [])
        root = _read_xml(self.job.source / "Annotations" / annotation)
        if len(found) != 1:
            got = " and ".join(path.name for path in found) or "none"
            raise DataError(f"{annotation}: expected one image {image_id}.* in JPEGImages, got {got}")
        image = self.job.image(self.job.source / "JPEGImages", found[0].name, annotation)
        # Absent or 0, as some tools write: the size is left to the image.
        stated = [_stated(root.findtext(f"size/{key}")) for key in ("width", "height")]
        size = self.job.size(image, annotation, (stated[0], stated[1]))
        difficult: list[int] = []
        objects: list[dict[str, Any]] = []
        for number, element in enumerate(root.findall("object"), start=1):
            name = (element.findtext("name") or "").strip()
            problem, box = _read_box(element, *size) if name else ("expected a name, got none", [])
            if problem:
                self.job.drop(f"{annotation}: object {number} ({name or 'no name'}): {problem}")
                continue
            if (element.findtext("difficult") or "").strip() == "1":
                difficult.append(len(objects))
            objects.append({"desc": name, "bbox_2d": box})
        metadata: dict[str, Any] = {"annotation": annotation, **({"difficult": difficult} if difficult else {})}
        return Draft(where, image, found[0].name, *size, objects, image_id, metadata)


def _stated(text: str | None) -> int | str | None:
    text = (text or "0").strip()
    return None if text == "0" else int(text) if text.isdecimal() and len(text) < 10 else text


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
