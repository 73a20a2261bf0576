"""What the numbers of a file of boxes are: units, layout, axes, grid. numpy only.

Every test asks for evidence that sound data cannot show: reversed or outside boxes under one reading that are all in order
under another. Where two readings fit alike, that is what is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LAYOUTS: Final[dict[str, str]] = {
    "xyxy": "[x1, y1, x2, y2]",
    "xywh": "[x, y, width, height]",
    "yxyx": "[y1, x1, y2, x2] (x and y swapped)",
    "cxcywh": "[centre x, centre y, width, height]",
}
UNITS: Final[dict[str, str]] = {
    "pixel": "pixels",
    "norm1": "0..1 of each side",
    "norm999": "0..999 of each side (norm999, or floor1000)",
    "norm1000": "0..1000 of each side (norm1000)",
    "norm999 or norm1000": "0..999 or 0..1000 of each side (no box touches the border: both fit)",
    "paligemma": "0..1023 of each side (paligemma)",
}
GRIDS: Final = (999, 1000, 1023)
MIN_BOXES: Final = 20
# Shares and counts of broken boxes from which a reading is given up, and how much better the other must be.
_BROKEN: Final = 0.05
_BROKEN_AXES: Final = 0.02
_FEW: Final = 5
_BETTER: Final = 0.1
# 2^-17 < 1e-5: values just below 1000 with none just above, where both are equally likely.
_CEILING: Final = 17
_LOG_CLEAR: Final = -30.0
_SIDES: Final = 200
_SAMPLE: Final = 2000


@dataclass(frozen=True)
class BoxFile:
    """``values [N, 4]`` as written, ``sides [N, 2]`` (width, height in pixels; NaN where unknown), ``image [N]``.

    ``format`` by name; ``units`` (a key of UNITS) and ``layout`` are what it promises (None: nothing). ``place`` and ``label`` by box.
    ``unreadable``: places of what looks like an object and is none.
    """

    format: str
    units: str | None
    layout: str | None
    values: Floats
    sides: Floats
    image: NDArray[np.int64]
    place: tuple[str, ...]
    label: tuple[str, ...]
    images: int
    unreadable: tuple[str, ...]
    complete: bool


@dataclass(frozen=True)
class Reading:
    """``units`` (a key of UNITS, or None: cannot be told) and ``layout`` of a file, and the broken share under every layout."""

    units: str | None
    layout: str
    broken: dict[str, float]
    why: str


def corners(values: Floats, layout: str) -> Floats:
    """Boxes ``[N, 4]`` of a layout as xyxy, in the same units."""
    if layout == "xywh":
        return np.concatenate([values[:, :2], values[:, :2] + values[:, 2:]], axis=1)
    if layout == "cxcywh":
        return np.concatenate([values[:, :2] - values[:, 2:] / 2, values[:, :2] + values[:, 2:] / 2], axis=1)
    return values[:, [1, 0, 3, 2]] if layout == "yxyx" else values


def limits(sides: Floats, units: str | None) -> Floats:
    """Largest value ``[N, 2]`` of x and y; infinite where it cannot be told."""
    if units == "pixel":
        return np.where(np.isnan(sides), np.inf, sides)
    top = {"norm1": 1.0, "norm999": 999.0, "paligemma": 1023.0, None: np.inf}.get(units, 1000.0)
    return np.full_like(sides, top)


def broken(boxes: Floats, limit: Floats, units: str | None) -> NDArray[np.bool_]:
    """Which xyxy boxes are reversed, empty or outside; a pixel (or rounding) beyond the border is let pass."""
    slack = 1.0 if units == "pixel" else 1e-6
    low, high = boxes[:, :2], boxes[:, 2:]
    return np.asarray(((high <= low) | (low < -slack) | (high > limit + slack)).any(axis=1))


def _shares(values: Floats, sides: Floats, units: str | None) -> dict[str, float]:
    limit = limits(sides, units)
    return {layout: float(broken(corners(values, layout), limit, units).mean()) for layout in LAYOUTS}


def find_reading(file: BoxFile, *, few: int = _FEW) -> Reading:
    """Units and layout that the numbers themselves show; the promised ones (else xyxy) where they show nothing else.

    ``few``: how many boxes must be broken at least.
    """
    values, sides = file.values, file.sides
    promised = file.layout or "xyxy"
    units, why = _find_units(values, sides, file.units, promised)
    shares = _shares(values, sides, units)
    layout = promised
    own = shares[promised]
    for other in sorted((name for name in LAYOUTS if name != promised), key=shares.__getitem__):
        least = _BROKEN_AXES if other == "yxyx" else _BROKEN
        if own >= least and own * len(values) >= few and shares[other] <= own * _BETTER and shares[other] < 0.01:
            layout = other
            break
    return Reading(units, layout, shares, why)


def _find_units(values: Floats, sides: Floats, promised: str | None, layout: str) -> tuple[str | None, str]:
    top, whole = float(values.max()), bool((values == np.round(values)).all())
    if top <= 1 + 1e-6 and not whole:
        return "norm1", "no value above 1"
    if np.isnan(sides).any():
        if top > 1023:
            return "pixel", f"values up to {top:g}"
        return None, "the sizes of the images are not known"
    pixel, thousand = (_shares(values, sides, units) for units in ("pixel", "paligemma"))
    for name in sorted(LAYOUTS, key=lambda name: (name != layout, thousand[name])):
        ceiling = _ceiling(corners(values, name), sides) if thousand[name] < 0.01 else None
        if ceiling is not None:
            return _thousand(values, layout, thousand), ceiling
    # Far outside, under every layout: an annotation that leaves the image by a little is not enough.
    far = min(
        float((corners(values, name)[:, 2:] > 1.1 * sides).any(axis=1).mean())
        for name in LAYOUTS
        if pixel[name] < min(pixel.values()) + 0.02
    )
    if min(pixel.values()) >= _BROKEN and far >= 0.02 and top >= 850 and min(thousand.values()) < 0.01:
        share = pixel[layout]
        return _thousand(values, layout, thousand), f"{share:.0%} of boxes would be broken in pixels, no value is above {top:g}"
    return "pixel", "they fit the images' sizes" if pixel[layout] < 0.01 else f"values up to {top:g}"


def _ceiling(boxes: Floats, sides: Floats) -> str | None:
    """Evidence of numbers that stop at 1000 or 1023 on larger images."""
    near = boxes[np.concatenate([sides, sides], axis=1) >= 1150]
    for top in (1000, 1023):
        below = int(((near > top - 100) & (near <= top)).sum())
        if below >= _CEILING and near.max() <= top:
            return f"{below} values in {top - 100}..{top} and none above, on sides of 1150 pixels and more"
    return None


def _thousand(values: Floats, layout: str, shares: dict[str, float]) -> str:
    """Which of the scales near 1000."""
    if shares[layout] >= _BROKEN:
        layout = min(shares, key=shares.__getitem__)
    high = corners(values, layout)[:, 2:]
    top = float(high.max())
    if top > 1000:
        return "paligemma"
    if top == 1000:
        return "norm1000"
    # Boxes that touch the border say where the scale ends: one could be chance.
    return "norm999" if int((high == 999).sum()) >= 3 else "norm999 or norm1000"


def grids(file: BoxFile, reading: Reading) -> dict[str, Any]:
    """Which of the grids k/999, k/1000, k/1023 of the side all values lie on, and how unlikely that is by chance.

    A value written with d decimals lies on a grid if it is within ``10^-d / 2`` of a multiple of ``side / grid``. How many of all
    values that could be written on that side do so is counted, not assumed: of whole pixels on a side of 1500 all lie
    on k/1000. Values on the border are left out. ``{grids: [..], values: n, log_chance: {grid: sum of logs}}``.
    """
    boxes = corners(file.values, reading.layout)
    unit = limits(file.sides, reading.units)
    side = np.concatenate([unit, unit], axis=1)
    usable = np.isfinite(side) & (boxes > 0) & (boxes < side)
    x, side = boxes[usable], side[usable]
    written = 10.0 ** -_decimals(x)
    result: dict[str, Any] = {"grids": [], "values": int(x.size), "log_chance": {}}
    known, index, count = np.unique(side, return_inverse=True, return_counts=True)
    # The commonest sides say enough.
    chosen = np.sort(np.argsort(-count, kind="stable")[:_SIDES])
    kept = np.isin(index, chosen)
    for grid in GRIDS:
        on = _on_grid(x, side, grid, written)
        logs = sum(float(count[i] * np.log(_chance(float(known[i]), grid, written))) for i in chosen)
        if x.size and on[kept].mean() >= 0.995 and logs < _LOG_CLEAR:
            result["grids"].append(grid)
            result["log_chance"][str(grid)] = logs
    return result


def _on_grid(x: NDArray[Any], side: Floats | float, grid: int, written: float) -> NDArray[np.bool_]:
    step = side / np.float64(grid)
    return np.asarray(np.abs(x - np.round(x / step) * step) <= 0.5 * written * (1 + 1e-6) + 1e-9 * side)


def _chance(side: float, grid: int, written: float) -> float:
    """Share of the values with that step between 0 and ``side`` that lie on the grid; counted on a sample where there are many."""
    number = int(side / written)
    ticks = np.arange(1, number) if number <= _SAMPLE else np.random.default_rng(0).integers(1, number, _SAMPLE)
    hits = int(_on_grid(ticks * written, side, grid, written).sum())
    return min(1.0, (hits + 1) / (len(ticks) + 1))


def _decimals(values: Floats) -> int:
    """Decimals that all values are written with, at most 12."""
    for decimals in range(12):
        if (np.abs(values - np.round(values, decimals)) <= 1e-9 * np.maximum(np.abs(values), 1)).all():
            return decimals
    return 12


def duplicates(file: BoxFile) -> list[int]:
    """Boxes that stand in their image before, with the same numbers and label."""
    seen: set[tuple[Any, ...]] = set()
    again = []
    for i, (image, label, values) in enumerate(zip(file.image.tolist(), file.label, file.values.tolist(), strict=True)):
        key = (image, label, *values)
        if key in seen:
            again.append(i)
        seen.add(key)
    return again
