"""One self-contained ``report.html`` from a run directory. Reads files only; needs no model and asks no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.records import Record, read_records
from coordexp.data.staging import atomic_text
from coordexp.data.yaml_text import parse_yaml
from coordexp.errors import CoordexpError, DataError
from coordexp.evaluate.distributions import SavedDistributions, distributions_folder, read_distributions
from coordexp.evaluate.predictions import Prediction, read_predictions
from coordexp.runs import charts, figures, tables
from coordexp.runs.audit import AUDIT, audit
from coordexp.runs.audit import figures as numbers
from coordexp.runs.describe import provenance_rows, setup_rows, stage_rows
from coordexp.runs.failures import name_confusion, parse_failures
from coordexp.runs.logs import RunLog, read_log
from coordexp.runs.manifest import MANIFEST, read_json_object, read_manifest
from coordexp.runs.options import ReportOptions
from coordexp.runs.pages import render_page
from coordexp.runs.pictures import MANY_OBJECTS, make_pictures

T = TypeVar("T")

MIN_IMAGES: Final = 8
PREDICTIONS: Final = "predictions.jsonl"
_GROUPS: Final = (
    ("loss", charts.LOSS_PANELS), ("distribution", charts.DISTRIBUTION_PANELS), ("coord", charts.COORD_PANELS),
    ("speed", charts.SPEED_PANELS),
)  # fmt: skip
_STATUS: Final = {
    "complete": "The run finished.",
    "running": "The run has not finished, or was killed: numbers below may be missing.",
    "failed": "The run stopped with an error: numbers below may be missing.",
    "interrupted": "The run was interrupted: numbers below may be missing.",
}


def write_report(run_dir: Path, options: ReportOptions, *, out: Path | None = None) -> Path:
    """Write the report of a run to ``out`` (default: ``report.html`` of the run directory) and return its path.

    A part that is missing or cannot be read becomes a sentence in the report. At least 8 pictures are shown
    where the test set has them.

    Raises:
        DataError: ``run_dir`` is not a directory.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: expected a run directory, found none")
    target = out or run_dir / "report.html"
    with atomic_text(target) as file:
        file.write(_render(_content(run_dir, options)))
    return target


def _render(content: Mapping[str, Any]) -> str:
    return render_page("report.html.j2", **content, numbers=numbers)


