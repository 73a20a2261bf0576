"""Pictures of a report: images as data URIs and boxes as shapes for an SVG laid over them."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image

from coordexp.boxes import bounding_box, iou_matrix
from coordexp.data.drawing import caption, outline
from coordexp.data.records import Record, open_image
from coordexp.errors import DataError
from coordexp.evaluate.predictions import Prediction

MANY_OBJECTS: Final = 6
_SMALL_SIDE: Final = 256
_JPEG_STEPS: Final = ((560, 82), (480, 75), (400, 68), (320, 60))
_LABELS: Final = "ABCDEF"


@dataclass(frozen=True)
class Shape:
    """One geometry in image pixels. ``points`` are SVG points; ``tag`` is its letter or number, empty in a crowd.

    ``tag_x``, ``tag_y`` say where the tag stands and ``anchor`` how it is aligned there.
    """

    kind: str
    points: str
    desc: str
    tag: str
    tag_x: float
    tag_y: float
    anchor: str
    iou: str | None = None


@dataclass(frozen=True)
class Picture:
    """An image with its true and predicted shapes. ``prediction`` says what is odd about the answer, if anything."""

    image_id: str
    source: str
    width: int
    height: int
    pixelated: bool
    true: tuple[Shape, ...]
    predicted: tuple[Shape, ...]
    true_counts: str | None
    predicted_counts: str | None
    prediction: str | None
    font_size: float
    alt: str


def make_pictures(
    records: Sequence[Record], predictions: Mapping[str, Prediction], *, byte_budget: int = 1_300_000
) -> tuple[list[Picture], list[str]]:
    """A picture per record whose image can be opened, and one line for each that cannot.

    ``byte_budget`` bounds all pictures together; large images are scaled down to keep it.
    """
    pictures: list[Picture] = []
    problems: list[str] = []
    for record in records:
        try:
            image = open_image(record)
        except DataError as error:
            # The whole path would name folders of this machine, and the report may travel.
            problems.append(str(error).replace(str(record.image.parent), "").lstrip("/"))
            continue
        pictures.append(_picture(record, image, predictions.get(record.image_id), byte_budget * 3 // 4 // len(records)))
    return pictures, problems


def _picture(record: Record, image: Image.Image, prediction: Prediction | None, limit: int) -> Picture:
    true_objects = [(caption(o), o.geometry, list(o.values)) for o in record.objects]
    truths = [list(o.values) for o in record.objects if o.geometry == "bbox_2d" and not o.crowd]
    predicted_objects = _predicted_objects(prediction)
    font_size = max(record.width, record.height * 0.75) * 0.045
    true = _shapes(true_objects, record, "true", font_size)
    predicted = _shapes(predicted_objects, record, "predicted", font_size, truths)
    return Picture(
        image_id=record.image_id,
        source=encode(image, limit),
        width=record.width,
        height=record.height,
        pixelated=max(record.width, record.height) <= _SMALL_SIDE,
        true=true,
        predicted=predicted,
        true_counts=_counts(true_objects),
        predicted_counts=_counts(predicted_objects),
        prediction=_oddity(prediction),
        font_size=round(font_size, 2),
        alt=f"Image {record.image_id}. True: {_spoken(true_objects)}. Predicted: {_spoken(predicted_objects)}.",
    )


def _oddity(prediction: Prediction | None) -> str | None:
    if prediction is None:
        return "no prediction for this image"
    parts = [prediction.error] if prediction.error else []
    if prediction.truncated:
        parts.append("answer cut off at the token limit")
    reasons = {k: v for k, v in (prediction.problems or {}).items() if v and not (k == "truncated" and prediction.truncated)}
    parts += [f"{reason.replace('_', ' ')} ×{count}" for reason, count in reasons.items()]
    return "; ".join(parts) or None


def _predicted_objects(prediction: Prediction | None) -> list[tuple[str, str, list[float]]]:
    return [] if prediction is None else [(item.desc, item.geometry, list(item.values)) for item in prediction.objects]


def _shapes(
    objects: Sequence[tuple[str, str, list[float]]], record: Record, side: str, font_size: float, truths: Sequence[list[float]] = ()
) -> tuple[Shape, ...]:
    shapes = []
    for i, (desc, geometry, values) in enumerate(objects):
        x1, y1, x2, y2 = bounding_box(values)
        crowd = len(objects) > MANY_OBJECTS
        tag = "" if crowd else str(i + 1) if side == "true" else _LABELS[i]
        iou = None
        if geometry == "bbox_2d" and truths:
            iou = f"{float(iou_matrix([values], list(truths)).max()):.2f}"
        kind = "point" if geometry == "point_2d" else "polygon"
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in outline(geometry, values))
        # True tags stand inside at the top left, predicted ones at the bottom right, so that they do not collide.
        pad = font_size * 0.3
        if side == "true":
            at, anchor = (max(x1, 0) + pad, max(y1, 0) + font_size), "start"
        else:
            at, anchor = (min(x2, record.width) - pad, min(y2, record.height) - pad), "end"
        shapes.append(Shape(kind, points, desc, tag, round(at[0], 2), round(at[1], 2), anchor, iou))
    return tuple(shapes)


def _counts(objects: Sequence[tuple[str, str, list[float]]]) -> str | None:
    """Descriptions with their counts where a list of every object would be too long."""
    if len(objects) <= MANY_OBJECTS:
        return None
    return ", ".join(f"{desc} ×{count}" for desc, count in Counter(o[0] for o in objects).most_common(6))


def _spoken(objects: Sequence[tuple[str, str, list[float]]]) -> str:
    if not objects:
        return "nothing"
    return ", ".join(f"{count} {desc}" for desc, count in Counter(o[0] for o in objects).most_common(6))


def encode(image: Image.Image, limit: int) -> str:
    """Data URI of an image in at most ``limit`` bytes where scaling down to 320 pixels allows it.

    Small images stay pixel for pixel (PNG) if they fit; others become JPEG.
    """
    if max(image.size) <= _SMALL_SIDE:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= limit:
            return _uri("png", buffer)
    for side, quality in _JPEG_STEPS:
        scaled = image.copy()
        scaled.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        scaled.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= limit:
            break
    return _uri("jpeg", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
