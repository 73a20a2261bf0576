"""Whether the answers could be read at all, and how they are made up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coordexp.evaluate.matching import candidates
from coordexp.evaluate.predictions import Prediction
from coordexp.evaluate.samples import FILE_READOUT, IntArray, Sample, flatten

DUPLICATE_IOU = 0.9


def repeats(samples: Sequence[Sample]) -> tuple[IntArray, IntArray]:
    """By image ``[I]``: how many boxes repeat an earlier one, and how often the most repeated box occurs.

    A repeat (of ``bbox_2d`` as it stands) has the same description and ``IoU > .9``. The second number is 1 where nothing is
    repeated and 0 without boxes.
    """
    flat = flatten(samples, FILE_READOUT)
    own = replace(flat, true_image=flat.pred_image, true_label=flat.pred_label, true_boxes=flat.pred_boxes)
    pairs = candidates(own)
    same = flat.pred_label[pairs.pred] == flat.pred_label[pairs.true]
    pairs = pairs.where((pairs.iou > DUPLICATE_IOU) & (pairs.pred > pairs.true) & same)
    again = np.bincount(flat.pred_image[np.unique(pairs.pred)], minlength=flat.images)
    longest = np.zeros(flat.images, dtype=np.int64)
    np.maximum.at(longest, flat.pred_image, 1 + np.bincount(pairs.true, minlength=len(flat.pred_image)))
    return again, longest


def states_parsing(row: Prediction) -> bool:
    """Whether the row says how its answer was read."""
    return row.problems is not None or row.states_error


def is_clean(row: Prediction) -> bool:
    """Whether the answer was read without a problem and without an error."""
    return row.error is None and not any((row.problems or {}).values())


def health_metrics(rows: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float | int | None]:
    """Rates over rows, and averages per image.

    ``parse_rate``: rows with no problems and no error, among rows that state either field.
    ``empty_rate``: rows without objects. ``truncation_rate`` and ``tokens_per_image``: among rows that state
    them. ``arity_rate``: rows with a wrong number of values, among rows that state problems. ``duplicate_rate``: share of predicted
    boxes, and ``max_repeat``: see :func:`repeats`. ``problems.<reason>``: total count. A rate over
    nothing is None.
    """
    again, longest = repeats(samples)
    stated = [row for row in rows if states_parsing(row)]
    clean = [row for row in stated if is_clean(row)]
    truncated = [row.truncated for row in rows if row.truncated is not None]
    tokens = [row.num_tokens for row in rows if row.num_tokens is not None]
    boxes = sum(len(row.objects) for row in rows)
    metrics: dict[str, float | int | None] = {
        "parse_rate": _ratio(len(clean), len(stated)),
        "empty_rate": _ratio(sum(not row.objects for row in rows), len(rows)),
        "truncation_rate": _ratio(sum(truncated), len(truncated)),
        "arity_rate": _ratio(
            sum((row.problems or {}).get("bad_arity", 0) > 0 for row in rows), sum(row.problems is not None for row in rows)
        ),
        "duplicate_rate": _ratio(int(again.sum()), sum(len(s.pred_labels) for s in samples)),
        "max_repeat": int(longest.max(initial=0)),
        "boxes_per_image": _ratio(boxes, len(rows)),
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
