"""Whether the answers could be read at all, and how they are made up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coordexp.evaluate.bootstrap import Ratio
from coordexp.evaluate.matching import candidates
from coordexp.evaluate.predictions import Prediction
from coordexp.evaluate.samples import BoolArray, Flat, FloatArray, IntArray

DUPLICATE_IOU = 0.9


def repeats(flat: Flat) -> tuple[IntArray, IntArray]:
    """By image ``[I]``: how many boxes repeat an earlier one, and how often the most repeated box occurs.

    A repeat (of ``bbox_2d`` as it stands) has the same description and ``IoU > .9``. The second number is 1 where nothing is
    repeated and 0 without boxes.
    """
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


def health_ratios(rows: Sequence[Prediction], objects: FloatArray, again: IntArray | None) -> dict[str, Ratio]:
    """Rates over rows and boxes per image, by row; ``objects [I]`` are the predicted ones, ``again`` those of :func:`repeats`.

    ``parse_rate``: rows with no problems and no error, among rows that state either field.
    ``empty_rate``: rows without objects. ``truncation_rate``: among rows that state it.
    ``arity_rate``: rows with a wrong number of values, among rows that state problems. ``duplicate_rate``: share of predicted
    boxes; left out without ``again`` (points).
    """

    def share(of: BoolArray, hit: BoolArray) -> Ratio:
        return Ratio((of & hit).astype(np.float64)[:, None], of.astype(np.float64)[:, None])

    def flags(values: Sequence[bool]) -> BoolArray:
        return np.array(values, dtype=bool)

    everything = np.ones(len(rows), dtype=bool)
    told = flags([row.truncated is not None for row in rows])
    found = {
        "parse_rate": share(flags([states_parsing(row) for row in rows]), flags([is_clean(row) for row in rows])),
        "empty_rate": share(everything, objects == 0),
        "truncation_rate": share(told, flags([bool(row.truncated) for row in rows])),
        "arity_rate": share(
            flags([row.problems is not None for row in rows]), flags([(row.problems or {}).get("bad_arity", 0) > 0 for row in rows])
        ),
        "boxes_per_image": Ratio(objects[:, None], everything.astype(np.float64)[:, None], rate=False),
    }
    return found if again is None else found | {"duplicate_rate": Ratio(again.astype(np.float64)[:, None], objects[:, None])}


def health_numbers(rows: Sequence[Prediction], flat: Flat) -> dict[str, float | int | None]:
    """``tokens_per_image`` among rows that state it, ``true_boxes_per_image``, and ``problems.<reason>``: how often, in all rows."""
    problems: Counter[str] = Counter()
    for row in rows:
        problems.update(row.problems or {})
    tokens = [row.num_tokens for row in rows if row.num_tokens is not None]
    found: dict[str, float | int | None] = {
        "tokens_per_image": sum(tokens) / len(tokens) if tokens else None,
        "true_boxes_per_image": len(flat.true_image) / flat.images,
    }
    return found | {f"problems.{reason}": count for reason, count in sorted(problems.items())}
