"""From two files to ``results.json``: join, compute, write; and the few rows a person reads first."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

import coordexp
from coordexp.boxes import as_boxes, bounding_box
from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.records import Record, RecordObject, read_records
from coordexp.errors import ComparisonError, ConfigError
from coordexp.evaluate.bootstrap import Ratio, intervals
from coordexp.evaluate.detection import (
    FILE_READOUT,
    FloatArray,
    MatchCounts,
    Sample,
    coco_metrics,
    count_matches,
    macro_metrics,
    micro_metrics,
)
from coordexp.evaluate.health import health_metrics
from coordexp.evaluate.localisation import EdgeErrors, edge_errors, localisation_metrics, matched_pairs
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.predictions import READOUT_NAMES, Prediction, read_predictions

SCHEMA: Final = 1
READOUT_ORDER: Final[tuple[str, ...]] = (FILE_READOUT, *READOUT_NAMES)


def evaluate_files(
    predictions: Path, records: Path, options: EvaluateOptions, *, out: Path | None, convention: str = "norm999"
) -> dict[str, Any]:
    """Evaluate a predictions file against a records file; needs no image file.

    Returns the flat results: dotted metric keys, ``intervals.<key>`` for the headline numbers (absent with
    ``options.bootstrap == 0`` and where the interval is undefined), ``schema``, and the nested ``counts`` and
    ``provenance``. Numbers are not rounded; what is undefined is None (null). A row with an ``error`` takes
    part as an image without boxes. With ``out`` the same is written there as JSON, atomically.
    ``convention`` names the bins of the localisation errors.

    Raises:
        DataError: a file that cannot be read.
        ComparisonError: files that do not fit together: other images, sizes, or truth that is not boxes.
        ConfigError: an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"unknown coordinate convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    codec = CoordCodec(CONVENTIONS[convention].bins, convention)
    rows, truth = read_predictions(predictions), read_records(records, check_images=False).records
    rows = _ordered(rows, truth, predictions, records)
    # The reader has checked that every object of the file has the same readouts.
    named = next((row.objects[0].readouts for row in rows if row.objects), {})
    readouts = [name for name in READOUT_NAMES if name in named]
    samples = [_sample(row, record, readouts) for row, record in zip(rows, truth, strict=True)]
    results: dict[str, Any] = {"schema": SCHEMA}
    statistics = _score(samples, rows, [FILE_READOUT, *readouts], codec, results)
    if options.bootstrap:
        found = intervals(statistics, resamples=options.bootstrap, seed=options.seed)
        results.update({f"intervals.{key}": list(bounds) for key, bounds in found.items() if bounds is not None})
    results["counts"] = {
        "original": len(truth),
        "effective": len(samples),
        "failed": sum(row.error is not None for row in rows),
        "true_boxes": sum(len(s.true_labels) for s in samples),
        "crowd_regions": sum(len(s.crowd_labels) for s in samples),
        "predicted_boxes": sum(len(s.pred_labels) for s in samples),
        "classes": len({label for s in samples for label in s.true_labels}),
    }
    results["provenance"] = {
        "predictions": predictions.name,
        "predictions_sha256": _sha256(predictions),
        "records": records.name,
        "records_sha256": _sha256(records),
        "score_source": next((row.score_source for row in rows if row.objects), None),
        "convention": convention,
        "options": asdict(options),
        "versions": {
            "coordexp": coordexp.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "scipy", "hotcoco")},
        },
    }
    if out is not None:
        write_results(results, out)
    return results


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, whole or not at all.

    Raises:
        ValueError: a number that JSON has no form for (NaN, infinity).
    """
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def best_readout(results: dict[str, Any]) -> str:
    """The readout with the highest class-agnostic F1 at IoU .5; the earlier of ``file``, ``argmax``, ... on a tie.

    Chosen on the very images it is reported on, so slightly optimistic.
    """
    scores = {name: results[key] for name in READOUT_ORDER if (key := f"detection.{name}.agnostic.f1.50") in results}
    defined = {name: score for name, score in scores.items() if score is not None}
    return max(defined, key=lambda name: defined[name]) if defined else FILE_READOUT


def headline(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for a person: name, and value with its 95 % interval, for the best readout. None reads ``undefined``."""
    best = best_readout(results)
    wanted = [
        (f"F1@.5 class-agnostic ({best})", f"detection.{best}.agnostic.f1.50", 3),
        (f"F1@.5:.95 class-agnostic ({best})", f"detection.{best}.agnostic.f1.mean", 3),
        (f"F1@.5 class-aware ({best})", f"detection.{best}.aware.f1.50", 3),
        (f"F1@.5:.95 class-aware ({best})", f"detection.{best}.aware.f1.mean", 3),
        (f"macro F1@.5 class-aware ({best})", f"detection.{best}.aware.macro_f1.50", 3),
        ("COCO AP, constant score", "coco.constant.ap", 3),
        ("COCO AP, scores of the file", "coco.file.ap", 3),
        (f"edge error of matched boxes, bins ({best})", f"localisation.{best}.all.mean_bins", 2),
        (f"edge error of matched boxes, pixels ({best})", f"localisation.{best}.all.mean_px", 2),
        ("answers read without a problem", "health.parse_rate", 3),
        ("duplicate boxes", "health.duplicate_rate", 3),
        ("boxes per image", "health.boxes_per_image", 2),
        ("true boxes per image", "health.true_boxes_per_image", 2),
    ]
    counts = results["counts"]
    rows = [("images", f"{counts['effective']} of {counts['original']}")]
    rows.extend((name, _format(results, key, digits)) for name, key, digits in wanted if key in results)
    return rows


