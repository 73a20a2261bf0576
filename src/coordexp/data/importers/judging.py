"""Single items judged: a raw object becomes an object of a record, or is Unusable for one stated reason.

What is unambiguous is read: ``"640"`` and ``640.0`` are 640, ``"1"`` is a true flag, the name 7 is ``"7"``. Nothing else is repaired.
An edge at most one pixel outside the image is a rounding of the source and is moved onto the border; what reaches further is
left out, or cut at the border with ``--clip``. Both are listed as repaired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from coordexp.boxes import bounding_box
from coordexp.data.importers.base import COORDS, UNITS, ImportOptions, Layout, RawObject, Unusable, brief
from coordexp.data.rows import geometry_problem
from coordexp.errors import ConfigError
from coordexp.grammar import Geometry

# An edge this far outside is a rounding of the source.
TOLERANCE_PX: Final = 1.0
_FLAGS: Final = {"": False, "0": False, "false": False, "no": False, "none": False, "1": True, "true": True, "yes": True}


def number(value: Any) -> float | None:
    """A finite number, as such or as text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    # The comparison is false for NaN and exact for integers beyond the range of a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def side(value: Any) -> int | None:
    """A stated width or height in pixels: whole numbers, as such or as text; 0, nothing and null say nothing.

    Raises:
        ValueError: anything else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    found = number(value)
    if found is None or found < 0 or not found.is_integer():
        raise ValueError
    return int(found) or None


def flag(value: Any, what: str, where: str) -> bool:
    """A stated yes or no.

    Raises:
        Unusable: neither.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    found = number(value)
    text = str(int(found)) if found is not None and found.is_integer() else str(value).strip().lower()
    if text not in _FLAGS:
        raise Unusable(f"{what} unclear", f"{where}: {what}: expected 0 or 1, got {brief(value)}")
    return _FLAGS[text]


def label(value: Any, where: str, default: str | None = None) -> str:
    """A description: text or a number, else ``default``.

    Raises:
        Unusable: none of them.
    """
    if not isinstance(value, str) and number(value) is not None:
        value = str(int(value)) if float(value).is_integer() else str(value)
    text = value.strip() if isinstance(value, str) else ""
    if not text and (value is None or value == "") and default is not None:
        return default
    if not text or any("\ud800" <= c <= "\udfff" for c in text):
        got = "none: give one for all that have none with --name" if value is None or value == "" else repr(brief(value))
        raise Unusable("no name", f"{where}: expected a name, got {got}")
    return text


def units_of(raw: RawObject, coords: str | None) -> str:
    """The unit of an object's numbers: what the source says, else what the user said, which may not contradict each other.

    Raises:
        ConfigError: nobody said.
        Unusable: a contradiction.
    """
    if raw.units is None and coords is None:
        raise ConfigError(f"--coords: expected one of {', '.join(COORDS)}, got none: {raw.where} does not say what its numbers are")
    user = None if coords is None else COORDS[coords]
    if raw.units is not None and user is not None and raw.units != user:
        raise Unusable("units contradict", f"{raw.where}: expected {coords} coordinates, as --coords says, got a row that says {raw.units}")
    return raw.units or str(user)


def judge(
    raw: RawObject, size: tuple[int, int], options: ImportOptions, repaired: Callable[[str], None], *, coords: str | None = None
) -> dict[str, Any]:
    """The object of a record, in pixel edges of an image of ``size`` (width, height).

    Raises:
        ConfigError: see :func:`units_of`.
        Unusable: it cannot be used.
    """
    where = raw.where
    made: dict[str, Any] = {"desc": label(raw.name, where, options.name)}
    geometry, values = pixels_of(raw, size, units_of(raw, coords), repaired)
    made[geometry] = _inside(geometry, values, size, where, options, repaired)
    area = number(raw.area)
    if area is not None and area > 0:
        made["area"] = area
    if raw.crowd and flag(raw.crowd, "iscrowd", where):
        if geometry == "point_2d":
            raise Unusable("crowd without extent", f"{where}: iscrowd: expected a crowd to cover a region, got a point")
        made["iscrowd"] = True
    if raw.difficult and flag(raw.difficult, "difficult", where):
        made["difficult"] = True
    return made