class _Parts:
    """Loads the parts of a run; what cannot be loaded becomes a line in ``problems``."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.problems: list[str] = []

    def load(self, relative: str, reader: Callable[[Path], T], default: T, missing: str | None) -> T:
        """What ``reader`` makes of the file, or ``default`` with a problem noted (``missing`` for a file not there)."""
        path = self.run_dir / relative
        if not path.exists():
            if missing:
                self.problems.append(missing)
            return default
        try:
            return reader(path)
        except CoordexpError as error:
            self.problems.append(self.shorten(str(error)))
            return default

    def attempt(self, what: str, make: Callable[[], T]) -> T | None:
        """What ``make`` returns, or None with a problem noted, once."""
        try:
            return make()
        except CoordexpError as error:
            message = self.shorten(str(error))
            if message not in self.problems:
                self.problems.append(f"{what}: {message}")
            return None

    def draw(self, what: str, *makers: Callable[[], figures.Plot | None]) -> list[figures.Plot]:
        """The figures that the run holds enough for."""
        return [plot for plot in (self.attempt(what, maker) for maker in makers) if plot is not None]

    def shorten(self, text: str) -> str:
        """A message without the folder of the run: the report may be shown elsewhere."""
        for prefix in (str(self.run_dir.resolve()), str(self.run_dir)):
            if prefix not in (".", ""):
                text = text.replace(prefix + "/", "")
        return text


def _content(run_dir: Path, options: ReportOptions) -> dict[str, Any]:
    parts = _Parts(run_dir)
    empty: dict[str, Any] = {}
    manifest = parts.load(MANIFEST, lambda p: read_manifest(p.parent), empty, "manifest.json is missing: no status, no provenance.")
    config_text = parts.load("config.yaml", _read_text, None, "config.yaml is missing.")
    config = _config(config_text, parts)
    log = parts.load("logging.jsonl", read_log, RunLog(None, [], []), None)
    results = parts.load("results.json", read_json_object, empty, None)
    metrics = tables.Metrics(results)
    status = str(manifest.get("status", "unknown"))
    decode = config.get("decode")
    content = {
        "title": options.title or manifest.get("name") or run_dir.resolve().name,
        "question": config.get("question"),
        "status": status,
        "status_text": _STATUS.get(status, "The state of the run is unknown."),
        "stage": manifest.get("stage"),
        "manifest": manifest,
        "setup": parts.attempt("set-up", lambda: setup_rows(config)) or [],
        "tiles": tables.tiles(metrics),
        "has_results": bool(results),
        "result_notes": [str(note) for note in results.get("notes") or []],
        "counts": {k: v for k, v in (results.get("counts") or {}).items() if isinstance(v, (int, float))},
        **_curves(log, parts, metrics),
        "tables": tables.metric_tables(metrics, decode.get("readout") if isinstance(decode, dict) else None),
        "readouts": tables.readout_table(metrics),
        "error_plots": [plot for plot in (figures.size_plot(metrics), figures.edge_plot(metrics)) if plot],
        "every_metric": tables.every_metric(metrics),
        **_answers(parts, max(options.images, MIN_IMAGES), manifest),
        "many_objects": MANY_OBJECTS,
        "config": config_text,
        "provenance": provenance_rows(manifest, results, log),
        "stages": stage_rows(manifest),
        "audit": _audit(parts),
    }
    notes = [*map(str, manifest.get("notes", [])), *log.notes, *parts.problems]
    return {**content, "notes": list(dict.fromkeys(notes)), "missing": _missing(content)}


def _curves(log: RunLog, parts: _Parts, metrics: tables.Metrics) -> dict[str, Any]:
    """Everything that is drawn from the log and the histograms beside it."""
    drawn = _charts(log, parts)
    dropped = sum(chart.dropped for group in drawn.values() for chart in group["charts"])
    if dropped:
        said = "1 value that is not finite is a gap" if dropped == 1 else f"{dropped} values that are not finite are gaps"
        parts.problems.append(f"logging.jsonl: {said} in the charts.")
    none: list[dict[str, Any]] = []
    rows = parts.load("histograms.jsonl", figures.read_histograms, none, None)
    return {
        "charts": drawn,
        "loss_plots": parts.draw("logging.jsonl", lambda: figures.loss_plot(log), lambda: figures.ratio_plot(log)),
        "calibration_plots": parts.draw(
            "logging.jsonl",
            lambda: figures.pit_plot(rows, metrics),
            lambda: figures.coverage_plot(log, metrics),
            lambda: figures.error_curve(rows),
        ),
        "has_histograms": bool(rows),
        "has_calibration": metrics.value("calibration.all.n") is not None,
    }


def _answers(parts: _Parts, count: int, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures, failures of the parser and confused names, from the test records and their predictions."""
    unpredicted: dict[str, Prediction] = {}
    none: list[Record] = []
    predictions = parts.load(PREDICTIONS, _predictions, unpredicted, f"{PREDICTIONS} is missing: no predicted boxes are shown.")
    records = parts.load("data/test.jsonl", _records, none, None)
    folder = distributions_folder(Path(PREDICTIONS)).name
    saved: dict[str, SavedDistributions] = {}
    saved = parts.load(folder, lambda p: _distributions(p, {r.image_id for r in records[:count]}), saved, None)
    convention = str(manifest.get("convention", "norm999"))
    codec = CoordCodec(CONVENTIONS[convention].bins, convention) if convention in CONVENTIONS else None
    other = {item.num_bins for item in saved.values()} - {codec.num_bins if codec else None}
    if other:
        parts.problems.append(f"{folder}: distributions over {max(other)} bins do not fit the convention {convention}: not drawn.")
    pictures, unopened = make_pictures(records[:count], predictions, {} if other else saved, codec)
    if pictures:
        parts.problems += [f"picture left out: {parts.shorten(line)}" for line in unopened]
    return {
        "pictures": pictures,
        "has_saved": bool(saved),
        "has_curves": any(picture.curves for picture in pictures),
        "pictures_missing": _no_pictures(records, unopened),
        "has_predictions": bool(predictions),
        "failures": parse_failures(records, predictions),
        "confusion": parts.attempt("names", lambda: name_confusion(records, predictions)),
    }


