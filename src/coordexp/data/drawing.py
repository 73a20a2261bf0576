"""Drawing of objects: their outlines, for the report's SVG and for pictures on disk alike. PIL only."""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from coordexp.boxes import bounding_box
from coordexp.data.rows import RecordObject

Point = tuple[float, float]
Color = tuple[int, int, int]
# Pictures are scaled so that their longer side lies in this range: labels have a readable size whatever the image.
_SIDES: Final = (800, 1600)
_FONT_SIZE: Final = 15


def outline(geometry: str, values: Sequence[float]) -> list[Point]:
    """The points of a geometry: a box's corners clockwise from the top left, a polygon's vertices, one point."""
    if geometry == "bbox_2d":
        x1, y1, x2, y2 = values
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    return list(zip(values[0::2], values[1::2], strict=False))


def caption(item: RecordObject) -> str:
    """Description, with a word on crowds."""
    return f"{item.desc} (crowd)" if item.crowd else item.desc


def class_color(desc: str) -> Color:
    """A colour that depends on the description alone: the same in every picture and every run."""
    code = zlib.crc32(desc.encode("utf-8"))
    red, green, blue = colorsys.hsv_to_rgb((code % 360) / 360, 0.75 + (code >> 9) % 3 * 0.12, 0.8 + (code >> 12) % 3 * 0.1)
    return round(red * 255), round(green * 255), round(blue * 255)


def paint(image: Image.Image, objects: Sequence[RecordObject]) -> Image.Image:
    """The image, scaled to a readable size, with every object outlined and labelled ``number description``, counted from 1.

    Labels stand above or below their object, on a free place where there is one; where all are taken, only the number is written.
    """
    scale = _scale(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), _FONT_SIZE)
    for item in objects:
        points = [(x * scale, y * scale) for x, y in outline(item.geometry, item.values)]
        _trace(draw, points, class_color(item.desc), dashed=item.crowd)
    taken: list[tuple[float, float, float, float]] = []
    for number, item in enumerate(objects, start=1):
        _label(draw, font, f"{number} {caption(item)}", [v * scale for v in item.values], class_color(item.desc), size, taken)
    return picture


def _scale(size: tuple[int, int]) -> float:
    longer = max(size)
    if longer < _SIDES[0]:
        # Whole factors keep pixels square and sharp.
        return max(1, _SIDES[0] // longer)
    return min(1.0, _SIDES[1] / longer)


def _trace(draw: ImageDraw.ImageDraw, points: Sequence[Point], color: Color, *, dashed: bool) -> None:
    if len(points) == 1:
        x, y = points[0]
        for radius, fill in ((7, (255, 255, 255)), (5, color)):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    ends = [*points[1:], points[0]]
    for width, fill in ((4, (255, 255, 255)), (2, color)):
        for start, end in zip(points, ends, strict=True):
            for a, b in _dashes(start, end) if dashed else [(start, end)]:
                draw.line((*a, *b), fill=fill, width=width)


def _dashes(start: Point, end: Point) -> list[tuple[Point, Point]]:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    count = max(1, int(length // 16))
    at = [(start[0] + (end[0] - start[0]) * i / (2 * count), start[1] + (end[1] - start[1]) * i / (2 * count)) for i in range(2 * count)]
    return list(zip(at[0::2], at[1::2], strict=True))


def _label(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str, values: Sequence[float], color: Color,
    size: tuple[int, int], taken: list[tuple[float, float, float, float]],
) -> None:  # fmt: skip
    x1, y1, x2, y2 = bounding_box(values)
    if len(values) == 2:  # beside the dot, not on it
        x1, y1, x2, y2 = x1 - 9, y1 - 9, x2 + 9, y2 + 9
    for shown in (" ".join(text.split())[:40], text.split(" ", 1)[0]):
        left, top, right, bottom = font.getbbox(shown)
        width, height = right - left + 8, bottom - top + 6
        places = [(x, y) for y in (y1 - height, y1, y2, y2 - height) for x in (x1, x2 - width)]
        fitted = [(min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))) for x, y in places]
        free = [(x, y) for x, y in fitted if not any(_overlap((x, y, x + width, y + height), other) for other in taken)]
        if free:
            break
    x, y = free[0] if free else fitted[0]
    taken.append((x, y, x + width, y + height))
    draw.rectangle(taken[-1], fill=color, outline=(255, 255, 255))
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    draw.text((x + 4 - left, y + 3 - top), shown, font=font, fill=(0, 0, 0) if dark else (255, 255, 255))


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
