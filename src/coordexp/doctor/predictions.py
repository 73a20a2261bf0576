"""Predicted boxes against records: whether they are in the records' pixels at all, and whether a convention was mixed up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordexp.boxes import iou_matrix
from coordexp.data.records import read_records
from coordexp.doctor.checks import Check
from coordexp.doctor.mixups import CLEAR, MIN_BOXES, MIN_IMAGES, Floats, Line, Pair, Verdict, fit_line, judge, pairs
from coordexp.errors import DataError
from coordexp.evaluate.localisation import matched_pairs
from coordexp.evaluate.origin import check_origin
from coordexp.evaluate.predictions import read_predictions
from coordexp.evaluate.registry import FILE_READOUT
from coordexp.evaluate.samples import Sample, in_order, make_samples

# A wrong reading is named where it matches this many more boxes, and this many times as many.
_GAIN: Final = 20
_TIMES: Final = 2.0
_ROUNDS: Final = 4
# Share of boxes that meet, below which something is wrong whatever it is.
_HARDLY: Final = 0.05

Change = Callable[[Floats, Floats], Floats]

# What a box ``[P, 4]`` would be, in shares of the side, if its numbers, read as pixels, were meant otherwise.
READINGS: Final[dict[str, tuple[Change, str]]] = {
    "norm1": (lambda b, s: b, "0..1 of each side, written as pixels"),
    "norm1000": (lambda b, s: b / 1000, "0..1000 of each side, written as pixels"),
    "norm1023": (lambda b, s: b / 1023, "0..1023 of each side, written as pixels"),
    "doubly scaled": (lambda b, s: b * 1000 / s**2, "pixels that were taken for 0..1000 and scaled to pixels again"),
    "swapped": (lambda b, s: b[:, [1, 0, 3, 2]] / s, "[y1, x1, y2, x2]"),
    "swapped sides": (lambda b, s: (b / s)[:, [1, 0, 3, 2]], "x and y swapped before they were scaled to the image"),
    "xywh": (lambda b, s: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1) / s, "[x, y, width, height]"),
    "cxcywh": (lambda b, s: np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], axis=1) / s, "centre, width, height"),
}


def check_predictions(predictions: Path, data: Path) -> list[Check]:
    """``predictions.reading`` and ``predictions.convention``.

    Raises:
        DataError, ComparisonError: a file that cannot be read, or files that do not hold the same images.
    """
    rows = read_predictions(predictions)
    try:
        truth = read_records(data, check_images=False).records
    except DataError as error:
        why = f"{data.name} is not a file of records that can be evaluated against ({str(error)[:200]})"
        return [Check(f"predictions.{what}", "skipped", why, "mend or import the data first") for what in ("reading", "convention")]
    rows = in_order(rows, truth, predictions, data)
    check_origin(rows, {record.image_id: record for record in truth}, predictions, data)
    # A point has no box to match.
    truth = tuple(replace(r, metadata={}, objects=tuple(o for o in r.objects if o.geometry != "point_2d")) for r in truth)
    samples = [_in_shares(sample) for sample in make_samples(rows, truth, ())]
    sides = [np.array([row.width, row.height] * 2, dtype=np.float64) for row in truth]
    reading = _check_reading(samples, sides)
    if reading.outcome == "fail":
        return [reading, Check("predictions.convention", "skipped", "the boxes are not in the records' pixels", "mend that first")]
    return [reading, check_convention(samples)]


def _in_shares(sample: Sample) -> Sample:
    side = np.array([sample.width, sample.height] * 2, dtype=np.float64)
    return replace(sample, true_boxes=sample.true_boxes / side, pred_boxes={FILE_READOUT: sample.pred_boxes[FILE_READOUT] / side})


def _reread(samples: Sequence[Sample], sides: Sequence[Floats], change: Change) -> list[Sample]:
    return [
        replace(s, pred_boxes={FILE_READOUT: change(s.pred_boxes[FILE_READOUT] * side, side)})
        for s, side in zip(samples, sides, strict=True)
    ]


def _straightened(samples: Sequence[Sample], slope: float, offset: float) -> list[Sample]:
    return [replace(s, pred_boxes={FILE_READOUT: (s.pred_boxes[FILE_READOUT] - offset) / slope}) for s in samples]


def _matches(samples: Sequence[Sample]) -> tuple[int, float]:
    """Matched boxes and the sum of their IoU, which tells readings apart that match alike."""
    found = matched_pairs(samples)
    total = sum(iou_matrix(s.pred_boxes[FILE_READOUT][p], s.true_boxes[t]).trace() for s, (p, t) in zip(samples, found, strict=True))
    return sum(len(pred) for pred, _ in found), float(total)


def _check_reading(samples: list[Sample], sides: list[Floats]) -> Check:
    predicted, true = sum(len(s.pred_labels) for s in samples), sum(len(s.true_labels) for s in samples)
    plain, _ = _matches(samples)
    seen = f"{plain} of {predicted} predicted boxes meet one of {true} true ones at IoU .5"
    details: dict[str, object] = {"predicted": predicted, "true": true, "matched": plain}
    if not predicted or not true:
        return Check("predictions.reading", "skipped", seen, details=details)
    found = {name: _matches(_reread(samples, sides, change)) for name, (change, _) in READINGS.items()}
    details["matched_if"] = counts = {name: count for name, (count, _) in found.items()}
    best = max(found, key=lambda name: found[name][1])
    details["closest"] = best
    if counts[best] >= _TIMES * plain and counts[best] >= plain + _GAIN:
        seen += f"; {counts[best]} would if they were read as {READINGS[best][1]}"
        return Check("predictions.reading", "fail", seen, "correct the program that wrote the predictions: boxes are xyxy pixels", details)
    if predicted >= MIN_BOXES and plain < _HARDLY * min(predicted, true):
        advice = "look at some of them (coordexp report): the model has not learned to point, or images and records do not belong together"
        return Check("predictions.reading", "warning", f"{seen}, and no other reading of the numbers meets many more", advice, details)
    return Check("predictions.reading", "ok", seen, details=details)


def match_around_line(samples: Sequence[Sample]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Matched predicted and true boxes ``[P, 4]`` (shares of the side) and their images.

    Boxes are matched after the systematic line is taken out, which is found by repetition: at IoU .5 of boxes as they
    stand, exactly those that a shift moved far would be lost, and the shift would look smaller than it is.
    """
    scales = sorted({round(pair.slope, 2): pair.slope for pair in pairs()}.values())
    best: tuple[int, tuple[Floats, Floats, NDArray[np.int64]]] | None = None
    for start in sorted(scales, key=lambda slope: abs(slope - 1)):
        slope, offset = start, 0.0
        for _ in range(_ROUNDS):
            found = _collect(samples, matched_pairs(_straightened(samples, slope, offset)))
            line = fit_line(*found)
            if line is None:
                break
            slope, offset = line.slope, line.intercept
        if best is None or len(found[2]) > best[0]:
            best = len(found[2]), found
    assert best is not None
    return best[1]


