"""Drawing of objects: outlines, labels and edge curves as plain geometry, for pictures on disk and for the report's SVG alike.

A true object is a solid line on a white rim and has a number; a predicted one is dashed on a black rim and has a letter; a
crowd or a difficult object is dotted. The colour belongs to the description. PIL and NumPy only.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from coordexp.boxes import bounding_box
from coordexp.data.rows import RecordObject

Point = tuple[float, float]
Color = tuple[int, int, int]
Rect = tuple[float, float, float, float]
Line = Literal["solid", "dashed", "dotted"]
WHITE: Final[Color] = (255, 255, 255)
BLACK: Final[Color] = (0, 0, 0)
# Lengths of stroke and gap, in widths of the line.
DASHES: Final[dict[Line, tuple[float, float]]] = {"solid": (1, 0), "dashed": (4, 3), "dotted": (1, 2)}
# Pictures are scaled so that their longer side lies in this range: labels have a readable size whatever the image.
_SIDES: Final = (800, 1600)
_FONT_SIZE: Final = 15
_LONGEST_LABEL: Final = 40
# Cells of an edge curve over the image's side, and the share of its peak under which it is not drawn.
_CELLS: Final = 200
_LEAST_OF_PEAK: Final = 0.06


@dataclass(frozen=True)
class Mark:
    """An object as it is drawn: ``points`` of the outline, ``label`` in ``spot`` (x1, y1, x2, y2), all in pixels of the picture.

    ``tag`` is the number or letter alone. ``ink`` is the colour of the label's text on ``color``, ``rim`` that of the outline's halo.
    """

    points: tuple[Point, ...]
    desc: str
    tag: str
    label: str
    spot: Rect
    color: Color
    line: Line
    predicted: bool

    @property
    def ink(self) -> Color:
        """Black or white, whichever is read better on the colour."""
        return ink(self.color)

    @property
    def rim(self) -> Color:
        """What sets the outline off from the image."""
        return BLACK if self.predicted else WHITE


def outline(geometry: str, values: Sequence[float]) -> list[Point]:
    """The points of a geometry: a box's corners clockwise from the top left, a polygon's vertices, one point."""
    if geometry == "bbox_2d":
        x1, y1, x2, y2 = values
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    return list(zip(values[0::2], values[1::2], strict=False))


def caption(item: RecordObject) -> str:
    """Description, with a word on what is not taught."""
    return f"{item.desc} (crowd)" if item.crowd else f"{item.desc} (difficult)" if item.difficult else item.desc


def class_color(desc: str) -> Color:
    """A colour that depends on the description alone: the same in every picture and every run."""
    code = zlib.crc32(desc.encode("utf-8"))
    red, green, blue = colorsys.hsv_to_rgb((code % 360) / 360, 0.75 + (code >> 9) % 3 * 0.12, 0.8 + (code >> 12) % 3 * 0.1)
    return round(red * 255), round(green * 255), round(blue * 255)


def contrast(a: Color, b: Color) -> float:
    """Contrast ratio of two sRGB colours, 1 to 21 (WCAG 2: ``(L1 + .05) / (L2 + .05)``, L the relative luminance)."""
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: Color) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink(color: Color) -> Color:
    """Black or white, whichever contrasts more; at least 4.5 on any colour."""
    return max((BLACK, WHITE), key=lambda candidate: contrast(candidate, color))


def letters(index: int) -> str:
    """A, B ... Z, AA, AB ..."""
    return (letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def text_size(text: str, size: float) -> tuple[float, float]:
    """Width and height of a label with its padding, for letters of ``size``."""
    return _font(100).getlength(text) * size / 100 + 0.55 * size, 1.35 * size


def make_marks(
    objects: Sequence[RecordObject],
    predicted: Sequence[RecordObject],
    size: tuple[float, float],
    *,
    scale: float,
    font_size: float,
    names: bool,
) -> list[Mark]:
    """True and predicted objects on a picture of ``size`` (width, height), coordinates multiplied by ``scale``.

    Labels are ``tag description`` (with ``names``) or the tag alone, each on a place where no other label is, if there is one: outside
    the object with names, inside without. Where every place is taken, the tag alone is tried, and last the least covered place.
    """
    placed: list[Rect] = []
    marks = []
    for of_prediction, group in ((False, objects), (True, predicted)):
        for i, item in enumerate(group):
            tag = letters(i) if of_prediction else str(i + 1)
            values = [v * scale for v in item.values]
            full = f"{tag} {' '.join(caption(item).split())}"[:_LONGEST_LABEL]
            label, spot = _place((full, tag) if names else (tag,), values, size, font_size, placed, low=of_prediction, inside=not names)
            placed.append(spot)
            line: Line = "dotted" if not item.taught else "dashed" if of_prediction else "solid"
            points = tuple(outline(item.geometry, values))
            marks.append(Mark(points, item.desc, tag, label, spot, class_color(item.desc), line, of_prediction))
    return marks


def _place(
    texts: Sequence[str], values: Sequence[float], size: tuple[float, float], font_size: float, taken: Sequence[Rect],
    *, low: bool, inside: bool,
) -> tuple[str, Rect]:  # fmt: skip
    """A text and its place. ``low``: begin at the bottom right, where true labels do not begin."""
    x1, y1, x2, y2 = bounding_box(values)
    if len(values) == 2:  # beside the dot, not on it
        x1, y1, x2, y2 = x1 - 0.6 * font_size, y1 - 0.6 * font_size, x2 + 0.6 * font_size, y2 + 0.6 * font_size
    found: list[tuple[float, str, Rect]] = []
    for text in texts:
        width, height = text_size(text, font_size)
        rows = [y1, y1 - height, y2 - height, y2] if inside and len(values) > 2 else [y1 - height, y1, y2, y2 - height]
        columns = [x1, x2 - width]
        if low:
            rows, columns = [*rows[2:], *rows[:2]], columns[::-1]
        for x, y in ((x, y) for y in rows for x in columns):
            left, top = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
            spot = (left, top, left + width, top + height)
            covered = sum(_shared(spot, other) for other in taken)
            if covered == 0:
                return text, spot
            found.append((covered, text, spot))
    _, text, spot = min(found, key=lambda entry: entry[0])
    return text, spot


def _shared(a: Rect, b: Rect) -> float:
    """Area that two rectangles share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def edge_curve(
    positions: NDArray[np.float64], probs: NDArray[np.float64], slot: int, box: Sequence[float], size: tuple[float, float], height: float
) -> list[Point]:
    """The distribution of one coordinate as a closed shape that stands outside on an edge of its box.

    ``positions [n]`` in pixels with ``probs [n]``; ``slot`` 0..3 for x1, y1, x2, y2; ``box`` in pixels, not necessarily in order. The
    curves of x1 and x2 stand on the top edge, or hang from the bottom edge where there is more room; those of y1 and y2 on the left or
    right one. Each is scaled to its own peak of ``height`` pixels: its width says how sure the model is. Empty without probability.
    """
    axis = slot % 2
    side = size[axis]
    cells = np.clip((positions / side * _CELLS).astype(np.int64), 0, _CELLS - 1)
    mass = np.bincount(cells, weights=probs, minlength=_CELLS)
    if not mass.max() > 0:
        return []
    share = mass / mass.max()
    shown = np.flatnonzero(share >= _LEAST_OF_PEAK)
    first, last = int(shown[0]), int(shown[-1])
    x1, y1, x2, y2 = bounding_box(box)
    near, far, limit = (y1, y2, size[1]) if axis == 0 else (x1, x2, size[0])
    # Outwards: up or left at the near edge, down or right at the far one.
    base, out = (near, -1.0) if near >= limit - far else (far, 1.0)
    base = min(max(base, 0.0), limit)
    along = [first * side / _CELLS, *((k + 0.5) * side / _CELLS for k in range(first, last + 1)), (last + 1) * side / _CELLS]
    across = [base, *(base + out * height * float(share[k]) for k in range(first, last + 1)), base]
    return list(zip(along, across, strict=True)) if axis == 0 else list(zip(across, along, strict=True))


