"""Every number about boxes, put together: which metric is computed for which readout and score mode, and what gets an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.codec import CoordCodec
from coordexp.evaluate.bootstrap import Ratio
from coordexp.evaluate.buckets import bucket_metrics
from coordexp.evaluate.calibration import calibration_metrics
from coordexp.evaluate.coco import ScoreMode, coco_table, lvis_metrics, tide_metrics
from coordexp.evaluate.detection import (
    REPORTED,
    MatchCounts,
    class_f1,
    count_matches,
    ignorable,
    macro_metrics,
    macro_ratio,
    micro_metrics,
    micro_ratio,
)
from coordexp.evaluate.distributions import distributions_folder, read_distributions
from coordexp.evaluate.localisation import EdgeErrors, edge_errors, localisation_metrics, matched_pairs
from coordexp.evaluate.matching import Candidates, candidates
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.ranking import ap_intervals, rank
from coordexp.evaluate.samples import FILE_READOUT, Flat, FloatArray, IntArray, Sample, flatten


@dataclass
class Scored:
    """What goes beyond the metrics: ``statistics`` for the bootstrap, finished ``intervals``, ``notes``, counts by image."""

    statistics: dict[str, Ratio] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    aware: MatchCounts | None = None
    agnostic: MatchCounts | None = None
    edge_bins: FloatArray | None = None

    def image(self, i: int) -> dict[str, Any]:
        """Counts over THRESHOLDS of image i, of the boxes as they stand, and the mean edge error of its matched ones in bins."""
        entry: dict[str, Any] = {}
        for name, counts in (("aware", self.aware), ("agnostic", self.agnostic)):
            if counts is not None:
                entry |= {f"tp_{name}": counts.tp[i].tolist(), f"counted_{name}": counts.predicted[i].tolist()}
        if self.edge_bins is not None:
            entry["edge_error_bins"] = None if np.isnan(self.edge_bins[i]) else float(self.edge_bins[i])
        return entry


def score_boxes(
    samples: Sequence[Sample],
    readouts: Sequence[str],
    codec: CoordCodec,
    options: EvaluateOptions,
    predictions: Path,
    results: dict[str, Any],
) -> Scored:
    """Put every metric about boxes into ``results``."""
    scored = Scored()
    for readout in readouts:
        _detection(samples, readout, codec, results, scored)
    flat = flatten(samples, FILE_READOUT)
    found = candidates(flat)
    same = found.where(flat.pred_label[found.pred] == flat.true_label[found.true])
    by_class = _average_precision(samples, flat, same, options, results, scored)
    pairs = matched_pairs(samples)
    for readout in readouts:
        _localisation(samples, pairs, readout, codec, results, scored)
    results["localisation.matched"] = sum(len(predicted) for predicted, _ in pairs)
    folder = distributions_folder(predictions)
    if folder.is_dir():
        measured = calibration_metrics(read_distributions(folder), samples, pairs, codec)
        results.update({f"calibration.{key}": value for key, value in measured.items()})
    else:
        scored.notes.append(
            "coordinate calibration is left out: no distributions lie beside the predictions; "
            "coordexp predict --save-distributions keeps them"
        )
    results["per_class"] = _per_class(scored.aware, by_class)
    return scored


def _detection(samples: Sequence[Sample], readout: str, codec: CoordCodec, results: dict[str, Any], scored: Scored) -> None:
    flat = flatten(samples, readout)
    found = candidates(flat)
    for mode in ("aware", "agnostic"):
        prefix = f"detection.{readout}.{mode}"
        counts = count_matches(samples, readout, class_aware=mode == "aware", flat=flat, found=found)
        metrics = micro_metrics(counts) | (macro_metrics(counts) if mode == "aware" else {})
        results.update({f"{prefix}.{key}": value for key, value in metrics.items()})
        scored.statistics[f"{prefix}.f1.50"] = micro_ratio(counts, "f1", first_only=True)
        scored.statistics[f"{prefix}.f1.mean"] = micro_ratio(counts, "f1")
        scored.statistics[f"{prefix}.precision.50"] = micro_ratio(counts, "precision", first_only=True)
        scored.statistics[f"{prefix}.recall.50"] = micro_ratio(counts, "recall", first_only=True)
        macro = macro_ratio(counts, flat) if mode == "aware" else None
        if macro is not None:
            scored.statistics[f"{prefix}.macro_f1.50"] = macro
        if readout == FILE_READOUT:
            buckets = bucket_metrics(counts, flat, samples, codec)
            results.update({f"buckets.{mode}.{key}": value for key, value in buckets.items()})
            if mode == "aware":
                scored.aware = counts
            else:
                scored.agnostic = counts


def _average_precision(
    samples: Sequence[Sample], flat: Flat, same: Candidates, options: EvaluateOptions, results: dict[str, Any], scored: Scored
) -> dict[str, float | None]:
    """AP under every score mode; TIDE and AP by class under the scores of the file, else the constant one."""
    has_scores = any(s.scores is not None for s in samples)
    modes: tuple[ScoreMode, ...] = ("constant", "file") if has_scores else ("constant",)
    by_class: dict[str, float | None] = {}
    federated = any(s.federated is not None for s in samples)
    for mode in modes:
        table = coco_table(samples, mode)
        results.update({f"coco.{mode}.{key}": value for key, value in table.metrics.items()})
        points = {"coco": table.metrics}
        if federated:
            points["lvis"] = lvis_metrics(samples, mode)
            results.update({f"lvis.{mode}.{key}": value for key, value in points["lvis"].items()})
        by_class = table.per_class
        if mode == modes[-1] and flat.pred_label.size and flat.true_label.size:
            results.update({f"tide.{mode}.{key}": value for key, value in tide_metrics(table).items()})
        for kind, metrics in points.items() if options.bootstrap else ():
            ignored = ignorable(samples, FILE_READOUT, class_aware=True, federated=kind == "lvis")
            ranked = rank(samples, flat, same, ignored, constant=mode == "constant", lvis=kind == "lvis")
            bounds = ap_intervals(ranked, len(samples), metrics, resamples=options.bootstrap, seed=options.seed)
            scored.intervals.update({f"{kind}.{mode}.{key}": value for key, value in bounds.items()})
    if federated:
        scored.notes.append(
            "LVIS rules: the records say which categories are absent or not labelled in full; class-aware F1 follows them too"
        )
    return by_class


def _localisation(
    samples: Sequence[Sample],
    pairs: Sequence[tuple[IntArray, IntArray]],
    readout: str,
    codec: CoordCodec,
    results: dict[str, Any],
    scored: Scored,
) -> None:
    prefix = f"localisation.{readout}"
    errors = edge_errors(samples, pairs, readout, codec)
    results.update({f"{prefix}.{key}": value for key, value in localisation_metrics(errors).items()})
    scored.statistics[f"{prefix}.all.mean_bins"] = _error_ratio(errors, np.abs(errors.bins), len(samples))
    scored.statistics[f"{prefix}.all.mean_px"] = _error_ratio(errors, np.abs(errors.px), len(samples))
    scored.statistics[f"{prefix}.all.signed_bias_bins"] = _error_ratio(errors, errors.bins, len(samples))
    if readout == FILE_READOUT:
        ratio = scored.statistics[f"{prefix}.all.mean_bins"]
        mean = np.full(len(samples), np.nan)
        np.divide(ratio.numerator[:, 0], ratio.denominator[:, 0], out=mean, where=ratio.denominator[:, 0] > 0)
        scored.edge_bins = mean


def _error_ratio(errors: EdgeErrors, values: FloatArray, images: int) -> Ratio:
    sums = np.asarray(np.bincount(errors.image, weights=values.sum(axis=1), minlength=images), dtype=np.float64)
    edges = np.asarray(4 * np.bincount(errors.image, minlength=images), dtype=np.float64)
    return Ratio(sums[:, None], edges[:, None])


def _per_class(counts: MatchCounts | None, ap: dict[str, float | None]) -> list[dict[str, Any]]:
    """Every class of the ground truth, the most frequent first, of the boxes as they stand."""
    if counts is None:
        return []
    f1 = class_f1(counts)
    rows = []
    for label, n in sorted(counts.class_true.items(), key=lambda item: (-item[1], item[0])):
        predicted = counts.class_predicted.get(label)
        row: dict[str, Any] = {"desc": label, "true": n, "predicted": 0 if predicted is None else int(predicted[0])}
        row |= {f"f1.{key}": float(f1[label][index]) for key, index in REPORTED.items()} | {"f1.mean": float(f1[label].mean())}
        rows.append(row | {"recall.50": float(counts.class_tp[label][0] / n), "ap": ap[label]})
    return rows
