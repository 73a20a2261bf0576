"""How far the edges of matched boxes lie from the truth, by slot and readout, in bins and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordexp.boxes import iou_matrix
from coordexp.codec import CoordCodec
from coordexp.evaluate.detection import FILE_READOUT, FloatArray, Sample, match

SLOTS: Final[tuple[str, ...]] = ("x1", "y1", "x2", "y2")
MATCH_THRESHOLD: Final = 0.5


@dataclass(frozen=True)
class EdgeErrors:
    """Signed errors, predicted minus true, of P matched pairs: ``bins [P, 4]``, ``px [P, 4]``; ``image [P]`` is the sample's index."""

    bins: FloatArray
    px: FloatArray
    image: NDArray[np.int64]


def matched_pairs(samples: Sequence[Sample]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Per image the indices of matched predicted and true boxes.

    Class-agnostic at ``IoU >= .5`` on ``bbox_2d`` as it stands, whatever the readout, so that all readouts
    are compared on the same pairs.
    """
    return [match(iou_matrix(s.pred_boxes[FILE_READOUT], s.true_boxes), MATCH_THRESHOLD) for s in samples]


def edge_errors(
    samples: Sequence[Sample],
    pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    readout: str,
    codec: CoordCodec,
) -> EdgeErrors:
    """Errors of every matched pair under a readout. A bin is that of ``codec``: ``side / codec.scale`` pixels."""
    px, bins, image = [np.zeros((0, 4))], [np.zeros((0, 4))], [np.zeros(0, dtype=np.int64)]
    for i, (sample, (predicted, true)) in enumerate(zip(samples, pairs, strict=True)):
        sides = np.array([sample.width, sample.height, sample.width, sample.height], dtype=np.float64)
        found, truth = sample.pred_boxes[readout][predicted], sample.true_boxes[true]
        px.append(found - truth)
        bins.append(np.asarray(codec.to_bin(found, sides)) - np.asarray(codec.to_bin(truth, sides)))
        image.append(np.full(len(predicted), i, dtype=np.int64))
    return EdgeErrors(np.concatenate(bins), np.concatenate(px), np.concatenate(image))


def localisation_metrics(errors: EdgeErrors) -> dict[str, float | None]:
    """``{x1,y1,x2,y2,all}.{mean,median,p90}_{bins,px}`` of the absolute error, and ``all.signed_bias_bins``.

    ``all`` pools the four slots. The signed bias is the mean of predicted minus true: away from 0 it points
    to a convention fault. All are None without a matched pair. ``p90`` interpolates linearly.
    """
    metrics: dict[str, float | None] = {}
    for unit, values in (("bins", errors.bins), ("px", errors.px)):
        for slot in (*SLOTS, "all"):
            chosen = np.abs(values if slot == "all" else values[:, SLOTS.index(slot)]).ravel()
            some = chosen.size > 0
            metrics[f"{slot}.mean_{unit}"] = float(chosen.mean()) if some else None
            metrics[f"{slot}.median_{unit}"] = float(np.median(chosen)) if some else None
            metrics[f"{slot}.p90_{unit}"] = float(np.percentile(chosen, 90)) if some else None
    metrics["all.signed_bias_bins"] = float(errors.bins.mean()) if errors.bins.size else None
    return metrics
