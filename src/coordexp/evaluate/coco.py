"""COCO and LVIS average precision, and the TIDE split of its errors, by named score modes.

The engine is hotcoco 1.3: equal to pycocotools to the last bit on random data with ties, crowds, empty images
and classes without predictions, and 0.05 s against 2.3 s (faster-coco-eval: 0.3 s) for 500 images of
20 boxes in 80 classes on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from hotcoco import COCO, COCOeval

from coordexp.boxes import area
from coordexp.evaluate.samples import FILE_READOUT, FloatArray, Sample

ScoreMode = Literal["constant", "file"]

COCO_KEYS: Final[dict[str, str]] = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "aps": "APs",
    "apm": "APm",
    "apl": "APl",
    "ar1": "AR1",
    "ar10": "AR10",
    "ar100": "AR100",
}
LVIS_KEYS: Final[dict[str, str]] = {
    **{key: COCO_KEYS[key] for key in ("ap", "ap50", "ap75", "aps", "apm", "apl")},
    "apr": "APr",
    "apc": "APc",
    "apf": "APf",
    "ar300": "AR@300",
}
TIDE_KINDS: Final[tuple[str, ...]] = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")


@dataclass(frozen=True)
class ApTable:
    """A finished COCO evaluation: ``metrics`` by COCO_KEYS and AP by class, None where COCO says -1."""

    metrics: dict[str, float | None]
    per_class: dict[str, float | None]
    engine: Any


def coco_metrics(samples: Sequence[Sample], mode: ScoreMode) -> dict[str, float | None]:
    """COCO box metrics of ``bbox_2d`` as it stands: ``ap``, ``ap50`` .. ``ar100``; None where COCO says -1.

    ``constant`` gives every box the score 1.0: the ranking is then the order of the file (the library sorts
    stably), and the number is no match for a detector's AP. ``file`` takes the scores as they stand. Object
    areas are box areas; classes are descriptions; at most 100 boxes an image count.

    Raises:
        ValueError: mode ``file`` where a sample has boxes without scores.
    """
    return coco_table(samples, mode).metrics


def coco_table(samples: Sequence[Sample], mode: ScoreMode) -> ApTable:
    """As :func:`coco_metrics`, with AP by class and the engine for :func:`tide_metrics`."""
    evaluation = _engine(samples, mode, lvis=False)
    values = evaluation.get_results(per_class=True)
    known = {label for s in samples for label in s.true_labels}
    return ApTable(
        {key: _defined(values[name]) for key, name in COCO_KEYS.items()},
        {label: _defined(values[f"AP/{label}"]) for label in sorted(known)},
        evaluation,
    )


def lvis_metrics(samples: Sequence[Sample], mode: ScoreMode) -> dict[str, float | None]:
    """LVIS box metrics: ``ap`` .. ``apl``, ``apr``, ``apc``, ``apf`` (rare, common, frequent categories) and ``ar300``.

    A category is judged in an image only if it is labelled there or listed as absent; where it is listed as not
    exhaustive, unmatched boxes of it are ignored. At most 300 boxes an image count. Crowds do not exist in LVIS and are left out.

    Raises:
        ValueError: samples without LVIS metadata, or mode ``file`` where a sample has boxes without scores.
    """
    values = _engine(samples, mode, lvis=True).get_results()
    return {key: _defined(values[name]) for key, name in LVIS_KEYS.items()}


def _defined(value: float) -> float | None:
    # COCO writes -1 where there is nothing to measure.
    return None if value < 0 else float(value)


def _engine(samples: Sequence[Sample], mode: ScoreMode, *, lvis: bool) -> Any:
    labels = {label for s in samples for label in (*s.true_labels, *s.crowd_labels, *s.pred_labels)}
    for sample in samples if lvis else ():
        if sample.federated is None:
            raise ValueError(f"image {sample.image_id!r} has no LVIS metadata")
        labels |= sample.federated.negative | sample.federated.not_exhaustive
    category = {label: number for number, label in enumerate(sorted(labels), start=1)}
    images = [_image(number, sample, category, lvis) for number, sample in enumerate(samples, start=1)]
    names: list[dict[str, Any]] = [{"id": number, "name": label} for label, number in category.items()]
    if lvis:
        frequency = {label: value for s in samples if s.federated for label, value in s.federated.frequency.items()}
        # The engine wants a frequency on every category; without one it counts in none of the three.
        names = [{**entry, "frequency": frequency[entry["name"]]} if entry["name"] in frequency else entry for entry in names]
    truth = _truth(samples, category, images, names, lvis)
    evaluation = COCOeval(truth, truth.load_res(_detections(samples, mode, category)), "bbox", lvis_style=lvis)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # summarize() without its printing
    return evaluation


def _image(number: int, sample: Sample, category: dict[str, int], lvis: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": number, "width": sample.width, "height": sample.height}
    if lvis and sample.federated is not None:
        entry["neg_category_ids"] = sorted(category[label] for label in sample.federated.negative)
        entry["not_exhaustive_category_ids"] = sorted(category[label] for label in sample.federated.not_exhaustive)
    return entry


def _truth(
    samples: Sequence[Sample], category: dict[str, int], images: list[dict[str, Any]], names: list[dict[str, Any]], lvis: bool
) -> Any:
    crowds = [] if lvis else [(n, s.crowd_labels, s.crowd_boxes) for n, s in enumerate(samples, start=1)]
    parts = [(n, s.true_labels, s.true_boxes) for n, s in enumerate(samples, start=1)] + crowds
    boxes = np.concatenate([np.zeros((0, 4)), *(part[2] for part in parts)])
    single = sum(len(s.true_labels) for s in samples)
    return COCO.from_arrays(
        images,
        names,
        np.repeat(np.array([n for n, _, _ in parts], dtype=np.int64), [len(labels) for _, labels, _ in parts]),
        np.array([category[label] for _, labels, _ in parts for label in labels], dtype=np.int64),
        _xywh(boxes),
        area=area(boxes),
        iscrowd=(np.arange(len(boxes)) >= single).astype(np.int64),
    )


def _detections(samples: Sequence[Sample], mode: ScoreMode, category: dict[str, int]) -> FloatArray:
    """``[P, 7]``: image, x, y, width, height, score, category."""
    for sample in samples if mode == "file" else ():
        if sample.pred_labels and sample.scores is None:
            raise ValueError(f"image {sample.image_id!r} has boxes without scores")
    boxes = np.concatenate([np.zeros((0, 4)), *(s.pred_boxes[FILE_READOUT] for s in samples)])
    found = np.ones((len(boxes), 7))
    found[:, 0] = np.repeat(np.arange(1, len(samples) + 1), [len(s.pred_labels) for s in samples])
    found[:, 1:5] = _xywh(boxes)
    if mode == "file":
        found[:, 5] = np.concatenate([np.zeros(0), *(s.scores for s in samples if s.scores is not None)])
    found[:, 6] = [category[label] for s in samples for label in s.pred_labels]
    return found


def _xywh(boxes: FloatArray) -> FloatArray:
    """A reversed box has no extent, as in :func:`coordexp.boxes.area`: it matches nothing."""
    return np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:] - boxes[:, :2], 0)], axis=1)


def tide_metrics(table: ApTable) -> dict[str, float | int]:
    """``{dap,count}.{cls,loc,both,dupe,bkg,miss}``: how much AP50 would gain without an error of that kind, and how many there are.

    By TIDE (Bolya et al. 2020) at IoU .5, background below .1: ``cls`` right place, wrong name; ``loc`` right name, IoU between .1 and
    .5; ``both`` the two together; ``dupe`` a true box found before; ``bkg`` nothing there; ``miss`` a true box that no error above covers.
    """
    found = table.engine.tide_errors(pos_thr=0.5, bg_thr=0.1)
    result: dict[str, float | int] = {f"dap.{kind.lower()}": float(found["delta_ap"][kind]) for kind in TIDE_KINDS}
    return result | {f"count.{kind.lower()}": int(found["counts"][kind]) for kind in TIDE_KINDS}
