"""Every number of an evaluation, put together: which metric is computed for which readout and score mode, and what gets an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.codec import CoordCodec
from coordexp.evaluate.bootstrap import Interval, Ratio, by_photo, intervals, points
from coordexp.evaluate.buckets import bucket_metrics
from coordexp.evaluate.calibration import calibration_scores
from coordexp.evaluate.coco import ScoreMode, coco_table, lvis_metrics, tide_metrics
from coordexp.evaluate.detection import (
    MatchCounts,
    class_f1,
    count_matches,
    macro_metrics,
    macro_ratio,
    micro_metrics,
    micro_ratio,
    rex_omni_metrics,
)
from coordexp.evaluate.distributions import distributions_folder, read_distributions
from coordexp.evaluate.grounding import grounding_scores, pointing_scores
from coordexp.evaluate.health import health_numbers, health_ratios, repeats
from coordexp.evaluate.join import Joined
from coordexp.evaluate.localisation import EdgeErrors, edge_errors, localisation_metrics, matched
from coordexp.evaluate.matching import candidates, same_label
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.ranking import Ranked, ap_intervals, mean_ap, rank, rank_voc
from coordexp.evaluate.registry import AREA_KEYS, FILE_READOUT, REPORTED
from coordexp.evaluate.samples import Flat, FloatArray, IntArray


@dataclass
class Scored:
    """``metrics`` by key; ``statistics`` (rows are records) and ``ranked`` (by prefix) give the intervals; the rest is by image."""

    metrics: dict[str, float | int | None] = field(default_factory=dict)
    statistics: dict[str, Ratio] = field(default_factory=dict)
    ranked: dict[str, Ranked] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    per_class: list[dict[str, Any]] = field(default_factory=list)
    aware: MatchCounts | None = None
    agnostic: MatchCounts | None = None
    edge_bins: FloatArray | None = None
    again: IntArray | None = None
    images: Sequence[Mapping[str, Any]] = ()

    def add(self, prefix: str, metrics: Mapping[str, float | int | None], statistics: Mapping[str, Ratio]) -> None:
        """Put ``prefix.`` before every key."""
        self.metrics |= {f"{prefix}.{key}": value for key, value in metrics.items()}
        self.statistics |= {f"{prefix}.{key}": value for key, value in statistics.items()}

    def image(self, i: int) -> dict[str, Any]:
        """Counts over THRESHOLDS of image i, of the boxes as they stand, and the mean edge error of its matched ones in bins."""
        entry: dict[str, Any] = {}
        for name, counts in (("aware", self.aware), ("agnostic", self.agnostic)):
            if counts is not None:
                entry |= {f"tp_{name}": counts.tp[i].tolist(), f"counted_{name}": counts.predicted[i].tolist()}
        if self.edge_bins is not None:
            entry["edge_error_bins"] = None if np.isnan(self.edge_bins[i]) else float(self.edge_bins[i])
        if self.again is not None:
            entry["duplicates"] = int(self.again[i])
        return entry | (dict(self.images[i]) if self.images else {})


def score(joined: Joined, flat: Flat, options: EvaluateOptions, predictions: Path) -> Scored:
    """Every metric of what was joined; ``flat`` are its boxes, perhaps with other names."""
    scored = statistics(joined, flat)
    if joined.task == "detection":
        by_class = _average_precision(flat, scored)
        if flat.area is None and joined.areas:
            scored.notes.append(f"area is stated for {joined.areas} of {len(flat.true_label)} objects: sizes are those of the boxes")
        scored.per_class = _per_class(scored.aware, by_class)
    if joined.task != "pointing":
        _calibration(flat, joined.codec, predictions, scored)
    scored.add("health", health_numbers(joined.rows, flat), {})
    return scored


def statistics(joined: Joined, flat: Flat) -> Scored:
    """What costs no ranking and no file: boxes by matching, phrases, and health."""
    scored = Scored()
    objects = flat.by_image(flat.pred_image)
    if joined.task != "pointing":
        _boxes(flat, joined.readouts, joined.codec, scored)
    if joined.task == "grounding":
        referred = grounding_scores(flat, joined.readouts)
    elif joined.task == "pointing":
        referred = pointing_scores(flat, joined.polygons, joined.readouts)
    if joined.task != "detection":
        scored.add(joined.task, referred.metrics, referred.statistics)
        scored.images = referred.images
    again = None
    if joined.task != "pointing":
        again, longest = repeats(flat)
        scored.again = again
        scored.metrics["health.max_repeat"] = int(longest.max(initial=0))
    ratios = health_ratios(joined.rows, objects, again)
    scored.add("health", points(ratios), ratios)
    return scored


def _boxes(flat: Flat, readouts: Sequence[str], codec: CoordCodec, scored: Scored) -> None:
    found = candidates(flat)
    pairs = matched(flat, found)
    for readout in readouts:
        own = flat.at(readout)
        near = found if readout == FILE_READOUT else candidates(own)
        for mode in ("aware", "agnostic"):
            prefix = f"detection.{readout}.{mode}"
            counts = count_matches(own, class_aware=mode == "aware", found=near)
            ratios = {f"{name}.50": micro_ratio(counts, name, first_only=True) for name in ("f1", "precision", "recall")}
            ratios["f1.mean"] = micro_ratio(counts, "f1")
            macro = macro_ratio(counts, own) if mode == "aware" else None
            if macro is not None:
                ratios["macro_f1.50"] = macro
            by_class = macro_metrics(counts) | rex_omni_metrics(counts) if mode == "aware" else {}
            scored.add(prefix, micro_metrics(counts) | by_class, ratios)
            if readout == FILE_READOUT:
                scored.add(f"buckets.{mode}", bucket_metrics(counts, own, codec), {})
                # Kept to the end for the rows by image, which need no pairs: those are the largest part.
                kept = replace(counts, pairs=(), ignored=None)
                if mode == "aware":
                    scored.aware = kept
                else:
                    scored.agnostic = kept
        _localisation(flat, pairs, readout, codec, scored)
    scored.metrics["localisation.matched"] = len(pairs[0])


def _localisation(flat: Flat, pairs: tuple[IntArray, IntArray], readout: str, codec: CoordCodec, scored: Scored) -> None:
    errors = edge_errors(flat, pairs, readout, codec)
    ratios = {
        "all.mean_bins": edge_ratio(flat, errors, np.abs(errors.bins)),
        "all.mean_px": edge_ratio(flat, errors, np.abs(errors.px)),
        "all.signed_bias_bins": edge_ratio(flat, errors, errors.bins),
    }
    scored.add(f"localisation.{readout}", localisation_metrics(errors), ratios)
    if readout == FILE_READOUT:
        ratio = ratios["all.mean_bins"]
        scored.edge_bins = np.full(flat.images, np.nan)
        np.divide(ratio.numerator[:, 0], ratio.denominator[:, 0], out=scored.edge_bins, where=ratio.denominator[:, 0] > 0)


def edge_ratio(flat: Flat, errors: EdgeErrors, values: FloatArray) -> Ratio:
    """Mean of ``values [P, 4]`` over the edges of matched pairs, by image."""
    return Ratio(flat.by_image(errors.image, values.sum(axis=1))[:, None], 4 * flat.by_image(errors.image)[:, None], rate=False)


def _average_precision(flat: Flat, scored: Scored) -> dict[str, float | None]:
    """AP under every score mode; TIDE and AP by class under the scores of the file, else the constant one."""
    modes = score_modes(flat)
    by_class: dict[str, float | None] = {}
    # First, for it needs the most memory: the engine keeps every box of every class.
    if flat.pred_label.size and flat.true_label.size:
        scored.add(f"tide.{modes[-1]}", tide_metrics(flat, modes[-1]), {})
    for mode in modes:
        ranked = rankings(flat, mode)
        scored.ranked |= ranked
        table = coco_table(flat, mode, ranked[f"coco.{mode}"])
        by_class = table.per_class
        named = {f"box_area.{key}" if key in AREA_KEYS and flat.area is None else key: value for key, value in table.metrics.items()}
        scored.add(f"coco.{mode}", named, {})
        if flat.federated is not None:
            named = lvis_metrics(flat, mode)
            named = {f"box_area.{key}" if key in AREA_KEYS and flat.area is None else key: value for key, value in named.items()}
            scored.add(f"lvis.{mode}", named, {})
        voc = mean_ap(ranked[f"voc.{mode}"])
        scored.add(f"voc.{mode}", {key: None if np.isnan(value) else value for key, value in voc.items()}, {})
    if flat.federated is not None:
        scored.notes.append(
            "LVIS rules: the records say which categories are absent or not labelled in full; class-aware F1 follows them too"
        )
    return by_class


def score_modes(flat: Flat) -> tuple[ScoreMode, ...]:
    """The ways in which the boxes can be ranked."""
    return ("constant",) if flat.scores is None else ("constant", "file")


def rankings(flat: Flat, mode: ScoreMode) -> dict[str, Ranked]:
    """What the intervals of average precision are drawn from, by prefix of the key."""
    same, constant = same_label(flat, candidates(flat)), mode == "constant"
    made = {f"coco.{mode}": rank(flat, same, constant=constant)}
    if flat.federated is not None:
        made[f"lvis.{mode}"] = rank(flat, same, constant=constant, lvis=True)
    return made | {f"voc.{mode}": rank_voc(flat, constant=constant)}


def all_intervals(scored: Scored, photo: IntArray, options: EvaluateOptions) -> dict[str, Interval]:
    """The interval of every number that has one, by key; the photos are drawn."""
    grouped = {key: by_photo(ratio, photo) for key, ratio in scored.statistics.items()}
    found = intervals(grouped, resamples=options.bootstrap, seed=options.seed)
    for prefix, ranked in scored.ranked.items():
        drawn = ap_intervals(ranked, resamples=options.bootstrap, seed=options.seed)
        found |= {f"{prefix}.{key}": value for key, value in drawn.items()}
    return found


def _calibration(flat: Flat, codec: CoordCodec, predictions: Path, scored: Scored) -> None:
    folder = distributions_folder(predictions)
    if folder.is_dir():
        scored.add("calibration", *calibration_scores(read_distributions(folder), flat, matched(flat), codec))
    else:
        scored.notes.append(
            "coordinate calibration is left out: no distributions lie beside the predictions; "
            "coordexp predict --save-distributions keeps them"
        )


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
