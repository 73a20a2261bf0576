"""A score for each box, and its calibration on boxes whose truth is known.

``constant``: 1 for every box; the ranking is the order of the answer.

``token``: ``exp(mean log p)`` over the tokens of the box: those of its description and its four coordinates,
each under the model's full vocabulary, before any constraint. Tokens that the format forced do not count.

``distribution``: ``prod_j W_j * prod_i p_i``: W_j is the probability within ``half_width`` bins of the reported
position of coordinate j, in the coordinate slice at temperature 1; p_i are the probabilities of the
description's tokens. It is high only if all four edges are sharp *and* the name is sure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from coordexp.boxes import area, as_boxes, bounding_box, iou_matrix
from coordexp.data.records import Record, read_records
from coordexp.data.staging import atomic_text
from coordexp.errors import ComparisonError, ConfigError, DataError
from coordexp.evaluate.origin import check_origin
from coordexp.evaluate.predictions import Prediction, read_predictions

HALF_WIDTH: Final = 16
CALIBRATED: Final = "+isotonic"
_KIND: Final = "coordexp-isotonic"


def token_score(desc: Sequence[float], coords: Sequence[float]) -> float:
    """``exp`` of the mean of the log-probabilities of a box's description and coordinate tokens."""
    values = [*desc, *coords]
    return math.exp(sum(values) / len(values))


def distribution_score(desc: Sequence[float], p: Tensor, positions: Tensor, *, half_width: int = HALF_WIDTH) -> float:
    """Window mass of the coordinates ``p`` ``[S, K]`` around ``positions`` ``[S]``, times the description's probability."""
    near = (torch.arange(p.shape[1], device=p.device)[None] - positions[:, None]).abs() <= half_width
    return float((p * near).sum(dim=-1).clamp_max(1.0).prod()) * math.exp(sum(desc))


@dataclass(frozen=True)
class Calibration:
    """A non-decreasing map from score to the share of such boxes that are right, linear between ``x``; flat beyond."""

    score_source: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    iou: float
    boxes: int

    def __call__(self, score: float) -> float:
        """The calibrated score."""
        return float(np.interp(score, self.x, self.y))

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        content = {"kind": _KIND, "score_source": self.score_source, "iou": self.iou, "boxes": self.boxes, "x": self.x, "y": self.y}
        with atomic_text(path) as file:
            file.write(json.dumps(content, indent=1) + "\n")


