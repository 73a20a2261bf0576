"""What the numbers of a file mean: pixels, bins or shares of the side; corners, or a corner and a size. numpy only.

Every reading gives a box a density. Of a box that lies inside the image it is uniform: ``4 / (X^2 Y^2)`` with X and Y the
largest coordinates the reading allows (for corners ``x1 < x2`` and for sizes ``x + w <= X`` the allowed part of the square is one
half alike). A box that does not is an outlier, of share ``OUTLIERS``, uniform over ten times the largest number. So
a reading loses by boxes that it cannot hold *and* by room that no box uses: pixels of 4K pictures that never exceed 999 are bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordexp.doctor.annotations import Boxes
from coordexp.doctor.base import Check

FloatArray = NDArray[np.float64]

OUTLIERS: Final = 0.01
SURE: Final = 10.0  # nats: odds of 22,000 to 1
REACH, MANY = 0.8, 100  # of so many boxes one comes nearer to the far edge than this share of the side
TOLERANCE: Final = 1.0  # pixels: other tools count the last pixel or the edge after it

# Largest coordinate by scale; None: the side of the image. Bins are whole numbers.
SCALES: Final[dict[str, float | None]] = {
    "pixels": None, "0..1": 1.0, "0..999": 999.0, "0..1000": 1000.0, "0..1023": 1023.0,
}  # fmt: skip
LAYOUTS: Final = ("xyxy", "xywh", "cxcywh", "yxyx")
_MEANING: Final = {
    "pixels": "pixels",
    "0..1": "shares of the side",
    "0..999": "bins 0..999 (norm999 or floor1000)",
    "0..1000": "bins 0..1000 (norm1000)",
    "0..1023": "bins 0..1023 (paligemma, which writes y before x)",
}
_ADVICE: Final = {
    "pixels": "they are pixels",
    "0..1": "multiply x by the width and y by the height",
    "0..999": "pixel = number / 999 * side (norm999; floor1000: number / 1000 * side)",
    "0..1000": "import with `coordexp data import swift|qwen --coords norm1000`, or pixel = number / 1000 * side",
    "0..1023": "pixel = number / 1023 * side",
}
_LAYOUT_ADVICE: Final = {
    "xyxy": "",
    "xywh": "[x, y, width, height] becomes [x, y, x + width, y + height]",
    "cxcywh": "[centre x, centre y, width, height] becomes [x - width/2, y - height/2, x + width/2, y + height/2]",
    "yxyx": "[y1, x1, y2, x2] becomes [x1, y1, x2, y2]",
}


@dataclass(frozen=True)
class Reading:
    """``misfits``: share of boxes that it cannot hold; ``score``: log-likelihood in nats."""

    scale: str
    layout: str
    misfits: float
    score: float

    @property
    def name(self) -> str:
        """For a person."""
        return f"{_MEANING[self.scale]}, {self.layout}"


def readings(boxes: Boxes) -> list[Reading]:
    """Every reading, the most likely first. Pixels take part where all sizes are known."""
    outlier = -4 * np.log(10 * max(1.0, float(np.abs(boxes.values).max())))
    found = []
    for scale, most in SCALES.items():
        if most is None and not boxes.known:
            continue
        bounds = boxes.sizes if most is None else np.full((len(boxes.values), 2), most)
        whole = np.ones(len(boxes.values), dtype=bool) if most in (None, 1.0) else (boxes.values % 1 == 0).all(axis=1)
        for layout in LAYOUTS:
            # A tool that counts the far edge as a pixel may be one over; bins have a hard end, but for centres that were rounded.
            slack = TOLERANCE if most is None else 0.5 if layout == "cxcywh" and most > 1 else 1e-6
            inside = whole & _inside(boxes.values, bounds, layout, slack)
            # ``+ 1`` for whole numbers: a bin or a pixel counts, not the space between two.
            room = bounds + (0 if most == 1.0 else 1)
            density = np.log(1 - OUTLIERS) + np.log(4.0) - 2 * np.log(room).sum(axis=1)
            score = np.where(inside, np.logaddexp(density, np.log(OUTLIERS) + outlier), np.log(OUTLIERS) + outlier)
            found.append(Reading(scale, layout, float(1 - inside.mean()), float(score.sum())))
    # Stable: of equals the earlier scale and layout come first.
    return sorted(found, key=lambda reading: -reading.score)


def _inside(values: FloatArray, bounds: FloatArray, layout: str, slack: float) -> NDArray[np.bool_]:
    a, b, c, d = values.T
    width, height = bounds.T
    if layout == "yxyx":
        a, b, c, d = b, a, d, c
    elif layout == "xywh":
        c, d = a + c, b + d
    elif layout == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    inside: NDArray[np.bool_] = (
        (c > a) & (d > b) & (a >= -slack) & (b >= -slack) & (c <= width + slack) & (d <= height + slack)
    )  # fmt: skip
    return inside


def check_file(boxes: Boxes, *, name: str) -> Check:
    """What was read."""
    sizes = "image sizes known" if boxes.known else "image sizes unknown for some or all"
    return Check("D01", "boxes", "ok", f"{name}: {len(boxes.values)} boxes in {boxes.rows} rows, {sizes}", "", {"boxes": len(boxes.values)})


def check_convention(boxes: Boxes, *, name: str) -> Check:
    """Are the numbers of a file pixel corners, as records and predictions hold them?

    ``fail``: pixel corners cannot hold more than 1 % of the boxes and another reading is likelier by ``SURE`` nats, or
    the numbers are shares. ``warning``: they can, but another reading is likelier by as much, no box comes near a far edge, or
    image sizes are unknown.
    """
    ranked = readings(boxes)
    best = ranked[0]
    # In bins and shares the order of axes leaves no trace: that twin says nothing.
    twin = (best.scale, "yxyx") if best.scale != "pixels" else None
    alike = [r.name for r in ranked[1:] if best.score - r.score < SURE / 2 and (r.scale, r.layout) != twin]
    expected = next((reading for reading in ranked if (reading.scale, reading.layout) == ("pixels", "xyxy")), None)
    values = {
        "best": {"scale": best.scale, "layout": best.layout, "misfits": best.misfits},
        "alternatives": [
            {"scale": r.scale, "layout": r.layout, "misfits": r.misfits, "behind_nats": best.score - r.score} for r in ranked[1:4]
        ],
        "boxes": len(boxes.values),
    }  # fmt: skip
    low, high = boxes.values.min(), boxes.values.max()
    seen = f"{name}: {len(boxes.values)} boxes, numbers {low:g}..{high:g}: "
    also = f" (or, as likely: {'; '.join(alike)})" if alike else ""
    if expected is None:
        return Check(
            "D02", "coordinate convention", "warning", f"{seen}image sizes are unknown; without them the best reading is {best.name}{also}",
            "give rows `width` and `height`, or keep the images where the rows say; then pixels can be told from bins", values,
        )  # fmt: skip
    if expected is best or best.score - expected.score < SURE:
        reach = float((boxes.values[:, 2:] / boxes.sizes).max())
        held = f"{seen}pixels, xyxy, hold {1 - expected.misfits:.1%} of them"
        if reach < REACH and len(boxes.values) >= MANY:
            return Check(
                "D02", "coordinate convention", "warning", f"{held}, yet none reaches beyond {reach:.0%} of its image",
                "numbers may belong to images that were scaled down: draw some with `coordexp data render`", values | {"reach": reach},
            )  # fmt: skip
        return Check("D02", "coordinate convention", "ok", held, "", values)
    if best.misfits > 0.2:
        return Check(
            "D02", "coordinate convention", "fail",
            f"{seen}no reading holds four boxes of five; the best, {best.name}, leaves {best.misfits:.0%} out",
            "numbers may belong to images of another size (resized, or turned): draw some with `coordexp data render`", values,
        )  # fmt: skip
    advice = "; ".join(text for text in (_LAYOUT_ADVICE[best.layout], "" if best.scale == "pixels" else _ADVICE[best.scale]) if text)
    # Thousands of boxes of less than a pixel fit into any image.
    if expected.misfits > 0.01 or best.scale == "0..1":
        fit = f"{expected.misfits:.0%} do not fit their image" if best.scale != "0..1" else "they would all lie in the first pixel"
        return Check(
            "D02", "coordinate convention", "fail",
            f"{seen}not pixel corners ({fit}) but {best.name}{also}", advice, values,
        )  # fmt: skip
    return Check(
        "D02", "coordinate convention", "warning",
        f"{seen}they fit as pixel corners, yet never use the image beyond what {best.name} allows{also}",
        f"if so: {advice}; draw some with `coordexp data render`", values,
    )  # fmt: skip


def check_inside(boxes: Boxes, *, name: str) -> Check:
    """Read as pixel corners: boxes that are reversed, empty or outside their image, by more than ``TOLERANCE`` pixels."""
    if not boxes.known:
        return Check("D03", "boxes inside their image", "skipped", f"{name}: image sizes are unknown")
    a, b, c, d = boxes.values.T
    reversed_ = (c <= a) | (d <= b)
    outside = ~reversed_ & ~_inside(boxes.values, boxes.sizes, "xyxy", TOLERANCE)
    bad = np.flatnonzero(reversed_ | outside)
    values = {"reversed_or_empty": int(reversed_.sum()), "outside": int(outside.sum()), "boxes": len(boxes.values)}
    if not bad.size:
        return Check("D03", "boxes inside their image", "ok", f"{name}: all {len(boxes.values)}", "", values)
    shown = "; ".join(f"{boxes.places[i]} {boxes.values[i].tolist()} in {boxes.sizes[i].tolist()}" for i in bad[:3])
    return Check(
        "D03", "boxes inside their image", "fail" if bad.size > 0.01 * len(boxes.values) else "warning",
        f"{name}: {values['reversed_or_empty']} reversed or empty, {values['outside']} outside, of {len(boxes.values)}: {shown}",
        "`coordexp data validate` names every one; importing with --on-invalid skip leaves them out", values,
    )  # fmt: skip