def pixels_of(raw: RawObject, size: tuple[int, int], units: str, repaired: Callable[[str], None]) -> tuple[Geometry, list[float]]:
    """Geometry and pixel values of an object whose numbers are of ``units``; they may lie outside the image.

    Raises:
        Unusable: no numbers, not as many as they should be, or a box that is reversed or empty.
    """
    values = raw.values
    if not isinstance(values, list | tuple):
        raise Unusable("not numbers", f"{raw.where}: expected a list of numbers, got {brief(values)}")
    numbers: list[float] = []
    for value in values:
        found = value if type(value) is float and abs(value) < 1e300 else number(value)
        if found is None:
            raise Unusable("not numbers", f"{raw.where}: expected finite numbers, got {brief(list(values), 120)}")
        numbers.append(found)
    if raw.layout == "xywh" and str in map(type, values):
        repaired(f"{raw.where}: numbers in quotes read as numbers: {brief(list(values))}")
    _check_count(raw.layout, numbers, raw.where)
    scale = UNITS[units]
    if scale is not None:
        shift, whole = scale
        if raw.layout in ("xywh", "cxcywh"):
            shift = 0.0
        flip = raw.layout == "yxyx"
        numbers = [(value + shift) * size[(i + flip) % 2] / whole for i, value in enumerate(numbers)]
    return _arrange(raw.layout, numbers, raw.where)


def _check_count(layout: Layout, numbers: Sequence[float], where: str) -> None:
    if layout == "point" and len(numbers) != 2:
        raise Unusable("wrong count of numbers", f"{where}: expected a point [x, y], got {len(numbers)} numbers")
    if layout == "outline" and (len(numbers) < 6 or len(numbers) % 2):
        raise Unusable("wrong count of numbers", f"{where}: expected at least 3 points, got {len(numbers)} numbers")
    if layout not in ("point", "outline") and len(numbers) != 4:
        raise Unusable("wrong count of numbers", f"{where}: expected 4 numbers, got {len(numbers)}")


def _arrange(layout: Layout, v: list[float], where: str) -> tuple[Geometry, list[float]]:
    if layout == "point":
        return "point_2d", v
    if layout == "outline":
        return "poly", v
    if layout == "xywh":
        box = [v[0], v[1], v[0] + v[2], v[1] + v[3]]
    elif layout == "cxcywh":
        box = [v[0] - v[2] / 2, v[1] - v[3] / 2, v[0] + v[2] / 2, v[1] + v[3] / 2]
    else:
        box = [v[1], v[0], v[3], v[2]] if layout == "yxyx" else v
    if box[2] <= box[0] or box[3] <= box[1]:
        raise Unusable("reversed or empty", f"{where}: expected a box that extends in x and in y, got {short(box)}")
    # Of a pixel that is counted from 1 the near edge is one lower, the far edge is its number.
    return "bbox_2d", [box[0] - 1, box[1] - 1, box[2], box[3]] if layout == "xyxy1" else box


def _inside(
    geometry: Geometry, values: list[float], size: tuple[int, int], where: str, options: ImportOptions, repaired: Callable[[str], None]
) -> list[float]:
    if geometry == "bbox_2d" and 0 <= values[0] < values[2] <= size[0] and 0 <= values[1] < values[3] <= size[1]:
        return [int(v) if v.is_integer() else v for v in values]
    inside = [min(max(v, 0.0), float(size[i % 2])) for i, v in enumerate(values)]
    if inside != values and geometry_problem(geometry, inside, *size) is None:
        far = max(abs(a - b) for a, b in zip(values, inside, strict=True))
        if far <= TOLERANCE_PX or options.clip:
            how = "moved onto the border" if far <= TOLERANCE_PX else "cut at the border"
            repaired(f"{where}: {geometry}: {how} of the {size[0]}x{size[1]} image, was {short(values)}")
            values = inside
    problem = geometry_problem(geometry, values, *size)
    if problem:
        outside = inside != values
        hint = " (--clip cuts at the border)" if outside and not options.clip else ""
        raise Unusable("outside the image" if outside else "reversed or empty", f"{where}: {problem}{hint}")
    return [int(v) if v.is_integer() else v for v in values]


def short(values: Sequence[float]) -> str:
    """Numbers for a message; of an outline its box."""
    box = values if len(values) <= 4 else [*bounding_box(values)]
    shown = ", ".join(f"{v:g}" if math.isfinite(v) else str(v) for v in box)
    return f"[{shown}]" if len(values) <= 4 else f"{len(values) // 2} points within [{shown}]"


def require_coords(options: ImportOptions, what: str) -> None:
    """The user must have said what numbers are.

    Raises:
        ConfigError: nobody said.
    """
    if options.coords is None:
        raise ConfigError(f"--coords: expected one of {', '.join(COORDS)}, got none: {what} does not say what its numbers are")