def load_calibration(path: Path) -> Calibration:
    """Read what :meth:`Calibration.save` wrote.

    Raises:
        DataError: another file, or one whose map is not usable.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a calibration saved by `coordexp predict --calibrate`: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise DataError(f"{path}: expected a calibration saved by `coordexp predict --calibrate`, got another file")
    try:
        made = Calibration(
            str(content["score_source"]), tuple(map(float, content["x"])), tuple(map(float, content["y"])), float(content["iou"]),
            int(content["boxes"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: this calibration lacks a usable field: {error}") from error
    x, y = np.array(made.x), np.array(made.y)
    if not (len(x) == len(y) > 0 and (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all() and y[0] >= 0 and y[-1] <= 1):
        raise DataError(f"{path}: expected x and y of one length, both ascending, y within 0 and 1: fit the calibration again")
    return made


def fit_calibration(predictions: Path, records: Path, *, iou: float = 0.5) -> Calibration:
    """Isotonic regression (scikit-learn) of "this box is right" on its score, over a held-out prediction file.

    A box is right if, in descending order of score, it meets a true box of the same description with ``IoU >= iou``
    that no better-scored box has taken: the rule of COCO. Boxes in a crowd of their description are left out.

    Raises:
        ComparisonError: files that do not fit together, points, or boxes without scores.
        DataError: a file that cannot be read, or no box to learn from.
    """
    from sklearn.isotonic import IsotonicRegression

    rows = read_predictions(predictions)
    truth = {record.image_id: record for record in read_records(records, check_images=False).records}
    unknown = [row for row in rows if row.image_id not in truth]
    if unknown:
        raise ComparisonError(
            f"{unknown[0].source}: image {unknown[0].image_id!r} is not in {records.name}: calibrate with the records that were predicted"
        )
    check_origin(rows, truth, predictions, records)
    scored = [row for row in rows if row.objects]
    other = next((row for row in scored if any(item.geometry == "point_2d" for item in row.objects)), None)
    if other is not None:
        raise ComparisonError(f"{other.source}: holds a point_2d: the scores of boxes are calibrated, by their IoU")
    if not scored:
        raise DataError(f"{predictions}: no box to calibrate on")
    source = scored[0].score_source
    if source is None or scored[0].objects[0].score is None:
        raise ComparisonError(f"{predictions}: its boxes have no scores: predict the held-out records with --score token or distribution")
    if source.endswith(CALIBRATED):
        raise ComparisonError(f"{predictions}: its scores are calibrated already: predict the held-out records without --calibrate")
    pairs: list[tuple[float, bool]] = []
    for row in scored:
        scores = [item.score for item in row.objects if item.score is not None]
        order = sorted(range(len(scores)), key=lambda i, scores=scores: -scores[i])  # type: ignore[misc]
        verdicts = _right(row, order, truth[row.image_id], iou)
        pairs += [(scores[i], verdict) for i, verdict in zip(order, verdicts, strict=True) if verdict is not None]
    if not pairs:
        raise DataError(f"{predictions}: no box to calibrate on: all lie in crowds")
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit([p for p, _ in pairs], [float(q) for _, q in pairs])
    x, y = fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()
    return Calibration(source, tuple(x), tuple(y), iou, len(pairs))


def _right(row: Prediction, order: Sequence[int], record: Record, iou: float) -> list[bool | None]:
    """Of each box in ``order``: right, wrong, or None where it lies in a crowd of its description and nothing is known."""
    if (row.width, row.height) != (record.width, record.height):
        raise ComparisonError(f"{row.source}: image {row.image_id!r} has another size in {record.source}: predict again from these records")
    if any(item.geometry == "point_2d" for item in record.objects):
        raise ComparisonError(f"{record.source}: has a point_2d: boxes are calibrated, give records with bbox_2d or poly")
    single = [item for item in record.objects if not item.crowd]
    crowd = [item for item in record.objects if item.crowd]
    boxes = as_boxes([row.objects[i].box for i in order])
    overlap = iou_matrix(boxes, as_boxes([bounding_box(item.values) for item in single]))
    regions = as_boxes([bounding_box(item.values) for item in crowd])
    low, high = np.maximum(boxes[:, None, :2], regions[None, :, :2]), np.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = np.prod(np.maximum(high - low, 0), axis=-1)
    free = np.ones(len(single), dtype=bool)
    found: list[bool | None] = []
    for n, i in enumerate(order):
        desc = row.objects[i].desc
        candidates = np.where(free & np.array([item.desc == desc for item in single], dtype=bool), overlap[n], -1.0)
        best = int(candidates.argmax()) if len(single) else -1
        if best >= 0 and candidates[best] >= iou:
            free[best] = False
            found.append(True)
            continue
        covered = max((inside[n, j] for j, item in enumerate(crowd) if item.desc == desc), default=0.0)
        found.append(None if covered > 0 and covered >= iou * area(boxes[n : n + 1])[0] else False)
    return found


def open_calibration(path: Path, records: Path | None, score: str) -> Calibration:
    """A saved calibration, or one fitted on a prediction file with its ``records``; for scores named ``score``.

    Raises:
        ConfigError: predictions without their records.
        ComparisonError: a calibration of other scores.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a calibration or a prediction file, got nothing there")
    if records is None and path.suffix == ".jsonl":
        raise ConfigError(f"--calibrate {path} is a prediction file: name the records it was made for with --calibrate-data")
    made = load_calibration(path) if records is None else fit_calibration(path, records)
    if made.score_source != score:
        raise ComparisonError(
            f"{path}: calibrates scores of {made.score_source!r}, and this prediction has {score!r}: use one --score for both"
        )
    return made


def calibrated(row: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """The prediction row with calibrated scores, and that in its ``score_source``."""
    objects = [item | {"score": calibration(item["score"])} for item in row["objects"]]
    return row | {"objects": objects, "score_source": row["score_source"] + CALIBRATED}
