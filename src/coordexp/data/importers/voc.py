"""Pascal VOC XML.

Source: any folder with XML annotations: ``Annotations`` and ``JPEGImages``, ``annotations`` and ``images``, XML beside the images, several
such folders (``VOCdevkit/VOC2007``), or one XML file. Splits are the lists of ``ImageSets/Main`` (one id a line; a suffix, a path
or a flag behind it is read), else folders called train, valid or test, else one split, ``all``. ``trainval`` is read where neither of its
halves has a list. An XML's image is the one of its own name, else the one that its ``filename`` says.

Convention: VOC pixels are counted from 1 and inclusive, so ``xmin=1 xmax=width`` is the whole width; the record's box is
``[xmin - 1, ymin - 1, xmax, ymax]``. CVAT, Datumaro and Label Studio write edges from 0 instead: ``--origin 0``. A box of one pixel
(``xmin == xmax``) is in practice a stray click and counts as empty. ``difficult`` is carried on.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import Job, Layout, RawImage, RawObject, RawSplit, Unusable, brief, folder_split
from coordexp.data.importers.files import Head, text_of, xml_of
from coordexp.data.importers.finding import SUFFIXES, plain_name
from coordexp.data.importers.judging import number
from coordexp.errors import DataError

_EDGES: Final = ("xmin", "ymin", "xmax", "ymax")
_FOLDERS: Final = ("JPEGImages", "images", "Images", "img")
_XMLS: Final = ("annotations", "annotation", "xml", "xmls", "labels")
_LISTS: Final = ("ImageSets/Main", "ImageSets", "Main")
_LISTED: Final = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
# Share of boxes with fractions from which a file is no VOC by the letter: VOC 2012 itself has a few.
_FRACTIONS: Final = 0.05


def looks(head: Head) -> bool:
    """An XML file of an annotation, or a folder with some."""
    if head.path.is_dir():
        return next((True for path in head.path.rglob("*.xml") if not path.name.startswith(".")), False)
    return head.suffix == ".xml"


def read(job: Job) -> list[RawSplit]:
    """The splits of the folder.

    Raises:
        DataError: no XML there.
        ConfigError: a split that is asked for and not there.
    """
    source = job.source
    if not source.exists():
        raise DataError(f"{source}: expected a Pascal VOC folder, got nothing there")
    root = source.parent if source.is_file() else source
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*.xml") if not p.name.startswith("."))
    if not files:
        inner = ", ".join(sorted(p.name for p in source.iterdir())[:6]) or "nothing"
        raise DataError(f"{source}: expected a folder with XML annotations (as Annotations and JPEGImages), got {inner}")
    splits = _listed(root, files) if source.is_dir() else {}
    if not splits:
        for path in files:
            name = job.options.splits[0] if source.is_file() and job.options.splits else folder_split(path.relative_to(root).parts[:-1])
            splits.setdefault(name or "all", []).append((path.relative_to(root).as_posix() if len(files) > 1 else path.name, path))
        _short_names(splits)
    folders = list(dict.fromkeys(path.parent for path in files))
    roots = tuple(dict.fromkeys([*_image_folders(folders), root]))
    return [RawSplit(name, len(splits[name]), _Images(job, root, splits[name]), roots) for name in job.choose(splits)]


def _short_names(splits: dict[str, list[tuple[str, Path]]]) -> None:
    """Places are names of files where those are unique."""
    names = [path.name for items in splits.values() for _, path in items]
    if len(set(names)) == len(names):
        for items in splits.values():
            items[:] = [(path.name, path) for _, path in items]


def _image_folders(folders: Sequence[Path]) -> list[Path]:
    """Folders in which images usually lie beside XML folders."""
    found = []
    for folder in folders:
        beside = [folder.parent / name for name in _FOLDERS]
        found += [path for path in beside if path.is_dir()] + [folder]
    return found


def _listed(root: Path, files: Sequence[Path]) -> dict[str, list[tuple[str, Path]]]:
    """By split: the place of each line of its lists, and the XML it names."""
    splits: dict[str, list[tuple[str, Path]]] = {}
    holders = list(dict.fromkeys([path.parent.parent for path in files] + [root]))
    for holder in holders:
        lists = {path.stem: path for name in _LISTS for path in (holder / name).glob("*.txt")}
        names = {split: next((lists[stem] for stem in stems if stem in lists), None) for split, stems in _LISTED.items()}
        if names["train"] is None and names["val"] is None and "trainval" in lists:
            names = {"trainval": lists["trainval"], **names}
        mine: dict[str, Path] = {}
        for path in files:
            if path.is_relative_to(holder):
                mine.setdefault(path.stem, path)
        for split, listed in names.items():
            lines = text_of(listed, "one image id a line").splitlines() if listed is not None else []
            for number_, line in enumerate(lines, start=1):
                words = line.split()
                if words and listed is not None:
                    splits.setdefault(split, []).append((f"{listed.name}:{number_}", _xml_of_id(line.strip(), words, mine, holder)))
    return splits


def _xml_of_id(line: str, words: Sequence[str], known: dict[str, Path], holder: Path) -> Path:
    """The XML of a list's line: an id, a file or a path, with or without a flag behind it."""
    for text in (line, words[0]):
        plain = Path(plain_name(text))
        for stem in (plain.name, plain.stem):
            if stem in known and ".." not in plain.parts:
                return known[stem]
    return holder / line


