"""Checks of a data file: ``data.units``, ``data.layout``, ``data.boxes``, ``data.grid``, ``data.duplicates``. numpy only."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from coordexp.data.importers.base import COORDS
from coordexp.data.importers.encoding import (
    LAYOUTS,
    MIN_BOXES,
    UNITS,
    BoxFile,
    Reading,
    broken,
    corners,
    duplicates,
    find_reading,
    grids,
    limits,
)  # fmt: skip
from coordexp.data.importers.formats import FORMATS
from coordexp.data.rows import losses_of
from coordexp.doctor.checks import Check
from coordexp.doctor.sources import Source, read_source_of

# How `coordexp data import --coords` calls the units it takes.
_IMPORT: Final = {unit: coords for coords, unit in COORDS.items()}


def check_data(path: Path) -> list[Check]:
    """All checks of the file or folder.

    Raises:
        DataError: a file that cannot be read at all.
    """
    source = read_source_of(path)
    file = source.boxes
    count = len(file.values)
    read = _check_file(source, path)
    names = ("data.units", "data.layout", "data.boxes", "data.grid", "data.duplicates")
    if count < MIN_BOXES:
        return [read, *(Check(name, "skipped", f"{count} boxes, expected at least {MIN_BOXES} to tell") for name in names)]
    reading = find_reading(file)
    units, layout = _check_units(file, reading), _check_layout(file, reading)
    wrong = "fail" in (units.outcome, layout.outcome)
    boxes = Check("data.boxes", "skipped", "the boxes are not what the file promises", "mend that first")
    return [read, units, layout, boxes if wrong else _check_boxes(file, reading), _check_grid(file, reading), _check_duplicates(file)]


def _check_file(source: Source, path: Path) -> Check:
    file, count = source.boxes, len(source.boxes.values)
    seen = f"{FORMATS[file.format].about} ({file.format}): {count} boxes in {file.images} images"
    seen += "" if file.complete else " (the rest of the file is not read)"
    details = {"format": file.format, "boxes": count, "images": file.images, "unreadable": list(file.unreadable[:20])}
    if file.unreadable:
        seen += f"; {len(file.unreadable)} objects or rows that cannot be read, first {file.unreadable[0]}"
    notes = [*source.notes, *losses_of(path)]
    if source.problem:
        return Check("data.file", "fail", f"{seen}; an import would stop: {source.problem}", "mend the source", details)
    if notes:
        return Check("data.file", "warning", f"{seen}; {notes[0]}", "read it; the import says all", details | {"notes": notes})
    if file.unreadable:
        return Check("data.file", "fail" if file.format == "records" else "warning", seen, "give every object four finite numbers", details)
    if not count and file.format != "records":
        return Check("data.file", "warning", seen, "rows need objects with a box, or an answer that holds some", details)
    return Check("data.file", "ok", seen, details=details)


def _check_units(file: BoxFile, reading: Reading) -> Check:
    details = {"units": reading.units, "promised": file.units, "largest": float(file.values.max()), "why": reading.why}
    if reading.units is None:
        advice = "give width and height in the rows, or put the images where the rows say"
        return Check("data.units", "skipped", f"cannot be told: {reading.why}", advice, details)
    seen = f"{UNITS[reading.units]}: {reading.why}"
    if file.units is not None and file.units != reading.units:
        seen = f"expected {UNITS[file.units]}, got {seen}"
        advice = "convert the boxes to pixels of the image file, or import the source again with the convention it has"
        return Check("data.units", "fail", seen, advice, details)
    if file.units is not None:
        return Check("data.units", "ok", seen, details=details)
    if reading.units in _IMPORT:
        return Check("data.units", "ok", seen, f"import with --coords {_IMPORT[reading.units]}", details)
    if reading.units == "norm999 or norm1000":
        return Check("data.units", "warning", seen, "find out which: the one read as the other is off by up to a bin", details)
    return Check("data.units", "warning", seen, "no import reads these units: convert the boxes to pixels first", details)


def _check_layout(file: BoxFile, reading: Reading) -> Check:
    details = {"layout": reading.layout, "promised": file.layout, "broken_share": reading.broken}
    promised = file.layout or "xyxy"
    share = reading.broken[promised]
    square = bool((file.sides[:, 0] == file.sides[:, 1]).all()) or reading.units != "pixel"
    note = " (on square images, or in shares of the side, a swap of x and y cannot be seen)" if square else ""
    if reading.layout == promised:
        return Check("data.layout", "ok", f"{LAYOUTS[promised]}: {share:.1%} of boxes reversed or outside{note}", details=details)
    seen = (
        f"expected {LAYOUTS[promised]}, got {LAYOUTS[reading.layout]}: {share:.0%} of boxes are reversed or outside as the former, "
        f"{reading.broken[reading.layout]:.1%} as the latter"
    )
    return Check("data.layout", "fail", seen, f"write boxes as {LAYOUTS[promised]}", details)


def _check_boxes(file: BoxFile, reading: Reading) -> Check:
    boxes, limit = corners(file.values, reading.layout), limits(file.sides, reading.units)
    reversed_ = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    outside = broken(boxes, limit, reading.units) & ~reversed_
    # Records are strict; other tools round.
    beyond = ((boxes < 0).any(axis=1) | (boxes[:, 2:] > limit).any(axis=1)) & ~reversed_
    bad = reversed_ | (beyond if file.format == "records" else outside)
    details = {"reversed": int(reversed_.sum()), "outside": int(beyond.sum()), "outside_by_over_a_pixel": int(outside.sum())}
    details["boxes"] = len(boxes)
    if not bad.any():
        return Check("data.boxes", "ok", f"all {len(boxes)} boxes have an extent and lie inside their image", details=details)
    first = int(np.flatnonzero(bad)[0])
    numbers = ", ".join(f"{v:g}" for v in file.values[first])
    seen = f"{details['reversed']} boxes reversed or empty, {details['outside']} outside the image; first {file.place[first]}: [{numbers}]"
    if file.format == "records":
        return Check("data.boxes", "fail", seen, "correct or remove them: `coordexp data validate` names each", details)
    return Check("data.boxes", "warning", seen, "`coordexp data import` drops them and says so", details)


def _check_grid(file: BoxFile, reading: Reading) -> Check:
    if reading.units not in ("pixel", "norm1"):
        whole = bool((file.values == np.round(file.values)).all())
        if reading.units is None or not whole:
            return Check("data.grid", "skipped", "no pixels to look for a grid in")
        seen = "whole numbers: boxes were rounded to about 1000 steps a side"
        return Check("data.grid", "warning", seen, "train and evaluate on the source's own pixels where you have them")
    found = grids(file, reading)
    if not found["grids"]:
        return Check("data.grid", "ok", "values are not rounded to a grid of 999, 1000 or 1023 steps a side", details=found)
    names = " and ".join(f"k/{grid}" for grid in found["grids"])
    seen = f"all values lie on {names} of the side: these boxes were quantised before"
    advice = "train and evaluate on the source's own pixels: a quantised truth caps IoU of small objects and hides half a bin of error"
    return Check("data.grid", "warning", seen, advice, found)


def _check_duplicates(file: BoxFile) -> Check:
    again = duplicates(file)
    details = {"duplicates": len(again)}
    if not again:
        return Check("data.duplicates", "ok", "no box stands twice in its image", details=details)
    seen = f"{len(again)} boxes stand in their image before, with the same label; first {file.place[again[0]]}"
    return Check("data.duplicates", "warning", seen, "remove the copies: a model learns to repeat itself from them", details)
