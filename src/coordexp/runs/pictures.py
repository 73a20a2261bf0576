"""Pictures of a report: images as data URIs and marks for an SVG laid over them."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from coordexp.boxes import iou_matrix
from coordexp.codec import CoordCodec
from coordexp.data.answers import PHRASE
from coordexp.data.drawing import DASHES, Color, Mark, Point, caption, class_color, edge_curve, ink, make_marks
from coordexp.data.records import Record, open_image
from coordexp.data.rows import RecordObject
from coordexp.errors import DataError
from coordexp.evaluate.distributions import SavedDistributions
from coordexp.evaluate.predictions import Prediction

MANY_OBJECTS: Final = 6
_SMALL_SIDE: Final = 256
_JPEG_STEPS: Final = ((560, 82), (480, 75), (400, 68), (320, 60))
# Shares of the image's longer side, at the size that the report shows it.
_FONT: Final = 0.042
_CURVE: Final = 0.06


@dataclass(frozen=True)
class Named:
    """An object in the list under a picture. ``iou``: of a predicted box, its highest with a true one, as text."""

    tag: str
    desc: str
    color: Color
    iou: str | None = None

    @property
    def background(self) -> str:
        """Of its tag."""
        return css(self.color)

    @property
    def ink(self) -> str:
        """Of the tag's letter."""
        return css(ink(self.color))


@dataclass(frozen=True)
class Overlay:
    """A mark as SVG: ``points`` of the outline; ``tag`` in the box ``x, y, width, height`` (None: in a crowd there are no tags)."""

    kind: str
    points: str
    color: str
    ink: str
    side: str
    line: str
    dashes: str | None
    tag: str
    spot: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Curve:
    """The distribution of one edge: ``points`` of a polygon."""

    points: str
    color: str


@dataclass(frozen=True)
class Picture:
    """An image with its true and predicted objects. ``prediction`` says what is odd about the answer, if anything; ``phrase`` is
    what was asked for, of a record with one.

    ``true_counts``, ``predicted_counts``: most frequent names with their number as the tag, where there are too many objects to list.
    """

    image_id: str
    source: str
    width: int
    height: int
    pixelated: bool
    overlays: tuple[Overlay, ...]
    curves: tuple[Curve, ...]
    true: tuple[Named, ...]
    predicted: tuple[Named, ...]
    true_counts: tuple[Named, ...]
    predicted_counts: tuple[Named, ...]
    crowded: bool
    prediction: str | None
    phrase: str | None
    font_size: float
    alt: str


