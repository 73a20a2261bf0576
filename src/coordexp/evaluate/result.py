"""From two files to ``results.json``, ``per_image.jsonl`` and ``table.md``: join, compute, write."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import coordexp
from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.records import Record, read_records, write_records
from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError
from coordexp.evaluate.bootstrap import Ratio, intervals
from coordexp.evaluate.grounding import Scores, Task, find_task, grounding_scores, pointing_scores
from coordexp.evaluate.health import health_metrics, repeats
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.origin import Basis, check_origin, origin_note
from coordexp.evaluate.predictions import READOUT_NAMES, Prediction, read_predictions
from coordexp.evaluate.samples import FILE_READOUT, Sample, check_sizes, in_order, make_samples, normalise
from coordexp.evaluate.scoring import Scored, score_boxes
from coordexp.evaluate.semantic import Embed, nearest_names
from coordexp.evaluate.summary import best_readout, headline, markdown

__all__ = ["best_readout", "evaluate_files", "headline", "write_results"]

SCHEMA: Final = 1


def evaluate_files(
    predictions: Path,
    records: Path,
    options: EvaluateOptions,
    *,
    out: Path | None,
    convention: str = "norm999",
    embed: Embed | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Evaluate a predictions file against a records file; needs no image file.

    Returns the flat results: dotted metric keys, ``intervals.<key>`` for the headline numbers (absent with
    ``options.bootstrap == 0`` and where the interval is undefined), ``schema``, ``task``, and the nested ``counts``, ``per_class``,
    ``notes`` and ``provenance``. Numbers are not rounded; what is undefined is None (null). A row with an ``error`` takes
    part as an image without boxes. The task follows from the records, see :func:`coordexp.evaluate.grounding.find_task`.
    In the folder ``out`` the same is written as ``results.json``, one row an image as ``per_image.jsonl`` and tables for a
    person as ``table.md``, each atomically. ``convention`` names the bins of the localisation errors. ``force`` evaluates predictions
    of other records too, and says so (see :mod:`coordexp.evaluate.origin`).

    Raises:
        DataError: a file that cannot be read.
        ComparisonError: files that do not fit together: other records, sizes, or truth that is not boxes.
        ConfigError: an unknown convention, or semantic matching without ``embed``.
    """
    if options.match == "semantic" and embed is None:
        raise ConfigError("semantic matching needs a text model: name its folder")
    joined = join(predictions, records, convention, force=force)
    rows, truth, task, readouts, codec = joined.rows, joined.truth, joined.task, joined.readouts, joined.codec
    results: dict[str, Any] = {"schema": SCHEMA, "task": task}
    notes = [joined.reason, *filter(None, [origin_note(joined.basis)])]
    renamed = _renamed(rows, truth, options, embed)
    samples: list[Sample] = []
    scored: Scored | None = None
    if task != "pointing":
        samples = joined.samples(renamed)
        scored = score_boxes(samples, readouts, codec, options, predictions, results)
        notes += scored.notes
    referred = _referred(task, rows, truth, readouts, results)
    statistics = ({} if scored is None else scored.statistics) | ({} if referred is None else referred.statistics)
    if options.bootstrap:
        found = intervals(statistics, resamples=options.bootstrap, seed=options.seed) | ({} if scored is None else scored.intervals)
        results.update({f"intervals.{key}": list(bounds) for key, bounds in found.items() if bounds is not None})
    results.update({f"health.{key}": value for key, value in health_metrics(rows, samples).items()})
    results["counts"] = _counts(rows, truth, samples)
    if renamed:
        results["renamed"] = renamed
    results["notes"] = notes
    results["provenance"] = _provenance(predictions, records, joined, options, convention)
    if out is not None:
        write_results(results, out / "results.json")
        write_records(out / "per_image.jsonl", _per_image(rows, samples, scored, referred))
        with atomic_text(out / "table.md") as file:
            file.write(markdown(results))
    return results


@dataclass(frozen=True)
class Joined:
    """Predictions in the order of their records, and what follows from the two."""

    rows: list[Prediction]
    truth: Sequence[Record]
    task: Task
    reason: str
    readouts: list[str]
    codec: CoordCodec
    basis: Basis

    def samples(self, renamed: Mapping[str, str]) -> list[Sample]:
        """The boxes as arrays; a predicted description that is a key of ``renamed`` goes by its value."""
        return make_samples(self.rows, self.truth, self.readouts[1:], lambda desc: renamed.get(normalise(desc), normalise(desc)))