def _format(results: dict[str, Any], key: str, digits: int) -> str:
    if results[key] is None:
        return "undefined"
    text = f"{results[key]:.{digits}f}"
    bounds = results.get(f"intervals.{key}")  # absent: no bootstrap, or undefined
    return text if bounds is None else f"{text} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def _score(
    samples: Sequence[Sample], rows: Sequence[Prediction], readouts: Sequence[str], codec: CoordCodec, results: dict[str, Any]
) -> dict[str, Ratio]:
    """Put every metric into ``results``; return the statistics that get an interval."""
    statistics: dict[str, Ratio] = {}
    for readout in readouts:
        for mode in ("aware", "agnostic"):
            prefix = f"detection.{readout}.{mode}"
            counts = count_matches(samples, readout, class_aware=mode == "aware")
            metrics = micro_metrics(counts) | (macro_metrics(counts) if mode == "aware" else {})
            results.update({f"{prefix}.{key}": value for key, value in metrics.items()})
            statistics.update({f"{prefix}.f1.50": _f1_ratio(counts, first_only=True), f"{prefix}.f1.mean": _f1_ratio(counts)})
    results.update({f"coco.constant.{key}": value for key, value in coco_metrics(samples, "constant").items()})
    if any(s.scores is not None for s in samples):
        results.update({f"coco.file.{key}": value for key, value in coco_metrics(samples, "file").items()})
    pairs = matched_pairs(samples)
    for readout in readouts:
        prefix = f"localisation.{readout}"
        errors = edge_errors(samples, pairs, readout, codec)
        results.update({f"{prefix}.{key}": value for key, value in localisation_metrics(errors).items()})
        statistics[f"{prefix}.all.mean_bins"] = _error_ratio(errors, np.abs(errors.bins), len(samples))
        statistics[f"{prefix}.all.mean_px"] = _error_ratio(errors, np.abs(errors.px), len(samples))
        statistics[f"{prefix}.all.signed_bias_bins"] = _error_ratio(errors, errors.bins, len(samples))
    results["localisation.matched"] = sum(len(predicted) for predicted, _ in pairs)
    results.update({f"health.{key}": value for key, value in health_metrics(rows, samples).items()})
    return statistics


def _f1_ratio(counts: MatchCounts, *, first_only: bool = False) -> Ratio:
    numerator = np.asarray(2 * (counts.tp[:, :1] if first_only else counts.tp), dtype=np.float64)
    boxes = np.asarray(counts.predicted + counts.true[:, None], dtype=np.float64)
    return Ratio(numerator, boxes[:, : numerator.shape[1]])


def _error_ratio(errors: EdgeErrors, values: FloatArray, images: int) -> Ratio:
    sums = np.asarray(np.bincount(errors.image, weights=values.sum(axis=1), minlength=images), dtype=np.float64)
    edges = np.asarray(4 * np.bincount(errors.image, minlength=images), dtype=np.float64)
    return Ratio(sums[:, None], edges[:, None])


def _ordered(rows: list[Prediction], truth: Sequence[Record], predictions: Path, records: Path) -> list[Prediction]:
    """Predictions in the order of the records.

    Raises:
        ComparisonError: the two files do not hold the same images.
    """
    by_id = {row.image_id: row for row in rows}
    known = {record.image_id for record in truth}
    unknown = [row for row in rows if row.image_id not in known]
    if unknown:
        raise ComparisonError(
            f"{predictions.name}: {len(unknown)} of {len(rows)} predictions have no record in {records.name}, first "
            f"{unknown[0].image_id!r} ({unknown[0].source}): evaluate against the records that were predicted"
        )
    missing = [record for record in truth if record.image_id not in by_id]
    if missing:
        raise ComparisonError(
            f"{records.name}: {len(missing)} of {len(truth)} records have no prediction in {predictions.name}, first "
            f"{missing[0].image_id!r} ({missing[0].source}): finish the prediction, or evaluate against the records that were predicted"
        )
    return [by_id[record.image_id] for record in truth]


def _sample(row: Prediction, record: Record, readouts: Sequence[str]) -> Sample:
    if (row.width, row.height) != (record.width, record.height):
        raise ComparisonError(
            f"{row.source}: image {row.image_id!r} is {row.width}x{row.height} in the predictions and {record.width}x{record.height} "
            f"in the records ({record.source}): predict again from these records"
        )
    scored = bool(row.objects) and row.objects[0].score is not None
    single = [(i, item) for i, item in enumerate(record.objects) if not item.crowd]
    crowd = [item for item in record.objects if item.crowd]
    boxes = {name: as_boxes([item.readouts[name] for item in row.objects]) for name in readouts}
    return Sample(
        image_id=row.image_id,
        width=row.width,
        height=row.height,
        true_labels=tuple(item.desc for _, item in single),
        true_boxes=as_boxes([_true_box(item, record, i) for i, item in single]),
        pred_labels=tuple(item.desc for item in row.objects),
        pred_boxes={FILE_READOUT: as_boxes([item.box for item in row.objects]), **boxes},
        scores=np.array([item.score for item in row.objects], dtype=np.float64) if scored else None,
        crowd_labels=tuple(item.desc for item in crowd),
        crowd_boxes=as_boxes([bounding_box(item.values) for item in crowd]),
    )


def _true_box(item: RecordObject, record: Record, index: int) -> tuple[float, float, float, float]:
    if item.geometry == "point_2d":
        raise ComparisonError(f"{record.source}: objects[{index}] is a point_2d: boxes are evaluated, give records with bbox_2d or poly")
    return bounding_box(item.values)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