def make_pictures(
    records: Sequence[Record],
    predictions: Mapping[str, Prediction],
    distributions: Mapping[str, SavedDistributions] | None = None,
    codec: CoordCodec | None = None,
    *,
    byte_budget: int = 1_300_000,
) -> tuple[list[Picture], list[str]]:
    """A picture per record whose image can be opened, and one line for each that cannot.

    ``distributions`` are drawn at the edges of the predicted boxes, their bins read by ``codec``. ``byte_budget`` bounds all pictures
    together; large images are scaled down to keep it.
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
        saved = (distributions or {}).get(record.image_id)
        limit = byte_budget * 3 // 4 // len(records)
        pictures.append(_picture(record, image, predictions.get(record.image_id), saved, codec or CoordCodec(), limit))
    return pictures, problems


def _picture(
    record: Record, image: Image.Image, prediction: Prediction | None, saved: SavedDistributions | None, codec: CoordCodec, limit: int
) -> Picture:  # fmt: skip
    predicted = _predicted_objects(prediction)
    truths = [list(o.values) for o in record.objects if o.geometry == "bbox_2d" and not o.crowd]
    font_size = max(record.width, record.height) * _FONT
    size = (float(record.width), float(record.height))
    marks = make_marks(record.objects, predicted, size, scale=1, font_size=font_size, names=False)
    crowded = {False: len(record.objects) > MANY_OBJECTS, True: len(predicted) > MANY_OBJECTS}
    few = not crowded[True] and codec.num_bins == (saved.num_bins if saved else None)
    return Picture(
        image_id=record.image_id,
        source=encode(image, limit),
        width=record.width,
        height=record.height,
        pixelated=max(image.size) <= _SMALL_SIDE,
        overlays=tuple(_overlay(mark, tagged=not crowded[mark.predicted]) for mark in marks),
        curves=tuple(_curves(predicted, saved, codec, size)) if few and saved is not None else (),
        true=tuple(Named(str(i + 1), caption(o), class_color(o.desc)) for i, o in enumerate(record.objects)),
        predicted=tuple(_named(mark, item, truths) for mark, item in zip(marks[len(record.objects) :], predicted, strict=True)),
        true_counts=_counts([o.desc for o in record.objects]),
        predicted_counts=_counts([o.desc for o in predicted]),
        crowded=any(crowded.values()),
        prediction=_oddity(prediction),
        phrase=str(record.metadata[PHRASE]) if PHRASE in record.metadata else None,
        font_size=round(font_size, 2),
        alt=(
            f"Image {record.image_id}. True: {_spoken([caption(o) for o in record.objects])}. "
            f"Predicted: {_spoken([o.desc for o in predicted])}."
        ),
    )


def _predicted_objects(prediction: Prediction | None) -> list[RecordObject]:
    if prediction is None:
        return []
    return [RecordObject(item.desc, item.geometry, tuple(item.values)) for item in prediction.objects]


def _overlay(mark: Mark, *, tagged: bool) -> Overlay:
    x1, y1, x2, y2 = mark.spot
    stroke, gap = DASHES[mark.line]
    return Overlay(
        kind="point" if len(mark.points) == 1 else "polygon",
        points=_svg(mark.points),
        color=css(mark.color),
        ink=css(mark.ink),
        side="predicted" if mark.predicted else "true",
        line=mark.line,
        dashes=f"{2 * stroke:g} {2 * gap:g}" if gap else None,
        tag=mark.tag,
        spot=(round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)) if tagged else None,
    )


def _named(mark: Mark, item: RecordObject, truths: Sequence[list[float]]) -> Named:
    iou = None
    if item.geometry == "bbox_2d" and truths:
        iou = f"{float(iou_matrix([item.values], list(truths)).max()):.2f}"
    return Named(mark.tag, item.desc, mark.color, iou)


def _curves(predicted: Sequence[RecordObject], saved: SavedDistributions, codec: CoordCodec, size: tuple[float, float]) -> list[Curve]:
    """Of every box that has its four distributions."""
    found = []
    for (item, slot), row in sorted(saved.rows.items()):
        if item >= len(predicted) or predicted[item].geometry != "bbox_2d":
            continue
        positions = np.asarray(codec.to_pixel(row.bins, size[slot % 2]))
        points = edge_curve(positions, row.probs, slot, predicted[item].values, size, max(size) * _CURVE)
        if points:
            found.append(Curve(_svg(points), css(class_color(predicted[item].desc))))
    return found


def css(color: Color) -> str:
    """A colour for CSS and SVG."""
    return "#" + "".join(f"{value:02x}" for value in color)


def _svg(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _oddity(prediction: Prediction | None) -> str | None:
    if prediction is None:
        return "no prediction for this image"
    parts = [prediction.error] if prediction.error else []
    if prediction.truncated:
        parts.append("answer cut off at the token limit")
    reasons = {k: v for k, v in (prediction.problems or {}).items() if v and not (k == "truncated" and prediction.truncated)}
    parts += [f"{reason.replace('_', ' ')} ×{count}" for reason, count in reasons.items()]
    return "; ".join(parts) or None


def _counts(names: Sequence[str]) -> tuple[Named, ...]:
    """The most frequent descriptions with their counts where a list of every object would be too long."""
    if len(names) <= MANY_OBJECTS:
        return ()
    return tuple(Named(str(count), desc, class_color(desc)) for desc, count in Counter(names).most_common(6))


def _spoken(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(f"{count} {desc}" for desc, count in Counter(names).most_common(6))


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
