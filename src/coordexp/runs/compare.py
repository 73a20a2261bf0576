"""Compare runs: every arm against the baseline, on the same photos, with intervals over photos and seeds.

Reads files only. ``comparison.json`` holds everything that the page shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from coordexp.data.staging import atomic_text
from coordexp.evaluate.bootstrap import LEVEL, Ratio, point, resampled, trials
from coordexp.evaluate.origin import origin_note
from coordexp.evaluate.paired import paired
from coordexp.evaluate.ranking import ap_draws, mean_ap, ranked_trials
from coordexp.evaluate.registry import BIN_SIZES, FILE_READOUT, HEADLINES, READOUT_NAMES, Better
from coordexp.runs.differences import Difference, Measured, difference, holm, interval_of
from coordexp.runs.groups import Comparison, Group, Run
from coordexp.runs.logs import EVAL_PREFIX, RunLog, read_log, series

SCHEMA: Final = 1
RESAMPLES: Final = 10_000

@dataclass(frozen=True)
class Metric:
    """What is compared. ``source``: ``photos`` (paired by photo) or ``log`` (one number a run: seeds only)."""

    key: str
    label: str
    unit: str
    better: Better
    source: Literal["photos", "log"] = "photos"


_SIZES: Final = (
    *(
        (f"third.{third}", f"{label} third of the objects")
        for third, label in (("small", "smallest"), ("middle", "middle"), ("large", "largest"))
    ),
    *((f"bins.{name}", f"objects of {name} bins") for name, _, _ in BIN_SIZES),
)


def _of_registry(place: str) -> Iterator[Metric]:
    """Metrics of ``results.json`` that the registry puts there, of the boxes as they stand."""
    for shown in HEADLINES:
        if shown.compared == place:
            yield Metric(shown.key.format(FILE_READOUT), shown.label, shown.metric.unit, shown.metric.better)


# None of them depends on the recipe: soft_ce, kl and loss are not among them on purpose.
HEADLINE: Final = (
    *_of_registry("headline"),
    Metric("coord_dist/crps", "CRPS, teacher-forced", "bins", "lower", "log"),
    Metric("coord_dist/nll", "NLL in the slice, teacher-forced", "nats", "lower", "log"),
)
SECONDARY: Final = (
    Metric("detection.file.agnostic.precision.50", "precision@.5 class-agnostic", "share", "higher"),
    Metric("detection.file.agnostic.recall.50", "recall@.5 class-agnostic", "share", "higher"),
    *(Metric(f"recall.{size}.50", f"recall@.5, {label}", "share", "higher") for size, label in _SIZES),
    *(Metric(f"localisation.file.{size}.mean_bins", f"edge error, {label}", "bins", "lower") for size, label in _SIZES),
    *_of_registry("secondary"),
    Metric("coord_dist/argmax_bin_mae", "argmax error, teacher-forced", "bins", "lower", "log"),
    Metric("coord_expected_bin_mae", "expectation error, teacher-forced", "bins", "lower", "log"),
    Metric("coord_dist/median_bin_mae", "median error, teacher-forced", "bins", "lower", "log"),
    Metric("coord_dist/coverage_80", "truth in the 80 % interval", "share", "neither", "log"),
    Metric("coord_dist/entropy", "entropy", "nats", "neither", "log"),
    Metric("coord_softce_w1/coord_vocab_mass", "coordinate mass", "share", "higher", "log"),
    Metric("base_ce/loss", "text cross-entropy", "nats", "lower", "log"),
    Metric("desc_token_acc", "accuracy of description tokens", "share", "higher", "log"),
)
_KEYS: Final = frozenset(metric.key for metric in (*HEADLINE, *SECONDARY))
READOUT_METRICS: Final = tuple(
    Metric(shown.key, shown.label, shown.metric.unit, shown.metric.better)
    for shown in HEADLINES
    if shown.key in ("detection.{}.agnostic.f1.50", "detection.{}.agnostic.f1.mean", "localisation.{}.all.mean_bins")
)
_SPEED: Final = ("speed/tokens_per_s", "speed/supervised_tokens_per_s", "speed/samples_per_s", "speed/loss_share")
CURVES: Final = ("coord_dist/crps", "coord_dist/nll", "coord_expected_bin_mae", "coord_softce_w1/coord_vocab_mass", "base_ce/loss")


@dataclass(frozen=True)
class Compared:
    """The content of ``comparison.json`` as ``data``, and the groups it was made of."""

    data: dict[str, Any]
    groups: tuple[Group, ...]


def compare(comparison: Comparison, *, resamples: int = RESAMPLES, seed: int = 0) -> Compared:
    """Compare every arm with the first. Metrics that the runs do not have are left out; those of some runs only are named in ``notes``.

    Raises:
        CoordexpError: files of a run that cannot be read.
    """
    groups = comparison.groups
    logs = {group.name: [read_log(run.path) for run in group.runs] for group in groups}
    measured = {group.name: _measure(group, logs[group.name], resamples, seed) for group in groups}
    baseline, notes = groups[0].name, _notes(groups)
    everywhere = set.intersection(*(set(values) for values in measured.values()))
    somewhere = set.union(*(set(values) for values in measured.values()))
    wanted = [metric for metric in (*HEADLINE, *SECONDARY) if metric.key in everywhere]
    notes += [f"{m.label} is left out: not every run has it" for m in (*HEADLINE, *SECONDARY) if m.key in somewhere - everywhere]
    headline = [metric for metric in HEADLINE if metric in wanted]
    differences = _against(groups, measured, wanted, headline)
    first = groups[0].runs[0]
    data = {
        "schema": SCHEMA,
        "name": comparison.name,
        "question": comparison.question,
        "baseline": baseline,
        "images": first.results["counts"]["effective"],
        "photos": max(value.photos for value in measured[baseline].values()),
        "resamples": resamples,
        "level": LEVEL,
        "records_sha256": first.results["provenance"]["records_sha256"],
        "headline": [metric.key for metric in headline],
        "metrics": {metric.key: asdict(metric) for metric in wanted},
        "arms": {group.name: _arm(group, measured[group.name], wanted, logs[group.name]) for group in groups},
        "differences": differences,
        "readouts": {group.name: _readouts(measured[group.name]) for group in groups},
        "cautions": list(comparison.cautions),
        "notes": notes,
    }
    return Compared(data, groups)


def write_comparison(result: Compared, out: Path) -> tuple[Path, Path]:
    """Write ``comparison.json`` and ``comparison.html`` to a folder."""
    from coordexp.runs.comparison_page import page

    out.mkdir(parents=True, exist_ok=True)
    written = out / "comparison.json", out / "comparison.html"
    for path, text in zip(
        written, (json.dumps(result.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", page(result.data)), strict=True
    ):
        with atomic_text(path) as file:
            file.write(text)
    return written


def _notes(groups: Sequence[Group]) -> list[str]:
    notes = [f"not in the comparison: {line}" for group in groups for line in group.left_out]
    if any(len(group.runs) < 2 for group in groups):
        notes.append(
            "an arm with one seed has no spread over seeds: its intervals are about photos only, and another seed may differ by more"
        )
    for group in groups:
        again = sorted({seed for seed in group.seeds if group.seeds.count(seed) > 1})
        if again:
            which = ", ".join(map(str, again))
            notes.append(f"{group.name} has several runs of seed {which}: the first is paired with the first, and so on")
    for group in groups[1:]:
        common = [run for run in groups[0].repeats if run in group.repeats]
        if not common:
            notes.append(f"{group.name} shares no seed with the baseline: its seeds are not paired")
        elif set(group.repeats) != set(groups[0].repeats):
            shared = ", ".join(str(seed) for seed, _ in common)
            notes.append(f"{group.name} is compared with the baseline on the runs that both have, of seeds {shared}")
    notes += [f"{run.path}: {origin_note('forced')}" for group in groups for run in group.runs if _forced(run)]
    commits = {str((run.manifest.get("git") or {}).get("commit")) for group in groups for run in group.runs}
    if len(commits) > 1:
        notes.append(f"the runs were made by different commits: {', '.join(sorted(commits))}")
    return notes


def _forced(run: Run) -> bool:
    return run.results["provenance"].get("records_match") == "forced"


@dataclass(frozen=True)
class _Value:
    """A metric of one run: the number, its ``draws [R]`` over the photos if it has any, and how many trials it stands for."""

    value: float
    draws: NDArray[np.float64] | None = None
    photos: int = 0
    trials: float | None = None


def _measure(group: Group, logs: Sequence[RunLog], resamples: int, seed: int) -> dict[str, Measured]:
    """Every metric that all runs of an arm have."""
    by_run = [_of_run(run, log, resamples, seed) for run, log in zip(group.runs, logs, strict=True)]
    found: dict[str, Measured] = {}
    for key in by_run[0]:
        own = [values[key] for values in by_run if key in values]
        if len(own) == len(by_run) and all(math.isfinite(one.value) for one in own):
            draws = None if own[0].draws is None else np.stack([one.draws for one in own])  # type: ignore[misc]
            of = None if own[0].trials is None else min(one.trials or 0.0 for one in own)
            found[key] = Measured(group.repeats, tuple(one.value for one in own), draws, own[0].photos, of)
    return found


def _of_run(run: Run, log: RunLog, resamples: int, seed: int) -> dict[str, _Value]:
    convention, renamed = run.results["provenance"]["convention"], run.results.get("renamed", {})
    made = paired(run.predictions, run.records, convention=convention, renamed=renamed, force=_forced(run))
    wanted = _wanted(made.ratios)
    drawn = resampled(wanted, made.photos, resamples=resamples, seed=seed)
    found = {key: _Value(point(ratio), drawn[key], made.photos, trials(ratio) if ratio.rate else None) for key, ratio in wanted.items()}
    for prefix, ranked in made.ranked.items():
        keys = {key.rpartition(".")[2] for key in _KEYS if key.startswith(f"{prefix}.")}
        if keys and ranked.photos > 1 and ranked.classes:
            values, of = mean_ap(ranked), ranked_trials(ranked)
            draws, _ = ap_draws(ranked, resamples=resamples, seed=seed)
            found |= {f"{prefix}.{key}": _Value(values[key], draws[key], ranked.photos, of) for key in keys}
    for metric in (*HEADLINE, *SECONDARY):
        if metric.source == "log":
            _, values_ = series(log.eval, EVAL_PREFIX + metric.key)
            if values_:
                found[metric.key] = _Value(values_[-1])
    return found


def _wanted(ratios: Mapping[str, Ratio]) -> dict[str, Ratio]:
    keys = _KEYS | {metric.key.format(name) for metric in READOUT_METRICS for name in (FILE_READOUT, *READOUT_NAMES)}
    return {key: ratio for key, ratio in ratios.items() if key in keys}


def _against(
    groups: Sequence[Group], measured: Mapping[str, Mapping[str, Measured]], wanted: Sequence[Metric], headline: Sequence[Metric]
) -> dict[str, dict[str, Any]]:
    """Differences from the baseline; Holm over the headline metrics of each arm."""
    first, arms = measured[groups[0].name], [group.name for group in groups[1:]]
    places = [(arm, metric) for arm in arms for metric in wanted]
    found = {place: difference(measured[place[0]][place[1].key], first[place[1].key]) for place in places}
    for arm in arms:
        family = [(arm, metric) for metric in headline]
        found |= dict(zip(family, holm([found[place] for place in family]), strict=True))
    return {arm: {metric.key: _plain(found[arm, metric], metric) for metric in wanted} for arm in arms}


def _plain(d: Difference, metric: Metric) -> dict[str, Any]:
    content = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(d).items()}
    return content | {"verdict": verdict(d, metric.better)}


def verdict(d: Difference, better: Better) -> str:
    """``better``, ``worse``, ``different`` (neither direction is better), ``not shown``, ``no interval``; headline metrics after Holm."""
    if d.interval is None:
        return "no interval"
    apart = d.shown if d.p_holm is not None else (d.interval[0] > 0 or d.interval[1] < 0)
    if not apart:
        return "not shown"
    if better == "neither":
        return "different"
    return "better" if (d.value > 0) == (better == "higher") else "worse"


def _arm(group: Group, measured: Mapping[str, Measured], wanted: Sequence[Metric], logs: Sequence[RunLog]) -> dict[str, Any]:
    metrics = {}
    for metric in wanted:
        m = measured[metric.key]
        bounds = interval_of(m)
        metrics[metric.key] = {"mean": m.mean, "by_seed": list(m.values), "interval": None if bounds is None else list(bounds)}
    return {
        "changed": list(group.changed),
        "differs": list(group.differs),
        "seeds": list(group.seeds),
        "metrics": metrics,
        "speed": _speed(group, logs),
        "curves": {key: _curve(logs, EVAL_PREFIX + key) for key in CURVES},
        "runs": [
            {
                "seed": run.seed,
                "config_sha256": run.manifest.get("config_sha256"),
                "predictions_sha256": run.results["provenance"]["predictions_sha256"],
                "git": run.manifest.get("git"),
                "versions": run.manifest.get("versions"),
                "hardware": run.manifest.get("hardware"),
            }
            for run in group.runs
        ],
    }


def _curve(logs: Sequence[RunLog], key: str) -> list[list[float]]:
    """``[step, mean over seeds]`` where every seed has a finite value."""
    by_seed = [dict(zip(*series(log.eval, key), strict=True)) for log in logs]
    steps = sorted(set.intersection(*(set(values) for values in by_seed)))
    rows = [[float(step), float(np.mean([values[step] for values in by_seed]))] for step in steps]
    return [row for row in rows if math.isfinite(row[1])]


def _speed(group: Group, logs: Sequence[RunLog]) -> dict[str, Any]:
    """Means over seeds: of the log windows after the first, of seconds by stage, and of peak memory (MiB)."""
    found: dict[str, Any] = {}
    for key in _SPEED:
        values = [value for log in logs for value in series(log.train, key)[1][1:]]
        if values:
            found[key.removeprefix("speed/")] = float(np.mean(values))
    steps = [value for log in logs if (value := _steps_per_s(log)) is not None]
    found["steps_per_s"] = float(np.mean(steps)) if len(steps) == len(logs) else None
    for kind in ("host", "device"):
        peaks = [run.manifest.get("peak_memory_mib", {}).get(kind) for run in group.runs]
        if None not in peaks:
            found[f"peak_memory_{kind}_mib"] = float(np.mean(peaks))
    if group.utilisation:
        found["device_utilisation"] = float(np.mean(list(group.utilisation.values())))
    stages = [run.manifest["stages"] for run in group.runs]
    found["stage_seconds"] = {name: float(np.mean([s[name] for s in stages])) for name in stages[0] if all(name in s for s in stages)}
    return found


def _steps_per_s(log: RunLog) -> float | None:
    """Mean over the log windows after the first: their steps, times samples a second over their samples."""
    rows = [row for row in log.train if row.get("speed/samples_per_s") and row.get("pack/num_samples")]
    found = [(row["step"] - before["step"]) * row["speed/samples_per_s"] / row["pack/num_samples"] for before, row in pairwise(rows)]
    return float(np.mean(found)) if found else None


def _readouts(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Each readout against ``argmax`` on the same answers; Holm over the readouts of a metric."""
    found: dict[str, dict[str, Any]] = {}
    for metric in READOUT_METRICS:
        names = [name for name in READOUT_NAMES if metric.key.format(name) in measured]
        if "argmax" not in names:
            continue
        base = measured[metric.key.format("argmax")]
        others = [name for name in names if name != "argmax"]
        rows: dict[str, Any] = {"argmax": {"mean": base.mean}}
        for name, d in zip(others, holm([difference(measured[metric.key.format(name)], base) for name in others]), strict=True):
            rows[name] = {"mean": measured[metric.key.format(name)].mean, "difference": _plain(d, metric)}
        found[metric.key] = {"label": metric.label, "unit": metric.unit, "better": metric.better, "rows": rows}
    return found
