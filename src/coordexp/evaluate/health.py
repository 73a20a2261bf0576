"""Whether the answers could be read at all, and how they are made up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from coordexp.boxes import iou_matrix
from coordexp.evaluate.detection import FILE_READOUT, Sample
from coordexp.evaluate.predictions import Prediction

DUPLICATE_IOU = 0.9


def duplicates(sample: Sample) -> int:
    """Boxes (``bbox_2d`` as it stands) that repeat an earlier one of the image: same description, ``IoU > .9``."""
    boxes = sample.pred_boxes[FILE_READOUT]
    close = np.tril(iou_matrix(boxes, boxes) > DUPLICATE_IOU, k=-1)
    return sum(any(close[j, i] and sample.pred_labels[i] == sample.pred_labels[j] for i in range(j)) for j in range(len(boxes)))


def health_metrics(rows: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float | int | None]:
    """Rates over rows, and averages per image.

    ``parse_rate``: rows with no problems and no error, among rows that state either field.
    ``empty_rate``: rows without objects. ``truncation_rate`` and ``tokens_per_image``: among rows that state
    them. ``duplicate_rate``: share of predicted boxes, see :func:`duplicates`. ``problems.<reason>``: total
    count. A rate over nothing is None.
    """
    stated = [row for row in rows if row.problems is not None or row.states_error]
    clean = [row for row in stated if row.error is None and not any((row.problems or {}).values())]
    truncated = [row.truncated for row in rows if row.truncated is not None]
    tokens = [row.num_tokens for row in rows if row.num_tokens is not None]
    boxes = sum(len(s.pred_labels) for s in samples)
    metrics: dict[str, float | int | None] = {
        "parse_rate": _ratio(len(clean), len(stated)),
        "empty_rate": _ratio(sum(not row.objects for row in rows), len(rows)),
        "truncation_rate": _ratio(sum(truncated), len(truncated)),
        "duplicate_rate": _ratio(sum(duplicates(s) for s in samples), boxes),
        "boxes_per_image": _ratio(boxes, len(samples)),
        "true_boxes_per_image": _ratio(sum(len(s.true_labels) for s in samples), len(samples)),
        "tokens_per_image": _ratio(sum(tokens), len(tokens)),
    }
    problems: Counter[str] = Counter()
    for row in rows:
        problems.update(row.problems or {})
    metrics.update({f"problems.{reason}": count for reason, count in sorted(problems.items())})
    return metrics


def _ratio(numerator: int, denominator: int) -> float | None:
    return None if denominator == 0 else numerator / denominator