def paint(image: Image.Image, objects: Sequence[RecordObject], predicted: Sequence[RecordObject] = ()) -> Image.Image:
    """The image, scaled to a readable size, with every object outlined and labelled ``number description``, predictions ``letter ...``."""
    scale = _scale(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    marks = make_marks(objects, predicted, size, scale=scale, font_size=_FONT_SIZE, names=True)
    for mark in marks:
        _trace(draw, mark)
    for mark in marks:
        x1, y1, x2, y2 = mark.spot
        draw.rectangle(mark.spot, fill=mark.color, outline=mark.rim)
        draw.text(((x1 + x2) / 2, (y1 + y2) / 2), mark.label, font=_font(_FONT_SIZE), fill=mark.ink, anchor="mm")
    return picture


def _scale(size: tuple[int, int]) -> float:
    longer = max(size)
    if longer < _SIDES[0]:
        # Whole factors keep pixels square and sharp.
        return max(1, _SIDES[0] // longer)
    return min(1.0, _SIDES[1] / longer)


def _trace(draw: ImageDraw.ImageDraw, mark: Mark) -> None:
    if len(mark.points) == 1:
        x, y = mark.points[0]
        for radius, fill in ((7, mark.rim), (5, mark.color)):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    ends = [*mark.points[1:], mark.points[0]]
    passes: tuple[tuple[int, Color, Line], ...] = ((4, mark.rim, "solid"), (2, mark.color, mark.line))
    for width, fill, line in passes:
        for start, end in zip(mark.points, ends, strict=True):
            for a, b in _strokes(start, end, *(2 * length for length in DASHES[line])):
                draw.line((*a, *b), fill=fill, width=width)


def _strokes(start: Point, end: Point, stroke: float, gap: float) -> list[tuple[Point, Point]]:
    """Pieces of a line; the whole line without a gap. Begins and ends with a stroke, so that corners are closed."""
    length = float(np.hypot(end[0] - start[0], end[1] - start[1]))
    if gap == 0 or length <= stroke:
        return [(start, end)]
    count = max(1, round((length - stroke) / (stroke + gap)))
    step = (length - stroke) / count
    begins = [i * step / length for i in range(count + 1)]
    return [(_between(start, end, t), _between(start, end, t + stroke / length)) for t in begins]


def _between(start: Point, end: Point, t: float) -> Point:
    return start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t
