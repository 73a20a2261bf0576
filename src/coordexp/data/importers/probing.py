"""Raw objects as numbers for the probe: what `doctor` looks at, and what an import that lost too much says about the likely cause."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

from coordexp.boxes import bounding_box
from coordexp.data.images import image_size
from coordexp.data.importers.base import COORDS, ImportOptions, Job, RawImage, RawObject, RawSplit, Unusable
from coordexp.data.importers.encoding import LAYOUTS, UNITS, BoxFile, find_reading
from coordexp.data.importers.finding import ImageFinder
from coordexp.data.importers.judging import number, side
from coordexp.data.importers.tally import Tally
from coordexp.errors import DataError

# Enough for every test of the probe; keeps a file of millions of boxes to seconds.
MAX_BOXES: Final = 200_000
_SAMPLE: Final = 20_000
_LOOKS: Final = {"norm1000": "0..1000 of each side"}
_OPEN: Final = 1_000_000
# How the probe calls the readers' units.
_NAMES: Final = {
    "pixel": "pixel",
    "norm1": "norm1",
    "norm100": "norm1",
    "norm1000": "norm1000",
    "norm1023": "paligemma",
    "floor1000": "norm999",
}


def box_file(splits: Sequence[RawSplit], options: ImportOptions, format_name: str, limit: int = MAX_BOXES) -> BoxFile:
    """Boxes of raw splits, nothing converted and nothing refused; outlines as their bounding box, points left out."""
    values: list[list[float]] = []
    sides: list[tuple[float, float]] = []
    index: list[int] = []
    place: list[str] = []
    labels: list[str] = []
    unreadable: list[str] = []
    units: set[str | None] = set()
    layout: str | None = None
    images, complete = 0, True
    for split in splits:
        finder = ImageFinder((options.images,) if options.images else split.roots, options.follow_links)
        unreadable += [str(fault) for fault in split.stray]
        for image in split.images:
            if len(values) >= limit:
                complete = False
                break
            if isinstance(image, Unusable):
                if not image.empty:
                    unreadable.append(str(image))
                images += 1
                continue
            size: tuple[float, float] | None = None
            for raw in image.objects:
                if isinstance(raw, Unusable):
                    unreadable.append(str(raw))
                    continue
                box = _box(raw, layout)
                if box is None:
                    unreadable.append(raw.where)
                elif box:
                    layout = layout or _layout(raw)
                    size = size or _side(image, finder)
                    values.append(box)
                    sides.append(size)
                    index.append(images)
                    place.append(raw.where)
                    labels.append(str(raw.name))
                    units.add(raw.units)
            images += 1
    promised = _NAMES[next(iter(units)) or ""] if len(units) == 1 and None not in units else None
    return BoxFile(
        format_name, promised, layout, np.array(values, dtype=np.float64).reshape(-1, 4), np.array(sides, dtype=np.float64).reshape(-1, 2),
        np.array(index, dtype=np.int64), tuple(place), tuple(labels), images, tuple(unreadable), complete,
    )  # fmt: skip


def _layout(raw: RawObject) -> str:
    return "xyxy" if raw.layout in ("xyxy1", "outline") else raw.layout


def _box(raw: RawObject, layout: str | None) -> list[float] | None:
    """Four numbers as written, nothing of a point, None of what is no box."""
    found = [number(value) for value in raw.values] if isinstance(raw.values, list | tuple) else []
    numbers = [value for value in found if value is not None]
    if len(numbers) < len(found) or not numbers:
        return None
    if raw.units == "norm100":
        numbers = [value / 100 for value in numbers]
    if raw.layout == "point":
        return [] if len(numbers) == 2 else None
    if raw.layout == "outline":
        if len(numbers) < 6 or len(numbers) % 2:
            return None
        x1, y1, x2, y2 = bounding_box(numbers)
        width, height = x2 - x1, y2 - y1
        return {"xywh": [x1, y1, width, height], "cxcywh": [x1 + width / 2, y1 + height / 2, width, height], "yxyx": [y1, x1, y2, x2]}.get(
            layout or "", [x1, y1, x2, y2]
        )
    return numbers if len(numbers) == 4 else None


def _side(image: RawImage, finder: ImageFinder) -> tuple[float, float]:
    """Width and height as stated, else from the image's header, else NaN."""
    try:
        width, height = (side(value) for value in image.size)
        if width and height:
            return float(width), float(height)
        if image.content is None:
            found = image_size(finder.find(image.names, image.where).path)
            return float(found[0]), float(found[1])
    except (DataError, ValueError):
        pass  # an import names the image; here its size is unknown
    return float("nan"), float("nan")


def likely_cause(splits: Sequence[RawSplit], options: ImportOptions, source: Path, *, coords: bool) -> str:
    """What the boxes of a source look like, where that is not what they were taken for; else where to look.

    ``coords``: whether the format takes ``--coords``.
    """
    doctor = f"`coordexp doctor --data {source}` looks closer"
    file = box_file(splits, options, "", _SAMPLE)
    if not len(file.values):
        return doctor
    units = file.units or _NAMES[COORDS[options.coords]] if options.coords else file.units
    reading = find_reading(BoxFile(**{**vars(file), "units": units}), few=2)
    found = []
    if reading.units is not None and units is not None and units not in reading.units.split(" or "):
        # Of a few boxes it cannot be told which scale near 1000 it is; norm1000 is the one that models write.
        name = {"pixel": "absolute", "norm1": "norm1"}.get(reading.units, "norm1000")
        found.append(f"the numbers look like {_LOOKS.get(name, UNITS[reading.units])}" + (f" (--coords {name})" if coords else ""))
    promised = file.layout or "xyxy"
    if reading.layout != promised:
        found.append(f"the boxes look like {LAYOUTS[reading.layout]}, not {LAYOUTS[promised]}")
    return f"{' and '.join(found)}; {doctor}" if found else doctor




def verdict(splits: Sequence[RawSplit], job: Job, *, coords: bool) -> str | None:
    """Why an import of these splits would stop, or None; images that are not there cost nothing here, their sizes are left open."""
    for split in splits:
        finder = ImageFinder(split.roots, job.options.follow_links)
        tally = Tally()
        for fault in split.stray:
            tally.lose_object(fault.reason, str(fault))
        for image in split.images:
            if tally.objects >= MAX_BOXES:
                break
            tally.images += 1
            if isinstance(image, Unusable):
                tally.lose_image(image)
                continue
            tally.unlabelled += not image.labelled
            size: tuple[int, int] | None = None
            for raw in image.objects:
                size = size or _whole(_side(image, finder))
                with suppress(Unusable):  # counted
                    tally.judge(raw, size, job.options, _open_units(raw), lambda line: None)
        problem = tally.problem(split.unlabelled, lambda: likely_cause(splits, job.options, job.source, coords=coords))
        if problem:
            return f"split {split.name!r}: {problem}"
    return None


def _whole(size: tuple[float, float]) -> tuple[int, int]:
    return (_OPEN, _OPEN) if size[0] != size[0] else (int(size[0]), int(size[1]))


def _open_units(raw: RawObject | Unusable) -> str | None:
    """What is not known yet is not held against a file."""
    return "absolute" if isinstance(raw, RawObject) and raw.units is None else None