def join(predictions: Path, records: Path, convention: str, *, force: bool = False) -> Joined:
    """Read both files and pair them image by image. ``force``: predictions of other records are no error.

    Raises:
        DataError: a file that cannot be read.
        ComparisonError: files that do not fit together.
        ConfigError: an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"unknown coordinate convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    codec = CoordCodec(CONVENTIONS[convention].bins, convention)
    rows, truth = read_predictions(predictions), read_records(records, check_images=False).records
    rows = in_order(rows, truth, predictions, records)
    check_sizes(rows, truth)
    basis = check_origin(rows, {record.image_id: record for record in truth}, predictions, records, force=force)
    task, reason = find_task(rows, truth)
    # The reader has checked that every object of the file has the same readouts.
    named = next((row.objects[0].readouts for row in rows if row.objects), {})
    readouts = [FILE_READOUT, *(name for name in READOUT_NAMES if name in named)]
    return Joined(rows, truth, task, reason, readouts, codec, basis)


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, whole or not at all.

    Raises:
        ValueError: a number that JSON has no form for (NaN, infinity).
    """
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_text(path) as file:
        file.write(text)


def _renamed(rows: Sequence[Prediction], truth: Sequence[Record], options: EvaluateOptions, embed: Embed | None) -> dict[str, str]:
    if options.match == "exact" or embed is None:
        return {}
    predicted = {item.desc for row in rows for item in row.objects}
    return nearest_names(predicted, {item.desc for r in truth for item in r.objects}, embed, similarity=options.match_similarity)


def _referred(
    task: Task, rows: Sequence[Prediction], truth: Sequence[Record], readouts: Sequence[str], results: dict[str, Any]
) -> Scores | None:
    if task == "detection":
        return None
    found = pointing_scores(rows, truth, readouts) if task == "pointing" else grounding_scores(rows, truth, readouts)
    results.update({f"{task}.{key}": value for key, value in found.metrics.items()})
    named: dict[str, Ratio] = {f"{task}.{key}": value for key, value in found.statistics.items()}
    return Scores(found.metrics, named, found.images)


def _counts(rows: Sequence[Prediction], truth: Sequence[Record], samples: Sequence[Sample]) -> dict[str, int]:
    single = [item for record in truth for item in record.objects if not item.crowd]
    return {
        "original": len(truth),
        "effective": len(rows),
        "failed": sum(row.error is not None for row in rows),
        "true_boxes": len(single),
        "crowd_regions": sum(item.crowd for record in truth for item in record.objects),
        "predicted_boxes": sum(len(row.objects) for row in rows),
        "classes": len({label for s in samples for label in s.true_labels}) if samples else len({normalise(item.desc) for item in single}),
    }


def _per_image(
    rows: Sequence[Prediction], samples: Sequence[Sample], scored: Scored | None, referred: Scores | None
) -> list[dict[str, Any]]:
    found = []
    again = repeats(samples)[0].tolist()
    for i, row in enumerate(rows):
        entry: dict[str, Any] = {"image_id": row.image_id, "predicted": len(row.objects)}
        if scored is not None:
            entry |= {"true": len(samples[i].true_labels), **scored.image(i), "duplicates": again[i]}
        if referred is not None:
            entry |= referred.images[i]
        found.append(entry | {"problems": row.problems, "error": row.error})
    return found


def _provenance(predictions: Path, records: Path, joined: Joined, options: EvaluateOptions, convention: str) -> dict[str, Any]:
    # The folder of the text model is a place on this machine; its name is enough.
    chosen = asdict(options) | {"match_model": None if options.match_model is None else Path(options.match_model).name}
    return {
        "predictions": predictions.name,
        "predictions_sha256": _sha256(predictions),
        "records": records.name,
        "records_sha256": _sha256(records),
        "records_match": joined.basis,
        "score_source": next((row.score_source for row in joined.rows if row.objects), None),
        "convention": convention,
        "options": chosen,
        "versions": {
            "coordexp": coordexp.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "scipy", "hotcoco")},
        },
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