@dataclass(frozen=True)
class _Images:
    job: Job
    root: Path
    items: Sequence[tuple[str, Path]]

    def __iter__(self) -> Iterator[RawImage | Unusable]:
        boxes = zeros = fractions = 0
        for where, path in self.items:
            if not os.path.isfile(path):
                yield Unusable(
                    "no annotation", f"{where}: expected an id with an XML file, got {path.name!r}: {path.name}.xml is not there"
                )
                continue
            image = self._image(where, path)
            if isinstance(image, RawImage):
                numbers = [[number(v) for v in raw.values] for raw in image.objects if isinstance(raw, RawObject)]
                boxes += len(numbers)
                zeros += sum(0 in box[:2] for box in numbers)
                fractions += sum(any(v is not None and not v.is_integer() for v in box) for box in numbers)
            yield image
        if self.job.options.origin is None and (zeros or fractions > _FRACTIONS * boxes):
            self.job.note(
                f"{zeros} boxes with a 0 and {fractions} with fractions among {boxes} speak for pixels counted from 0, as CVAT, "
                "Datumaro and "
                "Label Studio write them: read as counted from 1; import with --origin 0 if so (--origin 1 confirms)"
            )

    def _image(self, where: str, path: Path) -> RawImage | Unusable:
        try:
            root = xml_of(path, path.name)
        except Unusable as fault:
            return fault
        if root.tag.lower() != "annotation":
            return Unusable("unreadable", f"{path.name}: expected an <annotation>, got <{brief(root.tag, 40)}>")
        layout = self.job.options.origin
        objects = [_object(element, f"{path.name}: object {i}", layout) for i, element in enumerate(root.findall("object"), start=1)]
        # Its own name first, in the folders where its image usually lies: tools copy files and leave the name inside as it was.
        inner = path.relative_to(self.root)
        parts = inner.parts
        mirrored = [
            Path(*parts[:i], folder, *parts[i + 1 :]).with_suffix("").as_posix()
            for i, part in enumerate(parts[:-1])
            if part.lower() in _XMLS
            for folder in _FOLDERS
            if (self.root / Path(*parts[:i], folder)).is_dir()
        ]
        beside = [(inner.parent.parent / folder / path.stem).as_posix() for folder in _FOLDERS if (path.parent.parent / folder).is_dir()]
        near = [*mirrored, *beside]
        names = [_beside(path, inner), *near, path.stem, _text(root, "filename"), _text(root, "path")]
        size = (_text(root, "size/width"), _text(root, "size/height"))
        place = where if where.endswith(".xml") else f"{where}: {path.name}"
        return RawImage(place, tuple(filter(None, names)), objects, path.stem, size=size, metadata={"annotation": path.name})


def _beside(path: Path, inner: Path) -> str:
    """The image of the XML's own name in its folder."""
    there = (s for suffix in SUFFIXES for s in (suffix, suffix.upper()) if path.with_suffix(s).is_file())
    return next((inner.with_suffix(suffix).as_posix() for suffix in there), "")


def _text(element: ET.Element, key: str) -> str:
    return (element.findtext(key) or "").strip()


def _object(element: ET.Element, where: str, origin: int | None) -> RawObject | Unusable:
    name = _text(element, "name")
    where = f"{where} ({brief(name, 40) or 'no name'})"
    box = element.find("bndbox")
    if box is None:
        inside = ", ".join(child.tag for child in element)[:60]
        return Unusable("no box", f"{where}: expected a <bndbox>, got {inside or 'none'}")
    found: dict[str, Any] = {child.tag.lower(): (child.text or "").strip() for child in box}
    values = [found.get(edge, "") for edge in _EDGES]
    if any(number(value) is None for value in values):
        shown = " ".join(f"{edge}={value or 'none'}" for edge, value in zip(_EDGES, values, strict=True))
        return Unusable("not numbers", f"{where}: expected four finite numbers, got {shown}")
    layout: Layout = "xyxy" if origin == 0 else "xyxy1"
    return RawObject(where, [float(value) for value in values], layout, name=name, difficult=_text(element, "difficult") or None)