def _collect(
    samples: Sequence[Sample], pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    none = np.zeros((0, 4))
    predicted = np.concatenate([none, *(s.pred_boxes[FILE_READOUT][p] for s, (p, _) in zip(samples, pairs, strict=True))])
    true = np.concatenate([none, *(s.true_boxes[t] for s, (_, t) in zip(samples, pairs, strict=True))])
    return predicted, true, np.repeat(np.arange(len(samples), dtype=np.int64), [len(p) for p, _ in pairs])


def check_convention(samples: Sequence[Sample]) -> Check:
    """``predictions.convention`` of samples in shares of the side."""
    found = match_around_line(samples)
    line = fit_line(*found)
    if line is None:
        need = f"expected {MIN_BOXES} matched boxes away from the border in {MIN_IMAGES} images, got {len(found[2])} matched boxes"
        return Check("predictions.convention", "skipped", need, "predict more images")
    axes = [fit_line(*found, axes=(axis,)) for axis in (0, 1)]
    return _report(judge(line, tuple(one for one in axes if one is not None)))


def _report(verdict: Verdict) -> Check:
    line = verdict.line
    details = line.details() | {"p_healthy": verdict.healthy, "explains": [_pair(p) for p in verdict.explains], "pairs": verdict.table}
    seen = _line_text(line)
    name = "predictions.convention"
    if not verdict.clear:
        return Check(name, "ok", f"{seen}: no systematic error beyond chance", details=details)
    sure = f"(chance of this without a fault: {max(verdict.healthy, 1e-300):.0e}, accused below {CLEAR:.0e})"
    if not verdict.explains:
        advice = "look for another shift: a resized or padded copy of the images, pixel centres for edges, one axis only"
        return Check(name, "warning", f"{seen}: systematic, but no mix-up of conventions does this {sure}", advice, details)
    names = _describe(verdict.explains)
    if verdict.floored:
        # The one loss that is no mistake of the user, where floored labels are read as their convention says.
        advice = "floored labels read at k/1000 lie half a bin low: make labels with norm999, or check which convention made them"
        return Check(name, "warning", f"{seen}: explained by {names} {sure}", advice, details)
    advice = "read the answers with the convention the labels were made with (codec.convention; coordexp.json of the checkpoint)"
    return Check(name, "fail", f"{seen}: explained by {names} {sure}", advice, details)


def _pair(pair: Pair) -> dict[str, str]:
    return {"encode": pair.encode, "decode": pair.decode}


def _describe(explains: Sequence[Pair]) -> str:
    """One phrase for the pairs, those of one label convention together, in their order."""
    readers: dict[str, list[str]] = {}
    for pair in explains:
        readers.setdefault(pair.encode, []).append(pair.decode)
    return ", or ".join(f"labels of {encode} read as {' or '.join(decodes)}" for encode, decodes in readers.items())


def _line_text(line: Line) -> str:
    d = line.details()
    return (
        f"predicted = {d['slope']:.4f} (±{d['slope_se']:.4f}) x true {d['intercept_bins']:+.2f} (±{d['intercept_se_bins']:.2f}) bins, "
        f"mean error {d['mean_error_bins']:+.2f} (±{d['mean_error_se_bins']:.2f}) bins, {line.boxes} boxes in {line.images} images"
    )
