"""From two files to ``results.json``, ``per_image.jsonl`` and ``table.md``: join, compute, write."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

import coordexp
from coordexp.data.records import write_records
from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError
from coordexp.evaluate.join import Joined, join
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.origin import origin_note
from coordexp.evaluate.predictions import Prediction
from coordexp.evaluate.samples import Flat
from coordexp.evaluate.scoring import Scored, all_intervals, score
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
    part as an image without boxes. The task follows from the records, see :func:`coordexp.evaluate.grounding.TaskFinder`.
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
    rows, flat = joined.rows, joined.flat
    renamed = _renamed(flat, options, embed)
    scored = score(joined, joined.renamed(renamed), options, predictions)
    results: dict[str, Any] = {"schema": SCHEMA, "task": joined.task, **scored.metrics}
    notes = [joined.reason, *filter(None, [origin_note(joined.basis)]), *scored.notes]
    if options.bootstrap:
        found = all_intervals(scored, flat.photo, options)
        results |= {f"intervals.{key}": list(value.bounds) for key, value in found.items() if value.bounds is not None}
        results["interval_notes"] = {key: value.note for key, value in found.items() if value.note is not None}
        none = [key for key, value in found.items() if value.bounds is None]
        if none:
            notes.append(f"{len(none)} of {len(found)} numbers have no interval, first {none[0]}: interval_notes in results.json says why")
    results["counts"] = _counts(joined)
    results["per_class"] = scored.per_class
    if renamed:
        results["renamed"] = renamed
    results["notes"] = notes
    results["provenance"] = _provenance(predictions, records, joined, options, convention)
    if out is not None:
        write_results(results, out / "results.json")
        write_records(out / "per_image.jsonl", _per_image(rows, flat, scored))
        with atomic_text(out / "table.md") as file:
            file.write(markdown(results))
    return results


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, whole or not at all.

    Raises:
        ValueError: a number that JSON has no form for (NaN, infinity).
    """
    text = json.dumps(results, ensure_ascii=False, allow_nan=False)
    with atomic_text(path) as file:
        # Lines for people; json's own indent is ten times as slow, which thousands of classes feel.
        file.write(msgspec.json.format(text, indent=1) + "\n")


def _renamed(flat: Flat, options: EvaluateOptions, embed: Embed | None) -> dict[str, str]:
    if options.match == "exact" or embed is None:
        return {}
    predicted, true = ({flat.labels[k] for k in np.unique(of).tolist()} for of in (flat.pred_label, flat.true_label))
    return nearest_names(predicted, true, embed, similarity=options.match_similarity)


def _counts(joined: Joined) -> dict[str, int]:
    """An image is a record: ``photos`` says how many pictures they show."""
    flat = joined.flat
    return {
        "original": flat.images,
        "effective": len(joined.rows),
        "photos": int(flat.photo.max(initial=-1)) + 1,
        "failed": sum(row.error is not None for row in joined.rows),
        "true_boxes": len(flat.true_image),
        "crowd_regions": int((~flat.difficult).sum()),
        "difficult": int(flat.difficult.sum()),
        "predicted_boxes": len(flat.pred_image),
        "classes": len(np.unique(flat.true_label)),
    }


def _per_image(rows: Sequence[Prediction], flat: Flat, scored: Scored) -> Iterator[dict[str, Any]]:
    counted = zip(rows, flat.photo.tolist(), flat.by_image(flat.pred_image), flat.by_image(flat.true_image), strict=True)
    for i, (row, photo, predicted, true) in enumerate(counted):
        entry = {"image_id": row.image_id, "photo": photo, "predicted": int(predicted), "true": int(true), **scored.image(i)}
        yield entry | {"problems": row.problems, "error": row.error}


def _provenance(predictions: Path, records: Path, joined: Joined, options: EvaluateOptions, convention: str) -> dict[str, Any]:
    # The folder of the text model is a place on this machine; its name is enough.
    chosen = asdict(options) | {"match_model": None if options.match_model is None else Path(options.match_model).name}
    return {
        "predictions": predictions.name,
        "predictions_sha256": _sha256(predictions),
        "records": records.name,
        "records_sha256": _sha256(records),
        "records_match": joined.basis,
        "score_source": joined.score_source,
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