def _missing(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the report does not show, and why: anchor of the section and the sentence."""
    checks = (
        (content["has_results"], "headline", "headline numbers and metrics: the run has no results.json"),
        (content["audit"], "audit", "audit findings: there is no log to audit"),
        (content["pictures"], "pictures", "pictures: no readable test records or image files"),
        (content["has_predictions"], "answers", "predicted boxes and failures: the run has no predictions.jsonl"),
        (content["has_saved"], "pictures", "distributions at the edges: none were saved (decode.save_distributions)"),
        (content["loss_plots"] or content["charts"]["loss"]["charts"], "loss", "loss curves: the run has no log with loss terms"),
        (content["has_histograms"], "calibration", "PIT of the evaluation data: the run has no histograms.jsonl"),
        (content["has_calibration"], "calibration", "calibration of predicted boxes: the results have none"),
        (content["charts"]["speed"]["charts"], "speed", "speed: the log does not tell"),
        (content["config"], "provenance", "configuration: the run has no config.yaml"),
    )
    return [(anchor, text) for there, anchor, text in checks if not there]


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error


def _config(text: str | None, parts: _Parts) -> dict[str, Any]:
    try:
        content = parse_yaml(text) if text else {}
    except ValueError as error:
        parts.problems.append(f"config.yaml: not valid YAML: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def _records(path: Path) -> list[Record]:
    return list(read_records(path, on_invalid="skip", check_images=False).records)


def _predictions(path: Path) -> dict[str, Prediction]:
    return {row.image_id: row for row in read_predictions(path)}


def _distributions(folder: Path, wanted: set[str]) -> dict[str, SavedDistributions]:
    return {item.image_id: item for item in read_distributions(folder) if item.image_id in wanted}


def _no_pictures(records: list[Record], unopened: list[str]) -> str:
    if not records:
        return "The run directory has no readable test records (data/test.jsonl), so no pictures are shown."
    sentence = "The image files of the test records are not there or cannot be opened, so no pictures are shown."
    return f"{sentence} The first: {unopened[0]}" if unopened else sentence


def _charts(log: RunLog, parts: _Parts) -> dict[str, dict[str, Any]]:
    drawn: dict[str, dict[str, Any]] = {}
    for name, panels in _GROUPS:
        try:
            made, absent = charts.draw_panels(log, panels)
        except DataError as error:
            parts.problems.append(f"logging.jsonl: {error}")
            made, absent = [], list(panels)
        drawn[name] = {
            "charts": made,
            "absent": ", ".join(panel.title for panel in absent),
            "has_eval": any(chart.last_eval is not None for chart in made),
            "has_train": any(chart.last_train is not None for chart in made),
        }
    return drawn


def _audit(parts: _Parts) -> dict[str, Any] | None:
    """The rules applied to the log as it stands, never an ``audit.json`` that may be older; None without a log."""
    if not (parts.run_dir / "logging.jsonl").exists():
        return None
    found = parts.attempt("audit", lambda: audit(parts.run_dir))
    if found is None:
        return None
    written = parts.load(AUDIT, read_json_object, None, None)
    if written is not None and written != json.loads(found.text()):
        parts.problems.append(
            f"{AUDIT} differs from the audit of the log as it stands, so it is older, or another version's: the report shows a new audit"
        )
    return {"found": found.of("finding"), "passed": found.of("passed"), "not_applicable": found.of("not_applicable"), "all": found.judged}
