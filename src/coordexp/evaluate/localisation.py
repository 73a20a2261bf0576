"""How far the edges of matched boxes lie from the truth, by slot and readout, in bins and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from coordexp.codec import CoordCodec
from coordexp.evaluate.buckets import sides_bins, sides_px
from coordexp.evaluate.matching import Candidates, candidates, match_all
from coordexp.evaluate.registry import BIN_SIZES, COCO_SIZES, SLOTS
from coordexp.evaluate.samples import Flat, FloatArray, IntArray, Sample, flatten

MATCH_THRESHOLD: Final = 0.5


@dataclass(frozen=True)
class EdgeErrors:
    """Signed errors, predicted minus true, of P matched pairs: ``bins [P, 4]``, ``px [P, 4]``; ``image [P]`` is the sample's index.

    ``side_px`` and ``side_bins [P]`` are the sizes of the true boxes, see :mod:`coordexp.evaluate.buckets`.
    """

    bins: FloatArray
    px: FloatArray
    image: IntArray
    side_px: FloatArray
    side_bins: FloatArray


def matched(flat: Flat, found: Candidates | None = None) -> tuple[IntArray, IntArray]:
    """Matched predicted and true boxes by index into ``flat``, by predicted box; ``found`` may be handed in by a caller that has it.

    Class-agnostic at ``IoU >= .5`` on the boxes of ``flat``: those of the file, whatever the readout, so that all readouts
    are compared on the same pairs.
    """
    pred, true = match_all(candidates(flat) if found is None else found, flat, MATCH_THRESHOLD)
    order = np.argsort(pred)
    return pred[order], true[order]


def matched_pairs(samples: Sequence[Sample]) -> list[tuple[IntArray, IntArray]]:
    """:func:`matched` per image, by index into the boxes of each sample."""
    if not samples:
        return []
    flat = flatten(samples)
    pred, true = matched(flat)
    image = flat.pred_image[pred]
    pred_start, true_start = (np.searchsorted(of, np.arange(flat.images)) for of in (flat.pred_image, flat.true_image))
    ends = np.searchsorted(image, np.arange(1, flat.images))
    return list(zip(np.split(pred - pred_start[image], ends), np.split(true - true_start[image], ends), strict=True))


def edge_errors(flat: Flat, pairs: tuple[IntArray, IntArray], readout: str, codec: CoordCodec) -> EdgeErrors:
    """Errors of every matched pair under a readout. A bin is that of ``codec``: ``side / codec.scale`` pixels."""
    pred, true = pairs
    found, truth, image = flat.boxes[readout][pred], flat.true_boxes[true], flat.true_image[true]
    sides = np.stack([flat.width, flat.height, flat.width, flat.height], axis=1).astype(np.float64)[image]
    bins = np.asarray(codec.to_bin(found, sides)) - np.asarray(codec.to_bin(truth, sides))
    return EdgeErrors(bins, found - truth, image, sides_px(truth), sides_bins(truth, image, flat, codec))


def localisation_metrics(errors: EdgeErrors) -> dict[str, float | int | None]:
    """``{x1,y1,x2,y2,all}.{mean,median,p90}_{bins,px}`` of the absolute error and ``.signed_bias_{bins,px}``; by size.

    ``all`` pools the four slots. The signed bias is the mean of predicted minus true: away from 0 it points
    to a convention fault, in one slot alone to a fault of that edge. ``size.<small,medium,large>`` and ``bins.<0-8, ...>`` hold
    ``mean_bins``, ``mean_px``, ``signed_bias_bins`` and ``n`` by the size of the true box. Without a pair all are None (n is 0).
    ``p90`` interpolates linearly.
    """
    metrics: dict[str, float | int | None] = {}
    for unit, values in (("bins", errors.bins), ("px", errors.px)):
        for slot in (*SLOTS, "all"):
            signed = (values if slot == "all" else values[:, SLOTS.index(slot)]).ravel()
            chosen = np.abs(signed)
            some = chosen.size > 0
            metrics[f"{slot}.mean_{unit}"] = float(chosen.mean()) if some else None
            metrics[f"{slot}.median_{unit}"] = float(np.median(chosen)) if some else None
            metrics[f"{slot}.p90_{unit}"] = float(np.percentile(chosen, 90)) if some else None
            metrics[f"{slot}.signed_bias_{unit}"] = float(signed.mean()) if some else None
    for kind, buckets, side in (("size", COCO_SIZES, errors.side_px), ("bins", BIN_SIZES, errors.side_bins)):
        for name, low, high in buckets:
            own = (side >= low) & (side < high)
            some = bool(own.any())
            metrics[f"{kind}.{name}.mean_bins"] = float(np.abs(errors.bins[own]).mean()) if some else None
            metrics[f"{kind}.{name}.mean_px"] = float(np.abs(errors.px[own]).mean()) if some else None
            metrics[f"{kind}.{name}.signed_bias_bins"] = float(errors.bins[own].mean()) if some else None
            metrics[f"{kind}.{name}.n"] = int(own.sum())
    return metrics
